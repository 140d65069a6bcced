"""Documents and grids that the profile's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from compress.data.sample import TextSample
from compress.models.shape import shape_of
from compress.plan import ModelShape
from compress.profile.heads.base import HeadStatistic
from compress.profile.passes.attention import Feed
from compress.profile.passes.capture import Capture
from compress.profile.passes.tiles import LayerTensors, Workspace
from compress.profile.statistic import Item, Subject
from compress.profile.sums import Sheet
from compress.targets.window import SpanGrid
from tests.tiny import random_ids

Table = dict[str, torch.Tensor]

# Two sinks, among them none, and a negative alpha, whose boundary starts at the diagonal.
GRID = SpanGrid(sinks=(0, 5), betas=(0.0, 0.125, 0.4140625, 0.75, 1.0), alpha_min=-64)


def document(length: int, answer: int = 7, seed: int = 1, evidence: tuple[tuple[int, int], ...] = ()) -> TextSample:
    """Random tokens, the last `answer` of them the answer; two of these repeat two of the start."""
    tokens = random_ids(1, length, seed)[0].tolist()
    tokens[-3:-1] = tokens[5:7]
    return TextSample(tuple(tokens), (length - answer, length), evidence)


def documents() -> dict[int, list[TextSample]]:
    """Two lengths, one document shorter than its length, one without evidence."""
    return {
        70: [document(70, seed=2, evidence=((8, 12), (20, 21)))],
        133: [document(133, seed=3, evidence=((90, 106),)), document(101, seed=4)],
    }


def subject_of(model: Any, shape: ModelShape | None = None) -> Subject:
    """A model to measure, with nothing beside it."""
    loaded: Any = SimpleNamespace(model=model)
    return Subject(loaded, shape or shape_of(model), torch.device("cpu"))


def results(sheet: Sheet, subject: Subject) -> Table:
    """The tensors of a sheet, by the text of their keys."""
    pairs = zip(sheet.statistics, sheet.sums, sheet.counts, strict=True)
    found = [statistic.results([(sums, counts)], subject) for statistic, sums, counts in pairs]
    return {str(key): result.values for each in found for key, result in each.items()}


@contextmanager
def feeding(
    statistics: list[HeadStatistic],
    doc: TextSample,
    shape: ModelShape,
    length: int | None,
    strip_bytes: int | None,
    model: Any = None,
) -> Iterator[tuple[Feed, Table]]:
    """What takes the layers of one document, and the results, which are there afterwards."""
    subject, found = subject_of(model, shape), Table()
    item = Item(doc, length or doc.length, 0, "document 1")
    sheet, total = (Sheet(statistics, subject, [item.length]) for _ in range(2))
    feed = Feed(statistics, Workspace(), strip_bytes)
    feed.item, feed.sheet = item, sheet
    yield feed, found
    sheet.close(item)
    total.add(sheet, item)
    for statistic, sums, counts in zip(statistics, total.sums, total.counts, strict=True):
        found |= {str(key): result.values for key, result in statistic.results([(sums, counts)], subject).items()}


def take_layer(
    statistic: HeadStatistic,
    layer: LayerTensors,
    shape: ModelShape,
    *,
    length: int | None = None,
    strip_bytes: int | None = None,
    model: Any = None,
) -> Table:
    """Results over one document that is one layer."""
    with feeding([statistic], document(layer.query.shape[1]), shape, length, strip_bytes, model) as (feed, found):
        feed.layer(layer)
    return found


def measure(
    model: Any,
    statistics: list[HeadStatistic],
    doc: TextSample,
    *,
    length: int | None = None,
    strip_bytes: int | None = None,
    checkpointing: bool | None = False,
) -> Table:
    """Results of one document, straight from a capture and sums."""
    shape, gradient = shape_of(model), any(statistic.needs_gradient for statistic in statistics)
    with (
        feeding(statistics, doc, shape, length, strip_bytes, model) as (feed, found),
        Capture(model, feed.layer, gradient=gradient, checkpointing=checkpointing) as capture,
    ):
        capture.run(doc)
    return found


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
