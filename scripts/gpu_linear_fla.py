"""Section `fla` of `gpu_linear.py`: beside flash-linear-attention, where both compute the same function."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import normalize

from compress.bench import measure
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_layout import layout
from scripts.gpu_check import START, error, say
from scripts.gpu_linear_speed import foretold

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32


def fla_pairs(length: int) -> tuple[dict[str, tuple[Callable[[], Any], Callable[[], Any]]], dict[str, Any]]:
    """What both compute, at 32 heads of 128 numbers: calls of ours and theirs, and the leaves of each.

    Heads without window, one query head a group. Raises ImportError without the package.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    heads, dim = 32, 128
    query, key = (torch.rand(1, heads, length, dim, device=DEVICE, dtype=BF16) for _ in range(2))
    value = torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16)
    by_token = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    chunk = torch.arange(length // PAGE, device=DEVICE).expand(1, heads, -1).contiguous()
    absorbed = torch.full((1, heads), length - PAGE, device=DEVICE)
    where = layout(Rows.whole(1, length), chunk, length, absorbed=absorbed, own=True)
    slopes = -torch.linspace(0.001, 0.1, heads, device=DEVICE)
    by_chunk = layout(Rows.whole(1, length), chunk, length, absorbed=absorbed, own=True, segment=1)
    unit = normalize(key, dim=-1)
    strength, log_decay = (torch.rand(1, heads, length, device=DEVICE) for _ in range(2))
    log_decay = -0.05 * log_decay
    with_unit = [by_token[0], unit.transpose(1, 2).contiguous(), by_token[2]]
    gates = [x.transpose(1, 2).contiguous() for x in (log_decay, strength)]
    plain: dict[str, Any] = {"mean": False, "mass": False}
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "normalised": (
            lambda: additive(query, key, value, None, where)[0],
            lambda: chunk_linear_attn(*by_token, scale=1.0, normalize=True)[0],
        ),
        "plain": (
            lambda: additive(query, key, value, None, where, **plain)[0],
            lambda: chunk_linear_attn(*by_token, scale=1.0, normalize=False)[0],
        ),
        "decay": (
            lambda: additive(query, key, value, None, where, log_decay=slopes, **plain)[0],
            lambda: chunk_simple_gla(*by_token, scale=1.0, g_gamma=slopes)[0],
        ),
        "gated delta": (
            lambda: gated_delta(
                query,
                unit,
                value,
                None,
                where if torch.is_inference_mode_enabled() else by_chunk,
                log_decay=log_decay,
                strength=strength,
            )[0],
            lambda: chunk_gated_delta_rule(*with_unit, *gates, scale=1.0)[0],
        ),
    }
    of_ours, of_theirs = (query, key, value), by_token
    leaves: dict[str, Any] = dict.fromkeys(pairs, (of_ours, of_theirs))
    leaves["gated delta"] = ((query, unit, value), with_unit)
    return pairs, leaves


def with_gradients(call: Callable[[], Any], leaves: Any) -> Callable[[], Any]:
    """A call with its gradients."""

    def both() -> None:
        for x in leaves:
            x.requires_grad_()
        out = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        for x in leaves:
            x.requires_grad_(False)

    return both


def fla_compile(part: int, parts: int) -> None:
    """Compile every `parts`-th of the launches that the package tries; in a process of its own, into Triton's cache."""
    import os

    os.environ["FLA_CACHE_RESULTS"] = "0"  # the package shall measure by itself which is the fastest
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    def once(call: Callable[[], Any], **_: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    choose = Autotuner.prune_configs

    def some(self: Any, kwargs: Any) -> Any:
        configs = choose(self, kwargs)
        return configs[part::parts] or configs[:1]

    with (
        mock.patch.object(driver.active, "get_benchmarker", lambda: once),
        mock.patch.object(Autotuner, "prune_configs", some),
    ):
        pairs, leaves = fla_pairs(FLA_LENGTHS[0])
        for name, (_, theirs) in pairs.items():
            try:
                theirs()
                with_gradients(theirs, leaves[name][1])()
            except Exception:  # what cannot run is told where it is measured
                continue
        torch.cuda.synchronize()


FLA_LENGTHS = (8192, 32768)


def fla_rows() -> list[dict[str, Any]]:
    """Beside flash-linear-attention where the function is the same."""
    try:
        import fla
    except ImportError as missing:
        say(f"flash-linear-attention is not here ({missing})")
        return []
    from triton.runtime import driver
    from triton.testing import do_bench

    say(f"flash-linear-attention {fla.__version__}")
    workers = max(1, min(12, torch.multiprocessing.cpu_count() - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(fla_compile, range(workers), [workers] * workers))
    say(f"  its launches are compiled after {time.time() - START:.0f} s")
    rows = []
    # Its kernels choose their launches by measuring; .1 s for each of some hundred is more than they need.
    with mock.patch.object(driver.active, "get_benchmarker", lambda: partial(do_bench, warmup=5, rep=25)):
        for length in FLA_LENGTHS:
            measure.release(DEVICE)
            pairs, leaves = fla_pairs(length)
            for name, (ours, theirs) in pairs.items():
                with torch.inference_mode():
                    difference = error(ours(), theirs().transpose(1, 2).double())
                    # In a graph, so that the host's share of neither counts.
                    took = {n: measure.graphed_times(f, DEVICE, calls=5) for n, f in (("ours", ours), ("fla", theirs))}
                row: dict[str, Any] = {"length": length, "what": name, "difference": difference}
                row |= {n: t.median for n, t in took.items()}
                words = []
                if length == FLA_LENGTHS[0]:
                    for n, call, of in zip(("ours", "fla"), (ours, theirs), leaves[name], strict=True):
                        try:
                            both = with_gradients(call, of)
                            row[f"{n}_both_eager"] = measure.times(both, DEVICE).median
                            row[f"{n}_both"] = measure.graphed_times(both, DEVICE, calls=3).median
                            words.append(f"{row[f'{n}_both']:.2f} (launched by the host {row[f'{n}_both_eager']:.2f})")
                        except RuntimeError as refused:  # its gated delta on some versions of Triton
                            for x in of:
                                x.requires_grad_(False)
                            row[f"{n}_refuses"] = str(refused)
                            words.append(f"none of {n} ({str(refused)[:100]}...)")
                rows.append(row)
                say(
                    f"fla {name} {length}: ours {row['ours']:.3f} ms, fla {row['fla']:.3f} "
                    f"({row['fla'] / row['ours']:.2f} times as long)"
                    f"{'; with gradients ' * bool(words)}{' and '.join(words)}; results differ by {difference:.1e}"
                    f"{foretold(f'fla {name} {length}')}{foretold(f'fla {name} both') if words else ''}"
                )
    return rows
