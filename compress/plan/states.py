"""What the states of a plan take, and the length from which they are cheaper than the keys that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from compress.limits import LONGEST
from compress.plan.schema import Form, Plan
from compress.runtime.span import PAGE
from compress.words import size


@dataclass(frozen=True)
class States:
    """The states of constant size that head groups keep.

    Attributes:
        bytes: of one sequence, at every length.
        groups: head groups that have one.
        pays_from: tokens from which on the plan holds fewer bytes than full attention; None where it never does.
    """

    bytes: int
    groups: int
    pays_from: int | None

    @property
    def words(self) -> str:
        """In a sentence, without its end."""
        pays = (
            "at no length does the plan hold fewer bytes than full attention"
            if self.pays_from is None
            else f"from {self.pays_from:,} tokens on the plan holds fewer bytes than full attention"
        )
        many = "1 head group keeps" if self.groups == 1 else f"{self.groups} head groups keep"
        return f"{many} a state of constant size, {size(self.bytes)} in all at every length; {pays}"


def states_of(plan: Plan, itemsize: int = 2, form: Form | None = None) -> States | None:
    """What the states of a plan take; None where no head group has one.

    Args:
        itemsize, form: as of `Plan.cost`.
    """
    held = plan.cost(PAGE, itemsize, form=form).state_bytes
    if not held:
        return None
    groups = 0
    for number, row in enumerate(plan.groups_that_stay()):
        unit = plan.unit(number, itemsize, form or plan.form)
        groups += sum(group.cost(unit, PAGE).state_bytes > 0 for group, _ in row)
    return States(
        held,
        groups,
        pays_from(
            lambda length: plan.cost(length, itemsize, form=form).held_bytes,
            lambda length: plan.dense_cost(length, itemsize).held_bytes,
        ),
    )


def pays_from(held: Callable[[int], int], dense: Callable[[int], int]) -> int | None:
    """The least length in tokens, in whole pages, from which on less is held than by full attention; None up to 2^24.

    Args:
        held, dense: bytes at a length. What is saved may not shrink with the length, and it does not under any rule:
            a page more in the dense cache is at most a page more in another.
    """
    high = 1
    while held(high * PAGE) >= dense(high * PAGE):
        high *= 2
        if high * PAGE > LONGEST:
            return None
    low = high // 2  # pages at which it does not pay
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if held(middle * PAGE) < dense(middle * PAGE) else (middle, high)
    return high * PAGE
