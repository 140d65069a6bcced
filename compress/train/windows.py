"""Training text in windows of one length, and which of them each step takes: the same for any number of processes."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch

from compress.errors import UserError
from compress.models.context.layout import Layout
from compress.train.token_losses import next_tokens


def check_windows(
    available: int, length: int, context: int | None, section: str = "recover", text: str = "text", size: str = "length"
) -> None:
    """Check that windows fit the model and the text.

    Args:
        available: tokens of the text.
        length: tokens in a window.
        context: the model's longest input; None where it has none.
        section, text, size: of the recipe, and its keys of the text and of the tokens in a window, for the message.

    Raises:
        UserError: a window is longer than the context or than the text.
    """
    if context is not None and length > context:
        raise UserError(
            "the training sequences are longer than the model's context",
            where=f"{section}.{size}",
            expected=f"at most {context} tokens",
            found=f"{length}",
        )
    if available < length:
        raise UserError(
            "the training text is too short",
            where=f"{section}.{text}",
            expected=f"at least one sequence of {length} tokens in the calibration part of the text",
            found=f"{available} tokens",
            fix=f"give a longer text, or a smaller `{section}.{size}`",
        )


def half_and_half(first: Sequence[int], second: Sequence[int], length: int) -> list[int]:
    """Two texts behind one another, cut to the same number of whole windows of `length` tokens."""
    same = min(len(first), len(second)) // length * length
    return [*first[:same], *second[:same]]


class Windows:
    """A text cut into windows; every epoch takes each of them once, in an order of its own.

    Args:
        tokens: token ids; what is left behind the last whole window is not used.
        length: tokens in a window.
        seed: of the order.
    """

    def __init__(self, tokens: Sequence[int], length: int, seed: int) -> None:
        self.length = length
        self.count = len(tokens) // length
        self.table = torch.from_numpy(np.array(tokens[: self.count * length], dtype=np.int64)).view(self.count, length)
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._draw)

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Token ids of a step (from 0) over all processes, `[size, length]`; an epoch may end within a batch."""
        rows = []
        for number in range(step * size, (step + 1) * size):
            epoch, place = divmod(number, self.count)
            rows.append(self._order(epoch)[place])
        return self.table[rows]

    def digest(self, steps: int, size: int) -> str:
        """Hash of all batches of a training, to compare two trainings by."""
        digest = hashlib.sha256()
        for step in range(steps):
            digest.update(self.batch(step, size).numpy().tobytes())
        return digest.hexdigest()

    def _draw(self, epoch: int) -> list[int]:
        return random.Random(f"{self.seed}/recover/{epoch}").sample(range(self.count), self.count)


class WindowBatches:
    """Batches of windows for the training loop.

    Args:
        sequences: in a batch, over all processes.
        most: sequences in one pass; None takes all of a process at once.
        where: key of the recipe that says how many, for the message.
        context: processes that share a sequence.
    """

    unit = "tokens"

    def __init__(
        self,
        windows: Windows,
        sequences: int,
        most: int | None,
        where: str = "recover.batch_size",
        context: int = 1,
    ) -> None:
        self.windows, self.sequences, self.most, self.where = windows, sequences, most, where
        self.size, self.context = sequences * windows.length, context

    def per_process(self, processes: int) -> int:
        """Sequences of a batch in each process, which has all of them or its part of each.

        Raises:
            UserError: the batch does not divide among the processes.
        """
        shares = processes // self.context
        if self.sequences % shares:
            raise UserError(
                "the batch does not divide among the processes",
                where=self.where,
                expected=f"a multiple of {shares}",
                found=f"{self.sequences}",
            )
        return self.sequences // shares

    def passes(self, step: int, processes: int) -> list[list[dict[str, torch.Tensor]]]:
        """Parts `{"input_ids": [sequences, length]}` of the batch of a step (from 0), for every process.

        Where processes share sequences a part has the tokens that are its process's, and what follows each of them in
        its sequence, `next_ids`.
        """
        per_process = self.per_process(processes)
        most = min(self.most or per_process, per_process)
        batch = self.windows.batch(step, self.sequences)
        shares = [process.split(most) for process in batch.split(per_process)]
        if self.context == 1:
            return [[{"input_ids": part} for part in parts] for parts in shares]
        layout = Layout(self.windows.length, self.context)
        columns = [layout.positions(rank) for rank in range(self.context)]
        return [
            [{"input_ids": part[:, here], "next_ids": next_tokens(part)[:, here]} for part in parts]
            for parts in shares
            for here in columns
        ]
