"""The one door through which texts are read: it has the model at hand, for texts that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.data.text import Part, Source
from compress.plan import ModelShape

Progress = Callable[[int, int, str], None]  # done, total, what


class Loaded(Protocol):
    """What is needed of a `LoadedModel`."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def shape(self) -> ModelShape:
        """Sizes and fingerprint."""


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Reader:
    """Reads texts for one model.

    Attributes:
        loaded: the dense model.
        seed: of what the model writes.
        folder: keeps what the model wrote.
        progress: called with (tokens done, tokens in all, what) while the model writes.
        say: called with a line on what it wrote.
    """

    loaded: Loaded
    seed: int
    folder: Path
    progress: Progress | None = None
    say: Callable[[str], None] = _silent

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.loaded.tokenizer

    def ids(self, source: Source, part: Part, tokens: int) -> Sequence[int]:
        """Token ids of a part of a text, as far as a request for `tokens` tokens can use it. Raises UserError."""
        return source.read(self, part, tokens).ids
