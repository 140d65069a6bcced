"""Slots: head groups of a layer that get one target together, and choices from few targets, as engines ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from compress.plan import LayerPlan
from compress.search.choice.options import HeadGroups, Options
from compress.search.problem import FULL_GROUP
from compress.search.serve import Serve, distinct
from compress.targets.target import Target

CONSIDERED = 6  # targets, the most used ones, of which sets are tried; as many as there may be, where these are more


def in_slots(options: Sequence[Options], serve: Serve, groups: int) -> list[Options]:
    """The options of slots, from those of head groups; of layers whose groups decide together, as they are.

    Groups that lose alike when they become what is cheapest are put together: on every rank the groups are ordered by
    that, and each slot takes the next ones of every rank, so that all ranks have the same targets.

    Args:
        options: of head groups or of layers, with the same choices in the same order within a layer; none left out.
        groups: head groups of a layer.
    """
    layers: dict[int, dict[int, Options]] = {}
    for unit in options:
        layers.setdefault(unit.unit.place[0], {})[unit.unit.place[1]] = unit
    slots: list[Options] = []
    for number, units in layers.items():
        if len(units) < groups:
            slots += units.values()
            continue
        lost = _lost(units)
        ordered = [sorted(share, key=lambda group: (lost[group], group)) for share in serve.shares(groups)]
        for first in range(0, groups // serve.ranks, serve.slot):
            members = [group for share in ordered for group in share[first : first + serve.slot]]
            slots.append(
                Options(
                    HeadGroups(tuple((number, group) for group in members)),
                    units[members[0]].choices,
                    np.sum([units[group].losses for group in members], axis=0),
                    np.sum([units[group].costs for group in members], axis=0),
                )
            )
    return slots


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
    """The head groups of each slot of a layer that is as `serve` asks: on every rank those of one target, in order."""
    shares = [
        sorted(share, key=lambda group: (layer.groups.index(layer.groups[group]), group))
        for share in serve.shares(len(layer.groups))
    ]
    return [
        tuple(group for share in shares for group in share[first : first + serve.slot])
        for first in range(0, len(shares[0]), serve.slot)
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
