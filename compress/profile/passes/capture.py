"""Runs a sample through a model and hands out each layer's Q, K, V and dLoss/dO, one layer at a time.

The model's own attention is replaced, through transformers' AttentionInterface, by one that computes the same and
keeps what statistics need; in half precision on a GPU by the runtime's kernels, whose gradients are the same to the
bit in every run, elsewhere with SDPA. With gradients the layers arrive in backward order, inside the backward pass: a
node of the autograd graph right behind each attention output saves Q, K and V, receives dLoss/dO, and is freed with
what it saved as soon as it has handed the layer on. Under gradient checkpointing autograd recomputes the saved
tensors of a layer just before its node runs, and nothing here has to know. Without gradients the layers arrive in
forward order.

The mask function that is registered beside it makes no mask at all: causality and the architecture's sliding window are
handled here, so that no N x N mask exists either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.models.backward import loss_scale, recomputed
from compress.models.context.dense import SharedSample, shared_attention, views_of
from compress.models.placement import input_device
from compress.models.replaced import AttentionCall, differentiable_inputs, replaced_attention, tapped
from compress.models.stream import LayerByLayer, stream_of
from compress.profile.passes.tiles import LayerTensors

if TYPE_CHECKING:
    from compress.data.sample import Sample

NAME = "compress_profile"

Consume = Callable[[LayerTensors], None]


class Capture:
    """Context manager in which `run` passes samples through a model.

    While it is open the model is in eval mode, its weights need no gradient and its attention is the one described
    above; on leaving, also by an exception, all of that is as it was. One capture can be open at a time.

    Args:
        model: of a supported family.
        consume: called once per layer and sample.
        gradient: run a backward pass and give `output_gradient`.
        checkpointing: recompute each decoder layer in the backward pass instead of keeping its activations; None
            decides per sample from an estimate and the free memory. The numbers are the same.
        inputs: give what the attention modules get, too.
    """

    def __init__(
        self, model: Any, consume: Consume, *, gradient: bool, checkpointing: bool | None = None, inputs: bool = False
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.consume = consume
        self.gradient = gradient
        self.checkpointing = checkpointing
        self._undo = ExitStack()
        self._scale = 1.0
        self._shared: SharedSample | None = None
        self._problem: UserError | None = None

    def __enter__(self) -> Capture:
        self._undo.enter_context(replaced_attention(self.model, NAME, self._attention, inputs=self.inputs))
        if self.gradient:
            self._undo.enter_context(differentiable_inputs(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def run_all(
        self, samples: Sequence[Sample], begin: Callable[[int], None], tell: Callable[[int, int, str], None]
    ) -> list[float | None]:
        """`run` of several samples, which pass a model that is read layer by layer together.

        Args:
            begin: called with the number of a sample before layers of it are handed out.
            tell: called with (layers done, layers in all, what) where the model is read so.
        """
        losses: list[float | None] = [None] * len(samples)
        if stream_of(self.model) is None:
            for number, sample in enumerate(samples):
                begin(number)
                losses[number] = self.run(sample)
            return losses
        passing = LayerByLayer(self.model, tell)
        self._scale, found = self._loss_scale(), dict[int, float]()

        def loss(sample: Sample, output: Any) -> torch.Tensor:
            total, count = sample.loss(output)
            found[len(found)] = float((total / count).detach())
            return total / count * self._scale

        with passing.opened():
            states, inputs = passing.forward(samples, begin, keep=self.gradient)
            if self.gradient:
                passing.backward(samples, loss, states, inputs, begin)
        return [found.get(number) for number in range(len(samples))]

    def _loss_scale(self) -> float:
        return loss_scale(self.model.get_input_embeddings().weight.dtype)

    def run(self, sample: Sample | SharedSample) -> float | None:
        """Pass one sample through the model, or the part of it that is here.

        Returns:
            The mean loss in nats, or this process's share in it; None without a backward pass.

        Raises:
            UserError: attention outputs or gradients that are not finite; names the layer.
        """
        self._shared, self._problem = sample if isinstance(sample, SharedSample) else None, None
        loss = self._run(sample)
        if self._problem is not None:  # told when all is done, since other processes wait for this one meanwhile
            raise self._problem
        return loss

    def _run(self, sample: Sample | SharedSample) -> float | None:
        device = input_device(self.model)
        if not self.gradient:
            with torch.no_grad():
                self.model.base_model(**sample.body(device))
            return None
        self._scale = self._loss_scale()
        with torch.enable_grad(), recomputed(self.model, sample.length, chosen=self.checkpointing):
            total, count = sample.loss(self.model(**sample.inputs(device)))
            loss = total / count
            (loss * self._scale).backward()
        return float(loss.detach())

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        """`[1, H, T, D]`; hands the layer on."""
        # Not `call`: what is handed to the backward pass may not keep what recomputed layers give up.
        layer, scaling, window, scores = call.layer, call.scaling, call.window, call.scores
        shared = self._shared
        output = call.repeatable() if shared is None else shared_attention(call, shared.part)
        self._check(output, layer, "the attention output")

        read = [call.query, call.key, call.value]
        if call.hidden is not None:
            read += [call.hidden, *(call.rotary or ())]

        def hand_on(*tensors: torch.Tensor | None) -> None:
            query, key, value, *inputs = (tensor[0] for tensor in tensors[:-1] if tensor is not None)
            slope = tensors[-1]
            if slope is not None:
                self._check(slope, layer, "the gradient of the attention output")
                slope = slope[0].float() / self._scale
            if shared is not None:
                self._hand_on_segments(shared, LayerTensors(layer, query, key, value, scaling, window, slope, scores))
                return
            taken = LayerTensors(layer, query, key, value, scaling, window, slope, scores)
            if inputs:
                taken.hidden, *rotary = inputs
                taken.rotary = (rotary[0], rotary[1]) if rotary else None
            self.consume(taken)

        if self.gradient:
            return tapped(output, hand_on, *read)
        hand_on(*read, None)
        return output

    @torch.no_grad()
    def _hand_on_segments(self, shared: SharedSample, taken: LayerTensors) -> None:
        """Hand on the segments of a sample that are here, with the keys that they see, which are exchanged again."""
        views = views_of(shared.part, taken.key[None], taken.value[None], taken.window)
        queries = shared.part.split(taken.query, 1)
        whole = taken.output_gradient
        slopes = [None] * len(views) if whole is None else shared.part.split(whole, 1)
        for query, slope, (view, both) in zip(queries, slopes, views, strict=True):
            rows = min(view.stop, shared.whole) - view.start  # the rest is padding
            if rows <= 0:
                continue
            key, value = both[0].split([query.shape[-1], both.shape[-1] - query.shape[-1]], dim=-1)
            self.consume(
                replace(
                    taken,
                    query=query[:, :rows],
                    key=key,
                    value=value,
                    output_gradient=None if slope is None else slope[:, :rows],
                    row_start=view.start,
                    key_start=view.shift,
                )
            )

    def _check(self, values: torch.Tensor, layer: int, what: str) -> None:
        """Refuse NaN and infinity; where a sample is shared, once it has passed."""
        try:
            _check(values, layer, what)
        except UserError as error:
            if self._shared is None:
                raise
            self._problem = self._problem or error


def _check(values: torch.Tensor, layer: int, what: str) -> None:
    """Refuse NaN and infinity."""
    if not bool(torch.isfinite(values).all()):
        raise UserError(
            f"{what} of layer {layer} is not finite",
            where=f"model, layer {layer}",
            expected="finite numbers",
            found="NaN or infinity",
            fix="check the weights of the model; profile in float32 or bfloat16 instead of float16",
        )
