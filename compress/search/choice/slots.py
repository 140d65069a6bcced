"""Slots: head groups of a layer that get one target together, and choices from few targets, as engines ask.

Slots are put together before anything is chosen (`in_slots`), which is quick with any number of targets. With few, all
numbers of slots that each target can have in a layer are tried, and which groups these are follows (`by_counts`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from compress.plan import LayerPlan
from compress.search.choice.options import GroupsOfLayer, HeadGroups, Options
from compress.search.problem import FULL_GROUP
from compress.search.serve import Serve, distinct
from compress.targets.target import Target

CONSIDERED = 6  # targets, the most used ones, of which sets are tried; as many as there may be, where these are more
MOST_COUNTS = 600  # ways to give the slots of a layer targets, regardless of which slot has which, that are listed


def in_slots(options: Sequence[Options], serve: Serve, groups: int) -> list[Options]:
    """The options of slots, from those of head groups; of layers whose groups decide together, as they are.

    Groups that lose alike when they become what is cheapest are put together: in every share the groups are ordered by
    that, and each slot takes the next ones of every share (`Serve.shares`), so that all ranks have the same targets.

    Args:
        options: of head groups or of layers, with the same choices in the same order within a layer; none left out.
        groups: head groups of a layer.
    """
    slots: list[Options] = []
    for number, units in _by_layer(options).items():
        if len(units) < groups:
            slots += units.values()
            continue
        lost = _lost(units)
        ordered = [sorted(share, key=lambda group: (lost[group], group)) for share in serve.shares(groups)]
        for first in range(0, len(ordered[0]), serve.size):
            members = [group for share in ordered for group in share[first : first + serve.size]]
            slots.append(
                Options(
                    HeadGroups(tuple((number, group) for group in members)),
                    units[members[0]].choices,
                    np.sum([units[group].losses for group in members], axis=0),
                    np.sum([units[group].costs for group in members], axis=0),
                )
            )
    return slots


def by_counts(
    options: Sequence[Options], serve: Serve, groups: int, scale: NDArray[np.float64]
) -> list[Options] | None:
    """The options of layers whose groups decide one by one: all numbers of slots that each target can have, with the
    groups that lose least under it; other layers as in `in_slots`. None where these are too many to list.

    For one objective nothing is lost by that. For several the groups are those of the least mean, and those of the
    least loss in each.

    Args:
        options, groups: as of `in_slots`, of few targets.
        scale: of each objective, by which it is divided in the mean, `[objectives]`.
    """
    found: list[Options] = []
    shares = serve.shares(groups)
    for number, units in _by_layer(options).items():
        count, slots = len(next(iter(units.values())).choices), len(shares[0]) // serve.size
        if len(units) < groups or count == 1 or (serve.size == 1 and len(shares) == 1):
            found += in_slots(list(units.values()), serve, groups)
            continue
        if comb(slots + count - 1, slots) > MOST_COUNTS:
            return None
        losses = np.stack([units[group].losses for group in range(groups)])  # [groups, choices, objectives]
        costs = np.stack([units[group].costs for group in range(groups)])
        values = [(losses / scale).mean(-1), *(np.moveaxis(losses, -1, 0) if len(scale) > 1 else ())]
        rows = dict.fromkeys(
            tuple(_assigned(value, shares, np.repeat(chosen, serve.size)).tolist())
            for chosen in combinations_with_replacement(range(count), slots)
            for value in values
        )
        every = np.arange(groups)
        found.append(
            Options(
                GroupsOfLayer((number, 0)),
                tuple(tuple(units[group].choices[index] for group, index in enumerate(row)) for row in rows),
                np.stack([losses[every, row].sum(0) for row in rows]),
                np.stack([costs[every, row].sum(0) for row in rows]),
            )
        )
    return found


def _assigned(value: NDArray[np.float64], shares: Sequence[range], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """The choice of each group, `[groups]`, that loses least where every share has these choices, `[groups a share]`.

    Args:
        value: what each group loses by each choice, `[groups, choices]`.
    """
    chosen = np.empty(len(value), dtype=np.int64)
    for share in shares:
        members, places = linear_sum_assignment(value[share][:, columns])
        chosen[np.array(share)[members]] = columns[places]
    return chosen


def _by_layer(options: Sequence[Options]) -> dict[int, dict[int, Options]]:
    """Options by layer and head group."""
    layers: dict[int, dict[int, Options]] = {}
    for unit in options:
        layers.setdefault(unit.unit.place[0], {})[unit.unit.place[1]] = unit
    return layers


def _lost(units: Mapping[int, Options]) -> dict[int, float]:
    """What each head group of a layer loses under the cheapest option, as a share of what all lose, mean over the
    objectives."""
    costs = np.sum([unit.costs for unit in units.values()], axis=0)
    cheapest = int((costs / np.maximum(costs.max(0), 1)).sum(1).argmin())
    losses = np.stack([unit.losses[cheapest] for unit in units.values()])
    total = np.abs(losses).sum(0)
    shares = (losses / np.where(total > 0, total, 1.0)).mean(1)
    return dict(zip(units, shares.tolist(), strict=True))


def slots_of(layer: LayerPlan, serve: Serve) -> list[tuple[int, ...]]:
    """The head groups of each slot of a layer that is as `serve` asks: of every share those of one target, in order."""
    shares = [
        sorted(share, key=lambda group: (layer.groups.index(layer.groups[group]), group))
        for share in serve.shares(len(layer.groups))
    ]
    return [
        tuple(group for share in shares for group in share[first : first + serve.size])
        for first in range(0, len(shares[0]), serve.size)
    ]


def from_targets(options: Sequence[Options], targets: Collection[Target]) -> list[Options]:
    """The options of each unit that use none but some targets; of layers that slide by themselves, the one there is."""
    some = []
    for unit in options:
        index = [n for n, choice in enumerate(unit.choices) if len(unit.choices) == 1 or _within(unit, choice, targets)]
        choices = tuple(unit.choices[number] for number in index)
        some.append(Options(unit.unit, choices, unit.losses[index], unit.costs[index]))
    return some


def _within(unit: Options, choice: Any, targets: Collection[Target]) -> bool:
    return all(target in targets for target in unit.unit.targets(choice))


def few_targets(
    plans: Iterable[Sequence[LayerPlan]], options: Sequence[Options], serve: Serve
) -> list[frozenset[Target]]:
    """Sets of as many targets as there may be: of those that some plans use most, full attention, and what costs least,
    without which a tight budget cannot be met. Where layers slide by themselves, which counts as full, all have that.

    Args:
        plans: without a limit on the number of targets.
        options: what these were chosen from.
    """
    used = sum((distinct(layers) for layers in plans), Counter[Target]())
    ranked = sorted(used, key=lambda target: (-used[target], target.model_dump_json()))
    considered = ranked[: max(CONSIDERED, serve.spans)]
    widest = max(options, key=lambda unit: len(unit.choices))
    share = (widest.costs / np.maximum(widest.costs.max(0), 1)).sum(1)
    cheapest = widest.unit.targets(widest.choices[int(share.argmin())])
    considered = list(dict.fromkeys([*considered, FULL_GROUP, *cheapest]))
    fixed = {target for unit in options if len(unit.choices) == 1 for target in unit.unit.targets(unit.choices[0])}
    sets = map(frozenset, combinations(considered, min(serve.spans, len(considered))))
    return [targets for targets in sets if fixed <= targets]
