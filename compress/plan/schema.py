"""The plan: one target per head group and the neurons that stay of every MLP, bound to one model; and its file form."""

from __future__ import annotations

import base64
import math
import re
import reprlib
import struct
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compress import registry
from compress.json_file import sealed
from compress.plan.facts import ModelShape, Tokens
from compress.targets.cost import Cost
from compress.targets.expert import MOST_EXPERTS, ExpertGroup
from compress.targets.full import FullGroup
from compress.targets.target import StockForm, Target, layer_cost
from compress.targets.unit import LayerParameters, Unit

SCHEMA: Literal[2] = 2  # of the file; `read.py` reads older ones
MOST_NEURONS = 1 << 22  # no MLP has more; what is larger is damage
Bytes = Annotated[int, Field(ge=0)]
Form = Literal["patched", "native"]  # of a checkpoint: with the runtime's paged cache, or with transformers' own


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Group = Annotated[Target, registry.targets]


class Mlp(Strict):
    """What is kept of a layer's MLP.

    Attributes:
        kept: number of neurons.
        neurons: which, as one number in hexadecimal: neuron i is kept where the bit of 2^i is set. A mask, because
            the indices of a large model would be megabytes of JSON.
    """

    kept: int = Field(ge=1, description="neurons kept")
    neurons: str = Field(
        pattern=r"^[0-9a-f]+$", max_length=MOST_NEURONS // 4, description="which, as a bit mask in hexadecimal"
    )

    @model_validator(mode="after")
    def _counted(self) -> Mlp:
        count = int(self.neurons, 16).bit_count()
        if count != self.kept:
            raise ValueError(f"neurons: expected a mask of {self.kept} neurons, got one of {count}")
        return self

    @classmethod
    def of(cls, indices: Iterable[int]) -> Mlp:
        """From the indices of the neurons that stay."""
        chosen = set(indices)
        bits = "".join("1" if i in chosen else "0" for i in range(max(chosen), -1, -1))
        return cls(kept=len(chosen), neurons=f"{int(bits, 2):x}")

    def indices(self) -> tuple[int, ...]:
        """Indices of the neurons that stay, ascending."""
        return tuple(i for i, bit in enumerate(reversed(f"{int(self.neurons, 16):b}")) if bit == "1")


class OutputBias(Strict):
    """What is added behind the projections of a layer in place of what was removed from it (FLAP's compensation).

    Attributes:
        attention, mlp: `hidden_size` little-endian float32 numbers in base64, behind o_proj and behind down_proj.
    """

    attention: str
    mlp: str

    @field_validator("attention", "mlp")
    @classmethod
    def _of_numbers(cls, text: str) -> str:
        try:
            values = _unpacked(text)
        except (ValueError, struct.error):
            raise ValueError("expected float32 numbers in base64") from None
        if not all(map(math.isfinite, values)):
            raise ValueError("expected finite numbers, got NaN or infinity among them")
        return text

    @classmethod
    def of(cls, attention: Sequence[float], mlp: Sequence[float]) -> OutputBias:
        """From the numbers themselves."""
        return cls(attention=_packed(attention), mlp=_packed(mlp))

    def values(self) -> tuple[list[float], list[float]]:
        """The numbers behind o_proj, and those behind down_proj."""
        return _unpacked(self.attention), _unpacked(self.mlp)


def _packed(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _unpacked(text: str) -> list[float]:
    raw = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


class Expert(Strict):
    """One of the models that an upcycled model is made of: what the user called it, and its fingerprint."""

    name: str
    fingerprint: str


class MlpRouting(Strict):
    """How an upcycled model's tokens use its MLPs (`runtime/mlp_experts.py`).

    Attributes:
        top: MLPs that a token uses, `all` or a number.
        weight: what their outputs are multiplied by; where a token uses all, by p, which sums to 1.
    """

    top: Annotated[int, Field(ge=1, le=MOST_EXPERTS)] | Literal["all"] = Field(
        "all",
        description="MLPs that a token uses: all, mixed by p as attentions are, at the operations of all of them; or "
        "those with the highest p, one as published",
    )
    weight: Literal["one", "p"] = Field(
        "one",
        description="what their outputs are multiplied by: weights that sum to 1, with one MLP straight-through, so "
        "that equal experts stay what they were; or p, the router's own share, as published",
    )


class Upcycle(Strict):
    """What an upcycled model is made of (BAM, arXiv 2408.08274): a plan that has it describes all experts together.

    Attributes:
        seed: the model that costs are compared with, whose architecture and tokenizer all have.
        experts: in the order of their numbers.
        attention: `soft` where each expert's attention is there, `base` where there is one for all.
        kv: whether each has its own keys and values, or all share their mean.
        mlp: how tokens use the experts' MLPs.
        rest: where all other weights come from: the mean of the experts', or the seed's.
    """

    seed: ModelShape
    experts: tuple[Expert, ...] = Field(min_length=2, max_length=MOST_EXPERTS)
    attention: Literal["soft", "base"]
    kv: Literal["expert", "shared"]
    mlp: MlpRouting
    rest: Literal["average", "seed"]

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.experts)

    def shape(self, fingerprint: str) -> ModelShape:
        """The sizes of all experts together: query heads of all, and key/value heads of all unless they are shared."""
        heads = self.count if self.attention == "soft" else 1
        groups = heads if self.kv == "expert" else 1
        sizes = {"query_heads": self.seed.query_heads * heads, "kv_heads": self.seed.kv_heads * groups}
        return ModelShape(**{**self.seed.model_dump(), **sizes, "fingerprint": fingerprint})

    def groups(self) -> tuple[Target, ...]:
        """The head groups of every layer: expert by expert, or those of all with the query heads of each."""
        if self.attention == "base":
            return (FullGroup(),) * self.seed.kv_heads
        if self.kv == "shared":
            return (ExpertGroup(experts=self.count),) * self.seed.kv_heads
        return tuple(
            ExpertGroup(experts=self.count, expert=number)
            for number in range(self.count)
            for _ in range(self.seed.kv_heads)
        )

    @property
    def mlps(self) -> int:
        """MLPs that a token uses."""
        return self.count if self.mlp.top == "all" else self.mlp.top

    def runtime_mlp(self) -> dict[str, Any]:
        """What a checkpoint's configuration says of the MLP of a layer."""
        return {"experts": self.count, "top": self.mlps, "weight": self.mlp.weight}


class LayerPlan(Strict):
    """The decision for one layer.

    Attributes:
        groups: one target per head group of the model, in the model's order.
        order: the head groups that stay in the order in which the planned model and its checkpoint have them; None
            where that is the model's.
        queries: indices of the query heads that stay, the same number in every group that stays; None where groups
            keep all of theirs.
        mlp: None where the MLP is left as it is.
        bias: None where nothing is added in place of what was removed.
    """

    groups: tuple[Group, ...] = Field(min_length=1)
    order: tuple[int, ...] | None = None
    queries: tuple[int, ...] | None = None
    mlp: Mlp | None = None
    bias: OutputBias | None = None

    @model_validator(mode="after")
    def _orders_what_stays(self) -> LayerPlan:
        stay = [number for number, group in enumerate(self.groups) if not group.removes]
        if self.order is not None and sorted(self.order) != stay:
            raise ValueError(f"order: expected each of the groups that stay once, {stay}, got {list(self.order)}")
        return self

    @property
    def kept_groups(self) -> tuple[int, ...]:
        """Indices of the head groups that stay, in the order in which the planned model has them."""
        if self.order is not None:
            return self.order
        return tuple(number for number, group in enumerate(self.groups) if not group.removes)

    @property
    def prunes(self) -> bool:
        """Whether anything of the layer is removed."""
        return self.queries is not None or self.mlp is not None or len(self.kept_groups) < len(self.groups)

    @model_serializer(mode="wrap")
    def _as_needed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the layer does not have."""
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if value is not None}


class Amount(Strict):
    """What a plan costs in one kind of budget, beside the dense model.

    Attributes:
        kind: of budget, by its registered name.
        unit: what one is called, for instance `bytes`.
        of: what `dense` is, for instance `the dense KV bytes`.
        length: of the sequence in tokens; None where the cost depends on none.
        plan, dense: whole numbers of the unit.
        spread: of `plan`, where that is a mean over texts: their standard deviation, at most; None where it is none.
        most: what a text takes at most, likewise.
    """

    kind: str
    unit: str
    of: str
    length: Tokens | None = None
    plan: int = Field(ge=0)
    dense: int = Field(ge=0)
    spread: int | None = Field(None, ge=0)
    most: int | None = Field(None, ge=0)

    @model_serializer(mode="wrap")
    def _as_needed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only means over texts have."""
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if key not in ("spread", "most") or value is not None}

    @property
    def fraction(self) -> float:
        """The plan's of the dense model's."""
        return self.plan / self.dense if self.dense else 1.0

    @property
    def at(self) -> str:
        """The length in words, behind a blank; nothing without one."""
        return "" if self.length is None else f" at {self.length:,} tokens"


class Predicted(Strict):
    """What the search expects of the plan.

    Attributes:
        form: of the checkpoint whose cache `amounts` are of; None where it was not recorded, as in files of schema 1.
        itemsize: bytes of one cached number in them; None likewise.
        amounts: what the plan costs in every kind of the budget, in KV bytes, and in parameters where it removes any.
        loss: in the unit of the solver, which `provenance` names.
    """

    form: Form | None = None
    itemsize: int | None = Field(default=None, ge=1)
    amounts: tuple[Amount, ...] = ()
    loss: float | None = None

    def of(self, kind: str) -> dict[int | None, Amount]:
        """The amounts of one kind, by length; empty where nothing was predicted."""
        return {amount.length: amount for amount in self.amounts if amount.kind == kind}

    @property
    def lengths(self) -> list[int]:
        """All lengths that something was predicted for, in tokens, ascending."""
        return sorted({amount.length for amount in self.amounts if amount.length is not None})

    @property
    def longest(self) -> list[Amount]:
        """Of every kind the amount at its longest length, the smallest share first."""
        last = {amount.kind: amount for amount in sorted(self.amounts, key=lambda amount: amount.length or 0)}
        return sorted(last.values(), key=lambda amount: amount.fraction)


def _named(model: ModelShape) -> ModelShape:
    """A model that a plan can be bound to."""
    if not re.fullmatch(r"(v2|sha256):[0-9a-f]{64}", model.fingerprint):
        raise ValueError(f"fingerprint: expected v2 or sha256 and 64 digits, got {reprlib.repr(model.fingerprint)}")
    return model


class Plan(Strict):
    """One target with parameters per head group, the neurons that stay, and where the decision comes from.

    Attributes:
        model: that the plan is for; of an upcycled model, all experts together.
        layers: of the model, in order.
        provenance: what made the plan, and with which settings.
        upcycle: what an upcycled model is made of; None for a plan of one model.
    """

    schema_: Literal[2] = Field(default=SCHEMA, alias="schema")
    model: Annotated[ModelShape, AfterValidator(_named)]
    layers: tuple[LayerPlan, ...]
    predicted: Predicted = Predicted()
    provenance: dict[str, Any] = {}
    upcycle: Upcycle | None = None

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    @model_serializer(mode="wrap")
    def _as_needed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what only upcycled models have."""
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if key != "upcycle" or value is not None}

    @model_validator(mode="after")
    def _of_all_experts(self) -> Plan:
        if self.upcycle is not None and self.model != self.upcycle.shape(self.model.fingerprint):
            raise ValueError("model: expected the sizes of the upcycled experts together")
        return self

    @property
    def source(self) -> ModelShape:
        """The dense model that the plan is bound to, and compared with: an upcycled model's seed."""
        return self.model if self.upcycle is None else self.upcycle.seed

    def to_json(self) -> str:
        """The file form: indented JSON that ends with a checksum of everything before it."""
        return sealed(self.model_dump(mode="json", by_alias=True))

    def runtime_layers(self) -> list[dict[str, Any]]:
        """What a checkpoint's configuration carries of every layer: targets of the groups that stay, and how many
        query heads and neurons they are where the layer is narrower than the model's."""
        layers = []
        for layer in self.layers:
            row: dict[str, Any] = {
                "groups": [layer.groups[number].model_dump(mode="json") for number in layer.kept_groups]
            }
            wider = self.model.group_size > self.source.group_size
            if layer.queries is not None or len(row["groups"]) < len(layer.groups) or wider:
                row["query_heads"] = self._queries(layer)
            if layer.mlp is not None:
                row["mlp"] = {"kept": layer.mlp.kept}
            if self.upcycle is not None:
                row["mlp"] = row.get("mlp", {}) | self.upcycle.runtime_mlp()
            layers.append(row)
        return layers

    def stock(self) -> list[StockForm] | None:
        """Per layer, what a stock architecture with this plan has; None where none holds it, whatever the family.

        That is one form in all groups of a layer, one window in all layers that slide, and one number of heads and
        neurons in all layers, and no experts.
        """
        if self.upcycle is not None:
            return None
        forms = []
        for layer, native in zip(self.layers, self.model.native_windows, strict=True):
            of_groups = {group.stock(native) for group in layer.groups if not group.removes}
            form = of_groups.pop()
            if of_groups or form is None:
                return None
            forms.append(form)
        windows = {form.window for form in forms if form.window is not None}
        return forms if len(self.widths) == 1 and len(windows) <= 1 else None

    @property
    def form(self) -> Form:
        """The form of the model that computes the plan where no other is asked for: native where the plan removes
        heads or neurons and changes nothing else that the architecture cannot say."""
        return "native" if self.prunes and self.as_built and self.stock() is not None else "patched"

    @property
    def as_built(self) -> bool:
        """Whether every head group that stays computes what the architecture says."""
        return all(group.stock(native) == StockForm(native) for row in self.groups_that_stay() for group, native in row)

    @property
    def by_length(self) -> bool:
        """Whether what some query sees depends on the length of the whole input (`Target.by_length`)."""
        return any(group.by_length for layer in self.layers for group in layer.groups)

    @property
    def in_expectation(self) -> bool:
        """Whether what it holds depends on the text, so that costs are means (`Target.in_expectation`)."""
        return any(group.in_expectation for layer in self.layers for group in layer.groups)

    def groups_that_stay(self) -> list[list[tuple[Target, int | None]]]:
        """Per layer, the target of every head group that stays, and the window that the layer itself has."""
        return [
            [(layer.groups[number], native) for number in layer.kept_groups]
            for layer, native in zip(self.layers, self.model.native_windows, strict=True)
        ]

    def cost(
        self,
        length: int,
        itemsize: int = 2,
        *,
        form: Form | None = None,
        sizes: Sequence[LayerParameters] | None = None,
    ) -> Cost:
        """What the plan costs for one sequence of `length` tokens, all layers together.

        Args:
            itemsize: bytes of one cached number.
            form: of the checkpoint; None takes `self.form`.
            sizes: parameters of the dense layers (`parameters_per_unit`), an upcycled model's seed's; None counts none.
                Routers are not among them.

        Raises:
            ValueError: the plan has no native form, and that was asked for.
        """
        form = form or self.form
        if form == "native" and self.stock() is None:
            raise ValueError("no stock architecture holds this plan")
        total = Cost()
        for number, layer in enumerate(self.layers):
            size = None if sizes is None else sizes[number]
            unit = self.unit(number, itemsize, form, size)
            total += layer_cost(layer.groups, unit, length)
            if size is not None:
                neurons = size.neurons if layer.mlp is None else layer.mlp.kept
                models = 1 if self.upcycle is None else self.upcycle.count
                total += Cost(parameters=size.rest + models * neurons * size.neuron)
        return total

    def dense_cost(self, length: int, itemsize: int = 2) -> Cost:
        """What the dense model costs (`ModelShape.dense_cost`)."""
        return self.source.dense_cost(length, itemsize)

    def unit(self, number: int, itemsize: int, form: Form, size: LayerParameters | None = None) -> Unit:
        """A head group that stays of a layer, as the plan leaves it; arguments as of `cost`."""
        layer, model = self.layers[number], self.model
        kept = self._queries(layer) // len(layer.kept_groups)
        parameters = 0 if size is None else size.group - (self.source.group_size - kept) * size.query
        return Unit(kept, model.head_dim, itemsize, model.native_windows[number], form == "patched", parameters)

    @property
    def full_groups(self) -> int:
        """How many head groups stay and see every earlier key."""
        return sum(group.stock(native) == StockForm() for row in self.groups_that_stay() for group, native in row)

    @property
    def widths(self) -> set[tuple[int, int, int | None]]:
        """The widths that layers have: head groups, query heads and neurons that stay, None where all neurons do."""
        neurons = [None if layer.mlp is None else layer.mlp.kept for layer in self.layers]
        return set(zip(self.kept_heads, self.kept_queries, neurons, strict=True))

    @property
    def kept_heads(self) -> list[int]:
        """Key/value heads that stay, by layer."""
        return [len(layer.kept_groups) for layer in self.layers]

    @property
    def kept_queries(self) -> list[int]:
        """Query heads that stay, by layer."""
        return [self._queries(layer) for layer in self.layers]

    def _queries(self, layer: LayerPlan) -> int:
        """Query heads that stay of a layer."""
        return len(layer.kept_groups) * self.model.group_size if layer.queries is None else len(layer.queries)

    @property
    def prunes(self) -> bool:
        """Whether anything of the model is removed."""
        return any(layer.prunes for layer in self.layers)

    @property
    def reordered_layers(self) -> int:
        """Layers whose head groups the planned model has in another order than the model."""
        return sum(layer.order is not None for layer in self.layers)
