"""The plan: one target per head group, bound to one model. Schema, checks and file form."""

from __future__ import annotations

import base64
import math
import reprlib
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.errors import Problem, UserError
from compress.json_file import CHECKSUM, checksum_of, read_object, sealed, validated
from compress.runtime.span import NO_END, AnySpan, spans_of_plan
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.target import StockForm, Target, parse_target
from compress.targets.unit import LayerParameters, Unit

if TYPE_CHECKING:
    from compress.models.shape import ModelShape


# No model has more; what is larger is damage, and would only fail later or take all memory.
MOST_LAYERS, MOST_HEADS, MOST_HEAD_DIM, MOST_NEURONS = 10_000, 1 << 16, 1 << 16, 1 << 22
Tokens = Annotated[int, Field(ge=1, lt=NO_END)]
Bytes = Annotated[int, Field(ge=0)]
Form = Literal["patched", "native"]  # of a checkpoint: with the runtime's paged cache, or with transformers' own


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Group = Annotated[SerializeAsAny[Target], BeforeValidator(parse_target)]


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
        found = int(self.neurons, 16).bit_count()
        if found != self.kept:
            raise ValueError(f"neurons: expected a mask of {self.kept} neurons, got one of {found}")
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


class LayerPlan(Strict):
    """The decision for one layer.

    Attributes:
        groups: one target per head group of the model.
        queries: indices of the query heads that stay, the same number in every group that stays; None where groups
            keep all of theirs.
        mlp: None where the MLP is left as it is.
        bias: None where nothing is added in place of what was removed.
    """

    groups: tuple[Group, ...] = Field(min_length=1)
    queries: tuple[int, ...] | None = None
    mlp: Mlp | None = None
    bias: OutputBias | None = None

    @property
    def kept_groups(self) -> tuple[int, ...]:
        """Indices of the head groups that stay."""
        return tuple(number for number, group in enumerate(self.groups) if not group.removes)

    @property
    def prunes(self) -> bool:
        """Whether anything of the layer is removed."""
        return self.queries is not None or self.mlp is not None or len(self.kept_groups) < len(self.groups)

    @model_serializer(mode="wrap")
    def _as_needed(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `queries` and `bias` where there are none, as plans were written before they could have any."""
        written: dict[str, Any] = write(self)
        return {key: value for key, value in written.items() if value is not None or key not in ("queries", "bias")}


class PlanModel(Strict):
    """The model that a plan is for."""

    architecture: str
    layers: int = Field(ge=1, le=MOST_LAYERS)
    query_heads: int = Field(ge=1, le=MOST_HEADS)
    kv_heads: int = Field(ge=1, le=MOST_HEADS)
    head_dim: int = Field(ge=1, le=MOST_HEAD_DIM)
    native_windows: tuple[Tokens | None, ...]
    fingerprint: str = Field(pattern=r"^(v2|sha256):[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _heads_divide(self) -> PlanModel:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads: expected a multiple of kv_heads ({self.kv_heads}), got {self.query_heads}")
        return self


class Predicted(Strict):
    """What the search expects of the plan.

    Attributes:
        kv_bytes, dense_kv_bytes: bytes of one sequence by its length in tokens.
        parameters, dense_parameters: of the decoder layers, for a plan that removes any.
    """

    kv_bytes: dict[Tokens, Bytes] = {}
    dense_kv_bytes: dict[Tokens, Bytes] = {}
    loss: float | None = None
    parameters: int | None = Field(default=None, ge=0)
    dense_parameters: int | None = Field(default=None, ge=1)


class Plan(Strict):
    """One target with parameters per head group, and where the decision comes from."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    model: PlanModel
    layers: tuple[LayerPlan, ...]
    predicted: Predicted = Predicted()
    provenance: dict[str, Any] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    def to_json(self) -> str:
        """The file form: indented JSON that ends with a checksum of everything before it."""
        return sealed(self.model_dump(mode="json", by_alias=True))

    def spans(self) -> list[list[AnySpan]]:
        """The span of every head group that stays, `[layers][groups]`; costs resolve those by length at the length
        asked for."""
        return spans_of_plan({"layers": self.runtime_layers()}, list(self.model.native_windows))

    def runtime_layers(self) -> list[dict[str, Any]]:
        """What a checkpoint's configuration carries of every layer: targets of the groups that stay, and how many
        query heads and neurons they are where the layer is narrower than the model's."""
        layers = []
        for layer in self.layers:
            row: dict[str, Any] = {
                "groups": [group.model_dump(mode="json") for group in layer.groups if not group.removes]
            }
            if layer.queries is not None or len(row["groups"]) < len(layer.groups):
                share = self.model.query_heads // self.model.kv_heads
                row["query_heads"] = len(row["groups"]) * share if layer.queries is None else len(layer.queries)
            if layer.mlp is not None:
                row["mlp"] = {"kept": layer.mlp.kept}
            layers.append(row)
        return layers

    def stock(self) -> list[StockForm] | None:
        """Per layer, what a stock architecture with this plan has; None where none holds it, whatever the family.

        That is one form in all groups of a layer, and one number of heads and neurons in all layers.
        """
        forms = []
        for layer, native in zip(self.layers, self.model.native_windows, strict=True):
            of_groups = {group.stock(native) for group in layer.groups if not group.removes}
            form = of_groups.pop()
            if of_groups or form is None:
                return None
            forms.append(form)
        neurons = [None if layer.mlp is None else layer.mlp.kept for layer in self.layers]
        return forms if len(set(zip(self.kept_heads, self.kept_queries, neurons, strict=True))) == 1 else None

    @property
    def form(self) -> Form:
        """The form of the model that computes the plan where no other is asked for: native where the plan removes
        heads or neurons and changes nothing else that the architecture cannot say."""
        as_built = [StockForm(native) for native in self.model.native_windows]
        return "native" if self.prunes and self.stock() == as_built else "patched"

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
            sizes: parameters of the dense layers (`parameters_per_unit`); None counts none.

        Raises:
            ValueError: the plan has no native form, and that was asked for.
        """
        form = form or self.form
        if form == "native" and self.stock() is None:
            raise ValueError("no stock architecture holds this plan")
        total = Cost()
        for number, layer in enumerate(self.layers):
            size = None if sizes is None else sizes[number]
            unit = self._unit(number, itemsize, form, size)
            total += Cost.total(group.cost(unit, length) for group in layer.groups)
            if size is not None:
                neurons = size.neurons if layer.mlp is None else layer.mlp.kept
                total += Cost(parameters=size.rest + neurons * size.neuron)
        return total

    def dense_cost(self, length: int, itemsize: int = 2) -> Cost:
        """What the model costs as it is, with transformers' own cache; parameters are not counted."""
        model = self.model
        costs = []
        for native in model.native_windows:
            unit = Unit(model.query_heads // model.kv_heads, model.head_dim, itemsize, native, paged=False)
            costs.append(FullGroup().cost(unit, length) * model.kv_heads)
        return Cost.total(costs)

    def _unit(self, number: int, itemsize: int, form: Form, size: LayerParameters | None) -> Unit:
        """A head group that stays of a layer, as the plan leaves it."""
        model = self.model
        kept = self.kept_queries[number] // len(self.layers[number].kept_groups)
        parameters = 0 if size is None else size.group - (model.query_heads // model.kv_heads - kept) * size.query
        native = model.native_windows[number]
        return Unit(kept, model.head_dim, itemsize, native, form == "patched", parameters)

    @property
    def kept_heads(self) -> list[int]:
        """Key/value heads that stay, by layer."""
        return [len(layer.kept_groups) for layer in self.layers]

    @property
    def kept_queries(self) -> list[int]:
        """Query heads that stay, by layer."""
        share = self.model.query_heads // self.model.kv_heads
        return [
            len(layer.kept_groups) * share if layer.queries is None else len(layer.queries) for layer in self.layers
        ]

    @property
    def prunes(self) -> bool:
        """Whether anything of the model is removed."""
        return any(layer.prunes for layer in self.layers)

    def spans_by_group(self) -> list[list[AnySpan | None]]:
        """As `spans`, with None in the place of every head group that is removed: `[layers][kv_heads]`."""
        found: list[list[AnySpan | None]] = []
        for layer, row in zip(self.layers, self.spans(), strict=True):
            kept = iter(row)
            found.append([None if group.removes else next(kept) for group in layer.groups])
        return found

    def removal(self) -> str | None:
        """In words, what stays of a model that the plan makes smaller; None where nothing is removed."""
        if not self.prunes:
            return None
        model = self.model
        left, whole = self.predicted.parameters, self.predicted.dense_parameters
        parts = [
            f"{sum(self.kept_heads)} of {model.layers * model.kv_heads} head groups",
            f"{sum(self.kept_queries)} of {model.layers * model.query_heads} query heads",
        ]
        neurons = [layer.mlp.kept if layer.mlp is not None else None for layer in self.layers]
        known = [number for number in neurons if number is not None]
        if known:
            span = f"{min(known):,}" if len(set(known)) == 1 else f"{min(known):,} to {max(known):,}"
            untouched = len(neurons) - len(known)
            parts.append(f"{span} neurons a layer" + (f", all of them in {untouched} layers" if untouched else ""))
        if left is None or not whole:
            return f"{', '.join(parts)} stay"
        return f"{left:,} of {whole:,} parameters of the decoder layers stay ({left / whole:.2%}): {', '.join(parts)}"


def make_plan(
    shape: ModelShape,
    groups: Sequence[Sequence[Target]],
    *,
    predicted: Predicted | None = None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """A checked plan from one target per head group, `[layers][kv_heads]`.

    Raises:
        UserError: the groups do not fit the model.
    """
    layers = [LayerPlan(groups=tuple(row)) for row in groups]
    return plan_of_layers(shape, layers, predicted=predicted, provenance=provenance)


def plan_of_layers(
    shape: ModelShape,
    layers: Sequence[LayerPlan],
    *,
    predicted: Predicted | None = None,
    provenance: dict[str, Any] | None = None,
) -> Plan:
    """A checked plan from whole layers, which may be pruned. Raises UserError as `make_plan`."""
    plan = Plan(
        model=PlanModel(**shape.model_dump()),
        layers=tuple(layers),
        predicted=predicted or Predicted(),
        provenance=provenance or {},
    )
    problems = _count_problems(plan, "plan")
    if problems:
        raise UserError(problems)
    return plan


def uniform_plan(shape: ModelShape, group: Group, **fields: Any) -> Plan:
    """The same target for every head group, except that a layer with a window of its own keeps it."""
    return make_plan(
        shape,
        [[group if native is None else FullGroup()] * shape.kv_heads for native in shape.native_windows],
        **fields,
    )


def _count_problems(plan: Plan, where: str) -> list[Problem]:
    """Counts that disagree with each other, and windows where the architecture slides already."""
    problems = []
    if len(plan.layers) != plan.model.layers:
        problems.append(Problem("wrong number of layers", where, str(plan.model.layers), str(len(plan.layers))))
    if len(plan.model.native_windows) != plan.model.layers:
        problems.append(
            Problem(
                "wrong number of native_windows",
                f"{where}: model.native_windows",
                str(plan.model.layers),
                str(len(plan.model.native_windows)),
            )
        )
    for number, layer in enumerate(plan.layers):
        here = f"{where}: layers.{number}"
        if len(layer.groups) != plan.model.kv_heads:
            problems.append(
                Problem("wrong number of head groups", here, str(plan.model.kv_heads), str(len(layer.groups)))
            )
        problems += _pruning_problems(layer, plan.model, here)
        native = plan.model.native_windows[number] if number < len(plan.model.native_windows) else None
        if native is not None and not all(group.as_built for group in layer.groups):
            problems.append(
                Problem(
                    f"this layer already slides over {native} tokens in the architecture itself",
                    here,
                    "target full or pruned in every group",
                    ", ".join(group.target for group in layer.groups),
                )
            )
    return problems


def _pruning_problems(layer: LayerPlan, model: PlanModel, here: str) -> list[Problem]:
    """A layer with nothing left, or query heads that do not divide evenly among its groups."""
    kept = layer.kept_groups
    if not kept:
        return [Problem("every head group of the layer is pruned", here, "one or more that stay")]
    if layer.queries is None:
        return []
    share = model.query_heads // model.kv_heads
    counts = Counter(query // share for query in layer.queries)
    expected = "ascending indices of query heads, the same number of every group that stays, and of no other"
    ascending = sorted(set(layer.queries)) == list(layer.queries)
    if ascending and set(counts) == set(kept) and len(set(counts.values())) == 1:
        return []
    return [Problem("these query heads cannot stay", f"{here}.queries", expected, f"{list(layer.queries)}")]


def _model_problems(plan: Plan, shape: ModelShape, where: str, any_weights: bool) -> list[Problem]:
    """Every field in which the plan's model is not the model at hand."""
    found = plan.model.model_dump()
    problems = [
        Problem("the plan is for another model", f"{where}: model.{key}", str(getattr(shape, key)), str(found[key]))
        for key in shape.differing(found)
        if key != "fingerprint" or not any_weights
    ]
    if problems:
        problems[-1].fix = "search again with this model, or name the model that the plan was made for"
    return problems


def read_plan(path: Path | str, shape: ModelShape | None = None, *, any_weights: bool = False) -> Plan:
    """Read and check a plan file; every problem of the file is reported at once.

    A file without the key `checksum` is taken as written by hand; any checksum but its own, null too, is damage.

    Args:
        shape: the model it is going to be used with; None checks the file alone.
        any_weights: whether a model of the same sizes with other weights will do.

    Raises:
        UserError: missing or damaged file, unknown keys, wrong counts, impossible parameters, another model.
    """
    path = Path(path)
    raw = read_object(path, "the plan", fix="run `compress search`")
    checked = CHECKSUM in raw
    checksum = raw.pop(CHECKSUM, None)
    plan = validated(Plan, raw, "the plan", str(path))
    problems = _count_problems(plan, str(path))
    if checked and checksum != checksum_of(raw):
        problems.append(
            Problem(
                "the plan is damaged: its content does not match its checksum",
                str(path),
                expected=reprlib.repr(checksum),
                found=checksum_of(raw),
                fix="search again; if you edited the plan by hand, remove its `checksum` line",
            )
        )
    if shape is not None:
        problems += _model_problems(plan, shape, str(path), any_weights)
    if problems:
        raise UserError(problems)
    return plan
