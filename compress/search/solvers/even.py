"""The same option in every layer: how published models with routed heads are, and what a search has to beat."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from compress import registry
from compress.errors import UserError
from compress.registry import solvers
from compress.search.choice.whole import LeastSaving, WholeLayers, nothing_left
from compress.search.problem import Candidate, Layers, Problem
from compress.search.solver import Solver
from compress.targets.layer_option import LayerOption


@solvers.register("even")
class Even(Solver, LeastSaving):
    """One option for all layers, with as much of each layer on as the budget holds.

    Where the number of heads does not divide as the budget has it, some layers, evenly spread, get the next larger one.
    Nothing is priced.
    """

    needs_grid: ClassVar[bool] = False
    chooses_layers: ClassVar[bool] = True
    cheaper: ClassVar[str] = "lower what is shared"

    option: Annotated[LayerOption, registry.layer_options] = Field(
        description="what all layers become, for instance `{option: routed, shared: 0.25, shared_by: taylor}`; how "
        "many units a token chooses follows from the budget"
    )

    def scores_read(self) -> dict[str, str]:
        """What says which heads are shared."""
        return {} if self.option.ranked_by is None else {self.option.ranked_by: "worth"}

    def words(self) -> str:
        """What every layer becomes."""
        return f"{self.registered}, {self.option.words()}"

    def whole_layers(self, problem: Problem) -> WholeLayers:
        """The option with all numbers of units that a token may choose.

        Raises:
            UserError: all of them save too little.
        """
        shape = problem.shape
        whole = self.worthwhile(problem, self.option.ladder(shape.kv_heads, shape.group_size))
        if whole.refused and not whole.options:
            raise nothing_left(whole.refused)
        return whole

    def smallest(self, problem: Problem) -> Layers:
        """With the fewest units; see `Solver.smallest`."""
        return levels_of(problem, self.whole_layers(problem))[-1][1]

    def least_words(self) -> str:
        return "which the fewest units take in every layer"

    def solve(self, problem: Problem) -> list[Candidate]:
        """One plan; see `Solver.solve`."""
        plan = evenly(problem, self.whole_layers(problem))
        if plan is None:
            raise UserError(
                "no number of units that tokens choose meets the budget",
                where="search.budget",
                expected="room for the fewest in every layer",
                fix="raise the budget, or share fewer units",
            )
        return [plan]


def levels_of(problem: Problem, whole: WholeLayers) -> list[tuple[str, Layers]]:
    """Full attention everywhere, and one plan for each option in all layers; in the order of the options."""
    levels = [("full", problem.start)]
    return [*levels, *((option.words(), problem.with_layers(layers)) for option, layers in whole.options.items())]


def evenly(problem: Problem, whole: WholeLayers) -> Candidate | None:
    """The dearest option that fits in all layers, and the next dearer one in as many layers, evenly spread, as fit.

    Args:
        whole: the options, the dearest first.

    Returns:
        None where not even the last one fits.
    """
    levels = levels_of(problem, whole)
    number = next((number for number, (_, layers) in enumerate(levels) if problem.fits(layers)), None)
    if number is None:
        return None
    name, layers = levels[number]
    if number == 0:
        return Candidate(layers, note="full everywhere")
    dearer_name, dearer = levels[number - 1]
    free = [layer for layer in range(problem.shape.layers) if dearer[layer] != layers[layer]]
    for count in range(len(free) - 1, 0, -1):
        raised = {free[(place + 1) * len(free) // count - 1] for place in range(count)}
        mixed = tuple(dearer[layer] if layer in raised else layers[layer] for layer in range(problem.shape.layers))
        if problem.fits(mixed):
            return Candidate(
                mixed, note=f"{name} in {len(free) - count} of {len(free)} layers, {dearer_name} in the rest"
            )
    return Candidate(layers, note=f"{name} in every layer")
