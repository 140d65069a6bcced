"""Sums of all statistics of a pass: of one sample, or of a corpus with how much they are over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from compress.profile.statistic import Item, Subject, SummedStatistic, Sums, not_finite


class Sheet:
    """Sums of every statistic, at zero, for samples of some lengths in tokens.

    Attributes:
        sums: of each statistic, by place and name.
        counts: of each statistic, what its sums are over.
        loss: of a single sample, where a backward pass ran; NaN elsewhere.
    """

    def __init__(self, statistics: Sequence[SummedStatistic], subject: Subject, lengths: Sequence[int]) -> None:
        self.statistics = statistics
        self.sums: list[dict[int, Sums]] = [statistic.begin(subject, lengths) for statistic in statistics]
        self.counts: list[Counter[str]] = [Counter() for _ in statistics]
        self.loss = torch.full((), torch.nan, dtype=torch.float64, device=subject.device)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every sum as (`statistic/place/name`, tensor), always in this order."""
        for statistic, places in zip(self.statistics, self.sums, strict=True):
            for place, sums in places.items():
                for name, total in sums.items():
                    yield f"{statistic.registered}/{place}/{name}", total

    def close(self, item: Item) -> None:
        """End the one sample that was summed."""
        for statistic, sums in zip(self.statistics, self.sums, strict=True):
            statistic.close(sums, item)

    def add(self, sample: Sheet, item: Item) -> None:
        """Add the sums of one sample."""
        for places, others in zip(self.sums, sample.sums, strict=True):
            for place, sums in others.items():
                for name, part in sums.items():
                    places[place][name] += part
        for statistic, counts in zip(self.statistics, self.counts, strict=True):
            counts.update(statistic.count(item))

    def size(self) -> int:
        """Bytes of all sums."""
        return sum(total.numel() * total.itemsize for _, total in self.tensors())

    def state(self) -> dict[str, torch.Tensor]:
        """All sums, on the CPU."""
        return {name: total.detach().cpu() for name, total in self.tensors()}

    def restore(self, state: Mapping[str, torch.Tensor], counts: Sequence[Mapping[str, int]]) -> None:
        """Continue from `state` and the `counts` that were noted beside it."""
        for name, total in self.tensors():
            total.copy_(state[name])
        self.counts = [Counter(numbers) for numbers in counts]

    def check_finite(self, where: str) -> None:
        """Refuse sums that are NaN or infinite.

        Raises:
            UserError: names the statistic, the sum and the layer.
        """
        for statistic, places in zip(self.statistics, self.sums, strict=True):
            for place, sums in places.items():
                for name, total in sums.items():
                    if not bool(torch.isfinite(total).all()):
                        raise not_finite(statistic.registered, *statistic.bad_place(place, name, total), where)
