"""The dense model's own answers: prefill once, then decode through its KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.errors import NotFiniteError
from compress.models.placement import input_device
from compress.runtime.modeling_compress import CACHE

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.inference_mode()
def answer(
    model: Any,
    prompt: Sequence[int],
    count: int,
    *,
    decoding: Literal["sample", "greedy"] = "greedy",
    temperature: float = 1.0,
    seed: int = 0,
) -> tuple[int, ...]:
    """Exactly `count` tokens that the model writes behind a prompt.

    An end-of-sequence token does not stop it, so that documents have the exact length that was asked for; the model's
    own generation settings (penalties, top-k) are left aside. Sampling draws on the CPU from float32 probabilities,
    so that the draw of a seed does not depend on the device.

    Args:
        prompt: token ids.
        decoding: the most likely token each time, or a sample at `temperature`.

    Raises:
        NotFiniteError: the logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    device = input_device(model)
    tokens = torch.tensor([list(prompt)], device=device)
    cache: Any = None
    written: list[int] = []
    while True:
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        logits, cache = output.logits[0, -1].float(), getattr(output, CACHE)
        if not bool(torch.isfinite(logits).all()):
            raise NotFiniteError(f"the model's logits are not finite behind {len(prompt) + len(written)} tokens")
        if decoding == "greedy":
            chosen = int(logits.argmax())
        else:
            chosen = int(torch.multinomial((logits.cpu() / temperature).softmax(-1), 1, generator=generator))
        written.append(chosen)
        if len(written) == count:
            return tuple(written)
        tokens = torch.tensor([[chosen]], device=device)
