"""One calibration or evaluation document: tokens, where the answer is, and where its evidence lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """Tokens with an answer at the end.

    Attributes:
        tokens: token ids of prompt and answer together.
        answer: half-open token range [start, end) of the answer; the loss is taken on these tokens only.
        evidence: half-open token ranges that the answer has to be read from (pass key, value line); may be empty.
        task: name of the task that made it.
        expected: the right answer as text, None where there is none (plain continuation).
        depth: where the evidence lies, 0 at the start to 1 just before the question; None without evidence.
    """

    tokens: tuple[int, ...]
    answer: tuple[int, int]
    evidence: tuple[tuple[int, int], ...] = ()
    task: str = "text"
    expected: str | None = None
    depth: float | None = None

    @property
    def length(self) -> int:
        """Number of tokens, answer included."""
        return len(self.tokens)
