"""Runs a document through a model and hands out each layer's Q, K, V and dLoss/dO, one layer at a time.

The model's own attention is replaced, through transformers' AttentionInterface, by one that computes the same with
SDPA and keeps what the tiles need. With gradients the layers arrive in backward order, inside the backward pass: a
node of the autograd graph right behind each attention output saves Q, K and V, receives dLoss/dO, and is freed with
what it saved as soon as it has handed the layer on. Under gradient checkpointing autograd recomputes the saved
tensors of a layer just before its node runs, and nothing here has to know. Without gradients the layers arrive in
forward order.

The mask function that is registered beside it makes no mask at all: causality, the architecture's sliding window and
padding are handled here, so that no N x N mask exists either.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compress.errors import UserError
from compress.models.backward import loss_scale, recomputed
from compress.models.replaced import AttentionCall, answer_rows, causal_attention, replaced_attention, tapped
from compress.profile.tiles import LayerTensors

if TYPE_CHECKING:
    from compress.models.shape import ModelShape

NAME = "compress_profile"

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
        self._start = 0
        self._end = 0
        self._scale = 1.0

    def __enter__(self) -> Capture:
        self._undo.enter_context(replaced_attention(self.model, NAME, self._attention))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def run(self, tokens: torch.Tensor, answer: tuple[int, int], valid: torch.Tensor | None = None) -> float | None:
        """Pass one row of tokens through the model.

        Args:
            tokens: `[1, T]` token ids on the model's device.
            answer: half-open range of the answer's tokens; the loss is the mean cross-entropy over them.
            valid: `[T]` booleans, False at padding on the left or the right; default none. Layers are handed out
                without the padding, so the row gives what it gives alone.

        Returns:
            The loss in nats per answer token, None without a backward pass.

        Raises:
            UserError: attention outputs or gradients that are not finite; names the layer.
            ValueError: padding inside the sequence, or an answer outside it.
        """
        length = tokens.shape[1]
        self._start, self._end = _valid_range(valid, length)
        first, end = answer
        if not self._start < first < end <= self._end:
            raise ValueError(f"answer {answer} is not inside the tokens {(self._start, self._end)} behind the first")
        positions = torch.arange(length, device=tokens.device).sub(self._start).clamp(min=0)[None]
        arguments = {"position_ids": positions, "use_cache": False}
        if not self.gradient:
            with torch.no_grad():
                last = torch.tensor([end - 1], device=tokens.device)
                self.model(input_ids=tokens, logits_to_keep=last, **arguments)
            return None
        self._scale = loss_scale(self.model.get_input_embeddings().weight.dtype)
        with torch.enable_grad(), recomputed(self.model, self._end - self._start, chosen=self.checkpointing):
            embeddings = self.model.get_input_embeddings()(tokens).detach().requires_grad_()
            rows = answer_rows(answer, tokens.device)
            logits = self.model(inputs_embeds=embeddings, logits_to_keep=rows, **arguments).logits[0]
            loss = functional.cross_entropy(logits.float(), tokens[0, first:end])
            (loss * self._scale).backward()
        return float(loss.detach())

    def _attention(self, call: AttentionCall) -> torch.Tensor:
        """`[1, H, T, D]`; hands the layer on."""
        layer, scaling, window = call.layer, call.scaling, call.window
        total = call.query.shape[2]
        inside = slice(self._start, self._end)
        query, key, value = call.query[:, :, inside], call.key[:, :, inside], call.value[:, :, inside]
        output = causal_attention(query, key, value, scaling, window)
        self._check(output, layer, "the attention output")
        if self.gradient:

            def hand_on(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> None:
                self._check(slope, layer, "the gradient of the attention output")
                self.consume(LayerTensors(layer, q[0], k[0], v[0], scaling, window, slope[0].float() / self._scale))

            output = tapped(output, hand_on, query, key, value)
        else:
            self.consume(LayerTensors(layer, query[0], key[0], value[0], scaling, window))
        if total != self._end - self._start:
            output = functional.pad(output, (0, 0, self._start, total - self._end))
        return output

    def _check(self, values: torch.Tensor, layer: int, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"{what} of layer {layer} is not finite",
                where=f"model, layer {layer}",
                expected="finite numbers",
                found="NaN or infinity",
                fix="check the weights of the model; profile in float32 or bfloat16 instead of float16",
            )


def _valid_range(valid: torch.Tensor | None, length: int) -> tuple[int, int]:
    """[start, end) of the one run of valid tokens. Raises ValueError when there is none or more than one."""
    if valid is None:
        return 0, length
    inside = valid.nonzero().flatten()
    if valid.shape != (length,) or not len(inside) or int(inside[-1] - inside[0]) + 1 != len(inside):
        raise ValueError("valid: expected one run of True per row, padding only on the left and the right")
    return int(inside[0]), int(inside[-1]) + 1
