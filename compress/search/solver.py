"""What every solver is: a registered method whose fields are recipe keys, and which answers a problem."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from compress.errors import UserError
from compress.registry import Method, budget_kinds, solvers
from compress.search.choice.whole import WholeLayers
from compress.search.problem import Amounts, Candidate, Layers, Problem, smallest_window
from compress.targets.target import Target


class Solver(Method):
    """Base of every solver: its fields are recipe keys, and `solve` answers a problem.

    Attributes:
        stem: what its plans are called in a run folder, with a number behind.
        placed: whether its plans are compared with the same targets in drawn places, and in whole layers; those with
            trained targets always are.
        needs_grid: whether it reads the grid of rules that statistics price, be it for the smallest window alone; of a
            solver of spans.
        chooses_layers: whether it chooses what whole layers become, so that tokens may compute fewer heads.
        takes_removal: whether it has a `removal`, with which it removes heads and neurons beside windows.
        slots: whether its plans are as an engine asks, where a recipe says so (`search.serve`).
        cheaper: what to do besides, where its smallest plan is beyond the budget.
        other_scores: names that it reads beside those of statistics, where they are measured.
    """

    stem: ClassVar[str] = "pareto"
    placed: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    chooses_layers: ClassVar[bool] = False
    takes_removal: ClassVar[bool] = False
    slots: ClassVar[bool] = False
    cheaper: ClassVar[str] = "profile a grid with a smaller sink or alpha_min"
    other_scores: ClassVar[tuple[str, ...]] = ()

    @property
    def spans(self) -> bool:
        """Whether it chooses among the targets of head groups that stay."""
        return True

    @property
    def removes(self) -> bool:
        """Whether it removes heads and neurons."""
        return False

    @property
    def sinks(self) -> tuple[int, ...] | None:
        """Tokens at the start that its windows leave visible, each number that it may choose; None where its windows
        are those of the profile's grid."""
        return None

    @property
    def named(self) -> tuple[Target, ...]:
        """Targets that its own fields name, which it then chooses from in place of those priced or prepared."""
        return ()

    def budgets(self) -> list[str]:
        """The kinds of budget that it can meet: what counts parameters alone only by removing, all others by spans; one
        that counts nothing spent, only by what whole layers become."""
        return [
            name
            for name, kind in budget_kinds.items()
            if (self.removes if set(kind.reads) == {"parameters"} else self.spans)
            and (kind.spent or self.chooses_layers)
        ]

    def most_plans(self, lengths: int) -> int:
        """The most plans that `solve` gives for a profile with so many lengths, for estimates of the time."""
        return 1

    @property
    def ranks(self) -> str | None:
        """The statistic that says what heads and neurons are worth, the first of several; None where none is read."""
        return next((name for name, form in self.scores_read().items() if form == "units"), None)

    def smallest(self, problem: Problem) -> Layers:
        """The plan that costs least of all that it may choose, in every row."""
        return problem.uniform(smallest_window(problem.grid))

    def words(self) -> str:
        """What it decides, in a few words, for a list of stages; its name where that says enough."""
        return self.registered

    def choices(self, problem: Problem) -> Sequence[Target]:
        """Targets that it may choose beside windows, whose bytes the budget is to count exactly."""
        return ()

    def whole_layers(self, problem: Problem) -> WholeLayers:
        """What it may choose for whole layers, which the budget is to count exactly, too."""
        return WholeLayers()

    def least_amounts(self, problem: Problem) -> Amounts:
        """The least that any of its plans takes in each row, `[rows]`: of `smallest`, or less where no one plan is the
        smallest in every row."""
        return problem.total(self.smallest(problem))

    def least_words(self) -> str:
        """What the smallest plan is, in words."""
        if not self.removes:
            return "which the smallest rule of the profile's span grid takes in every head group"
        least = "which one head group a layer under the smallest rule of the profile's span grid and the least "
        return least + "neurons (`floor`) take"

    def written(self, candidate: Candidate) -> dict[str, Any]:
        """What a plan of it says of its solver: name and fields."""
        return solvers.written(self)

    def check(self, problem: Problem) -> list[Candidate]:
        """Refuse what no profile would change, of which only zeros are known here: a budget that no plan meets.

        Returns:
            Plans that it finds by these zeros; none where it needs a table of rules.

        Raises:
            UserError: a problem for every row that even the smallest plan exceeds.
        """
        if self.spans:
            check_rows(problem, self.least_amounts(problem), self)
        return [] if "rules" in self.scores_read().values() else self.solve(problem)

    @abstractmethod
    def solve(self, problem: Problem) -> list[Candidate]:
        """One or more plans that meet the budget in every row, none dominated by another.

        The same problem gives the same plans. Which of several is used is decided by measurement afterwards.

        Raises:
            UserError: no plan meets the budget, or the profile lacks a statistic that the solver needs.
        """


def check_rows(problem: Problem, amounts: Amounts, solver: Solver) -> None:
    """Raise one UserError with a problem for every row that no plan of a solver can meet.

    Args:
        amounts: the least that one takes in each row.
    """
    least = solver.least_words()
    if any(problem.shape.native_windows):
        least += ", beside the layers that slide by themselves"
    problems = [
        row.too_tight(int(amount), least, solver.cheaper)
        for row, amount in zip(problem.rows, amounts, strict=True)
        if amount > row.most
    ]
    if problems:
        raise UserError(problems)
