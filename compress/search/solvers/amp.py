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
from compress.search.removal import MULTIPLES, TOLERANCE, PrunedCandidate, PruningProblem, PruningSolver, Widths


@solvers.register("amp")
class Amp(PruningSolver):
    """The lowest scores of every layer go, the same numbers in each, so that a stock checkpoint holds the result."""

    attention: Annotated[
        tuple[float, ...] | None,
        Field(
            description="shares of the heads to remove, neurons make up the rest of the budget; several are several "
            "plans, of which held-out loss chooses; null is the budget's own share (AMP)"
        ),
    ] = None

    def ranked_by(self, name: str, problem: PruningProblem) -> list[PrunedCandidate]:
        """One candidate for every different number of heads that meets the budget; see `PruningSolver.solve`."""
        problem = self.counted(problem)
        removed = 1 - problem.most / problem.block
        shares = (removed,) if self.attention is None else self.attention
        units = problem.shape.kv_heads if self.unit == "group" else problem.share
        counts = sorted({min(max(round(share * units), 0), units - 1) for share in shares})
        found = []
        for count in counts:
            widths = self.widths(problem, count)
            if widths is not None:
                word = "head groups" if self.unit == "group" else "query heads of every group"
                gone = f"{problem.neurons - widths.neurons} of {problem.neurons} neurons"
                note = f"{count} of {units} {word} and {gone} removed"
                alone = self.protected(problem.shape.layers)
                whole = Widths(problem.shape.kv_heads, problem.share, problem.neurons)
                rows = [whole if layer in alone else widths for layer in range(problem.shape.layers)]
                found.append(self.candidate(name, problem, rows, note))
        if not found:
            raise UserError(
                "no equal widths of all layers meet the budget",
                where="search.budget.parameters",
                expected=f"at most {problem.most:,} parameters of the decoder layers",
                found=f"{self.least_neurons(problem)} neurons a layer stay at least (`floor`)",
                fix="raise the budget, lower `floor`, or remove more heads (`attention`)",
            )
        return found

    def widths(self, problem: PruningProblem, count: int) -> Widths | None:
        """The widest MLPs within the budget when `count` units of every attention go; None when there are none."""
        alone = self.protected(problem.shape.layers)
        rows = [sizes for layer, sizes in enumerate(problem.sizes) if layer not in alone]
        if self.unit == "group":
            groups, queries = problem.shape.kv_heads - count, problem.share
            heads = sum(sizes.removed(count, 0, 0) for sizes in rows)
        else:
            groups, queries = problem.shape.kv_heads, problem.share - count
            heads = sum(sizes.removed(0, groups * count, 0) for sizes in rows)
        one = sum(sizes.neuron for sizes in rows)
        missing = problem.whole - problem.most - heads
        most = problem.neurons - max(0, -(-missing // one)) if one else problem.neurons
        multiples = MULTIPLES if self.multiple is None else (self.multiple,)
        for multiple in multiples:
            neurons = problem.neurons if most == problem.neurons else most // multiple * multiple
            below = (problem.neurons - neurons) * one - missing
            exact = below <= TOLERANCE * problem.most
            if (exact or multiple == multiples[-1]) and neurons >= self.least_neurons(problem):
                return Widths(groups, queries, neurons)
        return None
