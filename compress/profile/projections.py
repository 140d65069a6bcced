"""Runs documents through a model and hands out what the output projections read, and gradients of weights if asked.

Forward only where no statistic needs gradients; else the backward pass follows on the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from compress.data.document import Document
from compress.models.backward import loss_scale, recomputed
from compress.models.replaced import answer_rows, frozen
from compress.models.units import LayerUnits

if TYPE_CHECKING:
    from compress.models.shape import ModelShape

ROWS = 1024  # tokens that are handed out at once: float32 copies of long documents would not fit

TakeInputs = Callable[[LayerUnits, str, torch.Tensor], None]
TakeGradient = Callable[[LayerUnits, str, torch.Tensor], None]


class Projections:
    """Context manager in which `run` passes documents through a model.

    While it is open the model is in eval mode and only the weights of its projections need gradients, if any do; on
    leaving, also by an exception, that is as it was.

    Args:
        model: a causal language model.
        units: its layers.
        take_inputs: called with (layer, `query` or `neuron`, `[tokens, columns]` float32), tokens in order.
        take_gradient: called with (layer, name of the projection, `[out, in]` float32) once a document; None runs
            no backward pass.
        checkpointing: recompute each layer in the backward pass; None decides from the free memory.
    """

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        units: Sequence[LayerUnits],
        take_inputs: TakeInputs,
        take_gradient: TakeGradient | None = None,
        checkpointing: bool | None = None,
    ) -> None:
        self.model = model
        self.shape = shape
        self.units = units
        self.take_inputs = take_inputs
        self.take_gradient = take_gradient
        self.checkpointing = checkpointing
        self._undo = ExitStack()
        self._forward = False

    def __enter__(self) -> Projections:
        self._undo.enter_context(frozen(self.model))
        for layer in self.units:
            for kind in ("query", "neuron"):
                hook = layer.output(kind).register_forward_pre_hook(self._hook(layer, kind))
                self._undo.callback(hook.remove)
            if self.take_gradient is not None:
                for module in layer.projections.values():
                    module.weight.requires_grad_()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.take_gradient is not None:
            self._drop_gradients()
        self._undo.close()

    def run(self, document: Document) -> float | None:
        """Pass one document; its loss in nats per answer token, None without a backward pass."""
        weight = self.model.get_input_embeddings().weight
        tokens = torch.tensor([document.tokens], device=weight.device)
        start, end = document.answer
        if self.take_gradient is None:
            last = torch.tensor([document.length - 1], device=tokens.device)
            with torch.no_grad():
                self._logits(tokens, last)
            return None
        scale = loss_scale(weight.dtype)
        self._drop_gradients()
        with torch.enable_grad(), recomputed(self.model, document.length, chosen=self.checkpointing):
            logits = self._logits(tokens, answer_rows(document.answer, tokens.device))
            loss = functional.cross_entropy(logits.float(), tokens[0, start:end], reduction="sum")
            (loss * scale).backward()
        for layer in self.units:
            for name, module in layer.projections.items():
                gradient: Any = module.weight.grad
                self.take_gradient(layer, name, gradient.float() / scale)
                module.weight.grad = None
        return float(loss.detach()) / (end - start)

    def _logits(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`[rows, vocabulary]`; what the projections read is only taken meanwhile, and not when recomputed."""
        self._forward = True
        try:
            logits: torch.Tensor = self.model(input_ids=tokens, logits_to_keep=rows, use_cache=False).logits[0]
        finally:
            self._forward = False
        return logits

    def _hook(self, layer: LayerUnits, kind: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if self._forward:
                for rows in arguments[0].detach()[0].split(ROWS):
                    self.take_inputs(layer, kind, rows.float())

        return hook

    def _drop_gradients(self) -> None:
        for layer in self.units:
            for module in layer.projections.values():
                module.weight.grad = None
