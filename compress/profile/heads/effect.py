"""What any target costs a head group, to first order: slope . (O_target - O_full).

With s = dLoss/dO, the gradient at a query head's attention output in one row, replacing the output O_full of full
attention by that of a target changes the loss by s . (O_target - O_full), to first order. Both outputs are exact: they
come from the runtime's own mixers. Summed over the rows and the query heads of a group this is `effect.signed`, the
derivative of the loss where O_full moves towards O_target; `effect.absolute` sums the sizes, as attention influence
does, since rows that gain do not make up for rows that lose at other inputs. For a window it is what
`influence.joint` is; a removed group has O_target = 0. So windows, removal and any target that the runtime has are
priced in the same unit, and may be weighed against each other. A target that has to be trained first is priced with the
tensors that were prepared for the model, after the preparation.

An option of a whole layer (`targets/layer_option.py`), such as routed heads, is priced by the same formula with all
head groups of the layer replaced together: O_target are the layer's outputs with the decisions that its router makes on
the very queries and inputs of the pass. Each group has its part; what the option costs is their sum over the layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import torch
from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from compress import registry
from compress.errors import UserError, one_of
from compress.limits import ENTRIES
from compress.models.outputs import Alternatives, check_priced, facts_of, reads_inputs
from compress.models.prepared import Prepared, found_for, placed_for, prepared_for
from compress.profile.heads.base import HeadStatistic, Table
from compress.profile.key import Key
from compress.profile.passes.tiles import LayerTensors
from compress.profile.statistic import Item, Result, Results, Subject, Sums
from compress.profile.worth import Assignment, entries_of
from compress.registry import is_echo, layer_options, statistics, targets
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target
from compress.targets.unit import Unit

if TYPE_CHECKING:
    from compress.plan import ModelShape


MOST = 1024  # targets at once: each is a pass over the attention of every sample
WHERE, WHERE_LAYERS = "profile.statistics.effect.targets", "profile.statistics.effect.layers"


@statistics.register("effect")
class Effect(HeadStatistic):
    """Loss that each of some targets costs each head group, to first order (needs a backward pass)."""

    targets: tuple[Annotated[Target, registry.targets], ...] = Field(
        (),
        max_length=ENTRIES,
        description="the targets, as a plan has them, for instance `{target: window, sink: 64, alpha: 256, beta: 0}` "
        "or `{target: pruned}`",
    )
    options: dict[str, dict[str, Any] | None] = Field(
        {},
        description="besides them all options of a target, by its name, with the fields of its grid or null for its "
        "defaults, for instance `{window: {sinks: [64], betas: [0], alpha_max: 1024}}`",
    )
    layers: tuple[Annotated[LayerOption, registry.layer_options], ...] = Field(
        (),
        max_length=ENTRIES,
        description="what all head groups of a layer may become together, for instance `{option: routed, shared: 1, "
        "active: 1}`; `options` has those of a grid, for instance `{routed: {active: [0.5, 0.75]}}`",
    )

    needs_gradient: ClassVar[bool] = True
    tiled: ClassVar[bool] = False
    unit: ClassVar[str] = "change of the mean answer cross-entropy, nats"
    gives: ClassVar[Mapping[str, str]] = {"effect.absolute": "targets", "effect.signed": "targets"}

    _prepared: Prepared = PrivateAttr(())
    _entries: list[Assignment] = PrivateAttr([])

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if not self.targets and not self.options and not self.layers:
            raise ValueError("expected one or more `targets`, `options` or `layers`")
        for name, grid in self.options.items():
            if name not in targets:
                raise ValueError(f"options: unknown target {name!r}, expected {one_of(targets, name)}")
            _grid(name, grid)
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without an empty `layers`, so that profiles from before there were any keep their keys."""
        written: dict[str, Any] = write(self)
        if not self.layers:
            written.pop("layers")
        return written

    @property
    def follows(self) -> tuple[str, ...]:
        """See `Statistic.follows`: what says which heads of a layer are always on."""
        read = [option.ranked_by for option in self.layers if option.ranked_by is not None]
        for name, grid in self.options.items():
            read += layer_options[name].ranks(_grid(name, grid)) if _of_layers(name) else ()
        return tuple(dict.fromkeys(read))

    @property
    def priced(self) -> tuple[Target, ...]:
        return self.targets

    @property
    def priced_layers(self) -> tuple[LayerOption, ...]:
        return self.layers

    def scores_read(self) -> dict[str, str]:
        """What it ranks heads by."""
        return dict.fromkeys(self.follows, "worth")

    def alternatives(self, shape: ModelShape, lengths: Sequence[int]) -> int:
        """All targets that it prices; see `Statistic.alternatives`."""
        resolved = self.resolved(shape, lengths)
        return len(resolved.priced) + len(resolved.priced_layers)

    def resolved(self, shape: ModelShape, lengths: Sequence[int]) -> Self:
        """With the options as targets, those of a layer that does not slide by itself.

        Raises:
            UserError: they are too many.
        """
        unit = Unit(shape.group_size, shape.head_dim)
        priced, layers = list(self.targets), list(self.layers)
        for name, grid in self.options.items():
            known = _grid(name, grid)
            if _of_layers(name):
                layers += layer_options[name].options(shape.kv_heads, shape.group_size, known)
            else:
                priced += targets[name].options(unit, lengths, known)
        chosen = tuple(
            target for target in dict.fromkeys(priced) if (target.removes or not target.as_built) and not target.idle
        )
        whole = tuple(dict.fromkeys(layers))
        if len(chosen) + len(whole) > MOST:
            raise UserError(
                "too many targets to price",
                where="profile.statistics.effect.options",
                expected=f"at most {MOST}",
                found=f"{len(chosen) + len(whole)}",
                fix="give the grids fewer values, or larger steps",
            )
        if not chosen and not whole:
            raise UserError(
                "there is nothing to price",
                where="profile.statistics.effect.options",
                expected="options that a layer of this model can have, and targets that change something",
                found=f"{shape.kv_heads} head groups of {shape.group_size} query heads"
                + "".join(f"; {target.words()}" for target in priced if target.idle),
                fix="name options, for instance `options: {retain: {scorers: [ridge], shares: [0.125, 0.25]}}`"
                if any(target.idle for target in priced)
                else None,
            )
        return self.model_copy(update={"targets": chosen, "options": {}, "layers": whole})

    def check_ahead(self, config: Any, prepared: Prepared = (), where: str | None = None) -> None:
        """Refuses targets and options that cannot be priced; see `Statistic.check_ahead`."""
        check_priced(self.targets, where or WHERE, prepared, config)
        for option in () if prepared else self.layers:
            if (why := option.unpriced()) is not None:
                raise _unprepared(option, why)

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """`absolute` and `signed`, (layer, group) for every target; 0 in layers that slide by themselves, where a
        target has no place there.
        """
        count = len(self.targets) + len(self.layers)
        return {part: Table(self.unit, target=count) for part in ("absolute", "signed")}

    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        """See `SummedStatistic.begin`.

        Raises:
            UserError: a target that cannot be priced.
        """
        prepared = prepared_for(subject.model)
        config = subject.model.config
        check_priced(self.targets, WHERE, prepared, config)
        self._prepared = self.learnt(prepared)
        find = subject.known.get
        self._entries = [entries_of(option, subject.shape, find, lengths, WHERE_LAYERS) for option in self.layers]
        check_priced(list(self._of_layers), WHERE_LAYERS, prepared, config)
        serving = found_for(prepared)
        for option, layers in zip(self.layers, self._entries, strict=True):
            why = option.unpriced()
            if why is not None and not all(serving(target) for targets in layers.values() for target in targets):
                raise _unprepared(option, why)
        return super().begin(subject, lengths)

    def learnt(self, prepared: Prepared) -> Prepared:
        """All where it prices options of layers: which targets these come to may depend on what is measured first."""
        serving = found_for(prepared)
        used = prepared if self.layers else [serving(target) for target in self.targets]
        return tuple(option for option in prepared if option in used)

    @property
    def needs_inputs(self) -> bool:
        return reads_inputs({*self.targets, *self._of_layers})

    @property
    def _of_layers(self) -> set[Target]:
        """What head groups become by the options of whole layers."""
        return {target for option in self._entries for targets in option.values() for target in targets}

    def add_layer(self, sums: Sums, layer: LayerTensors, item: Item) -> None:
        groups, placed = layer.key.shape[0], placed_for(self._prepared)
        alternatives: dict[int, Sequence[Target]] = {
            number: [placed(target, layer.layer, group) for group in range(groups)]
            for number, target in enumerate(self.targets)
            if layer.window is None or target.as_built
        }
        for number, entries in enumerate(self._entries, len(self.targets)):
            if layer.layer in entries:
                alternatives[number] = entries[layer.layer]
        for number, signed, absolute in effects_of(layer, alternatives, self._prepared):
            sums["signed"][layer.layer, :, number] += signed
            sums["absolute"][layer.layer, :, number] += absolute

    def named(self, key: Key, table: Table, values: torch.Tensor) -> Results:
        return {
            key.to(target): Result(values[..., number].clone(), ("layer", "group"), table.unit)
            for number, target in enumerate((*self.targets, *self.layers))
        }


def effects_of(
    layer: LayerTensors, alternatives: Mapping[int, Sequence[Target]], prepared: Prepared = ()
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """What other targets of a layer's head groups change in the loss to first order, in float32.

    Args:
        layer: with the gradient.
        alternatives: by number, a target for every head group.
        prepared: where the tensors of targets are that were trained before.

    Yields:
        Number of an alternative, sum over rows and query heads `[groups]`, and sum of the sizes.
    """
    slope = layer.output_gradient
    assert slope is not None
    query, key, value = (tensor[None].float() for tensor in (layer.query, layer.key, layer.value))
    hidden = None if layer.hidden is None else layer.hidden[None].float()
    rotary = None if layer.rotary is None else (layer.rotary[0][None].float(), layer.rotary[1][None].float())
    groups = key.shape[1]
    facts = facts_of(layer.layer, query, key, layer.window, hidden)
    others = Alternatives(facts, list(alternatives.values()), prepared)
    changes = others.changes(query, key, value, layer.scaling, scores=layer.scores, inputs=(hidden, rotary))
    for number, change in zip(alternatives, changes, strict=True):
        effects = torch.einsum("htd,htd->ht", slope.float(), change[0]).view(groups, -1)
        yield number, effects.sum(1, dtype=torch.float64), effects.abs().sum(1, dtype=torch.float64)


def _unprepared(option: LayerOption, why: str) -> UserError:
    return UserError(
        f"`{option.words()}` cannot be priced before it was prepared",
        where=WHERE_LAYERS,
        found=why,
        fix="price a router without weights (`router: norm`), or prepare this one and price it there: `prepare.layers`",
    )


def _of_layers(name: str) -> bool:
    """Whether the options of a target are those of whole layers."""
    return name in layer_options


def _grid(name: str, fields: dict[str, Any] | None) -> Any:
    """What a target's `options` take, from the fields that a recipe gives; None takes the target's defaults.

    Raises:
        ValueError: the target has no grid, or the fields are not those of it.
    """
    if fields is None:
        return None
    kind = layer_options[name].grid if _of_layers(name) else targets[name].grid
    if kind is None:
        raise ValueError(f"options: `{name}` has no grid to choose from; write null")
    try:
        return kind.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        items = (item for item in error.errors(include_url=False) if not is_echo(item))
        raise ValueError("; ".join(_told(f"options.{name}", kind, item) for item in items)) from None


def _told(place: str, kind: type[BaseModel], item: Any) -> str:
    """One of pydantic's errors in a grid, with its place, what was expected and what is there."""
    where = ".".join([place, *map(str, item["loc"])])
    if item["type"] == "extra_forbidden":
        return f"{place}: expected keys among {', '.join(kind.model_fields)}, got {item['loc'][-1]}"
    if item["type"] == "too_short":
        return f"{where}: expected at least one entry, got an empty list"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("expected ")
    return f"{where}: expected {message}" + ("" if ", got " in message else f", got {json.dumps(item['input'])}")
