"""What options of whole layers save of a layer, and why one that saves next to nothing is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compress.registry import budget_kinds
from compress.search.budget.bytes_read import BytesRead
from compress.search.budget.flops import Flops
from compress.search.budget.kind import Row
from compress.search.problem import Problem
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target

LEAST = 0.02  # share of a layer's cost below which an option saves too little


@dataclass(frozen=True)
class Saving:
    """What one layer saves in one row of the budget.

    Attributes:
        share: of what the whole layer costs there, its MLP and projections included where the row counts them.
    """

    row: Row
    share: float

    @property
    def words(self) -> str:
        """For instance ``3.3% of a layer's `flops` at 8,192 tokens``."""
        at = "" if self.row.length is None else f" at {self.row.length:,} tokens"
        return f"{self.share:.1%} of a layer's `{self.row.kind}`{at}"


def savings(problem: Problem, number: int, entries: Sequence[Target]) -> list[Saving]:
    """What a layer saves under a target for every head group, in every row of the budget that limits something spent.

    A budget that has none, such as one of active heads alone, is looked at by the FLOPs of a prefill and the bytes that
    a decode step reads.
    """
    rows = tuple(row for row in problem.rows if budget_kinds[row.kind].spent and row.limit < row.dense)
    if not rows:
        dense, lengths = problem.dense, problem.budget_lengths
        rows = tuple(kind.row(length, 1.0, dense) for kind in (Flops, BytesRead) for length in lengths)
    problem = replace(problem, rows=rows).counting((), [entries])
    whole, left = problem.layer_costs(number, [problem.start[number].groups, entries])
    rest = problem.parameters_cost(0)
    if problem.dense.removes:
        size = problem.sizes[number]
        rest = problem.parameters_cost(size.rest + size.neurons * size.neuron)
    found = []
    for row, before, after, beside in zip(rows, whole.tolist(), left.tolist(), rest.tolist(), strict=True):
        cost = row.step * (before + beside) + row.fixed / problem.shape.layers
        found.append(Saving(row, row.step * (before - after) / cost if cost else 0.0))
    return found


def saves_too_little(
    problem: Problem, option: LayerOption, layers: Mapping[int, Sequence[Target]], least: float = LEAST
) -> str | None:
    """Why an option is not worth its place, in a sentence with the figures; None where it saves enough somewhere.

    Args:
        layers: what it makes of the layers that may change, by layer.
        least: share of a layer's cost that has to be saved in one row or more.
    """
    number = next(iter(layers))
    found = savings(problem, number, layers[number])
    best = max(found, key=lambda saving: saving.share, default=None)
    if best is not None and best.share >= least:
        return None
    figures = ", ".join(saving.words for saving in found) or "nothing"
    why = option.little(problem.shape.kv_heads, problem.shape.group_size)
    told = f"{option.words()}: saves {figures}, less than the {least:.3g} that `least_saving` asks for"
    return f"{told}; {why}" if why else told
