"""Training text in windows of one length, and which of them each step takes: the same for any number of processes."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence

import torch

from compress.errors import UserError


def check_windows(available: int, length: int, context: int | None) -> None:
    """Check that windows fit the model and the text.

    Args:
        available: tokens of the text.
        length: tokens in a window.
        context: the model's longest input; None where it has none.

    Raises:
        UserError: a window is longer than the context or than the text.
    """
    if context is not None and length > context:
        raise UserError(
            "the training sequences are longer than the model's context",
            where="recover.length",
            expected=f"at most {context} tokens",
            found=f"{length}",
        )
    if available < length:
        raise UserError(
            "the training text is too short",
            where="recover.text",
            expected=f"at least one sequence of {length} tokens in the calibration part of the text",
            found=f"{available} tokens",
            fix="give a longer text, or a smaller `recover.length`",
        )


class Windows:
    """A text cut into windows; every epoch takes each of them once, in an order of its own.

    Args:
        tokens: token ids; what is left behind the last whole window is not used.
        length: tokens in a window.
        seed: of the order.
    """

    def __init__(self, tokens: Sequence[int], length: int, seed: int) -> None:
        self.count = len(tokens) // length
        self.table = torch.tensor(list(tokens[: self.count * length])).view(self.count, length)
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Token ids of a step (from 0) over all processes, `[size, length]`; an epoch may end within a batch."""
        chosen = []
        for number in range(step * size, (step + 1) * size):
            epoch, place = divmod(number, self.count)
            chosen.append(self._order(epoch)[place])
        return self.table[chosen]

    def digest(self, steps: int, size: int) -> str:
        """Hash of all batches of a training, to compare two trainings by."""
        digest = hashlib.sha256()
        for step in range(steps):
            digest.update(self.batch(step, size).numpy().tobytes())
        return digest.hexdigest()

    def _draw(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/recover/{epoch}").sample(range(self.count), self.count)
