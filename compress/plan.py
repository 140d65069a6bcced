"""The plan: one target per head group, bound to one model. Schema, checks and file form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError

from compress.errors import Problem, UserError
from compress.runtime.span import AnySpan, spans_of_plan
from compress.targets.full import FullGroup
from compress.targets.target import Target, parse_target

if TYPE_CHECKING:
    from compress.models.shape import ModelShape


class Strict(BaseModel):
    """Frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Group = Annotated[SerializeAsAny[Target], BeforeValidator(parse_target)]


class Mlp(Strict):
    """What is kept of a layer's MLP."""

    kept: int = Field(ge=1, description="neurons kept")


class LayerPlan(Strict):
    """The decision for one layer; `mlp` is None where the MLP is left as it is."""

    groups: tuple[Group, ...] = Field(min_length=1)
    mlp: Mlp | None = None


class PlanModel(Strict):
    """The model that a plan is for."""

    architecture: str
    layers: int = Field(ge=1)
    query_heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    native_windows: tuple[int | None, ...]
    fingerprint: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")


class Predicted(Strict):
    """What the search expects of the plan. `kv_bytes` maps a length in tokens to bytes for one sequence."""

    kv_bytes: dict[int, int] = {}
    dense_kv_bytes: dict[int, int] = {}
    loss: float | None = None


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
        content = self.model_dump(mode="json", by_alias=True)
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"

    def spans(self) -> list[list[AnySpan]]:
        """The span of every head group, `[layers][kv_heads]`; costs resolve those by length at the length asked for."""
        return spans_of_plan(self.model_dump(mode="json", by_alias=True), list(self.model.native_windows))


def _checksum(content: dict[str, Any]) -> str:
    """`sha256:...` of a plan's content in canonical JSON, so that a changed digit is noticed."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


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
    plan = Plan(
        model=PlanModel(**shape.model_dump()),
        layers=tuple(LayerPlan(groups=tuple(row)) for row in groups),
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
        native = plan.model.native_windows[number] if number < len(plan.model.native_windows) else None
        if native is not None and any(group.target != "full" for group in layer.groups):
            problems.append(
                Problem(
                    f"this layer already slides over {native} tokens in the architecture itself",
                    here,
                    "target full in every group",
                    ", ".join(group.target for group in layer.groups),
                )
            )
    return problems


def _model_problems(plan: Plan, shape: ModelShape, where: str) -> list[Problem]:
    """Every field in which the plan's model is not the model at hand."""
    problems = []
    found = plan.model.model_dump()
    for key, value in shape.model_dump().items():
        if found[key] != value:
            problems.append(
                Problem("the plan is for another model", f"{where}: model.{key}", str(value), str(found[key]))
            )
    if problems:
        problems[-1].fix = "search again with this model, or name the model that the plan was made for"
    return problems


def read_plan(path: Path | str, shape: ModelShape | None = None) -> Plan:
    """Read and check a plan file; every problem of the file is reported at once.

    A file without `checksum` is taken as written by hand; one whose checksum does not match is damaged.

    Args:
        shape: the model it is going to be used with; None checks the file alone.

    Raises:
        UserError: missing or damaged file, unknown keys, wrong counts, impossible parameters, another model.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such plan file", where=str(path), fix="run `compress search` first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            "the plan is damaged", where=str(path), expected="JSON", found=str(error), fix="search again"
        ) from None
    checksum = raw.pop("checksum", None) if isinstance(raw, dict) else None
    try:
        plan = Plan.model_validate(raw)
    except ValidationError as error:
        problems = [
            Problem(
                item["msg"],
                f"{path}: {'.'.join(str(part) for part in item['loc'])}",
                found=repr(item["input"])[:80],
            )
            for item in error.errors(include_url=False)
        ]
        raise UserError(problems) from None
    problems = _count_problems(plan, str(path))
    if checksum is not None and checksum != _checksum(raw):
        problems.append(
            Problem(
                "the plan is damaged: its content does not match its checksum",
                str(path),
                expected=str(checksum),
                found=_checksum(raw),
                fix="search again; if you edited the plan by hand, remove its `checksum` line",
            )
        )
    if shape is not None:
        problems += _model_problems(plan, shape, str(path))
    if problems:
        raise UserError(problems)
    return plan
