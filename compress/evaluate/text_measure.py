"""The base of measures over windows of a text: which text they read, and whether it and the model's context suffice."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from compress.data.text import TextSource
from compress.errors import UserError
from compress.evaluate.measure import Measure, Reading, Setting
from compress.limits import STEPS
from compress.words import counted


class TextMeasure(Measure):
    """A measure over windows of held-out text."""

    text: TextSource | None = Field(None, description="where the text comes from; by default the evaluation's text")
    length: int

    @property
    def tokens(self) -> int:
        """Tokens of the text that the windows cover."""
        return self.length

    @property
    def input_lengths(self) -> tuple[int, ...]:
        return (self.length,)

    def readings(self, seed: int) -> list[Reading]:
        return [Reading(self.text, self.tokens, lambda tokenizer, ids, context: self.check_fits(len(ids), context))]

    def read(self, setting: Setting) -> Sequence[int]:
        """Token ids of the text.

        Raises:
            UserError: they are too few, or do not fit the model.
        """
        ids = setting.tokens(self.text or setting.text, self.tokens)
        self.check_fits(len(ids), setting.context)
        named = "" if self.text is None else f"{self.text.source} "
        setting.check(ids, f"the {named}text of the {self.registered}")
        return ids

    def check_fits(self, available: int, context: int | None) -> None:
        """Check the windows against the text and the model.

        Raises:
            UserError: the text has too few tokens, or a window is longer than the model's context.
        """
        where = f"{self.registered} {self.length}"
        if context is not None and self.length > context:
            raise UserError(
                "the windows are longer than the model's context",
                where=where,
                expected=f"length of at most {context} tokens",
                found=f"{self.length} tokens",
            )
        if self.tokens > available:
            raise UserError(
                "the text is too short",
                where=where,
                expected=f"at least {self.tokens} tokens in the evaluation part of the text",
                found=f"{available} tokens",
                fix="ask for fewer or shorter windows, or give a longer text",
            )


class WindowsMeasure(TextMeasure):
    """A measure over windows of held-out text that do not overlap."""

    windows: int = Field(4, ge=1, le=STEPS, description="number of windows, which do not overlap")

    @property
    def tokens(self) -> int:
        return self.length * self.windows

    def words(self) -> str:
        return f"{self.registered} on {counted(self.windows, 'window')} of {self.length:,} tokens"
