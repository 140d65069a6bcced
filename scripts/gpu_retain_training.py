"""The section `training` of `gpu_retain.py`: kernels that train what heads keep, against float64 and plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from compress.bench import measure
from compress.runtime.reference import Rows
from compress.runtime.retain_training import prefill as reference
from compress.runtime.scores import Scores
from compress.runtime.span import PAGE, Span
from compress.runtime.triton_retain_training import prefill
from scripts.gpu_check import error, poison, say

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
MOST = {BF16: 8e-3, F32: 1e-5}  # norm of the difference over the norm: one rounding to bfloat16 is .0017
MOST_OF_SUM = {BF16: 2e-2, F32: 1e-5}  # of `dextra`, a sum over all rows whose terms cancel
# Batch, query heads, groups, head size, tokens, and milliseconds forward and backward as an H100 took, hard decisions.
SHAPES = {"smollm2-135m": (4, 9, 3, 64, 4096, 2.6), "llama-3-8b": (1, 32, 8, 128, 8192, 17.8)}
NAMES = ("out", "dquery", "dkey", "dvalue", "dtaken", "dextra")


def _inputs(batch: int, heads: int, groups: int, dim: int, length: int, hard: bool) -> list[torch.Tensor]:
    """Query, key, value `[B, H or G, T, D]` and decisions `[B, G, T]`, float64."""
    made = [torch.randn(batch, count, length, dim, device=DEVICE).double() for count in (heads, groups, groups)]
    drawn = torch.rand(batch, groups, length, device=DEVICE).double()
    return [*made, (drawn < 0.3).double() if hard else drawn.log()]


def _gradients(run: Any, parts: Sequence[torch.Tensor], toward: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Outputs and gradients of all parts; a fifth part are extra logits."""
    parts = [part.detach().requires_grad_() for part in parts]
    scores = Scores(20.0, parts[4]) if len(parts) > 4 else None
    out = run(*parts[:4], scores=scores, **options)
    return [out, *torch.autograd.grad(out, parts, toward)]


def _checked(dtype: torch.dtype, heads: int, groups: int, dim: int, hard: bool, extra: bool) -> list[dict[str, Any]]:
    """Errors of outputs and gradients on an odd length with padding, where it holds NaN."""
    length = 389
    made = _inputs(2, heads, groups, dim, length, hard)
    rows = Rows((0, 0), (0, 30), (length, 331))
    live = rows.positions(length, DEVICE) >= 0
    spans = [Span(0, 1 + 40 * number, 0.0, granule=PAGE) for number in range(groups)]
    parts = [x.to(dtype).double() for x in made[:3]] + made[3:]
    if extra:
        parts.append(torch.linspace(-1, 1, heads, device=DEVICE).double())
    toward = torch.randn(2, heads, length, dim, device=DEVICE).to(dtype)
    exact = _gradients(reference, parts, toward.double(), spans=spans, rows=rows, hard=hard)
    for part in parts[:3]:
        part.masked_fill_(~live[:, None, :, None], torch.nan)
    poison()
    given = [part.to(dtype) for part in parts[:3]] + [part.float() for part in parts[3:]]
    found = _gradients(prefill, given, toward, spans=spans, rows=rows, hard=hard)
    told = []
    for name, own, right in zip(NAMES, found, exact, strict=False):
        took = error(own, right)
        what = f"{name} D {dim} heads {heads // groups}{' hard' if hard else ''}{' capped' if extra else ''}"
        most = (MOST_OF_SUM if name == "dextra" else MOST)[dtype]
        told.append({"what": what, "dtype": str(dtype), "error": took, "ok": took <= most})
    return told


def training_rows() -> list[dict[str, Any]]:
    """Numerics, then forward and backward of a layer beside plain PyTorch, soft and hard decisions."""
    rows: list[dict[str, Any]] = []
    for dtype in (BF16, F32):
        own = []
        for heads, groups, dim in ((9, 3, 64), (4, 2, 128), (2, 2, 256)):
            for hard in (False, True):
                own += _checked(dtype, heads, groups, dim, hard, dim == 128)
        bad = [row["what"] for row in own if not row["ok"]]
        worst = max(own, key=lambda row: row["error"])
        say(
            f"training numerics in {dtype}: {len(own)} checks, {len(bad)} failed, worst {worst['error']:.1e} "
            f"({worst['what']}) {bad[:6] if bad else ''}"
        )
        rows += own
    for name, (batch, heads, groups, dim, length, before) in SHAPES.items():
        spans = [Span(0, 256, 0.0, granule=PAGE)] * groups
        for hard in (False, True):
            made = _inputs(batch, heads, groups, dim, length, hard)
            parts = [x.to(BF16) for x in made[:3]] + [made[3].float()]
            toward = torch.randn(batch, heads, length, dim, device=DEVICE, dtype=BF16)
            options = {"spans": spans, "rows": Rows.whole(batch, length), "hard": hard}
            took = {}
            for impl, run in (("triton", prefill), ("plain", reference)):
                both = partial(_gradients, run, parts, toward, **options)
                measure.release(DEVICE)
                both()
                took[impl] = (measure.times(both, DEVICE).median, torch.cuda.max_memory_allocated())
            (ms, size), (plain, plain_size) = took["triton"], took["plain"]
            words = f"train {name}, {batch} x {length:,} tokens, {'hard' if hard else 'soft'}"
            say(
                f"{words}: {ms:.2f} ms and {size / 2**30:.2f} GiB, plain PyTorch {plain:.1f} ms and "
                f"{plain_size / 2**30:.2f} GiB [an H100 before: {before}]"
            )
            rows.append({"shape": name, "hard": hard, "ms": ms, "plain_ms": plain, "bytes": size})
    return rows
