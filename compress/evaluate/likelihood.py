"""Log-likelihoods of many continuations at once: packed by length, with logits at their positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from compress.evaluate.device import device_name
from compress.evaluate.requests import Answer, AnswerFile, Request, RequestFile
from compress.models.placement import input_device

Ids = tuple[int, ...]


@torch.inference_mode()
def score(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Sum of ln p over each continuation, and whether it is the greedy one, in the order of the requests.

    Computes what lm-eval's `HFLM` does, with softmax in float32. Inputs that occur more than once, as with choices of
    one token each, run once. They are padded on the right, which a causal model never sees from the left of it, so no
    mask is needed and attention takes its fast path.

    Args:
        model: a causal language model of transformers, on any device.
        batch_tokens: tokens of a batch with its padding; a longer input is a batch of its own.
        progress: called with (inputs done, inputs in all).
    """
    owners: dict[Ids, list[int]] = {}
    for number, request in enumerate(requests):
        owners.setdefault((*request.context_ids, *request.continuation_ids)[:-1], []).append(number)
    device = input_device(model)
    total = torch.zeros(len(requests), dtype=torch.float64, device=device)
    misses = torch.zeros(len(requests), dtype=torch.int64, device=device)
    done = 0
    for inputs in _batches(sorted(owners, key=len, reverse=True), batch_tokens):
        longest = len(inputs[0])
        positions: list[int] = []
        tokens: list[int] = []
        targets: list[int] = []
        for row, ids in enumerate(inputs):
            for number in owners[ids]:
                continuation = requests[number].continuation_ids
                end = row * longest + len(ids)
                positions += range(end - len(continuation), end)
                tokens += continuation
                targets += [number] * len(continuation)
        padded = torch.tensor([ids + (0,) * (longest - len(ids)) for ids in inputs], device=device)
        wanted, owner = torch.tensor(tokens, device=device), torch.tensor(targets, device=device)
        logits = _logits(model, padded, torch.tensor(positions, device=device)).float()
        chosen = logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)
        total.index_add_(0, owner, chosen.double())
        misses.index_add_(0, owner, (logits.argmax(dim=1) != wanted).long())
        done += len(inputs)
        if progress is not None:
            progress(done, len(owners))
    return list(zip(total.tolist(), (misses == 0).tolist(), strict=True))


def answer(
    model: Any,
    asked: RequestFile,
    name: str,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] | None = None,
) -> AnswerFile:
    """`score` all requests of a file, as a file that names the model, its precision and its device."""
    answers = score(model, asked.requests, batch_tokens=batch_tokens, progress=progress)
    dtype = str(model.dtype).removeprefix("torch.")
    return AnswerFile(name, dtype, device_name(input_device(model)), asked.key, tuple(answers))


def _batches(inputs: Sequence[Ids], batch_tokens: int) -> Iterator[list[Ids]]:
    """Inputs, longest first, in batches of about `batch_tokens` with padding."""
    start = 0
    while start < len(inputs):
        count = max(1, batch_tokens // len(inputs[start]))
        yield list(inputs[start : start + count])
        start += count


def _logits(model: Any, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits `[positions, vocabulary]` at some positions of `rows`, `[batch, length]`, counted over all rows."""

    def pick(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1)[positions.to(inputs[0].device)][None],)

    # At the head, so that what a model does to its logits (scales, caps) stays its own.
    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: torch.Tensor = model(input_ids=rows, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits
