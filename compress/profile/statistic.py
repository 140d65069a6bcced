"""What a statistic is: its parameters (recipe schema), the pass it is taken from, what it sums, and its tensors."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from compress.errors import UserError
from compress.models.families import layers_of
from compress.models.placement import placement_of
from compress.models.pruning import output_projections
from compress.models.stream import holding
from compress.models.units import LayerUnits, units_of
from compress.profile.key import Key
from compress.registry import Method, statistics

if TYPE_CHECKING:
    from compress.data.sample import Sample
    from compress.models.load import LoadedModel
    from compress.models.prepared import Prepared
    from compress.plan import ModelShape
    from compress.targets.layer_option import LayerOption
    from compress.targets.target import Target
    from compress.targets.window import SpanGrid

# What a statistic is taken from: queries, keys and values of attention, where the loss is that of the answers, or that
# of what can be looked up in the context; attention where the model repeats the text; inputs and gradients of the
# projections; the weights alone; or a training of its own.
Reads = Literal["attention", "repeats", "reconstruction", "projections", "weights", "training"]

# Sums by name, of one place: a profiled length (statistics of head groups) or a layer (those of heads and neurons).
Sums = dict[str, torch.Tensor]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Subject:
    """The model that is measured.

    Attributes:
        loaded: the model with what was read beside it.
        shape: its shape.
        device: where sums over samples are held, so that none waits for a copy.
        known: what was measured before, by key; see `Statistic.follows`.
    """

    loaded: LoadedModel
    shape: ModelShape
    device: torch.device
    known: Mapping[Key, torch.Tensor] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.loaded.model

    @cached_property
    def units(self) -> list[LayerUnits]:
        """Heads and neurons of every layer. Raises UserError where the projections are not understood."""
        return units_of(self.model)

    @cached_property
    def places(self) -> tuple[torch.device, ...]:
        """The device of every layer."""
        return placement_of(self.model).layers

    @cached_property
    def reach(self) -> list[torch.Tensor]:
        """W_o^T W_o of every layer over the query heads of a group, `[groups, head_dim, head_dim]` float64: of a value,
        v, they add to the hidden state what has the summed squares v^T reach v.

        Raises:
            UserError: the projections of the architecture are not understood.
        """
        shape, reach = self.shape, []
        for number, layer in enumerate(layers_of(self.model)):
            with holding(self.model, number):
                weight = output_projections(layer, self.model.config)[0].weight.detach().double()
            heads = weight.view(weight.shape[0], shape.kv_heads, -1, shape.head_dim)
            reach.append(torch.einsum("ogqd,ogqe->gde", heads, heads).to(self.device))
        return reach


@dataclass(frozen=True)
class Item:
    """One sample of a pass.

    Attributes:
        length: the profiled length in tokens that it stands for; the sample itself may be shorter.
        corpus: 0, or 1 where it belongs to the second corpus.
        where: how it is called in messages.
    """

    sample: Sample
    length: int
    corpus: int
    where: str


@dataclass(frozen=True)
class Result:
    """One tensor of a statistic.

    Attributes:
        values: float32 on the CPU, finite.
        axes: one name per axis, `layer` and `group` first, or `layer` and `neuron`.
        unit: what one number counts.
    """

    values: torch.Tensor
    axes: tuple[str, ...]
    unit: str


Results = dict[Key, Result]


class Statistic(Method):
    """Base of all statistics; the fields of a subclass are its recipe keys, each with a description.

    A new statistic is one file with a subclass of `heads.base.HeadStatistic` or `units.base.UnitStatistic`, registered
    by `@statistics.register("name")`, and an entry in `tests/profile/test_matrix.py`.

    Attributes:
        reads: the pass that it is taken from.
        needs_gradient: whether the pass has to run backwards.
        by_rows: whether all that it takes are sums over the tokens of a sample, as queries or as inputs, so that
            processes that share the sample can each add up their own.
        of_evidence: whether it is measured on documents alone that hide something to look up.
        unit: what one number counts.
    """

    reads: ClassVar[Reads]
    by_rows: ClassVar[bool] = False
    needs_gradient: ClassVar[bool] = False
    of_evidence: ClassVar[bool] = False
    unit: ClassVar[str]

    @property
    def follows(self) -> tuple[str, ...]:
        """Names of what it reads of other statistics, which are therefore measured before it (`Subject.known`)."""
        return ()

    @property
    def span_grid(self) -> SpanGrid | None:
        """The grid whose rules it prices; None where it prices no rules."""
        return None

    @property
    def priced(self) -> tuple[Target, ...]:
        """The targets whose effect on the loss it measures, once it is `resolved`."""
        return ()

    @property
    def priced_layers(self) -> tuple[LayerOption, ...]:
        """Likewise, options of whole layers."""
        return ()

    @property
    def reads_inputs(self) -> bool:
        """Whether it is taken from what the output projections read."""
        return False

    @property
    def steps_taken(self) -> int:
        """Samples that it trains on, one after another; an estimate of the time counts them."""
        return 0

    def check_training(self, tasks: Collection[str]) -> None:
        """Refuse documents of these tasks where it trains and finds none of its own among them. Raises UserError."""

    def check_ahead(self, config: Any, prepared: Prepared = (), where: str | None = None) -> None:
        """Refuse, before anything is measured, what it cannot measure of a model.

        Args:
            config: of the model.
            prepared: what was trained by then, or stands for it.
            where: the recipe's key of what it measures; None where that is the statistic's own.

        Raises:
            UserError: there is such.
        """

    def alternatives(self, shape: ModelShape, lengths: Sequence[int]) -> int:
        """Targets under which it computes all head groups again; an estimate of the time counts them."""
        return 0

    def resolved(self, shape: ModelShape, lengths: Sequence[int]) -> Self:
        """A copy with all parameters that depend on the model or the profiled lengths worked out, in tokens."""
        return self

    def scores_heads(self, shape: ModelShape) -> bool:
        """Whether it leaves a score of every query head."""
        return "units" in self.gives.values()

    def learnt(self, prepared: Prepared) -> Prepared:
        """What it reads of the targets that were prepared for the model."""
        return ()

    def parameters(self) -> dict[str, Any]:
        """The parameters as plain JSON values."""
        return self.model_dump(mode="json")


class SummedStatistic(Statistic):
    """Base of the statistics that are sums over samples, and something that is made of the sums."""

    @abstractmethod
    def begin(self, subject: Subject, lengths: Sequence[int]) -> dict[int, Sums]:
        """Sums at zero for samples of these lengths in tokens, by place (see `Sums`)."""

    def close(self, sums: dict[int, Sums], item: Item) -> None:
        """Finish the sums of one sample, before they are added to those of the others."""

    @abstractmethod
    def count(self, item: Item) -> Mapping[str, int]:
        """What a sample adds to the numbers that sums are divided by, by name."""

    @abstractmethod
    def bad_place(self, place: int, name: str, total: torch.Tensor) -> tuple[str, int]:
        """What a sum that is not finite is called, and its first layer with NaN or infinity."""

    @abstractmethod
    def results(self, totals: Sequence[tuple[dict[int, Sums], Counter[str]]], subject: Subject) -> Results:
        """The tensors, from the sums and numbers of every corpus.

        Raises:
            UserError: a number that is NaN or infinite.
        """


def giving(form: str) -> list[str]:
    """Names of the statistics that leave something of a form (`Method.gives`) for a search to read."""
    return [name for name, kind in statistics.items() if form in kind.gives.values()]


def not_finite(statistic: str, what: str, layer: int, where: str) -> UserError:
    """The error that names the statistic, the tensor and the layer."""
    return UserError(
        f"statistic `{statistic}` is not finite in layer {layer}",
        where=where,
        expected="finite numbers",
        found=f"NaN or infinity in `{what}`, layer {layer}",
        fix="check the weights of the model; profile in float32 or bfloat16 instead of float16",
    )
