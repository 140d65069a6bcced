"""What a refinement may change: targets of head groups, and, where a search removes, groups and neurons themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from compress.plan import LayerPlan
from compress.profile.key import Key
from compress.runtime.span import PAGE
from compress.search.choice.options import HeadGroup, HeadGroups, Options, WholeLayer
from compress.search.choice.removal import PRUNED, Neurons, counted
from compress.search.choice.slots import slots_of
from compress.search.problem import FULL_GROUP, Layers, Problem
from compress.search.serve import Serve, distinct
from compress.targets.target import Target
from compress.targets.window import WindowGroup

STEPS = (-4, -2, -1, 1, 2, 4)  # of a 32nd of the neurons, that a layer may have more or fewer at once
LEAST = 10  # at least one in so many neurons stays


@dataclass(frozen=True)
class Moves:
    """The units of a plan and their options, and what effects have to be known of.

    Attributes:
        problem: with the plan as its start.
        units: what can change; head groups, the slots of an engine, or layers whose groups are decided together, then
            MLPs. Their losses are left out.
        rules: targets `[layers][rules][groups]`; the options of a head group are some of its column, those of a layer
            whole rows.
        picked: by head group or layer, the first units, which rules are its options; the other units are MLPs.
        masks: by layer, the neurons that each step removes `[steps, neurons]`.
    """

    problem: Problem
    units: list[Options]
    rules: list[list[list[Target]]]
    picked: list[list[int]]
    masks: dict[int, torch.Tensor]

    @staticmethod
    def of(problem: Problem, layers: Layers, importance: str | None = None) -> Moves:
        """The moves from a plan within the budget.

        Args:
            importance: the statistic that ranks neurons; without one nothing is removed or comes back.
        """
        problem = replace(problem, base=layers)
        if problem.serve is not None:
            return _of_slots(problem, layers, problem.serve)
        rules = rules_of(problem, layers)
        units, picked = [], list[list[int]]()
        for number, (layer, native) in enumerate(zip(layers, problem.shape.native_windows, strict=True)):
            if native is not None:
                continue
            if any(group.by_layer for group in layer.groups):
                units.append(_whole(problem, number, rules[number]))
                picked.append([rules[number].index(list(choice)) for choice in units[-1].choices])
                continue
            for group in range(problem.shape.kv_heads):
                # Where nothing may be removed, what is removed stays so. The first group of a layer always stays.
                keeps = group == layer.kept_groups[0]
                if layer.groups[group].removes and importance is None:
                    continue
                column = [row[group] for row in rules[number]]
                rows = [
                    index
                    for index, target in enumerate(column)
                    if not (keeps and target.removes) and not target.by_layer
                ]
                targets = [column[index] for index in rows]
                costs = problem.costs(number, targets, layer)
                losses = np.zeros((len(targets), 1))
                units.append(Options(HeadGroup((number, group)), tuple(targets), losses, costs))
                picked.append(rows)
        masks = {}
        if importance is not None:
            scores = problem.profile.tensor(Key(importance, "neurons")).double()
            for number, layer in enumerate(layers):
                unit, steps = _neuron_steps(number, layer, scores[number], problem.dense.neuron_step)
                units.append(counted(problem, unit, steps, [0.0] * len(steps), problem.sizes[number].neuron))
                masks[number] = _removed(unit.order, steps)
        return Moves(problem, units, rules, picked, masks)

    def options_of(self, layers: Sequence[LayerPlan]) -> list[int]:
        """The option of every unit, by index."""
        return [unit.choices.index(unit.unit.read(layers[unit.unit.place[0]])) for unit in self.units]

    def columns(self, groups: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
        """The effects of all options of all units `[samples, documents, columns]`.

        Args:
            groups: `[samples, documents, layers, groups, rules]`.
            neurons: `[samples, documents, layers, steps]`.
        """
        of_groups: list[Any] = self.units[: len(self.picked)]
        of_neurons = self.units[len(self.picked) :]
        parts = [
            unit.unit.of_groups(groups[:, :, unit.unit.place[0]])[..., rows]
            for unit, rows in zip(of_groups, self.picked, strict=True)
        ]
        parts += [neurons[:, :, unit.unit.place[0], : len(unit.choices)] for unit in of_neurons]
        return torch.cat(parts, -1)


def _of_slots(problem: Problem, layers: Layers, serve: Serve) -> Moves:
    """The moves of a plan that an engine serves: whole slots, among the targets that it has, and full attention where
    there may be one more. So it stays as the engine asks."""
    targets = list(distinct(layers))
    if FULL_GROUP not in targets and len(targets) < serve.spans:
        targets.append(FULL_GROUP)
    rules: list[list[list[Target]]] = [[[target] * len(layer.groups) for target in targets] for layer in layers]
    units = []
    for number, (layer, native) in enumerate(zip(layers, problem.shape.native_windows, strict=True)):
        if native is None:
            costs = problem.costs(number, targets, layer)
            for slot in slots_of(layer, serve):
                unit = HeadGroups(tuple((number, group) for group in slot))
                units.append(Options(unit, tuple(targets), np.zeros((len(targets), 1)), costs * len(slot)))
    return Moves(problem, units, rules, [list(range(len(targets)))] * len(units), {})


def rules_of(problem: Problem, layers: Sequence[LayerPlan]) -> list[list[list[Target]]]:
    """Targets to think of, `[layers][rules][groups]`: full, removed where allowed, what was prepared, options of whole
    layers, windows, and the group's own last. Where the profile priced no rules, the targets that it did price are in
    place of the windows.
    """
    first: list[Target] = [FULL_GROUP]
    if problem.dense.removes:
        first.append(PRUNED)
    first += [option.target for option in problem.prepared if not option.target.idle]
    if problem.effects is not None:
        first += [target for target in problem.effects.priced if target.open]
    windows = problem.profile.grid is not None
    if not windows:
        first += [target for target in problem.profile.priced if not target.removes]
    rules = []
    for number, (layer, whole) in enumerate(zip(layers, _layer_rows(problem, layers), strict=True)):
        placed = [[problem.placed(target, (number, group)) for group in range(len(layer.groups))] for target in first]
        rules.append([*placed, *whole, *(_windows(problem, layer.groups) if windows else ()), list(layer.groups)])
    return rules


def _layer_rows(problem: Problem, layers: Sequence[LayerPlan]) -> list[list[list[Target]]]:
    """What whole layers may become, `[layers][options][groups]`; none where the plan has no such layer, and full
    attention in place of it in the layers that are none."""
    routed = [any(group.by_layer for group in layer.groups) for layer in layers]
    options = [problem.entries(option) for option in problem.priced_layers] if any(routed) else []
    rows = []
    for number, (layer, of_layer) in enumerate(zip(layers, routed, strict=True)):
        full: list[Target] = [FULL_GROUP] * len(layer.groups)
        rows.append([list(entries.get(number, full)) if of_layer else full for entries in options])
    return rows


def _whole(problem: Problem, number: int, rules: Sequence[Sequence[Target]]) -> Options:
    """What a layer whose groups are decided together may become: full attention, what it is, and its other options."""
    own = problem.start[number].groups
    choices = [tuple(row) for row in rules if all(group.by_layer for group in row)]
    choices = list(dict.fromkeys([(FULL_GROUP,) * len(own), *choices, own]))
    costs = problem.layer_costs(number, choices)
    return Options(WholeLayer((number, 0), joint=False), tuple(choices), np.zeros((len(choices), 1)), costs)


def _windows(problem: Problem, targets: Sequence[Target]) -> list[list[Target]]:
    """Windows in steps of about a half, `[rules][groups]`, with the group's own sink and growth; with the grid's first
    sink where the group has no window, or one behind which something was trained for it as it is.
    """
    grid, longest = problem.grid, max(problem.budget_lengths)
    alphas, alpha = [], max(grid.alpha_min, PAGE)
    while alpha < longest:
        alphas.append(alpha)
        alpha = max(alpha + PAGE, round(alpha * 2**0.5 / PAGE) * PAGE)

    def window(target: Target, alpha: int) -> Target:
        fixed = target.objective is not None or "alpha" not in type(target).model_fields
        if target.as_built or fixed:
            return WindowGroup(sink=grid.sinks[0], alpha=alpha, beta=0.0)
        changed: Target = target.model_copy(update={"alpha": alpha})
        return changed

    return [[window(target, alpha) for target in targets] for alpha in alphas]


def _neuron_steps(number: int, layer: LayerPlan, scores: torch.Tensor, multiple: int) -> tuple[Neurons, list[int]]:
    """How many neurons of a layer may stay: those that do, some more or fewer, all. The best of the others come first.

    Args:
        scores: `[neurons]`.
        multiple: of which the architecture has numbers of neurons.
    """
    whole = len(scores)
    kept = set(range(whole) if layer.mlp is None else layer.mlp.indices())
    order = sorted(range(whole), key=lambda neuron: (neuron not in kept, -float(scores[neuron]), neuron))
    step = max(multiple, whole // 32 // 8 * 8)
    least = min(len(kept), max(1, whole // LEAST))
    counts = {len(kept), whole, *(len(kept) + times * step for times in STEPS)}
    return Neurons((number, 0), tuple(order)), sorted(count for count in counts if least <= count <= whole)


def _removed(order: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
    """Which neurons each step removes, `[steps, neurons]`."""
    mask = torch.zeros(len(steps), len(order), dtype=torch.bool)
    for row, kept in enumerate(steps):
        mask[row, list(order[kept:])] = True
    return mask
