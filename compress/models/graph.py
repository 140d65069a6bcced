"""A call that is captured in a CUDA graph, and replayed without the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def graph_of(call: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """Capture `calls` calls in one CUDA graph, after three to warm up; the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    return graph.replay
