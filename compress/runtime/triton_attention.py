"""The Triton implementation as a whole: what it can run, its autograd, and where it leaves a case to PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .flash import applies, attend
from .pages import Pages
from .reference import Rows
from .reference import prefill as reference_prefill
from .scores import KernelScores, Scores
from .span import Span
from .triton_backward import backward
from .triton_decode import decode
from .triton_prefill import forward
from .triton_store import store, store_one

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_DIM = 256
LN2 = 0.6931471805599453
DENSE_UP_TO = 4096  # tokens; an H200 breaks even between 2,048 and 8,192


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels do not run for this device, dtype and head size; None when they do."""
    if device.type != "cuda" and not (device.type == "cpu" and triton.knobs.runtime.interpret):
        return f"Triton compiles for GPUs and the model is on {device.type}"
    if dtype not in DTYPES:
        return f"the kernels have no {dtype}"
    if head_dim > MOST_DIM:
        return f"the kernels go to head size {MOST_DIM}, and this one is {head_dim}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0) and dtype == torch.bfloat16:
        return "this GPU has no bfloat16"
    return None


class _Prefill(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: tuple[Span, ...],
        rows: torch.Tensor,
        ragged: bool,
        scale: float,
        cap: float | None,
        extra: torch.Tensor | None,
        score: int,
        keep_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        options: dict[str, Any] = {"cap": cap, "extra": extra, "score": score, "ahead": key.shape[2] - query.shape[2]}
        out, lse = forward(query, key, value, spans, rows, ragged, None, scale, keep_lse=True, **options)
        ctx.save_for_backward(query, key, value, rows, out, lse, extra)
        ctx.spans, ctx.scale, ctx.cap, ctx.score = spans, scale, cap, score
        return out, lse * LN2 if keep_lse else None

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, rows, out, lse, extra = ctx.saved_tensors
        grad, grad_lse = grads
        grad = torch.zeros_like(out) if grad is None else grad  # nothing was made of the output itself
        *found, of_extra, _ = backward(
            grad, query, key, value, out, lse, ctx.spans, rows, ctx.scale, ctx.cap, extra, grad_lse, ctx.score
        )
        return (*found, None, None, None, None, None, of_extra, None, None)


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    *,
    rows: Rows | None = None,
    pages: Pages | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
    keep_lse: bool = False,
) -> Any:
    """As `reference.prefill`, which it calls for dropout, gradients over a cache, and scores without a kernel."""
    batch, _, columns, dim = query.shape
    form = KernelScores() if scores is None else scores.for_kernels
    tensors = (query, key, value, *(() if form is None or form.by_head is None else (form.by_head,)))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    options: dict[str, Any]
    if form is None or dropout > 0 or (trained and pages is not None):
        options = {"scale": scale, "dropout": dropout, "scores": scores, "keep_lse": keep_lse}
        return reference_prefill(query, key, value, spans, rows=rows, pages=pages, **options)
    rows = rows or Rows.whole(batch, columns)
    scale = dim**-0.5 if scale is None else scale
    ahead = key.shape[2] - columns
    ragged = not rows.is_whole(columns)
    short = query.is_cuda and columns <= DENSE_UP_TO and not ragged and pages is None and ahead == 0
    if scores is None and short and not keep_lse and all(span.sees_all(columns) for span in spans):
        # Nothing is hidden from anyone yet: the same function, and for short inputs PyTorch's launch is cheaper.
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    where = rows.tensor(query.device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    if trained:
        out, lse = _Prefill.apply(
            query, key, value, tuple(spans), where, ragged, scale, form.cap, form.by_head, form.score, keep_lse
        )
        return (out, lse) if keep_lse else out
    cached = None if pages is None else (pages.keys, pages.values, pages.table)
    options = {"keep_lse": keep_lse, "natural": True, "cap": form.cap, "extra": form.by_head, "score": form.score}
    options["ahead"] = ahead
    out, lse = forward(query, key, value, spans, where, ragged, cached, scale, **options)
    return (out, lse) if keep_lse else out


def prefill_or_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Sequence[Span],
    *,
    rows: Rows | None = None,
    pages: Pages | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    scores: Scores | None = None,
    keep_lse: bool = False,
) -> Any:
    """As `prefill`; long prompts without history and padding go through FlashAttention-4, unless `keep_lse` is set."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    whole = (rows is None or rows.is_whole(query.shape[2])) and key.shape[2] == query.shape[2]
    plain = whole and pages is None and dropout == 0 and scores is None and not trained and not keep_lse
    if applies(query, key, value, plain=plain):
        return attend(query, key, value, spans, query.shape[-1] ** -0.5 if scale is None else scale)
    options: dict[str, Any] = {"scale": scale, "dropout": dropout, "scores": scores, "keep_lse": keep_lse}
    return prefill(query, key, value, spans, rows=rows, pages=pages, **options)


TRITON = (prefill, decode, store, store_one)
FLASH = (prefill_or_flash, decode, store, store_one)
