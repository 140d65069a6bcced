"""The pass over projections: what those of the outputs read, and gradients of weights if asked.

Forward only where no statistic needs gradients; else the backward pass follows on the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from compress.models.backward import loss_scale, recomputed
from compress.models.context.dense import shared_attention
from compress.models.families import check_reading
from compress.models.placement import input_device
from compress.models.replaced import AttentionCall, frozen, replaced_attention
from compress.models.stream import LayerByLayer, stream_of
from compress.models.units import LayerUnits
from compress.profile.passes.base import Run, Work
from compress.profile.passes.samples import Read, SamplePass, one_by_one
from compress.profile.statistic import Item, Reads, Statistic
from compress.profile.sums import Sheet

if TYPE_CHECKING:
    from compress.data.sample import Sample
    from compress.profile.units.base import UnitStatistic

NAME = "compress_shared"  # of the attention where processes share samples
ROWS = 1024  # tokens that are handed out at once: float32 copies of long documents would not fit


class ProjectionsPass(SamplePass):
    """Feeds statistics of heads and neurons.

    While the model is read it is in eval mode and only the weights of its projections need gradients, if any do;
    afterwards, also after an exception, that is as it was.
    """

    reads: ClassVar[Reads] = "projections"
    streams: ClassVar[bool] = True
    corpora: ClassVar[int] = 2

    @classmethod
    def work(cls, statistics: Sequence[Statistic], alternatives: int) -> Work:
        gradient = any(statistic.needs_gradient for statistic in statistics)
        return Work(forward=1, backward=gradient, weights=gradient, columns=True, corpora=cls.corpora)

    @contextmanager
    def reader(self, run: Run, statistics: Sequence[UnitStatistic]) -> Iterator[Read]:
        reader = _Reader(run, statistics)
        with ExitStack() as undo:
            reader.open(undo)
            yield reader.read


class _Reader:
    """Runs samples with hooks on the projections."""

    sheet: Sheet

    def __init__(self, run: Run, statistics: Sequence[UnitStatistic]) -> None:
        self.run, self.subject, self.statistics = run, run.subject, statistics
        self.taken: Any = None
        self.gradient = any(statistic.needs_gradient for statistic in statistics)
        self._forward = False

    def open(self, undo: ExitStack) -> None:
        """Set hooks and gradients, until `undo` closes."""
        if self.run.sharing is None:
            undo.enter_context(frozen(self.subject.model))
        else:
            undo.enter_context(replaced_attention(self.subject.model, NAME, self._attention))
        inputs = [statistic.registered for statistic in self.statistics if statistic.reads_inputs]
        check_reading(self.subject.model.config, inputs)
        for layer in self.subject.units:
            for kind in ("query", "neuron") if inputs else ():
                hook = layer.output(kind).register_forward_pre_hook(self._hook(layer, kind))
                undo.callback(hook.remove)
            if self.gradient:
                for module in layer.projections.values():
                    module.weight.requires_grad_()
        undo.callback(self._drop_gradients)

    def read(self, items: Sequence[Item], sheets: Sequence[Sheet]) -> list[float | None]:
        """See `samples.Read`; without losses, which are not those of the profile."""
        if stream_of(self.subject.model) is not None:
            self._read_by_layer([item.sample for item in items], sheets)
        else:
            one_by_one(self._read)(items, sheets)
        return [None] * len(items)

    def _read_by_layer(self, samples: Sequence[Sample], sheets: Sequence[Sheet]) -> None:
        passing, model = LayerByLayer(self.subject.model, self.run.report), self.subject.model
        scale = loss_scale(model.get_input_embeddings().weight.dtype)

        def begin(number: int) -> None:
            self.sheet = sheets[number]

        with passing.opened():
            with self._taking():
                states, inputs = passing.forward(samples, begin, keep=self.gradient)
            if self.gradient:
                passing.backward(
                    samples,
                    lambda sample, output: sample.loss(output)[0] * scale,
                    states,
                    inputs,
                    begin,
                    lambda layer, number: self._add_gradients(self.subject.units[layer], sheets[number], scale),
                )

    def _read(self, item: Item, sheet: Sheet) -> None:
        self.sheet, sample, model = sheet, self.run.taken(item.sample), self.subject.model
        self.taken = sample
        device = input_device(model)
        if not self.gradient:
            with torch.no_grad(), self._taking():
                model.base_model(**sample.body(device))
            return
        scale = loss_scale(model.get_input_embeddings().weight.dtype)
        self._drop_gradients()
        with torch.enable_grad(), recomputed(model, sample.length, chosen=self.run.checkpointing):
            with self._taking():
                output = model(**sample.inputs(device))
            loss, _ = sample.loss(output)
            (loss * scale).backward()
        for layer in self.subject.units:
            self._add_gradients(layer, sheet, scale)

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        return shared_attention(call, self.taken.part)

    def _add_gradients(self, layer: LayerUnits, sheet: Sheet, scale: float) -> None:
        """Take the gradients of a layer's projections, and drop them."""
        for name, module in layer.projections.items():
            gradient: Any = module.weight.grad
            gradient = gradient.float() / scale
            module.weight.grad = None
            for statistic, sums in zip(self.statistics, sheet.sums, strict=True):
                if statistic.needs_gradient:
                    statistic.add_gradient(sums[layer.index], name, gradient)

    @contextmanager
    def _taking(self) -> Iterator[None]:
        """What the projections read is only taken meanwhile, and not where a layer is computed again."""
        self._forward = True
        try:
            yield
        finally:
            self._forward = False

    def _hook(self, layer: LayerUnits, kind: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if not self._forward:
                return
            read = arguments[0].detach()[0]
            if self.run.sharing is not None:  # without what stands behind the sample
                read = read[self.taken.real(read.device)]
            for rows in read.split(ROWS):
                inputs = rows.float()
                for statistic, sums in zip(self.statistics, self.sheet.sums, strict=True):
                    statistic.add(sums[layer.index], layer, kind, inputs)

        return hook

    def _drop_gradients(self) -> None:
        if self.gradient:
            for layer in self.subject.units:
                for module in layer.projections.values():
                    module.weight.grad = None
