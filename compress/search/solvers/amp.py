"""AMP's allocation (arXiv 2504.21174): the same share of heads and neurons in every layer, neurons make it exact.

AMP rounds the number of heads and lets one neuron stand for one head; here a group is worth the neurons that have its
parameters, (2g + 2) x head_dim / 3 of them without biases, so that the budget is met in parameters. All layers get the
same widths, which an ordinary checkpoint can say.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compress.errors import UserError
from compress.registry import solvers
from compress.runtime.widths import Width
from compress.search.choice.removal import TOLERANCE, whole_width
from compress.search.problem import Candidate, Problem
from compress.search.solvers.ranked import Ranked


@solvers.register("amp")
class Amp(Ranked):
    """Removes the units of the lowest scores, equally many in every layer, so that a stock checkpoint can hold it."""

    attention: Annotated[
        tuple[float, ...] | None,
        Field(
            description="shares of the heads to remove, neurons make up the rest of the budget; several are several "
            "plans, of which held-out loss chooses; null is the budget's own share (AMP)"
        ),
    ] = None

    def most_plans(self, lengths: int) -> int:
        """One for each statistic and number of heads; see `Solver.most_plans`."""
        return len(self.statistics_read()) * len(self.attention or (None,))

    def ranked_by(self, name: str, problem: Problem) -> list[Candidate]:
        """One candidate for every different number of heads that meets the budget; see `Ranked.solve`."""
        limit, dense = problem.parameters_limit, problem.dense.parameters
        shares = (1 - limit / dense,) if self.attention is None else self.attention
        units = problem.shape.kv_heads if self.unit == "group" else problem.queries
        counts = sorted({min(max(round(fraction * units), 0), units - 1) for fraction in shares})
        alone = self.protected(problem.shape.layers)
        candidates = []
        for count in counts:
            widths = self.widths(problem, count)
            if widths is not None:
                word = "head groups" if self.unit == "group" else "query heads of every group"
                neurons = problem.sizes[0].neurons
                note = f"{count} of {units} {word} and {neurons - widths.neurons} of {neurons} neurons removed"
                rows = [whole_width(problem, n) if n in alone else widths for n in range(problem.shape.layers)]
                candidates.append(self.candidate(name, problem, rows, note))
        if not candidates:
            least = self.least_neurons(problem, problem.sizes[0].neurons)
            raise UserError(
                "no equal widths of all layers meet the budget",
                where="search.budget.parameters",
                expected=f"at most {limit:,} parameters of the decoder layers",
                found=f"{least} neurons a layer stay at least (`floor`)",
                fix="raise the budget, lower `floor`, or remove more heads (`attention`)",
            )
        return candidates

    def widths(self, problem: Problem, count: int) -> Width | None:
        """The widest MLPs within the budget when `count` units of every attention go; None when there are none."""
        alone = self.protected(problem.shape.layers)
        rows = [sizes for layer, sizes in enumerate(problem.sizes) if layer not in alone]
        whole, limit = problem.sizes[0].neurons, problem.parameters_limit
        if self.unit == "group":
            groups, queries = problem.shape.kv_heads - count, problem.queries
            heads = sum(sizes.removed(count, 0, 0) for sizes in rows)
        else:
            groups, queries = problem.shape.kv_heads, problem.queries - count
            heads = sum(sizes.removed(0, groups * count, 0) for sizes in rows)
        one = sum(sizes.neuron for sizes in rows)
        missing = problem.parameters - limit - heads
        most = whole - max(0, -(-missing // one)) if one else whole
        multiples = self.multiples(problem)
        for multiple in multiples:
            neurons = whole if most == whole else most // multiple * multiple
            below = (whole - neurons) * one - missing
            exact = below <= TOLERANCE * limit
            if (exact or multiple == multiples[-1]) and neurons >= self.least_neurons(problem, whole):
                return Width(groups * queries, groups, neurons)
        return None
