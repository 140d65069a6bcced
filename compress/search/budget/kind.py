"""What a kind of budget is: its recipe fields, the constraints that they make, and how these are described.

A new kind is one file with a subclass, registered by `@budget_kinds.register("name")`. Its first field has the kind's
name: a recipe that gives it limits the kind.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import Problem
from compress.limits import BYTES, ENTRIES, LONGEST
from compress.plan import Amount
from compress.registry import Method, budget_kinds

if TYPE_CHECKING:
    from compress.search.dense import Dense
    from compress.targets.cost import Cost

Shares = float | dict[int, float] | None


@dataclass(frozen=True)
class Row:
    """One constraint: what all units of a plan may cost together, in whole numbers.

    Attributes:
        kind: the name of its kind of budget.
        unit: what one is called, for instance `bytes`.
        of: what shares are shares of, for instance `the dense KV bytes`.
        length: of the sequence in tokens; None where the cost depends on none.
        limit: what a plan may cost.
        dense: what the dense model costs.
        counts: fields of `Cost`, and how often each counts.
        fixed: what every plan costs besides.
        step: what costs are counted in, for instance the bytes of a cache page: small numbers solve faster.
    """

    kind: str
    unit: str
    of: str
    length: int | None
    limit: int
    dense: int
    counts: tuple[tuple[str, int], ...]
    fixed: int = 0
    step: int = 1

    @property
    def most(self) -> int:
        """What all units may cost together, in steps."""
        return (self.limit - self.fixed) // self.step

    def cost(self, cost: Cost) -> int:
        """What a cost counts in this row, in steps; a part of a step counts as one."""
        return -(-self.exact(cost) // self.step)

    def exact(self, cost: Cost) -> int:
        """The same in the row's unit, nothing rounded."""
        return int(sum(getattr(cost, name) * times for name, times in self.counts))

    def amount(self, steps: int) -> int:
        """What a plan costs whose units cost so many steps, in the row's unit."""
        return steps * self.step + self.fixed

    def fraction(self, steps: int) -> float:
        """The cost of that many steps as a fraction of what the dense model costs."""
        return self.amount(steps) / self.dense

    def describe(self, smallest: int) -> dict[str, Any]:
        """The row in `search/pareto.json`.

        Args:
            smallest: the least that the units of any plan cost, in steps.
        """
        facts = {"limit": self.limit, "dense": self.dense, "smallest": self.amount(smallest)}
        return {"kind": self.kind, "length": self.length, "unit": self.unit, **facts}

    def amount_of(self, cost: Cost) -> Amount | None:
        """What a plan of this cost takes of the kind, beside the dense model; None where `report` says it better."""
        spent = self.amount(self.cost(cost))
        varies = budget_kinds[self.kind].in_expectation and cost.varies
        about = {"spread": cost.spread_bytes, "most": spent + cost.over_bytes} if varies else {}
        facts = {"kind": self.kind, "unit": self.unit, "of": self.of, "length": self.length}
        return Amount(**facts, plan=spent, dense=self.dense, **about)

    def report(self, costs: Callable[[int], Cost]) -> dict[str, Any] | None:
        """What the provenance of a plan says under the kind's name besides its costs; for most kinds nothing.

        What it has under `rows` is a list, and those of all rows of a kind are put together.

        Args:
            costs: of the plan, by length in tokens.
        """
        return None

    def too_tight(self, smallest: int, least: str, cheaper: str) -> Problem:
        """What to say of a row that no plan meets.

        Args:
            smallest: the least that the units of any plan cost, in steps.
            least: what costs that little, in words.
            cheaper: what else to do, so that plans cost less.
        """
        fraction = rounded_up(self.fraction(smallest))
        ways = [f"raise the budget to {fraction:g} or more"] if fraction <= 1 else []  # no share is above the dense one
        if self.length is not None:
            ways += ["budget at longer inputs", cheaper]
        return Problem(
            "no plan meets the budget" + ("" if self.length is None else f" at length {self.length}"),
            f"search.budget.{self.kind}",
            expected=f"at least {fraction:g} of {self.of} ({self.amount(smallest):,} of {self.dense:,} {self.unit}), "
            f"{least}",
            found=f"{self.limit:,} {self.unit}, {self.limit / self.dense:.4g} of {self.of}",
            fix=", or ".join(filter(None, (", ".join(ways[:-1]), ways[-1]))) if ways else cheaper,
        )


class BudgetKind(Method):
    """Base of the kinds. The fields of all of them together are those of `Budget`.

    Attributes:
        reads: fields of `Cost`.
        spent: whether it counts what a plan spends; else a share of it need not save anything.
        newer: whether it came after files were written that name all kinds, which then only do where it is given.
        in_expectation: whether it counts a mean over texts, whose spread and bound are told beside it.
    """

    reads: ClassVar[tuple[str, ...]]
    spent: ClassVar[bool] = True
    newer: ClassVar[bool] = False
    in_expectation: ClassVar[bool] = False

    @classmethod
    def value(cls, budget: Any) -> Any:
        """What a budget gives of this kind; None where it does not."""
        return getattr(budget, cls.registered)

    @classmethod
    def report_lines(cls, report: Mapping[str, Any]) -> list[str]:
        """What its rows report of a plan (`Row.report`, those of all lengths), a sentence each."""
        return []

    @classmethod
    @abstractmethod
    def rows(cls, budget: Any, dense: Dense, profiled: Sequence[int]) -> list[Row]:
        """The constraints of a budget that gives this kind, ascending lengths.

        Args:
            profiled: lengths to take where the budget names none.

        Raises:
            UserError: what the kind needs besides is missing, for instance a cost table.
        """


class ShareByLength(BudgetKind):
    """Base of the kinds that are limited to a share of the dense model's cost, at every length.

    Attributes:
        unit, of: as in `Row`.
        whole_numbers: whether a mapping may give the limit itself, as a number above 1.
    """

    unit: ClassVar[str]
    of: ClassVar[str]
    whole_numbers: ClassVar[bool] = False

    @classmethod
    def rows(cls, budget: Any, dense: Dense, profiled: Sequence[int]) -> list[Row]:
        shares = shares_by_length(cls.value(budget), budget.lengths or profiled)
        return [cls.row(length, given, dense) for length, given in shares.items()]

    @classmethod
    def row(cls, length: int, given: float, dense: Dense) -> Row:
        """The row of one length, of the field that the kind reads.

        A share of 1 also covers the rounding of a length to whole cache pages, so that a plan which changes nothing
        always meets it.
        """
        (name,) = cls.reads
        whole, paged = (getattr(dense.cost(length, paged=paged), name) for paged in (False, True))
        limit = int(given) if given > 1 else max(whole, paged) if given == 1 else math.floor(given * whole)
        step = dense.page_bytes if name.endswith("_bytes") else 1
        return Row(cls.registered, cls.unit, cls.of, length, limit, whole, ((name, 1),), step=step)

    @classmethod
    def check(cls, value: Shares) -> Shares:
        """The value of a recipe, as a validator of its field.

        Raises:
            ValueError: a share that is none, or a length that is none.
        """
        if value is None or (not isinstance(value, dict) and 0 < value <= 1):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"expected a share of {cls.of} in (0, 1], got {value}; half of them is 0.5")
        if not value:
            raise ValueError("expected at least one length")
        if len(value) > ENTRIES:
            raise ValueError(f"expected at most {ENTRIES} lengths, got {len(value)}")
        for length, given in value.items():
            if not 1 <= length <= LONGEST:
                raise ValueError(f"expected lengths of at least 1 token and at most {LONGEST:,}, got {length}")
            whole = cls.whole_numbers and 1 < given <= BYTES and given == int(given)
            if not (0 < given <= 1 or whole):
                most = f" or whole {cls.unit} of at most {BYTES:,}" if cls.whole_numbers else ""
                raise ValueError(f"at length {length}: expected a share in (0, 1]{most}, got {given}")
        return value


def shares_by_length(value: Shares, lengths: Sequence[int]) -> dict[int, float]:
    """The value of a kind at every length, ascending; empty without one."""
    if value is None:
        return {}
    return dict(sorted((value if isinstance(value, Mapping) else dict.fromkeys(lengths, value)).items()))


def rounded_up(fraction: float) -> float:
    """Four digits, so that what a message asks for is enough."""
    return math.ceil(fraction * 10_000) / 10_000
