"""Compiles each kernel on this machine and compares it with the reference on a small input: what `doctor` shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress.bench.kernel import Shape, random_pages, random_qkv
from compress.runtime.flash import refusal as flash_refusal
from compress.runtime.impl import IMPLS, explain_impl
from compress.runtime.impl_routed import ROUTED_IMPLS
from compress.runtime.reference import Rows
from compress.runtime.score_functions import ScoreFunction
from compress.runtime.span import PAGE, Span

SHAPE = Shape("check", 8, 2, 64)
RULES = [Span(4, 40, 0.25), Span()]
LENGTH = 200
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # norm of the difference over the norm


@dataclass(frozen=True)
class KernelCheck:
    """One kernel: `error` is the difference to the reference, `refused` why it did not run."""

    name: str
    ok: bool
    error: float | None = None
    seconds: float | None = None
    refused: str | None = None


def check_kernels(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[KernelCheck]:
    """Run every kernel once; a failure to compile is a result that carries the compiler's message."""
    checks: dict[str, Callable[[], float]] = {
        "prefill": lambda: _prefill(device, dtype),
        "gradients of prefill": lambda: _gradients(device, dtype),
        "decode": lambda: _decode(device, dtype),
        "prefill and decode with sigmoid and LSSA scores": lambda: _scores(device, dtype),
        "prefill and decode of the heads that tokens choose": lambda: _chosen(device, dtype),
        "store": lambda: _store(device, dtype),
    }
    results = []
    for name, run in checks.items():
        try:
            explain_impl("triton", device, dtype, SHAPE.head_dim)
            start = time.perf_counter()
            error = run()
            seconds = time.perf_counter() - start
        except Exception as failure:  # compilers raise what they like
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            results.append(KernelCheck(name, False, refused=lines[0]))
        else:
            results.append(KernelCheck(name, error <= LIMIT[dtype], error, seconds))
    reason = flash_refusal(device, dtype, SHAPE.head_dim)
    results.append(KernelCheck("FlashAttention-4 for prefill", reason is None, refused=reason))
    return results


def _difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    return float((values.float() - expected.float()).norm() / expected.float().norm())


def _prefill(device: torch.device, dtype: torch.dtype) -> float:
    query, key, value = random_qkv(SHAPE, 2, LENGTH, device, dtype)
    rows = Rows((0, 0), (0, 7), (LENGTH, LENGTH - 20))
    ours, expected = (IMPLS[impl].prefill(query, key, value, RULES, rows=rows) for impl in ("triton", "reference"))
    return _difference(ours, expected)


def _gradients(device: torch.device, dtype: torch.dtype) -> float:
    leaves = random_qkv(SHAPE, 1, LENGTH, device, dtype)
    weight = torch.randn_like(leaves[0])
    grads = []
    for impl in ("triton", "reference"):
        copies = [tensor.detach().clone().requires_grad_() for tensor in leaves]
        grads.append(
            torch.autograd.grad((IMPLS[impl].prefill(copies[0], copies[1], copies[2], RULES) * weight).sum(), copies)
        )
    return max(_difference(ours, expected) for ours, expected in zip(*grads, strict=True))


def _decode(device: torch.device, dtype: torch.dtype) -> float:
    pages = random_pages(RULES, 2, LENGTH, SHAPE.head_dim, device, dtype)
    query = torch.randn(2, SHAPE.query_heads, SHAPE.head_dim, device=device, dtype=dtype)
    lengths = torch.tensor([LENGTH, LENGTH], dtype=torch.int32, device=device)
    ours, expected = (IMPLS[impl].decode(query, pages, lengths, RULES) for impl in ("triton", "reference"))
    return _difference(ours, expected)


def _scores(device: torch.device, dtype: torch.dtype) -> float:
    pages = random_pages(RULES, 1, LENGTH, SHAPE.head_dim, device, dtype)
    query, key, value = random_qkv(SHAPE, 1, PAGE, device, dtype)
    lengths = torch.tensor([LENGTH], dtype=torch.int32, device=device)
    worst = 0.0
    for scores in (
        ScoreFunction(name="sigmoid", bias=torch.zeros(SHAPE.query_heads, device=device)),
        ScoreFunction(name="lssa"),
    ):
        ours, expected = (
            (
                IMPLS[impl].prefill(query, key, value, RULES, scores=scores),
                IMPLS[impl].decode(query[:, :, -1], pages, lengths, RULES, scores=scores),
            )
            for impl in ("triton", "reference")
        )
        worst = max(worst, *(_difference(one, known) for one, known in zip(ours, expected, strict=True)))
    return worst


def _chosen(device: torch.device, dtype: torch.dtype) -> float:
    """Prefill by groups, decode by query heads."""
    from compress.runtime.triton_routed import SKIP_FROM

    columns = SKIP_FROM if device.type == "cuda" else PAGE
    pages = random_pages(RULES, 1, PAGE, SHAPE.head_dim, device, dtype)
    query, key, value = random_qkv(SHAPE, 1, columns, device, dtype)
    lengths = torch.tensor([PAGE], dtype=torch.int32, device=device)
    gates = torch.rand(1, SHAPE.groups, columns, device=device)
    of_heads = torch.rand(1, SHAPE.query_heads, device=device)
    results = [
        (
            ROUTED_IMPLS[impl].prefill(query, key, value, RULES, gates < 0.5, gates=gates),
            IMPLS[impl].decode(query[:, :, 0], pages, lengths, RULES, active=of_heads < 0.5, gates=of_heads),
        )
        for impl in ("triton", "reference")
    ]
    return max(_difference(ours, known) for ours, known in zip(*results, strict=True))


def _store(device: torch.device, dtype: torch.dtype) -> float:
    _, key, value = random_qkv(SHAPE, 2, LENGTH, device, dtype)
    rows = Rows.whole(2, LENGTH)
    pools = []
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        pages = random_pages(RULES, 2, LENGTH, SHAPE.head_dim, device, dtype)
        IMPLS[impl].store(key, value, pages, rows, RULES)
        pools.append(pages)
    return _difference(pools[0].keys, pools[1].keys) + _difference(pools[0].values, pools[1].values)
