"""Timing: medians with quartiles from device events, CUDA-graph replays, and the device's own copy bandwidth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from compress.models.graph import graph_of


@dataclass(frozen=True)
class Time:
    """Milliseconds of one call: median and quartiles over `repeats` calls."""

    median: float
    lower: float
    upper: float
    repeats: int


def times(call: Callable[[], Any], device: torch.device, *, seconds: float = 0.3, most: int = 200) -> Time:
    """Time a call that is warm already: as many repeats as fit in `seconds`, between 5 and `most`.

    On a GPU every call lies between two events, and the caches keep what one call leaves for the next, as they do
    when a model runs.
    """
    return _summary(_durations(call, device, seconds, 5, most))


def times_in_turn(calls: Mapping[str, Callable[[], Any]], device: torch.device, *, turns: int = 3) -> dict[str, Time]:
    """Time several calls against each other, each for .1 s a turn: a GPU that grows hot slows all of them alike."""
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            durations[name] += _durations(call, device, 0.1, 2, 100)
    return {name: _summary(values) for name, values in durations.items()}


def _durations(call: Callable[[], Any], device: torch.device, seconds: float, least: int, most: int) -> list[float]:
    call()
    if device.type != "cuda":
        durations: list[float] = []
        end = time.perf_counter() + seconds
        while len(durations) < least or (time.perf_counter() < end and len(durations) < most):
            began = time.perf_counter()
            call()
            durations.append((time.perf_counter() - began) * 1e3)
        return durations
    torch.cuda.synchronize(device)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    repeats = int(min(most, max(least, seconds * 1e3 / max(start.elapsed_time(stop), 1e-3))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) for first, second in pairwise(events)]


def graphed_times(call: Callable[[], Any], device: torch.device, *, calls: int = 20, seconds: float = 0.3) -> Time:
    """Time a call inside a CUDA graph of `calls` of them, so that launch gaps of the host take no part."""
    if device.type != "cuda":
        return times(call, device, seconds=seconds)
    replay = graph_of(call, calls)
    time_of_all = times(replay, device, seconds=seconds)
    median, lower, upper = (value / calls for value in (time_of_all.median, time_of_all.lower, time_of_all.upper))
    return Time(median, lower, upper, time_of_all.repeats)


def copy_bandwidth(device: torch.device, size: int = 2**31) -> float:
    """Bytes read plus bytes written per second of a large copy on the device."""
    source = torch.empty(size if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / times(lambda: target.copy_(source), device).median * 1e3


def release(*devices: torch.device) -> None:
    """Give freed memory back and start the peaks anew."""
    gc.collect()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(*devices: torch.device) -> int | None:
    """Most bytes that were allocated at once since `release`, added up; None on a CPU, which has no such account."""
    if any(device.type != "cuda" for device in devices):
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in devices)


def _summary(durations: list[float]) -> Time:
    values = torch.tensor(durations, dtype=torch.float64)
    lower, median, upper = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return Time(median, lower, upper, len(durations))
