"""The pass in which the model repeats every sample (`models.reconstruction`), with the scores of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.errors import UserError
from compress.models.reconstruction import TokenScores, reconstructing
from compress.profile.passes.base import Run, Work
from compress.profile.passes.samples import Read, SamplePass, one_by_one
from compress.profile.statistic import Item, Reads, Statistic
from compress.profile.sums import Sheet

if TYPE_CHECKING:
    from compress.profile.heads.reconstruction import Reconstruction


class ReconstructionPass(SamplePass):
    """Feeds statistics with the scores of a sample's tokens, layer by layer; no gradients."""

    reads: ClassVar[Reads] = "reconstruction"

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        return Work(forward=2, tables=True)  # the text and its repetition

    @contextmanager
    def reader(self, run: Run, statistics: Sequence[Reconstruction]) -> Iterator[Read]:
        loaded = run.subject.loaded
        (chunk,) = {statistic.chunk for statistic in statistics}
        with reconstructing(loaded.model, loaded.tokenizer, chunk) as reconstruct:

            def read_one(item: Item, sheet: Sheet) -> None:
                def take(scores: TokenScores) -> None:
                    scores = scores.on(run.subject.device)
                    for statistic, sums in zip(statistics, sheet.sums, strict=True):
                        statistic.add_scores(sums[item.length], scores)

                ids = item.sample.body(torch.device("cpu")).get("input_ids")
                if ids is None:
                    raise UserError(
                        f"a {item.sample.noun} cannot be repeated",
                        where="profile.statistics.reconstruction",
                        expected="documents of text",
                        found=item.where,
                        fix="leave the statistic out",
                    )
                reconstruct(ids[0].tolist(), take)

            yield one_by_one(read_one)
