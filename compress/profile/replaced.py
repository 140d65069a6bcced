"""A model whose attention is, for a while, another function: weights frozen, eval mode, everything put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface


@contextmanager
def replaced_attention(model: Any, name: str, attention: Callable[..., Any]) -> Iterator[None]:
    """Run `model` on another attention function of transformers' interface, without any mask tensor.

    The function gets queries, keys and values after RoPE; causality, sliding windows and padding are its own matter.

    Args:
        name: what the function is registered as; one user of a name at a time.
    """
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        # The registered function would keep whatever it is bound to, and with it the model, alive.
        undo.callback(AttentionInterface.register, name, _closed)
        model.eval()
        model.requires_grad_(False)
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, _no_mask)
        model.set_attn_implementation(name)
        yield


def _no_mask(*_: Any, **__: Any) -> None:
    """Mask function of transformers' interface: the attention functions here need none."""


def _closed(*_: Any, **__: Any) -> None:
    raise RuntimeError("this attention function belongs to a measurement that has ended")


def answer_rows(answer: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The rows whose logits predict the answer's tokens [start, end): start - 1 to end - 2."""
    return torch.arange(answer[0] - 1, answer[1] - 1, device=device)
