"""The search problem: a model, what its profile measured, the constraints; and a candidate, which is a whole plan."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.plan import Amount, LayerPlan, Plan, Predicted, plan_of_layers
from compress.profile.key import Key
from compress.profile.statistic import giving
from compress.profile.store import effect_key
from compress.profile.worth import entries_of
from compress.registry import budget_kinds
from compress.search.budget.bytes_read import BytesRead
from compress.search.budget.flops import Flops
from compress.search.budget.kind import Row
from compress.search.budget.kv import Kv
from compress.search.budget.parameters import Parameters
from compress.search.dense import Dense
from compress.search.serve import Serve
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.layer_option import Alike, LayerOption
from compress.targets.target import Target, Thresholds, layer_cost
from compress.targets.unit import Unit
from compress.targets.window import SpanGrid, WindowGroup
from compress.words import either

if TYPE_CHECKING:
    import torch

    from compress.plan import ModelShape
    from compress.targets.unit import LayerParameters

Layers = tuple[LayerPlan, ...]
Amounts = NDArray[np.int64]
Place = tuple[int, int]
FULL_GROUP = FullGroup()


class ProfileLike(Protocol):
    """What a search reads of a profile."""

    @property
    def lengths(self) -> Sequence[int]:
        """Profiled lengths in tokens."""

    @property
    def grid(self) -> SpanGrid | None:
        """The grid of the rule tables, None when none were profiled."""

    def find(self, key: Key) -> torch.Tensor | None:
        """One tensor of the profile; None where it has none of this key."""

    def tensor(self, key: Key) -> torch.Tensor:
        """One tensor of the profile. Raises UserError where it has none of this key."""

    @property
    def priced(self) -> Sequence[Target]:
        """The targets that the statistic `effect` priced; none without it."""

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """What a target costs every head group at a length, `[layers, groups]` in nats, 0 for one that changes nothing.

        Raises UserError where it was not priced.
        """

    @property
    def priced_layers(self) -> Sequence[LayerOption]:
        """The options of whole layers that the statistic `effect` priced."""


class Trained(Protocol):
    """What a search reads of a target that was trained before it (`models.prepared.PreparedOption`)."""

    @property
    def target(self) -> Target:
        """The target."""

    @property
    def errors(self) -> torch.Tensor:
        """Relative squared error of the outputs of every head group, `[layers, groups]`; NaN where it has no place."""

    @property
    def retention(self) -> Thresholds | None:
        """Which thresholds keep which shares of the tokens; None for a target without."""


@dataclass(frozen=True)
class Problem:
    """What a solver is asked: the cheapest loss within every row.

    Attributes:
        dense: the model.
        profile: what was measured.
        rows: the constraints.
        base: what is decided before the search, layer by layer; None where everything is as in the dense model.
        biased: whether every projection has a bias, as after a compensation.
        prepared: targets that were trained before the search.
        effects: what these cost the loss to first order, at the profiled lengths; None where that was not measured.
        counted: targets whose costs the rows count exactly, see `counting`.
        whole: targets of all groups of a layer, likewise.
        asked: lengths in tokens that the budget names, for kinds of it that have none.
        serve: what an engine asks of the plans; None where nothing is.
    """

    dense: Dense
    profile: ProfileLike
    rows: tuple[Row, ...]
    base: Layers | None = None
    biased: bool = False
    prepared: tuple[Trained, ...] = ()
    effects: ProfileLike | None = None
    counted: tuple[Target, ...] = ()
    whole: tuple[tuple[Target, ...], ...] = ()
    asked: tuple[int, ...] = ()
    serve: Serve | None = None
    _costs: dict[Any, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _assigned: dict[LayerOption, dict[int, tuple[Target, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.dense.shape

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths in tokens, ascending."""
        return tuple(sorted(self.profile.lengths))

    @property
    def budget_lengths(self) -> list[int]:
        """Lengths in tokens at which anything is limited, ascending. Where no kind has lengths they are the profiled
        ones, or those that the budget names where it has a kind that says nothing of what is spent."""
        named = () if self.counts_spending else self.asked
        return sorted({row.length for row in self.rows if row.length is not None} or named or self.lengths)

    @property
    def counts_spending(self) -> bool:
        """Whether all kinds of the budget count what a plan spends."""
        return all(budget_kinds[row.kind].spent for row in self.rows)

    @property
    def grid(self) -> SpanGrid:
        """The windows that the profile priced.

        Raises:
            UserError: it priced none.
        """
        if self.profile.grid is None:
            raise UserError(
                "no statistic of the profile prices rules",
                where="profile.statistics",
                expected=either(giving("rules")),
                fix="add one of them to the recipe and profile again",
            )
        return self.profile.grid

    @property
    def priced(self) -> tuple[Target, ...]:
        """The targets whose effect on the loss is known: those of the profile, then those that were prepared."""
        prepared = () if self.effects is None else self.effects.priced
        return tuple(dict.fromkeys((*self.profile.priced, *prepared)))

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """What a target costs every head group at a profiled length, `[layers, groups]` in nats.

        Raises:
            UserError: it was not priced.
        """
        prepared = self.effects is not None and target in self.effects.priced
        return (self.effects if self.effects is not None and prepared else self.profile).effect(target, length, part)

    @property
    def priced_layers(self) -> tuple[LayerOption, ...]:
        """The options of whole layers whose effect on the loss is known: of the profile, then those prepared."""
        prepared = () if self.effects is None else self.effects.priced_layers
        alike = [Alike(target=target) for target in self.priced if target.by_layer]
        return tuple(dict.fromkeys((*self.profile.priced_layers, *prepared, *alike)))

    def layer_effect(self, option: LayerOption, length: int, part: str = "absolute") -> torch.Tensor:
        """What an option costs every layer at a profiled length, by head group `[layers, groups]` in nats.

        Raises:
            UserError: it was not priced.
        """
        for target in self.priced:
            if target.by_layer and option == Alike(target=target):
                return self.effect(target, length, part)
        prepared = self.effects is not None and option in self.effects.priced_layers
        measured = self.effects if self.effects is not None and prepared else self.profile
        return measured.tensor(effect_key(option, length, part))

    def entries(self, option: LayerOption) -> dict[int, tuple[Target, ...]]:
        """What an option makes of the layers that may change and still have all of their head groups, by layer.

        Raises:
            UserError: the layers are too small for it, or the profile does not have what it ranks heads by.
        """
        known = self._assigned.get(option)
        if known is None:
            found = entries_of(option, self.shape, self.profile.find, self.lengths, "search.solver")
            known = {layer: targets for layer, targets in found.items() if not self.start[layer].prunes}
            self._assigned[option] = known
        return known

    def error(self, target: Target) -> torch.Tensor:
        """How wrong the outputs of every head group are under a target after its preparation, `[layers, groups]`.

        Raises:
            UserError: it was not prepared.
        """
        for option in self.prepared:
            if option.target == target:
                return option.errors
        raise UserError(
            f"the error of `{target.target}` is not known: it was not prepared",
            where="search.solver",
            expected="one of " + (", ".join(option.target.words() for option in self.prepared) or "none: no `prepare`"),
            found=target.words(),
            fix="name it under `prepare.targets`",
        )

    @property
    def sizes(self) -> tuple[LayerParameters, ...]:
        """Parameters by what they go with, layer by layer."""
        return self.dense.biased_sizes if self.biased else self.dense.sizes

    @property
    def queries(self) -> int:
        """Query heads of a group of the dense model."""
        return self.shape.query_heads // self.shape.kv_heads

    @property
    def score_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the scores of query heads `[layers, groups, query heads a group]`, and of neurons `[layers, neurons]`."""
        shape = self.shape
        return (shape.layers, shape.kv_heads, self.queries), (shape.layers, self.sizes[0].neurons)

    def row(self, kind: str) -> Row | None:
        """The one row of a kind of budget that has no lengths; None where that kind is not limited."""
        return next((row for row in self.rows if row.kind == kind), None)

    @property
    def parameters(self) -> int:
        """Parameters of the decoder layers with nothing removed."""
        groups = self.shape.kv_heads
        return sum(size.rest + groups * size.group + size.neurons * size.neuron for size in self.sizes)

    @property
    def parameters_limit(self) -> int:
        """How many parameters the decoder layers may have.

        Raises:
            UserError: the budget does not say.
        """
        row = self.row("parameters")
        if row is None:
            raise UserError(
                "the budget does not say how many parameters may stay",
                where="search.budget",
                expected="`parameters`, for a solver that removes heads and neurons",
            )
        return row.limit

    def only(self, lengths: Sequence[int]) -> Problem:
        """A copy of the problem with the budget at only some of its lengths."""
        return replace(self, rows=tuple(row for row in self.rows if row.length is None or row.length in lengths))

    def counting(self, targets: Sequence[Target], whole: Sequence[Sequence[Target]] = ()) -> Problem:
        """The same problem, whose rows count exactly what these targets cost, and targets of all groups of a layer.

        Rows of bytes count whole cache pages, which windows fill. A constant state is no whole number of them: the step
        is then the largest number of bytes that divides both.
        """
        problem = replace(self, counted=tuple(targets), whole=tuple(dict.fromkeys(map(tuple, whole))))
        return replace(problem, rows=tuple(map(problem._exactly, self.rows)))

    def _exactly(self, row: Row) -> Row:
        if row.step == 1 or not (self.counted or self.whole):
            return row
        units = {self.unit(layer) for layer, _ in self.free}
        groups = self.shape.kv_heads
        alone = ((target,) * (groups if target.by_layer else 1) for target in self.counted)
        together = (*alone, *self.whole)
        costs = (layer_cost(groups, unit, row.length or 1) for groups in together for unit in units)
        return replace(row, step=math.gcd(row.step, *map(row.exact, costs)))

    def compensated(self) -> Problem:
        """A copy for plans whose projections all get biases, whose parameters count in the budget, too."""
        return replace(self, biased=True)

    @functools.cached_property
    def start(self) -> Layers:
        """What is decided before the search: `base`, or the dense model."""
        return self.base or (LayerPlan(groups=(FULL_GROUP,) * self.shape.kv_heads),) * self.shape.layers

    @functools.cached_property
    def free(self) -> tuple[Place, ...]:
        """(layer, group) of every head group that may change: it stays, and its layer does not slide by itself."""
        return tuple(
            (number, group)
            for number, (layer, native) in enumerate(zip(self.start, self.shape.native_windows, strict=True))
            if native is None
            for group in layer.kept_groups
        )

    def unit(self, number: int, layer: LayerPlan | None = None) -> Unit:
        """A head group of a layer, with the query heads that `layer` leaves it, those of `start` by default."""
        layer = self.start[number] if layer is None else layer
        kept = self.queries if layer.queries is None else len(layer.queries) // len(layer.kept_groups)
        unit = replace(self.shape.unit(number, self.dense.itemsize), query_heads=kept)
        if not self.dense.removes:
            return unit
        size = self.sizes[number]
        return replace(unit, parameters=size.group - (self.queries - kept) * size.query)

    def costs(self, number: int, targets: Sequence[Target], layer: LayerPlan | None = None) -> Amounts:
        """What a head group of a layer costs under each target, in every row: `[targets, rows]`."""
        unit = self.unit(number, layer)
        return np.array([self._cost(unit, (target,)) for target in targets], dtype=np.int64).reshape(-1, len(self.rows))

    def layer_costs(self, number: int, choices: Sequence[Sequence[Target]]) -> Amounts:
        """What all head groups of a layer that stay cost together under each choice of their targets, in every row:
        `[choices, rows]`."""
        unit, layer = self.unit(number), self.start[number]
        drafts = [layer.model_copy(update={"groups": tuple(groups)}) for groups in choices]
        return np.array([self._together(unit, draft) for draft in drafts], dtype=np.int64).reshape(-1, len(self.rows))

    def _together(self, unit: Unit, layer: LayerPlan) -> Amounts:
        """What the head groups of a layer cost in every row, `[rows]`."""
        amounts = np.zeros(len(self.rows), dtype=np.int64)
        for target, count in Counter(group for group in layer.groups if not group.by_layer).items():
            amounts += np.array(self._cost(unit, (target,)), dtype=np.int64) * count
        if joint := tuple(group for group in layer.groups if group.by_layer):
            amounts += np.array(self._cost(unit, joint), dtype=np.int64)
        return amounts

    def _cost(self, unit: Unit, groups: tuple[Target, ...]) -> tuple[int, ...]:
        """What targets in one layer cost together in every row."""
        known = self._costs.get((unit, groups))
        if known is None:
            by_length = {row.length: layer_cost(groups, unit, row.length or 1) for row in self.rows}
            known = self._costs[unit, groups] = tuple(row.cost(by_length[row.length]) for row in self.rows)
        return known

    def parameters_cost(self, count: int) -> Amounts:
        """What so many parameters cost in every row, `[rows]`."""
        return np.array([row.cost(Cost(parameters=count)) for row in self.rows], dtype=np.int64)

    def total(self, layers: Sequence[LayerPlan]) -> Amounts:
        """What all units of some layers cost together in every row, `[rows]`."""
        amounts, parameters = np.zeros(len(self.rows), dtype=np.int64), 0
        for number, layer in enumerate(layers):
            unit = self.unit(number, layer)
            amounts += self._together(unit, layer)
            if self.dense.removes:
                size = self.sizes[number]
                neurons = size.neurons if layer.mlp is None else layer.mlp.kept
                parameters += size.rest + neurons * size.neuron
        return amounts + self.parameters_cost(parameters)

    @property
    def limits(self) -> Amounts:
        """What is allowed in every row, `[rows]`."""
        return np.array([row.most for row in self.rows], dtype=np.int64)

    def amounts(self, cost: Callable[[int], Cost], removes: bool) -> Iterator[Amount]:
        """What a plan costs in every row, in KV bytes at the profiled lengths, and in parameters if it removes any; in
        FLOPs and bytes read, too, where the budget has a kind that says nothing of what is spent.

        Args:
            cost: of the plan, by length in tokens.
        """
        lengths = {*self.budget_lengths, *self.lengths}
        rows = {(row.kind, row.length): row for row in self.rows}
        kinds = (Kv,) if self.counts_spending else (Kv, Flops, BytesRead)
        told = [self._exactly(kind.row(length, 1.0, self.dense)) for kind in kinds for length in lengths]
        for row in (*told, *([Parameters.row(1.0, self.dense)] if removes else [])):
            rows.setdefault((row.kind, row.length), row)
        for row in sorted(rows.values(), key=lambda row: (row.kind, row.length or 0)):
            amount = row.amount_of(cost(row.length or min(lengths)))
            if amount is not None:
                yield amount

    def fits(self, layers: Sequence[LayerPlan]) -> bool:
        """Whether a plan meets the budget in every row."""
        return bool((self.total(layers) <= self.limits).all())

    def thresholds(self, target: Target) -> Thresholds | None:
        """Which thresholds of a target keep which shares of the tokens; None where that was not measured."""
        serving = {option.target.prepared_as: option.retention for option in self.prepared}
        return serving.get(target.prepared_as)

    def placed(self, target: Target, place: Place) -> Target:
        """What a head group has under an option: the same, or with a threshold of its own (`Target.placed`)."""
        return target.placed(self.thresholds(target), *place) if target.open else target

    def anywhere(self, target: Target) -> Target:
        """What a head group has, as an option for all of them; itself where it could not be placed again."""
        return target if self.thresholds(target) is None else target.anywhere

    def with_targets(self, choose: Callable[[Place], Target]) -> Layers:
        """The layers of `start` with a target for every head group that may change, placed there."""
        rows = [list(layer.groups) for layer in self.start]
        for layer, group in self.free:
            rows[layer][group] = self.placed(choose((layer, group)), (layer, group))
        return tuple(
            layer.model_copy(update={"groups": tuple(row)}) for layer, row in zip(self.start, rows, strict=True)
        )

    def with_layers(self, groups: Mapping[int, Sequence[Target]]) -> Layers:
        """The layers of `start`, some of them with other targets for their groups."""
        return tuple(
            layer.model_copy(update={"groups": tuple(groups[number])}) if number in groups else layer
            for number, layer in enumerate(self.start)
        )

    def uniform(self, target: Target) -> Layers:
        """One target for every head group that may change."""
        return self.with_targets(lambda place: target)


def smallest_window(grid: SpanGrid) -> Target:
    """The target of a grid that costs least, in every kind and at every length.

    Pages and visible keys grow with sink, beta and alpha, so it is the smallest in all three.
    """
    windows = [rule.span for rule in grid.rules(1) if not rule.span.is_full]
    return WindowGroup.of(windows[0]) if windows else FULL_GROUP


@dataclass(frozen=True)
class Candidate:
    """One decision of a solver: a whole plan.

    Attributes:
        layers: the decision; in layers that slide by themselves groups are full or removed.
        losses: predicted loss by objective, for instance `{"absolute.2048": 0.3}`; empty where none was predicted.
        gap: how far the solved objective is from the proven optimum at most, relative; None where none was solved.
        note: which of the solver's questions this plan answers.
        importance: the statistic that ranked what is removed; None where nothing is, or it was drawn.
    """

    layers: Layers
    losses: Mapping[str, float] = field(default_factory=dict)
    gap: float | None = None
    note: str = ""
    importance: str | None = None

    @property
    def targets(self) -> list[list[Target]]:
        """What every head group becomes, `[layers][groups]`."""
        return [list(layer.groups) for layer in self.layers]

    @property
    def biased(self) -> bool:
        """Whether something is added in place of what is removed."""
        return any(layer.bias is not None for layer in self.layers)

    def to_plan(self, problem: Problem, provenance: Mapping[str, Any]) -> Plan:
        """The plan file of this decision, with what it costs at the budget's and the profiled lengths."""
        plan = plan_of_layers(problem.shape, self.layers, provenance=dict(provenance))
        dense = problem.dense
        sizes = (dense.biased_sizes if self.biased else dense.sizes) if dense.removes else None

        @functools.cache
        def cost(length: int) -> Cost:
            return plan.cost(length, dense.itemsize, sizes=sizes)

        reports: dict[str, Any] = {}
        for row in problem.rows:
            report = row.report(cost)
            if report is not None and row.kind in reports:
                reports[row.kind]["rows"] += report["rows"]
            elif report is not None:
                reports[row.kind] = report
        amounts = tuple(problem.amounts(cost, plan.prunes))
        loss = list(self.losses.values())[-1] if self.losses else None
        predicted = Predicted(form=plan.form, itemsize=dense.itemsize, amounts=amounts, loss=loss)
        return plan.model_copy(update={"predicted": predicted, "provenance": plan.provenance | reports})
