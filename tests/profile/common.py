"""Documents and grids that the profile's tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from compress.data.sample import TextSample
from compress.models.shape import shape_of
from compress.profile.capture import Capture
from compress.profile.statistic import Statistic
from compress.profile.tiles import LayerTensors, Workspace, tiles
from compress.targets.window import SpanGrid
from tests.tiny import random_ids

# Two sinks, among them none, and a negative alpha, whose boundary starts at the diagonal.
GRID = SpanGrid(sinks=(0, 5), betas=(0.0, 0.125, 0.4140625, 0.75, 1.0), alpha_min=-64)


def document(length: int, answer: int = 7, seed: int = 1, evidence: tuple[tuple[int, int], ...] = ()) -> TextSample:
    """Random tokens, the last `answer` of them the answer."""
    return TextSample(tuple(random_ids(1, length, seed)[0].tolist()), (length - answer, length), evidence)


def documents() -> dict[int, list[TextSample]]:
    """Two lengths, one document shorter than its length, one without evidence."""
    return {
        70: [document(70, seed=2, evidence=((8, 12), (20, 21)))],
        133: [document(133, seed=3, evidence=((90, 106),)), document(101, seed=4)],
    }


def measure(
    model: Any,
    statistics: list[Statistic],
    doc: TextSample,
    *,
    length: int | None = None,
    padding: tuple[int, int] = (0, 0),
    strip_bytes: int | None = None,
    checkpointing: bool | None = False,
) -> dict[str, torch.Tensor]:
    """Results of one document, straight from capture, tiles and accumulators."""
    shape = shape_of(model)
    length = length or doc.length
    accumulators = [statistic.begin(shape, [length]) for statistic in statistics]
    workspace = Workspace()

    def consume(layer: LayerTensors) -> None:
        for tile in tiles(layer, workspace, strip_bytes):
            for accumulator in accumulators:
                accumulator.add(tile)

    for accumulator in accumulators:
        accumulator.open(length, doc)
    left, right = padding
    tokens = torch.tensor([[0] * left + list(doc.tokens) + [0] * right])
    valid = torch.zeros(tokens.shape[1], dtype=torch.bool)
    valid[left : left + doc.length] = True
    gradient = any(statistic.needs_gradient for statistic in statistics)
    with Capture(model, shape, consume, gradient=gradient, checkpointing=checkpointing) as capture:
        answer = (doc.answer[0] + left, doc.answer[1] + left)
        capture.run(tokens, answer, valid if left or right else None)
    for accumulator in accumulators:
        accumulator.close()
    return {key: value for accumulator in accumulators for key, value in accumulator.result().items()}


def tensor_bytes(folder: Path) -> bytes:
    """The stored tensors, byte by byte."""
    return (folder / "statistics.safetensors").read_bytes()


def join(rank: int, world: int, store: str) -> None:
    """Make this process one of `world` on this machine, on one thread each, connected by gloo through a file.

    With OMP_NUM_THREADS unset accelerate takes as many threads as there are cores, and sums over several threads round
    otherwise than over one.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=FileStore(store, world), rank=rank, world_size=world)
