"""How far a planned model is from the dense one on documents: KL divergence on the rows that predict the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compress.data.sample import Sample
from compress.errors import UserError
from compress.models.placement import input_device

LIKELIEST = 256  # tokens of the dense model's distribution that are kept apart; all others count as one
BATCH_TOKENS = {"cpu": 1, "cuda": 65_536}  # at least one document


class Divergence:
    """KL(dense || planned) in nats a row, mean over a document's answer rows.

    The dense model's 256 likeliest tokens of a row are compared one by one and all others as one event, which takes
    a hundredth of the memory and is never more than the divergence over the whole vocabulary.

    Args:
        model: the dense model.
        documents: each ends with its answer.

    Raises:
        UserError: no documents, or logits that are not finite.
    """

    def __init__(self, model: Any, documents: Sequence[Sample]) -> None:
        if not documents:
            raise UserError("there are no documents to refine on", where="calibration.documents")
        self.documents = list(documents)
        self.device = input_device(model)
        self.likeliest: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * len(documents)
        with torch.no_grad():  # inference tensors could take no part in a backward pass
            for members in self.batches(range(len(documents))):
                for number, rows in self.answer_logits(model, members):
                    if not bool(torch.isfinite(rows).all()):
                        raise UserError(
                            "the dense model's logits are not finite",
                            where=f"a document of {self.documents[number].length} tokens",
                            fix="run in float32 or bfloat16 instead of float16",
                        )
                    tokens = rows.topk(min(LIKELIEST, rows.shape[-1] - 1)).indices
                    self.likeliest[number] = (_shares(rows, tokens), tokens)

    def batches(self, numbers: Sequence[int] | range) -> Iterator[list[int]]:
        """Documents of one length together, as many as a batch may have tokens."""
        by_length: dict[int, list[int]] = {}
        for number in numbers:
            by_length.setdefault(self.documents[number].length, []).append(number)
        most = BATCH_TOKENS.get(self.device.type, 1)
        for length, members in sorted(by_length.items()):
            size = max(1, most // length)
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def answer_logits(self, model: Any, members: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(document, logits `[rows, classes]` that its loss is taken on) for documents of one length."""
        batch = [self.documents[number] for number in members]
        output = model(**batch[0].together(batch, self.device))
        yield from zip(members, batch[0].logits_of(batch, output), strict=True)

    def of_rows(self, number: int, logits: torch.Tensor) -> torch.Tensor:
        """The divergence of one document, a scalar that gradients go through; `logits` as `answer_logits` gives."""
        dense, tokens = self.likeliest[number]
        planned = _shares(logits, tokens)
        return (dense.exp() * (dense - planned)).sum(-1).mean()

    @torch.no_grad()
    def measure(self, model: Any, numbers: Sequence[int] | None = None) -> dict[int, float]:
        """The divergence of a planned model on each document, by its number."""
        batches = self.batches(range(len(self.documents)) if numbers is None else numbers)
        return {number: value for members in batches for number, value in self.of_batch(model, members)}

    @torch.no_grad()
    def of_batch(self, model: Any, members: Sequence[int]) -> list[tuple[int, float]]:
        """The same on the documents of one batch."""
        return [(number, float(self.of_rows(number, rows))) for number, rows in self.answer_logits(model, members)]

    def by_task(self, measured: Mapping[int, float]) -> dict[str, float]:
        """Mean over the documents of each task."""
        values: dict[str, list[float]] = {}
        for number, value in sorted(measured.items()):
            values.setdefault(self.documents[number].task, []).append(value)
        return {task: sum(losses) / len(losses) for task, losses in values.items()}


def _shares(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log of the probability of some tokens `[rows, n]`, and of all others together; `[rows, n + 1]` float32."""
    logits = logits.float()
    others = logits.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    shares = torch.cat([logits.gather(-1, tokens), others], -1)
    return shares - logits.logsumexp(-1, keepdim=True)
