"""What a stage speaks through while it works. The command line prints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

Progress = Callable[[int, int, str], None]  # done, in all, what


class Reporter(Protocol):
    """Where lines for humans and progress go."""

    def say(self, line: str) -> None:
        """One line, exactly as it is."""

    def progress(self, title: str) -> AbstractContextManager[Progress]:
        """Shows how far a piece of work is, from entering to leaving."""
