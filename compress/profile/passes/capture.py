"""Runs a document through a model and hands out each layer's Q, K, V and dLoss/dO, one layer at a time.

The model's own attention is replaced, through transformers' AttentionInterface, by one that computes the same with
SDPA and keeps what statistics need. With gradients the layers arrive in backward order, inside the backward pass: a
node of the autograd graph right behind each attention output saves Q, K and V, receives dLoss/dO, and is freed with
what it saved as soon as it has handed the layer on. Under gradient checkpointing autograd recomputes the saved
tensors of a layer just before its node runs, and nothing here has to know. Without gradients the layers arrive in
forward order.

The mask function that is registered beside it makes no mask at all: causality and the architecture's sliding window are
handled here, so that no N x N mask exists either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compress.errors import UserError
from compress.models.memory import needs_checkpointing
from compress.models.replaced import (
    answer_rows,
    causal_attention,
    checkpoint_layers,
    refuse_arguments,
    replaced_attention,
    tapped,
)
from compress.profile.passes.tiles import LayerTensors

if TYPE_CHECKING:
    from compress.data.document import Document
    from compress.models.shape import ModelShape

NAME = "compress_profile"
HALF_SCALE = 2.0**12  # loss scale of float16 models, whose smallest gradients would be flushed to zero

Consume = Callable[[LayerTensors], None]


class Capture:
    """Context manager in which `run` passes documents through a model.

    While it is open the model is in eval mode, its weights need no gradient and its attention is the one described
    above; on leaving, also by an exception, all of that is as it was. One capture can be open at a time.

    Args:
        model: a causal language model of a supported family.
        shape: its shape.
        consume: called once per layer and document.
        gradient: run a backward pass and give `output_gradient`.
        checkpointing: recompute each decoder layer in the backward pass instead of keeping its activations; None
            decides per document from an estimate and the free memory. The numbers are the same.
    """

    def __init__(
        self, model: Any, shape: ModelShape, consume: Consume, *, gradient: bool, checkpointing: bool | None = None
    ) -> None:
        self.model = model
        self.shape = shape
        self.consume = consume
        self.gradient = gradient
        self.checkpointing = checkpointing
        self._undo = ExitStack()
        self._scale = 1.0

    def __enter__(self) -> Capture:
        self._undo.enter_context(replaced_attention(self.model, NAME, self._attention))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def run(self, sample: Document) -> float | None:
        """Pass one sample through the model.

        Returns:
            The loss in nats per answer token, None without a backward pass.

        Raises:
            UserError: attention outputs or gradients that are not finite; names the layer.
        """
        weight = self.model.get_input_embeddings().weight
        tokens = torch.tensor([sample.tokens], device=weight.device)
        start, end = sample.answer
        if not self.gradient:
            with torch.no_grad():
                last = torch.tensor([end - 1], device=tokens.device)
                self.model(input_ids=tokens, logits_to_keep=last, use_cache=False)
            return None
        self._scale = HALF_SCALE if weight.dtype == torch.float16 else 1.0
        with torch.enable_grad(), ExitStack() as layers:
            if self._checkpoints(sample.length, weight.dtype.itemsize, tokens.device):
                checkpoint_layers(self.model, layers)
            embeddings = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
            rows = answer_rows(sample.answer, tokens.device)
            logits = self.model(inputs_embeds=embeddings, logits_to_keep=rows, use_cache=False).logits[0]
            loss = functional.cross_entropy(logits.float(), tokens[0, start:end])
            (loss * self._scale).backward()
        return float(loss.detach())

    def _checkpoints(self, length: int, itemsize: int, device: torch.device) -> bool:
        if self.checkpointing is not None:
            return self.checkpointing
        return needs_checkpointing(self.model, self.shape, length, itemsize, device)

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention function of transformers' interface: `[B, H, T, D]` in, `[B, T, H, D]` out, batch 1."""
        refuse_arguments(module, others)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        window = self.shape.native_windows[layer]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = causal_attention(query, key, value, scaling, window)
        self._check(output, layer, "the attention output")
        if self.gradient:

            def hand_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> None:
                self._check(slope, layer, "the gradient of the attention output")
                self.consume(LayerTensors(layer, q[0], k[0], v[0], scaling, window, slope[0].float() / self._scale))

            output = tapped(output, hand_on, query, key, value)
        else:
            self.consume(LayerTensors(layer, query[0], key[0], value[0], scaling, window))
        return output.transpose(1, 2).contiguous(), None

    def _check(self, values: torch.Tensor, layer: int, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"{what} of layer {layer} is not finite",
                where=f"model, layer {layer}",
                expected="finite numbers",
                found="NaN or infinity",
                fix="check the weights of the model; profile in float32 or bfloat16 instead of float16",
            )
