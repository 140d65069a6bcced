"""Options: what each unit can become, with losses and costs, dominated ones removed exactly; windows of head groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.plan import LayerPlan
from compress.profile.key import Key
from compress.runtime.span import AnySpan
from compress.search.problem import FULL_GROUP, Layers, Place, Problem
from compress.targets.target import Target
from compress.targets.window import Rule, WindowGroup

if TYPE_CHECKING:
    import torch

BLOCK = 128  # rows compared at once, so that memory stays at BLOCK x kept rows


@dataclass(frozen=True)
class Objective:
    """One loss to minimise: a weighted sum of rule tables of the profile at one length.

    Every table is divided by what the smallest rule loses in all groups together, so weights of 1 weigh alike; the sum
    has the unit of the first table.

    Attributes:
        tables: (name, weight) of rule tables, for instance `influence.absolute` or `retrieval.lost`; the tensor of the
            profile is `<name>.<length>`.
        length: the profiled length in tokens.
    """

    tables: tuple[tuple[str, float], ...]
    length: int

    @property
    def name(self) -> str:
        """How the objective is called in files, for instance `absolute+retrieval.lost.2048`."""
        return f"{'+'.join(name.removeprefix('influence.') for name, _ in self.tables)}.{self.length}"


class Decided(Protocol):
    """What a decision is about: a head group, the heads of a layer, or its neurons."""

    @property
    def place(self) -> Place:
        """Index of the layer, and of the unit in it."""

    @property
    def joint(self) -> bool:
        """Whether it stands for all head groups of its layer, which otherwise decide one by one."""

    @property
    def decides_groups(self) -> bool:
        """Whether it says what head groups become."""

    def put(self, draft: dict[str, Any], choice: Any) -> None:
        """Write a choice into the fields of a `LayerPlan`; `groups` is a list."""

    def read(self, layer: LayerPlan) -> Any:
        """The choice that a layer has made."""

    def targets(self, choice: Any) -> tuple[Target, ...]:
        """What a choice makes of head groups."""


@dataclass(frozen=True)
class HeadGroup:
    """One head group; a choice is its target."""

    place: Place
    joint: ClassVar[bool] = False
    decides_groups: ClassVar[bool] = True

    def put(self, draft: dict[str, Any], choice: Target) -> None:
        """The target of the group."""
        draft["groups"][self.place[1]] = choice

    def targets(self, choice: Any) -> tuple[Target, ...]:
        """See `Decided.targets`."""
        return (choice,)

    def read(self, layer: LayerPlan) -> Target:
        """The target of the group."""
        return layer.groups[self.place[1]]

    def of_groups(self, values: torch.Tensor) -> torch.Tensor:
        """Its part of what the head groups of its layer have, `[..., groups, n]` to `[..., n]`."""
        return values[..., self.place[1], :]


@dataclass(frozen=True)
class HeadGroups:
    """Some head groups of one layer that get the same target, as an engine has them in one slot; a choice is that."""

    places: tuple[Place, ...]
    joint: ClassVar[bool] = False
    decides_groups: ClassVar[bool] = True

    @property
    def place(self) -> Place:
        """Of the first."""
        return self.places[0]

    def put(self, draft: dict[str, Any], choice: Target) -> None:
        """The target of the groups."""
        for _, group in self.places:
            draft["groups"][group] = choice

    def targets(self, choice: Any) -> tuple[Target, ...]:
        """See `Decided.targets`."""
        return (choice,)

    def read(self, layer: LayerPlan) -> Target:
        """The target of the groups."""
        return layer.groups[self.place[1]]

    def of_groups(self, values: torch.Tensor) -> torch.Tensor:
        """What they have together of what the head groups of their layer have, `[..., groups, n]` to `[..., n]`."""
        return values[..., [group for _, group in self.places], :].sum(-2)


@dataclass(frozen=True)
class GroupsOfLayer:
    """All head groups of a layer that stay; a choice is one option for all of them, placed in each."""

    place: Place
    joint: ClassVar[bool] = False
    decides_groups: ClassVar[bool] = True

    def put(self, draft: dict[str, Any], choice: Sequence[Target]) -> None:
        """The targets of the groups that are not removed."""
        targets = iter(choice)
        draft["groups"][:] = [group if group.removes else next(targets) for group in draft["groups"]]

    def targets(self, choice: Any) -> tuple[Target, ...]:
        """See `Decided.targets`."""
        return tuple(choice)

    def read(self, layer: LayerPlan) -> tuple[Target, ...]:
        """The targets of the groups that are not removed."""
        return tuple(layer.groups[group] for group in layer.kept_groups)


@dataclass(frozen=True)
class WholeLayer:
    """All head groups of a layer together; a choice is a target for each of them.

    Attributes:
        joint: whether they may also decide one by one.
    """

    place: Place
    joint: bool = True
    decides_groups: ClassVar[bool] = True

    def put(self, draft: dict[str, Any], choice: Sequence[Target]) -> None:
        """The targets of all groups."""
        draft["groups"][:] = choice

    def targets(self, choice: Any) -> tuple[Target, ...]:
        """See `Decided.targets`."""
        return tuple(choice)

    def read(self, layer: LayerPlan) -> tuple[Target, ...]:
        """The targets of all groups."""
        return tuple(layer.groups)

    def of_groups(self, values: torch.Tensor) -> torch.Tensor:
        """What the head groups of its layer have together, `[..., groups, n]` to `[..., n]`."""
        return values.sum(-2)


@dataclass(frozen=True)
class Options:
    """What one unit can become: options with their losses and costs.

    Attributes:
        unit: what the decision is about.
        choices: what the unit can become, as it reads them.
        losses: `[choices, objectives]`, in the unit of the objective.
        costs: `[choices, rows]`, what the unit costs in every row of the problem.
    """

    unit: Decided
    choices: tuple[Any, ...]
    losses: NDArray[np.float64]
    costs: NDArray[np.int64]

    def kept(self, always: int = 0) -> Options:
        """Without the options that another one beats in every loss and cost; the one at `always` stays, but where
        the unit need not choose any."""
        index = nondominated(np.concatenate([self.losses, self.costs], axis=1))
        index = index if self.unit.joint else np.union1d(index, [always])
        return Options(self.unit, tuple(self.choices[i] for i in index), self.losses[index], self.costs[index])

    def with_choice(self, choice: Any, losses: Sequence[float], costs: Sequence[int]) -> Options:
        """With one option more, the last."""
        return Options(
            self.unit, (*self.choices, choice), np.vstack([self.losses, losses]), np.vstack([self.costs, costs])
        )


def by_layer(options: Sequence[Options]) -> list[Options]:
    """The options of whole layers, from those of their head groups, which may choose the same in the same order."""
    layers: dict[int, list[Options]] = {}
    for unit in options:
        layers.setdefault(unit.unit.place[0], []).append(unit)
    return [
        Options(
            GroupsOfLayer((layer, 0)),
            tuple(zip(*(unit.choices for unit in units), strict=True)),
            np.sum([unit.losses for unit in units], axis=0),
            np.sum([unit.costs for unit in units], axis=0),
        )
        for layer, units in layers.items()
    ]


def in_place_of(options: Sequence[Options]) -> dict[int, list[int]]:
    """Of every unit that stands for others, by number, the numbers of these; see `Knapsack`."""
    groups: dict[int, list[int]] = {}
    for number, unit in enumerate(options):
        if unit.unit.decides_groups and not unit.unit.joint:
            groups.setdefault(unit.unit.place[0], []).append(number)
    return {number: groups[unit.unit.place[0]] for number, unit in enumerate(options) if unit.unit.joint}


def layers_of(problem: Problem, options: Sequence[Options], choice: Sequence[int]) -> Layers:
    """The layers of a problem with one choice of every unit, by index; -1 where another unit decides."""
    drafts = [{**dict(layer), "groups": list(layer.groups)} for layer in problem.start]
    for unit, index in zip(options, choice, strict=True):
        if index >= 0:
            unit.unit.put(drafts[unit.unit.place[0]], unit.choices[index])
    return tuple(LayerPlan(**{**draft, "groups": tuple(draft["groups"])}) for draft in drafts)


def choice_of(options: Sequence[Options], layers: Layers) -> list[int]:
    """The choice of every unit in a plan, by index; -1 as in `Solution.choice`."""
    joint = in_place_of(options)
    choice = [-1] * len(options)
    decided = set()
    for number, members in joint.items():
        unit, read = options[number], options[number].unit.read(layers[options[number].unit.place[0]])
        if read in unit.choices:
            choice[number] = unit.choices.index(read)
            decided |= set(members)
    for number, unit in enumerate(options):
        if number not in decided and number not in joint:
            choice[number] = unit.choices.index(unit.unit.read(layers[unit.unit.place[0]]))
    return choice


def losses_of(options: Sequence[Options], layers: Layers) -> NDArray[np.float64]:
    """What the options of a plan lose together, by objective."""
    chosen = zip(options, choice_of(options, layers), strict=True)
    losses: NDArray[np.float64] = np.sum([unit.losses[index] for unit, index in chosen if index >= 0], axis=0)
    return losses


def room(problem: Problem, options: Sequence[Options]) -> NDArray[np.int64]:
    """What some units may cost together in every row, beside what all plans cost: `[rows]`."""
    first = layers_of(problem, options, [-1 if unit.unit.joint else 0 for unit in options])
    fixed = problem.total(first) - np.sum([unit.costs[0] for unit in options if not unit.unit.joint], axis=0)
    return problem.limits - fixed


def nondominated(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the rows that no other row is at most equal to in every column; ascending.

    Of equal rows the first is kept. Exact: rows are visited in lexicographic order, in which a row can only be
    dominated by an earlier one, and compared with all that were kept.

    Args:
        rows: `[rows, columns]`, smaller is better in every column.
    """
    order = np.lexsort((np.arange(len(rows)), *rows.T[::-1]))
    kept: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        beaten = (rows[kept][:, None] <= rows[block][None]).all(-1).any(0)
        block = block[~beaten]
        inside = (rows[block][:, None] <= rows[block][None]).all(-1)
        block = block[~np.triu(inside, 1).any(0)]
        kept = np.concatenate([kept, block])
    return np.sort(kept)


def rule_losses(table: torch.Tensor, rules: Sequence[Rule]) -> NDArray[np.float64]:
    """Losses `[layers, kv_heads, rules]` out of an influence table `[layers, kv_heads, sinks, betas, alphas]`.

    Full attention, and alphas beyond the table's last (which already hides nothing at the table's length), are 0.
    """
    values = table.double().numpy()
    losses = np.zeros((*values.shape[:2], len(rules)))
    for number, rule in enumerate(rules):
        if rule.index is not None and rule.index[2] < values.shape[4]:
            losses[:, :, number] = values[:, :, *rule.index]
    return losses


def window_options(
    problem: Problem, objectives: Sequence[Objective], rule: Literal["position", "length"] = "position"
) -> list[Options]:
    """Full attention and the windows of the grid for every head group that stays, layer by layer; dominated ones, too.

    A layer with a sliding window of its own has only `full`, which there means the model's own window.

    Args:
        rule: what a beta is a share of. A rule by length is at every length a fixed window, and has the loss and the
            pages of that; the loss is of the next smaller window where the grid has no such alpha.

    Raises:
        UserError: a table is missing, does not have the shape that model and grid ask for, or is not finite, or
            there are no fixed windows to price rules by length with.
    """
    spans, priced = _rules(problem, objectives, rule)
    targets: list[Target] = [FULL_GROUP if span.is_full else WindowGroup.of(span) for span in spans]
    losses = np.stack(
        [rule_losses(_table(problem, objective), rules) for objective, rules in zip(objectives, priced, strict=True)],
        axis=-1,
    )
    free, options = set(problem.free), []
    for number, layer in enumerate(problem.start):
        costs = problem.costs(number, targets)
        for group in layer.kept_groups:
            place = (number, group)
            if place in free:
                options.append(Options(HeadGroup(place), tuple(targets), losses[number, group], costs))
            else:
                zero = np.zeros((1, len(objectives)))
                options.append(Options(HeadGroup(place), (FULL_GROUP,), zero, costs[:1]))
    return options


def _rules(
    problem: Problem, objectives: Sequence[Objective], rule: Literal["position", "length"]
) -> tuple[list[AnySpan], list[list[Rule]]]:
    """The spans to choose from, full attention first, and for every objective the rules that price them there.

    What sees most comes first, so that of two spans that are equal at all known lengths the more careful one stays.
    """
    grid, profiled = problem.grid, max(problem.lengths)
    if rule == "position":
        first, *rest = grid.rules(profiled)
        rules = [first, *sorted(rest, key=lambda rule: _careful(rule.span))]
        return [rule.span for rule in rules], [rules] * len(objectives)
    full, *windows = grid.length_spans(profiled, {*problem.lengths, *problem.budget_lengths})
    spans = [full, *sorted(windows, key=_careful)]
    at = [objective.length for objective in objectives]
    return spans, [[grid.fixed_rule(span.at_length(length), length) for span in spans] for length in at]


def _careful(span: AnySpan) -> tuple[float, int, int]:
    return -span.beta, -span.alpha, -span.sink


def _table(problem: Problem, objective: Objective) -> torch.Tensor:
    """The loss of every rule, `[layers, kv_heads, sinks, betas, alphas]`."""
    tables = [_checked(problem, Key.parse(name).at(objective.length), objective.length) for name, _ in objective.tables]
    if len(tables) == 1:
        return tables[0]
    # The first sink, beta and alpha are the smallest rule. Signed influence may be negative, so its size is taken.
    sizes = [table[:, :, 0, 0, 0].abs().sum() for table in tables]
    total = tables[0] * 0
    for table, size, (name, weight) in zip(tables, sizes, objective.tables, strict=True):
        if not size > 0:
            raise UserError(
                f"every rule costs nothing in `{name}`, so this table cannot rank rules",
                where=f"profile: {name}.{objective.length}",
                expected="documents on which the smallest rule of the grid loses something; for `retrieval.lost` "
                "recall documents whose evidence lies beyond the smallest window",
                fix="profile longer documents, or leave the table out of the solver",
            )
        total = total + weight * (sizes[0] / size) * table
    return total


def _checked(problem: Problem, key: Key, length: int) -> torch.Tensor:
    """One rule table, checked against model and grid."""
    table = problem.profile.tensor(key)
    shape, grid = problem.shape, problem.grid
    expected = (
        shape.layers,
        shape.kv_heads,
        len(grid.sinks),
        len(grid.betas),
        len(grid.alphas(length)),
    )
    if tuple(table.shape) != expected:
        raise UserError(
            "a rule table does not fit the model and the span grid",
            where=f"profile: {key}",
            expected=f"shape {list(expected)}",
            found=f"shape {list(table.shape)}",
            fix="profile again with `--overwrite`",
        )
    if not bool(table.isfinite().all()):
        raise UserError(
            "a rule table has values that are not finite",
            where=f"profile: {key}",
            fix="profile again in float32",
        )
    return table.cpu()
