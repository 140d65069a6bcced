"""Makes plans from targets, and checks that their counts agree with the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from compress.errors import Problem, UserError
from compress.plan.facts import ModelShape
from compress.plan.schema import Group, LayerPlan, Plan, Predicted, Upcycle
from compress.targets.full import FullGroup
from compress.targets.target import Target


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
    upcycle: Upcycle | None = None,
) -> Plan:
    """A checked plan from whole layers, which may be pruned. Raises UserError as `make_plan`."""
    plan = Plan(
        model=ModelShape(**shape.model_dump()),
        layers=tuple(layers),
        predicted=predicted or Predicted(),
        provenance=provenance or {},
        upcycle=upcycle,
    )
    problems = count_problems(plan, "plan")
    if problems:
        raise UserError(problems)
    return plan


def uniform_plan(shape: ModelShape, group: Group, **fields: Any) -> Plan:
    """A plan with one target for every head group, except that a layer with a sliding window of its own keeps it."""
    return make_plan(
        shape,
        [[group if native is None else FullGroup()] * shape.kv_heads for native in shape.native_windows],
        **fields,
    )


def measured_plan(plan: Plan, found: Sequence[Sequence[Any]]) -> Plan:
    """The plan with what its head groups were found to hold of texts (`Target.measured`).

    Args:
        found: `[layers][groups that stay]`, None or what has a `threshold`, a `share` and a `spread`.
    """
    layers = []
    for layer, row in zip(plan.layers, found, strict=True):
        groups = list(layer.groups)
        for number, one in zip(layer.kept_groups, row, strict=True):
            if one is not None:
                groups[number] = groups[number].measured(one.threshold, one.share, one.spread)
        layers.append(layer.model_copy(update={"groups": tuple(groups)}))
    return plan.model_copy(update={"layers": tuple(layers)})


def count_problems(plan: Plan, where: str) -> list[Problem]:
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
        problems += _group_problems(layer, plan.model, here)
        native = plan.model.native_windows[number] if number < len(plan.model.native_windows) else None
        if native is not None and not all(group.fits_native for group in layer.groups):
            problems.append(
                Problem(
                    f"this layer already slides over {native} tokens in the architecture itself",
                    here,
                    "target full or pruned in every group, or routed without a window",
                    ", ".join(group.target for group in layer.groups),
                )
            )
    return problems


def _pruning_problems(layer: LayerPlan, model: ModelShape, here: str) -> list[Problem]:
    """A layer with nothing left, or query heads that do not divide evenly among its groups."""
    kept = layer.kept_groups
    if not kept:
        return [Problem("every head group of the layer is pruned", here, "one or more that stay")]
    if layer.queries is None:
        return []
    counts = Counter(query // model.group_size for query in layer.queries)
    expected = "ascending indices of query heads, the same number of every group that stays, and of no other"
    ascending = sorted(set(layer.queries)) == list(layer.queries)
    if ascending and set(counts) == set(kept) and len(set(counts.values())) == 1:
        return []
    return [Problem("these query heads cannot be kept", f"{here}.queries", expected, f"{list(layer.queries)}")]


def _group_problems(layer: LayerPlan, model: ModelShape, here: str) -> list[Problem]:
    """Targets of a layer that do not go together with others of their kind in it."""
    kept = layer.kept_groups
    if not kept or len(layer.groups) != model.kv_heads:
        return []
    heads = model.group_size if layer.queries is None else len(layer.queries) // len(kept)
    problems = []
    for kind in dict.fromkeys(type(layer.groups[number]) for number in kept):
        wrong = kind.layer_problem([layer.groups[n] for n in kept if type(layer.groups[n]) is kind], heads)
        if wrong is not None:
            problems.append(Problem(wrong[0], here, *wrong[1:]))
    return problems
