"""What a stage speaks through while it works. The command line prints; a script may stay silent."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

Progress = Callable[[int, int, str], None]  # done, in all, what


class Reporter(Protocol):
    """Where lines for humans and progress go."""

    def say(self, line: str) -> None:
        """One line, exactly as it is."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Shows how far a piece of work is, from entering to leaving."""


class Silent:
    """A reporter that nobody hears."""

    def say(self, line: str) -> None:
        """Nothing."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Counts nothing."""
        return nullcontext(lambda done, total, what: None)
