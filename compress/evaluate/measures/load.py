"""How often the heads that tokens choose from are chosen: a router that collapses wastes the heads that it forgets.

A layer is even where every routed unit is chosen by K of E tokens, K being how many of the E units each token uses. The
same is told of MLPs that tokens choose from, and of experts whose attentions or MLPs are mixed the mean of their gates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import MOST_TOKENS
from compress.evaluate.cell import Cell, heads_words
from compress.evaluate.measure import Inputs, Job, Result, Setting, Step, Subject
from compress.evaluate.text_measure import WindowsMeasure
from compress.files import text_key
from compress.limits import LONGEST
from compress.models.placement import input_device
from compress.plan import ModelShape
from compress.registry import measures
from compress.runtime.step import Record, Routing

TITLE = "how evenly tokens choose"
COLLAPSED = 0.1  # share of an even choice below which a unit is as good as removed
NAMED = 8  # collapsed units that are named one by one


class UnitLoad(BaseModel):
    """One unit that tokens choose.

    Attributes:
        heads: the query heads of its layer that it is, among those that stay; none of an MLP.
        chosen: tokens that chose it.
        probability: the router's softmax for it, the mean over tokens.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    heads: tuple[int, ...]
    chosen: int = Field(ge=0)
    probability: float = Field(ge=0)


class LayerLoad(BaseModel):
    """The units of one layer: its heads, or its MLPs.

    Attributes:
        active: units that each token uses.
        shared: query heads of each unit that is always on.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    layer: int = Field(ge=0)
    active: int = Field(ge=0)
    units: list[UnitLoad]
    shared: list[tuple[int, ...]] = []

    def loads(self, tokens: int) -> list[float]:
        """Of each unit, the tokens that chose it over those that an even choice gives it."""
        even = tokens * self.active / len(self.units) if self.units else 1.0
        return [unit.chosen / even for unit in self.units]

    def names(self) -> list[str]:
        """Of each unit."""
        return [heads_words(unit.heads) if unit.heads else f"MLP {n}" for n, unit in enumerate(self.units)]


class LoadResult(Result):
    """What tokens of a text chose; without layers for a model that routes nothing.

    Attributes:
        tokens: how many chose.
        layers: with routed heads.
        mlps: with several MLPs that tokens choose from.
        gates: by layer with experts whose attentions are mixed, the mean gate of each.
        mlp_gates: likewise of MLPs that are mixed.
    """

    measure: Literal["load"] = "load"
    length: int = Field(ge=1, le=MOST_TOKENS)
    windows: int = Field(ge=1)
    tokens: int = Field(default=0, ge=0)
    layers: list[LayerLoad] = Field(default_factory=list)
    mlps: list[LayerLoad] = Field(default_factory=list)
    gates: dict[int, list[float]] = Field(default_factory=dict)
    mlp_gates: dict[int, list[float]] = Field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """The coefficient of variation of the load, of all units and by layer; collapsed units; and each unit."""
        cells = [*self._variations("load", self.layers), *self._variations("load of MLPs", self.mlps)]
        if cells:
            cells.insert(0, self._cell("collapsed units", "units", float(len(self._collapsed())), table=TITLE))
        for layer in self.layers:
            for heads, share, probability in _rows(layer, self.tokens):
                about: dict[str, Any] = {"place": (layer.layer, None), "heads": heads}
                cells.append(self._cell("load", "load", share, **about))
                if probability is not None:
                    cells.append(self._cell("mean probability", "load", probability, **about))
        for layer in self.mlps:
            for name, unit in zip(layer.names(), layer.units, strict=True):
                share, place = unit.chosen / self.tokens, (layer.layer, None)
                cells.append(self._cell(f"load of {name}", "load", share, place=place))
        for what, gates in (("expert", self.gates), ("MLP", self.mlp_gates)):
            for number, means in gates.items():
                for which, mean in enumerate(means):
                    cells.append(self._cell(f"gate of {what} {which}", "load", mean, place=(number, None)))
        return cells

    def _variations(self, what: str, layers: Sequence[LayerLoad]) -> list[Cell]:
        """The coefficient of variation of all units together, of the least even layer, and of every layer, with the
        shares of the tokens of its least and its most used unit."""
        loads = {layer.layer: layer.loads(self.tokens) for layer in layers if layer.units}
        if not loads:
            return []
        each = {layer: _variation(row) for layer, row in loads.items()}
        together = _variation([load for row in loads.values() for load in row])
        label = f"variation of {what}"
        cells = [
            self._cell(label, "variation", together, table=TITLE),
            self._cell(f"{label}, worst layer", "variation", max(each.values()), table=TITLE),
        ]
        for layer in (layer for layer in layers if layer.units):
            place, shares = (layer.layer, None), [unit.chosen / self.tokens for unit in layer.units]
            cells.append(self._cell(label, "variation", each[layer.layer], place=place))
            cells.append(self._cell(f"least {what}", "load", min(shares), place=place))
            cells.append(self._cell(f"largest {what}", "load", max(shares), place=place))
        return cells

    def _cell(self, label: str, unit: str, value: float, **about: Any) -> Cell:
        return Cell(label, unit, value, "lower", length=self.length, note=self.words(), **about)

    def _collapsed(self) -> list[str]:
        """The units that hardly a token chooses, in words."""
        return [
            f"layer {layer.layer} {name} ({unit.chosen / self.tokens:.2%} of the tokens)"
            for layer in (*self.layers, *self.mlps)
            for name, unit, load in zip(layer.names(), layer.units, layer.loads(self.tokens), strict=True)
            if load < COLLAPSED
        ]

    def words(self) -> str:
        """What the numbers are, and the text."""
        return (
            f"load: share of {self.tokens:,} tokens that choose a unit; its variation is the standard deviation over "
            f"the mean; collapsed: below {COLLAPSED:g} of an even share"
        )

    def notes(self) -> str:
        """The collapsed units by name."""
        names = self._collapsed()
        if not (self.layers or self.mlps):  # gates collapse nowhere
            return ""
        if not names:
            return "no unit has collapsed"
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"collapsed: {', '.join(names[:NAMED])}{more}"


def _rows(layer: LayerLoad, tokens: int) -> list[tuple[tuple[int, ...], float, float | None]]:
    """Heads, share of the tokens and mean probability of every unit; one that is always on has no probability."""
    routed = [(unit.heads, unit.chosen / tokens, unit.probability) for unit in layer.units]
    return sorted([*routed, *((heads, 1.0, None) for heads in layer.shared)], key=lambda row: row[0])


def _variation(loads: Sequence[float]) -> float:
    """The coefficient of variation: the standard deviation of some loads over their mean."""
    mean = math.fsum(loads) / len(loads)
    return math.sqrt(math.fsum((load - mean) ** 2 for load in loads) / len(loads)) / mean


@measures.register("load")
class Load(WindowsMeasure):
    """How evenly tokens choose among routed heads: load of each, and its variation by layer and in all."""

    result: ClassVar[type[Result]] = LoadResult
    one_tokenizer: ClassVar[bool] = True

    length: int = Field(ge=1, le=LONGEST, description="tokens in a window of text")

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """A pass a window, through models that may route."""
        return [Inputs(self.length, self.windows, by_dense=False)]

    def passes(self) -> str:
        return f"load: {self.windows} forward"

    def jobs(self, setting: Setting) -> list[Job]:
        ids = self.read(setting)
        facts = ["load", self.model_dump(mode="json"), text_key(str(ids))]
        return [Job("load", facts, self.windows, partial(self._measured, ids))]

    @torch.inference_mode()
    def _measured(self, ids: Sequence[int], subject: Subject, step: Step) -> Result:
        model = subject.model
        result = LoadResult(length=self.length, windows=self.windows)
        if not hasattr(model.config, "compress_plan"):
            return result
        device = input_device(model)
        heads: dict[int, _Sums] = {}
        mlps: dict[int, _Sums] = {}
        gates: dict[int, torch.Tensor] = {}
        for number in range(self.windows):
            window = torch.tensor([list(ids[number * self.length : (number + 1) * self.length])], device=device)
            record = Record()
            model.get_decoder()(input_ids=window, use_cache=False, compress_record=record)
            for sums, found in ((heads, record.routing), (mlps, record.mlp_routing)):
                for layer, routing in found.items():
                    sums.setdefault(layer, _Sums()).add(routing)
            for layer, found_gates in record.expert_gates.items():
                gates[layer] = gates.get(layer, 0) + found_gates.double().sum(0).cpu()
            if not (heads or mlps or gates):  # nothing is chosen or mixed
                return result
            step(number + 1, self.windows)
        of_heads, of_mlps = ([sums[layer].load(layer) for layer in sorted(sums)] for sums in (heads, mlps))
        told = {
            "layers": of_heads,
            "mlps": [layer for layer in of_mlps if layer.active < len(layer.units)],
            "gates": {layer: (gates[layer] / self.tokens).tolist() for layer in sorted(gates)},
            "mlp_gates": {
                layer.layer: [unit.probability for unit in layer.units]
                for layer in of_mlps
                if layer.active == len(layer.units)
            },
        }
        return result.model_copy(update={"tokens": self.tokens, **told})


class _Sums:
    """What the tokens of one layer chose so far.

    Attributes:
        chosen, probability: `[E]` float64, sums over the tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.chosen = self.probability = torch.zeros(())

    def add(self, routing: Routing) -> None:
        """Add the tokens of a pass."""
        self.tokens += routing.chosen.shape[0]
        self.chosen = self.chosen + routing.chosen.double().sum(0).cpu()
        self.probability = self.probability + routing.probs.double().sum(0).cpu()
        self.units, self.shared = routing.units, routing.shared

    def load(self, layer: int) -> LayerLoad:
        """The layer's part of the result."""
        counts, means = self.chosen.long().tolist(), (self.probability / self.tokens).tolist()
        return LayerLoad(
            layer=layer,
            active=sum(counts) // self.tokens,
            units=[
                UnitLoad(heads=heads, chosen=count, probability=mean)
                for heads, count, mean in zip(self.units, counts, means, strict=True)
            ],
            shared=list(self.shared),
        )
