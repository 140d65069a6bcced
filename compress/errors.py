"""The one exception for what a user can put right: what, where, expected, found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Problem:
    """One thing that is wrong, in the words that the user reads."""

    what: str
    where: str | None = None
    expected: str | None = None
    found: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [
            f"  {label:<9}{text}"
            for label, text in (("expected", self.expected), ("found", self.found), ("do", self.fix))
            if text
        ]
        return "\n".join(lines)


class UserError(Exception):
    """A mistake in the input, reported without a traceback; the command exits with 2.

    Carries one or many `Problem`s, so that all problems of a file are printed at once.
    """

    def __init__(
        self,
        what: str | list[Problem],
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.problems = what if isinstance(what, list) else [Problem(what, where, expected, found, fix)]
        super().__init__("\n".join(str(problem) for problem in self.problems))


class NotFiniteError(UserError, FloatingPointError):
    """Logits or losses that are NaN or infinite: what weights and precision make, not a defect of this program."""

    def __init__(self, what: str, where: str | None = None) -> None:
        super().__init__(
            what,
            where=where,
            expected="finite numbers",
            fix="check that the weights are whole; a model that overflows in float16 runs in bfloat16 or float32",
        )


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Puts a place before those that a `UserError` of the block names: where the value stands that is wrong."""
    try:
        yield
    except UserError as error:
        for problem in error.problems:
            problem.where = f"{place}: {problem.where}" if problem.where else place
        raise UserError(error.problems) from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """'did you mean ...?' for a name that is close to a known one, else None."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"did you mean `{match[0]}`?" if match else None


def one_of(known: Iterable[str], name: str) -> str:
    """`one of ...`, with the nearest of them where a name is close to one, for what was expected in place of it."""
    hint = nearest(name, known := sorted(known))
    return f"one of {', '.join(known)}" + (f"; {hint}" if hint else "")
