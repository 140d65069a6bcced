"""Dense attention as PyTorch has it: every back end that takes the shape, so that the fastest can be compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ON_CPU = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}

Attention = Callable[[], torch.Tensor]


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Attention]:
    """Causal attention `[B, H, T, D]` over keys `[B, G, N, D]` by every back end that runs it, T = N or T = 1.

    FlashAttention-4 is among them where the package flash-attn-4 is installed and works.
    """
    causal = query.shape[2] > 1
    calls: dict[str, Attention] = {}
    for name, backend in (BACKENDS if query.is_cuda else ON_CPU).items():
        call = _by(backend, query, key, value, causal)
        if _runs(call):
            calls[name] = call
    four = flash_attention_4(query, key, value, causal) if query.is_cuda else None
    if four is not None and _runs(four):
        calls["flash-4"] = four
    if not calls:
        raise RuntimeError(f"no dense attention of PyTorch takes queries {tuple(query.shape)} of {query.dtype}")
    return calls


def _by(backend: SDPBackend, query: Any, key: Any, value: Any, causal: bool) -> Attention:
    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    return call


def flash_attention_4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> Attention | None:
    """The call into flash-attn-4; None where it is not installed."""
    try:
        from flash_attn.cute.interface import flash_attn_func
    except Exception:  # whatever a half-installed compiler raises
        return None
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))

    def call() -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=causal)
        return (out[0] if type(out) is tuple else out).transpose(1, 2)

    return call


def _runs(call: Attention) -> bool:
    try:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:  # a back end says in its own way that it does not take the shape
        return False
    return True
