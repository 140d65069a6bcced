"""What a search may choose for whole layers, and which of the options it leaves out because they save too little."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from compress.errors import UserError
from compress.registry import Method
from compress.search.choice.saving import LEAST, saves_too_little
from compress.search.problem import Problem
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target


@dataclass(frozen=True)
class WholeLayers:
    """Options of whole layers.

    Attributes:
        options: what they make of the layers that may change, by layer.
        refused: why others are left out, a sentence each.
        flagged: what is to be known of those that are taken all the same, likewise.
    """

    options: dict[LayerOption, dict[int, tuple[Target, ...]]] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    flagged: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """All of that, for the user."""
        return [*(f"not chosen from: {why}" for why in self.refused), *self.flagged]

    @property
    def entries(self) -> list[tuple[Target, ...]]:
        """Everything that a layer may become, each once."""
        return list(dict.fromkeys(targets for layers in self.options.values() for targets in layers.values()))

    def of(self, layer: int) -> list[tuple[LayerOption, tuple[Target, ...]]]:
        """What one layer may become."""
        return [(option, layers[layer]) for option, layers in self.options.items() if layer in layers]


class LeastSaving(Method):
    """Fields of solvers that choose among options of whole layers."""

    least_saving: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of a layer's cost that an option of whole layers, such as routed heads, has to save in "
            "one of the budget's kinds at one of its lengths; others are left out",
        ),
    ] = LEAST
    force: Annotated[bool, Field(description="choose also among options that save less")] = False

    def worthwhile(self, problem: Problem, options: Iterable[LayerOption]) -> WholeLayers:
        """Options with what they make of the layers, without those that save too little.

        Raises:
            UserError: an option does not fit the layers, or the profile does not have what it ranks heads by.
        """
        taken, left, flagged = {}, list[str](), list[str]()
        for option in options:
            layers = problem.entries(option)
            if not layers:
                continue
            why = saves_too_little(problem, option, layers, self.least_saving)
            if why is None or self.force:
                taken[option] = layers
            if why is not None:
                (flagged if self.force else left).append(why)
        return WholeLayers(taken, tuple(left), tuple(flagged))


def nothing_left(refusals: Iterable[str]) -> UserError:
    """The error for a solver all of whose options save too little."""
    return UserError(
        "every option of whole layers saves too little to choose from",
        where="search.solver",
        expected="an option that saves `least_saving` of a layer's cost in a kind of the budget at one of its lengths",
        found="; ".join(refusals),
        fix="choose longer `lengths`, other options or another kind of budget; `force: true` takes them all the same",
    )
