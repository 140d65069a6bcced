"""Logits of a long input a few positions at a time, as the model itself makes them of its hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

SLICE = 256  # positions of logits in memory at once


def logits_in_slices(model: Any, tokens: torch.Tensor, positions: range) -> Iterator[tuple[range, torch.Tensor]]:
    """Logits at some positions of one input, for consecutive ranges of at most `SLICE` of them.

    The decoder runs once. What a model does to its logits (scales them, caps them) is done by its own forward pass, in
    which the hidden states stand in place of the decoder.

    Args:
        tokens: `[N]`, on the model's device.

    Yields:
        The range, and its logits `[len(range), vocabulary]`.
    """
    output = model.get_decoder()(input_ids=tokens[None], use_cache=False)
    yield from logits_of_output(model, output, tokens, positions)


def logits_of_output(
    model: Any, output: Any, tokens: torch.Tensor, positions: range
) -> Iterator[tuple[range, torch.Tensor]]:
    """The same of what the decoder has given already, `output`, for `tokens` `[N]`."""
    decoder, hidden = model.get_decoder(), output.last_hidden_state
    for start in range(positions.start, positions.stop, SLICE):
        part = range(start, min(start + SLICE, positions.stop))
        states = type(output)(last_hidden_state=hidden[:, part.start : part.stop])
        before = vars(decoder).get("forward")  # of a model on several devices, where hooks wrap it
        decoder.forward = lambda *args, states=states, **options: states
        try:
            logits = model(input_ids=tokens[None, part.start : part.stop], use_cache=False).logits[0]
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before
        yield part, logits
