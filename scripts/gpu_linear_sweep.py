"""Sections `sweep` and `sweep-decode` of `gpu_linear.py`: launch parameters, one candidate after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import normalize

from compress.bench import measure
from compress.runtime import (
    triton_linear,
    triton_linear_decode,
    triton_linear_delta,
    triton_linear_features,
    triton_linear_layout,
    triton_linear_states,
    tuned_linear,
)
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_features import features
from compress.runtime.triton_linear_layout import SEGMENT, layout, with_decays
from compress.runtime.triton_linear_states import segment_states
from scripts.gpu_check import START, say
from scripts.gpu_linear_fla import with_gradients
from scripts.gpu_linear_speed import DECODE_SHAPES, READ_ONE, absorb_step, decode_step, foretold, with_decode_config
from scripts.gpu_sweep import Job, apart, side_by_side

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32


READ_ONE_CHANGES: tuple[tuple[bool, dict[str, Any]], ...] = (
    (True, {"features": 256, "warps": 1, "stages": 1}),
    (True, {"features": 256, "numbers": 8192, "warps": 2, "stages": 1}),
    (True, {"features": 128, "numbers": 2048, "warps": 1, "stages": 3}), (True, {"numbers": 2048, "warps": 2}),
    (True, {"stages": 3}), (True, {"stages": 4}),
    (True, {"numbers": 8192, "warps": 8}), (True, {"features": 128, "numbers": 8192, "stages": 3}),
    (True, {"features": 128, "warps": 2, "stages": 3}), (True, {"features": 32, "numbers": 2048, "stages": 6}),
    (True, {}), (True, {"ahead": 0}), (False, {}), (False, {"piece": 1024}), (False, {"numbers": 1024}),
)  # fmt: skip
ABSORB: tuple[dict[str, int], ...] = (
    {"warps": 8}, {"warps": 8, "registers": 128}, {"warps": 16}, {"warps": 4}, {"warps": 4, "registers": 128},
)  # fmt: skip
SWEEP_SECONDS = 60  # of the sweep of decoding alone
# Heads, groups, head size, features, tokens, and whether there is no window; what `additive` is measured with.
LLAMA, ALONE = (32, 8, 128, 256, 32768, False), (32, 32, 128, 128, 8192, True)
STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scan", {}), ("scan", {"stages": 3}), ("scan", {"stages": 2}), ("scan", {"stages": 4}), ("scan", {"values": 32}),
    ("scan", {"features": 128}), ("scan", {"features": 128, "values": 32}), ("scan", {"features": 128, "warps": 8}),
    ("sums", {}), ("sums", {"features": 128, "warps": 8}), ("sums", {"features": 128, "values": 64}),
    ("sums", {"values": 64}), ("sums", {"warps": 8}), ("sums", {"registers": 128}),
)  # fmt: skip
READ: tuple[dict[str, Any], ...] = (
    {}, {"stages": 2}, {"features": 128, "stages": 2}, {"features": 32}, {"features": 32, "stages": 4},
    {"registers": 168}, {"heads": 2}, {"heads": 2, "warps": 8, "registers": 168}, {"warps": 8, "registers": 255},
    {"warps": 8, "registers": 168}, {"features": 32, "warps": 8, "registers": 168},
)  # fmt: skip
# With decays, and without sums of weights.
STATES_DECAY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scan", {}), ("scan", {"stages": 4}), ("scan", {"stages": 2}), ("scan", {"warps": 8}),
    ("scan", {"warps": 8, "stages": 4}), ("scan", {"features": 128, "warps": 8}), ("scan", {"values": 32}),
    ("scan", {"features": 32}), ("sums", {}),
)  # fmt: skip
READ_DECAY: tuple[dict[str, Any], ...] = (
    {}, {"stages": 3}, {"stages": 1}, {"features": 32, "stages": 3}, {"features": 32, "stages": 4},
    {"features": 128, "stages": 1}, {"warps": 8, "registers": 255}, {"warps": 8, "registers": 168},
    {"registers": 168}, {"values": 64, "warps": 8, "registers": 128},
)  # fmt: skip
GRADIENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("queries", {}), ("queries", {"stages": 2}), ("queries", {"registers": 255}), ("queries", {"features": 64}),
    ("queries", {"stages": 2, "registers": 255}), ("queries", {"features": 64, "stages": 2}),
    ("keys", {}), ("keys", {"stages": 2}), ("keys", {"registers": 255}), ("keys", {"warps": 8, "registers": 168}),
    ("keys", {"warps": 8, "registers": 255}), ("keys", {"features": 64}), ("keys", {"features": 64, "stages": 2}),
    ("query_sums", {}), ("query_sums", {"stages": 3}), ("query_sums", {"registers": 128}),
    ("query_sums", {"values": 64, "warps": 4}),
)  # fmt: skip
FEATURES: tuple[dict[str, Any], ...] = (
    {}, {"registers": 128}, {"registers": 144}, {"registers": 192}, {"registers": 255}, {"warps": 8, "registers": 128},
    {"tokens": 32}, {"tokens": 32, "warps": 2}, {"tokens": 128, "warps": 8},
)  # fmt: skip
DELTA: tuple[tuple[str, dict[str, Any]], ...] = (
    ("delta", {}), ("delta", {"stages": 1}), ("delta", {"stages": 2}), ("delta", {"stages": 4}),
    ("delta", {"values": 16}), ("delta", {"values": 16, "stages": 2}), ("delta", {"values": 64}),
    ("delta", {"warps": 8}), ("writes", {"registers": 128}), ("writes", {"registers": 255}),
    ("writes", {"warps": 8, "registers": 128}), ("writes", {"warps": 8, "registers": 80}),
    ("apart", {}), ("apart", {"stages": 1}),
)  # fmt: skip


def with_config(name: str, change: dict[str, int]) -> Any:
    """A context in which the launches of that name, or of one that begins so, have other parameters."""
    configs = tuned_linear.linear_config(2, DEVICE)
    changed = {of: config | change if of.startswith(name) else config for of, config in configs.items()}
    module = triton_linear_delta if name in ("delta", "writes") else triton_linear_layout
    return mock.patch.object(module, "linear_config", lambda *_: changed)


def sweep_jobs() -> list[Job]:
    """What is tried: a kernel, sizes, and what is changed."""
    jobs: list[Job] = [("delta", ALONE, change) for change in DELTA]
    # The launch of gradients inside chunks also where plain PyTorch stands in for it, with and without decays.
    jobs += [("inside", (4, 4, dim, dim, 8192, True), decays) for dim in (64, 128, 256) for decays in (True, False)]
    jobs += [("states", (*ALONE, "decay"), change) for change in STATES_DECAY]
    jobs += [("read", (*ALONE, "decay"), change) for change in READ_DECAY]
    jobs += decode_jobs()
    jobs += [("gradients", ALONE, change) for change in GRADIENTS]
    for shape in (LLAMA, ALONE):
        jobs += [("states", shape, change) for change in STATES]
        jobs += [("read", shape, change) for change in READ]
        jobs += [("segments", shape, segment) for segment in (1, 2)]
    jobs += [("features", LLAMA, change) for change in FEATURES]
    return jobs


def decode_jobs() -> list[Job]:
    """The same of decoding: what `tuned_linear.py` says of every shape first, then other ways, in turn."""
    shapes = [(*sizes, 64 << 20) for sizes in DECODE_SHAPES]
    of_tuned = {shape: tuned_linear.linear_decode_config(shape[1], shape[3], DEVICE) for shape in shapes}
    jobs: list[Job] = [("decode", shape, None) for shape in shapes]
    absorbed = ((8, 128, 256), (3, 64, 128), (4, 256, 512))
    jobs += [
        ("absorb", sizes, change) for change in (None, *ABSORB) for sizes in absorbed if not change or sizes[1] < 256
    ]
    for dot, change in READ_ONE_CHANGES:
        for shape in shapes:
            # One after the other, many heads take twice as long as by products; one or two are faster so.
            if (shape[1] > 2 if dot else shape[1] <= 4) and READ_ONE[dot] | change != of_tuned[shape]:
                jobs.append(("decode", shape, (dot, change)))
    return jobs


def sweep_call(what: str, shape: Any, change: Any) -> Callable[[], Any]:
    """A call of that kernel."""
    if what == "decode":
        step, _ = decode_step(*shape)
        found = change and READ_ONE[change[0]] | change[1]

        def decode() -> None:
            with with_decode_config(found or tuned_linear.linear_decode_config(shape[1], shape[3], DEVICE)):
                step()

        return decode
    if what == "absorb":
        groups, dim, count = shape
        take = absorb_step(groups, dim, count, (64 << 20) // (4 * groups * dim * count), 129)
        found = change or tuned_linear.linear_absorb_config(count // 2, True, DEVICE)

        def absorbs() -> None:
            with mock.patch.object(triton_linear_decode, "linear_absorb_config", lambda *_: found):
                take()

        return absorbs
    heads, groups, dim, count, length, own, *decay = shape
    if what == "features":
        rows = torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16)
        weight = torch.randn(heads, dim, count // 2, device=DEVICE, dtype=BF16)
        gain, turn = torch.randn(heads, device=DEVICE), torch.randn(heads, dim, device=DEVICE)
        config = tuned_linear.linear_features_config(count // 2, DEVICE) | change

        def make() -> None:
            with mock.patch.object(triton_linear_features, "linear_features_config", lambda *_: config):
                features(rows, weight, None, "hedgehog", 1.0, gain, turn)

        return make
    stream = length if own else length - PAGE
    pages = torch.arange(length // PAGE, device=DEVICE)
    chunk = (pages if own else (pages - 1).clamp(min=0)).expand(1, groups, -1).contiguous()
    query = torch.rand(1, heads, length, count, device=DEVICE, dtype=BF16)
    key = torch.rand(1, groups, stream, count, device=DEVICE, dtype=BF16)
    value = torch.rand(1, groups, stream, dim, device=DEVICE, dtype=BF16)
    segment = change if what == "segments" else SEGMENT
    where = layout(Rows.whole(1, length), chunk, stream, own=own, segment=segment)
    if decay:
        where = with_decays(where, -0.05 * torch.rand(1, groups, stream, device=DEVICE), stream)
    if what == "states":
        way, more = change

        def states() -> None:
            scans = mock.patch.object(triton_linear_states, "linear_scans", lambda *_: way == "scan")
            with with_config(way, more), scans:
                segment_states(key, value, None, where)

        return states
    if what == "delta":
        strength, log_decay = torch.rand(1, groups, stream, device=DEVICE), -torch.rand(groups, device=DEVICE)
        unit = normalize(key, dim=-1)

        def delta() -> None:
            way, more = change
            # Apart: no launch takes its place before the one ahead of it has ended.
            apart = mock.patch.object(triton_linear_layout, "launches_overlap", lambda _: way != "apart")
            with with_config("delta" if way == "apart" else way, more), apart, torch.inference_mode():
                gated_delta(query, unit, value, None, where, log_decay=log_decay, strength=strength)

        return delta
    if what == "inside":
        strength, unit = torch.rand(1, groups, stream, device=DEVICE), normalize(key, dim=-1)
        decay_of = -torch.rand(groups, device=DEVICE) if change else None
        where = layout(Rows.whole(1, length), chunk, stream, own=own, segment=1)
        step_back = with_gradients(
            lambda: gated_delta(query, unit, value, None, where, log_decay=decay_of, strength=strength)[0],
            (query, unit, value),
        )

        def inside() -> None:
            with mock.patch.object(triton_linear_delta, "linear_inside", lambda *_: True):
                step_back()

        return inside
    if what == "gradients":
        both = with_gradients(lambda: additive(query, key, value, None, where)[0], (query, key, value))

        def gradients() -> None:
            with with_config(*change):
                both()

        return gradients
    out, lse = (
        torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16),
        torch.randn(1, heads, length, device=DEVICE),
    )
    if what == "segments":
        window: dict[str, Any] = {} if own else {"window": (out, lse), "log_gain": lse}
        return lambda: additive(query, key, value, None, where, **window)
    slots, _ = segment_states(key, value, None, where)
    merged, mean = None if own else (out, lse, lse), not decay

    def reads() -> None:
        with with_config("read", change):
            triton_linear.read(query, key, value, slots, where, merged, mean=mean, mass=mean)

    return reads


def sweep_once(what: str, shape: Any, change: Any) -> None:
    """Call that kernel, of which Triton's cache has all launches then."""
    sweep_call(what, shape, change)()


def sweep_time(what: str, shape: Any, change: Any) -> float:
    """Milliseconds of that kernel in a CUDA graph."""
    call = sweep_call(what, shape, change)
    measure.release(DEVICE)
    return measure.graphed_times(call, DEVICE, calls=3, seconds=0.1).median


def sweep_rows() -> list[dict[str, Any]]:
    """Other launch parameters for the kernels; the fastest should be the first of each list, of `tuned_linear.py`.

    Every kernel is timed in a process of its own, so that a launch that breaks it ends nothing else.
    """
    return sweep_through(sweep_jobs(), seconds=math.inf, by_kernel=True)


def sweep_decode_rows() -> list[dict[str, Any]]:
    """The same of decoding alone: what SWEEP_SECONDS after the last compilation has not been timed is left out."""
    rows = sweep_through(decode_jobs(), seconds=SWEEP_SECONDS, by_kernel=False)
    copy = measure.copy_bandwidth(DEVICE)
    say(f"  of a copy's bandwidth, {copy / 1e9:.0f} GB/s, over 64 MiB: as in tuned_linear.py, and the best of all")
    for groups, share, dim, count in DECODE_SHAPES:
        shape = (groups, share, dim, count, 64 << 20)
        tried = [row for row in rows if row["shape"] == shape and math.isfinite(row.get("us", math.nan))]
        each = groups * count * (dim + 1) * 4
        least = -(-shape[-1] // each) * each / copy * 1e6
        ours = [f"{least / row['us']:.3f}" for row in tried if row["change"] is None]
        if tried:
            best = min(tried, key=lambda row: row["us"])
            told = foretold(f"decode {groups} {share} {dim} {count}")
            say(
                f"  {groups} groups of {share}, D {dim}, F {count}: {' '.join(ours) or 'not timed'}, "
                f"{least / best['us']:.3f} with {best['change'] or 'the same'}{told}"
            )
    return rows


def sweep_through(jobs: list[Job], *, seconds: float, by_kernel: bool) -> list[dict[str, Any]]:
    """Compile all, time one after the other for so long, and tell the fastest of each kernel and shape.

    With `by_kernel` each kernel has a process of its own.
    """
    compiled = side_by_side(sweep_once, jobs, 14)
    for number, tried in compiled.items():
        if tried.wrong is not None:
            print(f"  {jobs[number]}: {tried.wrong}", flush=True)
    broken = {number for number, tried in compiled.items() if tried.breaks}
    say(f"  launches are compiled after {time.time() - START:.0f} s")
    until = time.time() + seconds
    rows: list[dict[str, Any]] = []
    best: dict[str, list[tuple[float, str]]] = {}
    for of in dict.fromkeys(what if by_kernel else "" for what, _, _ in jobs):
        numbers = [number for number, (what, _, _) in enumerate(jobs) if of in ("", what) and number not in broken]
        for number, tried in apart(sweep_time, jobs, [numbers], until).items():
            if tried.breaks:
                print(f"  {jobs[number]}: {tried.wrong}", flush=True)
                broken.add(number)
                continue
            what, shape, change = jobs[number]
            us = math.nan if tried.wrong is not None else tried.value * 1e3 / (4 if what == "decode" else 1)
            rows.append({"what": what, "shape": shape, "change": change, "us": us})
            say(f"sweep {what} {shape} {change}: {us:.1f} us" + ("" if tried.wrong is None else f", {tried.wrong}"))
            best.setdefault(f"{what} {shape}", []).append((us if math.isfinite(us) else math.inf, str(change)))
    for name, found in best.items():
        least, change = min(found)
        say(f"best {name}: {least:.1f} us with {change}; the first tried {found[0][0]:.1f} us")
    for number in sorted(broken):
        say(f"  BREAKS {jobs[number]}")
        rows.append(dict(zip(("what", "shape", "change"), jobs[number], strict=True)) | {"breaks": True})
    return rows
