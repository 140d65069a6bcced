"""What a statistic is: its parameters (recipe schema), what it accumulates from tiles, and the tensors it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from compress.errors import UserError
from compress.registry import Method, statistics

if TYPE_CHECKING:
    from compress.data.sample import TextSample as Document
    from compress.models.load import LoadedModel
    from compress.models.shape import ModelShape
    from compress.profile.tiles import Tile


# What a statistic is taken from: attention tiles, inputs of the output projections, the weights alone, or a training
# of its own.
Reads = Literal["tiles", "projections", "weights", "training"]


@dataclass(frozen=True)
class Measure:
    """Declaration of one tensor of a statistic.

    Attributes:
        shape: sizes, the first one the number of layers and the second the number of key/value heads or neurons.
        axes: one name per axis, `layer` and `group` first, or `layer` and `neuron`.
        unit: what one number counts.
        length: the profiled length in tokens that the tensor belongs to; 0 where it is of all documents.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    unit: str
    length: int


class Accumulator(ABC):
    """Running sums of one statistic over the documents of one run.

    The sums are float64 and their first axis is the layer. `close` counts a document; a result is the mean over
    the counted documents. `state` and `restore` carry everything, so that a resumed run ends with the same bits.

    Args:
        measures: tensor key -> declaration.
        device: where the sums are held (that of the model, so that no tile waits for a copy).
    """

    def __init__(self, measures: Mapping[str, Measure], device: torch.device | str = "cpu") -> None:
        self.measures = dict(measures)
        self.sums = {
            key: torch.zeros(measure.shape, dtype=torch.float64, device=device)
            for key, measure in self.measures.items()
        }
        self.counts = dict.fromkeys(self.measures, 0)
        self.length = 0
        self.document: Document | None = None

    def open(self, length: int, document: Document) -> None:
        """Start a document that is profiled as one of `length` tokens (it may itself be shorter)."""
        self.length = length
        self.document = document

    @abstractmethod
    def add(self, tile: Tile) -> None:
        """Take one tile of the open document. The tile's tensors are shared with other statistics: read only."""

    def counted(self) -> list[str]:
        """Keys for which the open document counts in the mean: all keys of its length."""
        return [key for key, measure in self.measures.items() if measure.length == self.length]

    def close(self) -> None:
        """End the open document."""
        for key in self.counted():
            self.counts[key] += 1
        self.document = None

    def bad_layer(self) -> tuple[str, int] | None:
        """(key, layer) of the first sum that is NaN or infinite, None when all are finite."""
        for key, total in self.sums.items():
            finite = torch.isfinite(total.flatten(1)).all(1)
            if not bool(finite.all()):
                return key, int((~finite).nonzero()[0])
        return None

    def state(self) -> dict[str, torch.Tensor]:
        """All that was accumulated, as CPU tensors."""
        state = {key: total.detach().cpu().clone() for key, total in self.sums.items()}
        state.update({f"count:{key}": torch.tensor(count) for key, count in self.counts.items()})
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from what `state` gave. Raises KeyError or RuntimeError when it is another statistic's."""
        for key in self.measures:
            self.sums[key].copy_(state[key])
            self.counts[key] = int(state[f"count:{key}"])

    def result(self) -> dict[str, torch.Tensor]:
        """Means over documents, float32 on the CPU; keys for which no document counted are left out."""
        return {key: (self.sums[key] / self.counts[key]).float().cpu() for key in self.measures if self.counts[key]}


class AnyStatistic(Method):
    """What all statistics share: the fields of a subclass are its recipe keys, each with a description."""

    needs_gradient: ClassVar[bool]
    reads: ClassVar[Reads]
    unit: ClassVar[str]

    @property
    def name(self) -> str:
        """The name under which the class is registered."""
        for name, method in statistics.items():
            if method is type(self):
                return name
        raise LookupError(f"{type(self).__qualname__} is not registered")

    def parameters(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return self.model_dump(mode="json")


class Statistic(AnyStatistic):
    """Base of the statistics of head groups, by length; those of heads and neurons are `importance.Importance`.

    A new statistic is one file with a subclass, registered by `@statistics.register("name")`, an import in
    `compress/profile/__init__.py` and an entry in `tests/profile/test_matrix.py`.
    """

    reads: ClassVar[Reads] = "tiles"

    @abstractmethod
    def begin(self, shape: ModelShape, lengths: Sequence[int], device: torch.device | str = "cpu") -> Accumulator:
        """An empty accumulator for a model of this shape and for documents of these lengths in tokens."""

    def learn(
        self,
        loaded: LoadedModel,
        shape: ModelShape,
        documents: Mapping[int, Sequence[Document]],
        accumulator: Accumulator,
        folder: Path,
        key: str,
        seed: int,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """What a statistic that runs the model itself does after the common pass; most have nothing to do.

        Args:
            documents: what to learn from, by length.
            accumulator: what `begin` gave, to be filled.
            folder: of the profile; an interrupted learning continues from a file here, which goes when it is done.
            key: of the run, which such a file has to match.
            progress: called with (done, in all, message).
        """


def per_length(
    shape: ModelShape, lengths: Sequence[int], names: Mapping[str, str], rest: Mapping[str, int] | None = None
) -> dict[str, Measure]:
    """Measures `<name>.<length>` with axes (layer, group, *rest); `names` maps each name to its unit."""
    sizes = dict(rest or {})
    return {
        f"{name}.{length}": Measure(
            (shape.layers, shape.kv_heads, *sizes.values()), ("layer", "group", *sizes), unit, length
        )
        for length in lengths
        for name, unit in names.items()
    }


def check_finite(name: str, accumulator: Accumulator, where: str) -> None:
    """Refuse a statistic that has become NaN or infinite.

    Raises:
        UserError: names the statistic, the tensor and the layer.
    """
    bad = accumulator.bad_layer()
    if bad is not None:
        key, layer = bad
        raise not_finite(name, key, layer, where)


def not_finite(name: str, key: str, layer: int, where: str) -> UserError:
    """The error that names the statistic, the tensor and the layer."""
    return UserError(
        f"statistic `{name}` is not finite in layer {layer}",
        where=where,
        expected="finite numbers",
        found=f"NaN or infinity in `{key}`, layer {layer}",
        fix="check the weights of the model; profile in float32 or bfloat16 instead of float16",
    )
