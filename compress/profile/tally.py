"""Sums of all importance statistics over documents, corpus by corpus, and the tensors that come of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from compress.data.sample import TextSample as Document
from compress.errors import UserError
from compress.models.units import LayerUnits
from compress.profile.importance import AXES, SCORES, Importance, Seen, Sums
from compress.profile.statistic import Measure, not_finite

CORPORA = ("first", "second")


class Sheet:
    """Sums of every statistic in every layer, at zero."""

    def __init__(self, statistics: Sequence[Importance], units: Sequence[LayerUnits]) -> None:
        self.statistics = statistics
        self.units = units
        self.sums: list[list[Sums]] = [
            [
                {
                    name: torch.zeros(size, dtype=statistic.dtype, device=layer.output("neuron").weight.device)
                    for name, size in statistic.sizes(layer).items()
                }
                for layer in units
            ]
            for statistic in statistics
        ]

    def take_inputs(self, layer: LayerUnits, kind: str, inputs: torch.Tensor) -> None:
        """See `Importance.add`."""
        for statistic, sums in zip(self.statistics, self.sums, strict=True):
            statistic.add(sums[layer.index], layer, kind, inputs)

    def take_gradient(self, layer: LayerUnits, name: str, gradient: torch.Tensor) -> None:
        """See `Importance.add_gradient`."""
        for statistic, sums in zip(self.statistics, self.sums, strict=True):
            if statistic.needs_gradient:
                statistic.add_gradient(sums[layer.index], name, gradient)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every sum as (`statistic/layer/name`, tensor), always in this order."""
        for statistic, layers in zip(self.statistics, self.sums, strict=True):
            for layer, sums in enumerate(layers):
                for name, total in sums.items():
                    yield f"{statistic.name}/{layer}/{name}", total

    def clear(self) -> None:
        """Zero again."""
        for _, total in self.tensors():
            total.zero_()

    def check_finite(self, where: str) -> None:
        """Refuse sums that are NaN or infinite.

        Raises:
            UserError: names the statistic and the layer.
        """
        finite = [(key, torch.isfinite(total).all().cpu()) for key, total in self.tensors()]
        for key, good in finite:
            if not bool(good):
                statistic, layer, name = key.split("/")
                raise not_finite(statistic, name, int(layer), where)


class Tally:
    """A sheet for each corpus, and how many tokens it is over."""

    def __init__(self, statistics: Sequence[Importance], units: Sequence[LayerUnits], corpora: int) -> None:
        self.statistics = statistics
        self.units = units
        self.sheets = [Sheet(statistics, units) for _ in range(corpora)]
        self.seen = [Seen() for _ in range(corpora)]

    def add(self, corpus: int, document: Document, sheet: Sheet) -> None:
        """Count one document."""
        for (_, total), (_, part) in zip(self.sheets[corpus].tensors(), sheet.tensors(), strict=True):
            total += part
        self.seen[corpus].tokens += document.length
        self.seen[corpus].answers += document.answer[1] - document.answer[0]

    def state(self) -> dict[str, torch.Tensor]:
        """All that was summed, on the CPU."""
        return {
            f"{corpus}/{key}": total.detach().cpu()
            for corpus, sheet in enumerate(self.sheets)
            for key, total in sheet.tensors()
        }

    def size(self) -> int:
        """Bytes of `state`."""
        return sum(total.numel() * total.itemsize for sheet in self.sheets for _, total in sheet.tensors())

    def restore(self, state: Mapping[str, torch.Tensor], seen: Sequence[Mapping[str, int]]) -> None:
        """Continue from `state` and the counts beside it."""
        for corpus, sheet in enumerate(self.sheets):
            for key, total in sheet.tensors():
                total.copy_(state[f"{corpus}/{key}"])
        self.seen = [Seen(**counts) for counts in seen]

    def results(self, number: int) -> tuple[dict[str, Measure], dict[str, torch.Tensor]]:
        """Declarations and tensors, float32 on the CPU, of the statistic at a place.

        Scores are those of all documents; with two corpora `.first` and `.second` behind a key is each by itself.

        Raises:
            UserError: a score that is NaN or infinite.
        """
        statistic = self.statistics[number]
        everything = range(len(self.sheets))
        found = self._scores(number, everything)
        if len(self.sheets) > 1 and statistic.reads == "projections":
            for corpus in everything:
                scores = self._scores(number, [corpus])
                found |= {f"{key}.{CORPORA[corpus]}": scores[key] for key in SCORES}
        measures, tensors = {}, {}
        for key, values in found.items():
            part = key.partition(".")[0]
            name = f"{statistic.name}.{key}"
            measures[name] = Measure(tuple(values.shape), AXES[part], statistic.unit_of(part), 0)
            tensors[name] = values
        return measures, tensors

    def _scores(self, number: int, corpora: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tensors with all layers, over some corpora together."""
        statistic = self.statistics[number]
        seen = Seen(
            sum(self.seen[corpus].tokens for corpus in corpora), sum(self.seen[corpus].answers for corpus in corpora)
        )
        layers: list[dict[str, torch.Tensor]] = []
        for layer in self.units:
            parts: list[Sums] = [self.sheets[corpus].sums[number][layer.index] for corpus in corpora]
            whole: dict[str, Any] = {name: sum(part[name] for part in parts) for name in parts[0]}
            scores = statistic.scores(whole, seen, layer)
            layers.append({key: values.float().cpu() for key, values in scores.items()})
            for key, values in layers[-1].items():
                if not bool(torch.isfinite(values).all()):
                    raise not_finite(statistic.name, key, layer.index, "all documents")
        return {key: torch.stack([layer[key] for layer in layers]) for key in layers[0]}


def check_corpora(statistics: Sequence[Any], second: Mapping[int, Sequence[Document]]) -> None:
    """Refuse a second corpus that nothing would be measured on.

    Raises:
        UserError: no statistic reads projections.
    """
    if any(second.values()) and not any(statistic.reads == "projections" for statistic in statistics):
        raise UserError(
            "no statistic is measured on a second corpus",
            where="calibration.second",
            expected="an importance statistic that reads documents: amp, flap, taylor or wanda_sp",
            found=", ".join(statistic.name for statistic in statistics),
            fix="leave `calibration.second` out, or add such a statistic",
        )
