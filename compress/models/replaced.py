"""A model whose attention is, for a while, another function: weights frozen, eval mode, everything put back.

Beside it what such functions need: plain causal attention, and a tap on the gradient of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from compress.errors import UserError
from compress.models.families import attentions_of, layers_of
from compress.runtime.attention import changing_arguments
from compress.runtime.impl import IMPLS, Impl, current, explain_impl
from compress.runtime.reference import prefill
from compress.runtime.scores import Scores
from compress.runtime.span import native_windows, own_span


@dataclass(frozen=True)
class AttentionCall:
    """What an attention layer asks for in one forward pass.

    Attributes:
        module: the attention module.
        layer: its index.
        query: `[B, H, T, D]`, after RoPE.
        key, value: `[B, G, T, D]`, keys after RoPE.
        scaling: of the scores.
        window: the layer's own sliding window in tokens; None where it has none.
        scores: what else the layer does to its scores; None for a plain softmax.
        hidden: input of the attention module `[B, T, hidden size]`, where it is kept (`replaced_attention`).
        rotary: cosines and sines of the layer `[B, T, D]`, likewise; None in a layer without them.
    """

    module: Any
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None
    scores: Scores | None = None
    hidden: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def dense(self) -> torch.Tensor:
        """What the layer computes by itself: causal attention within its own window, `[B, H, T, D]`."""
        return causal_attention(self.query, self.key, self.value, self.scaling, self.window, self.scores)

    def repeatable(self) -> torch.Tensor:
        """`dense`, with gradients that are the same to the bit in every run and process, where a kernel gives such.

        On a GPU and in half precision PyTorch takes cuDNN's kernels or FlashAttention's, which add what each block of
        keys gives to the gradient of a query in the order in which the blocks end. Those of the runtime go over the
        keys of a query one after the other.
        """
        impl = repeatable_impl(self.query)
        if impl is None or self.scores is not None:
            return self.dense()
        spans = (own_span(self.window),) * self.key.shape[1]
        # Asked for the log-sum-exp, because otherwise short inputs that hide nothing are PyTorch's there, too.
        output: torch.Tensor
        output, _ = impl.prefill(self.query, self.key, self.value, spans, scale=self.scaling, keep_lse=True)
        return output


Attend = Callable[[AttentionCall], torch.Tensor]
Inputs = dict[int, tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]]  # hidden and rotary, by layer


def repeatable_impl(query: torch.Tensor) -> Impl | None:
    """What computes attention in place of PyTorch's kernels where the gradients of these differ from run to run; None
    where they do not, where no gradient is taken, or where there is nothing else but plain PyTorch or, in float32, a
    much slower kernel."""
    if query.device.type != "cuda" or query.dtype.itemsize != 2 or not torch.is_grad_enabled():
        return None
    name, _ = explain_impl("auto", query.device, query.dtype, query.shape[-1])
    return None if name == "reference" else IMPLS[name]


def attention_function(
    attend: Attend, windows: Mapping[int, int | None] | None = None, inputs: Inputs | None = None
) -> Callable[..., Any]:
    """An attention function of transformers' interface from one of a call, which returns outputs `[B, H, T, D]`.

    Args:
        windows: the layers' own sliding windows; None hands on none.
        inputs: where `kept_inputs` puts what the modules get; None hands on none.
    """

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        refuse_arguments(module, others)
        layer = int(module.layer_idx)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = None if windows is None else windows[layer]
        scores = Scores.given(softcap, s_aux)
        hidden, rotary = (None, None) if inputs is None else inputs.pop(layer)
        with current(query.device):
            output = attend(AttentionCall(module, layer, query, key, value, scaling, window, scores, hidden, rotary))
        return output.transpose(1, 2).contiguous(), None

    return attention


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """A model in eval mode whose weights need no gradient; on leaving, all of that is as it was."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
        model.eval()
        model.requires_grad_(False)
        yield


@contextmanager
def kept_inputs(model: Any) -> Iterator[Inputs]:
    """What the attention modules get, by layer, from their call on until their attention function takes it."""
    inputs: Inputs = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        inputs[int(module.layer_idx)] = hidden, kwargs.get("position_embeddings")

    with ExitStack() as hooks:
        for attention in attentions_of(model):
            hooks.callback(attention.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield inputs


@contextmanager
def replaced_attention(model: Any, name: str, attend: Attend, *, inputs: bool = False) -> Iterator[None]:
    """Run `model` on another attention function, without any mask tensor; causality and padding are its own matter.

    Args:
        name: what the function is registered as; one user of a name at a time.
        inputs: hand on what the attention modules get, too.
    """
    windows = dict(enumerate(native_windows(model.config, len(layers_of(model)))))
    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        # The registered function would keep whatever it is bound to, and with it the model, alive.
        undo.callback(AttentionInterface.register, name, _closed)
        kept = undo.enter_context(kept_inputs(model)) if inputs else None
        AttentionInterface.register(name, attention_function(attend, windows, kept))
        AttentionMaskInterface.register(name, _no_mask)
        model.set_attn_implementation(name)
        yield


@contextmanager
def differentiable_inputs(model: Any) -> Iterator[None]:
    """Gradients reach back to what the input embedding gives, though no weight of the model needs one."""

    def start(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(start)
    try:
        yield
    finally:
        hook.remove()


def refuse_arguments(module: Any, given: Mapping[str, Any]) -> None:
    """Raise UserError where a layer gives its attention arguments that ask for more than causal attention.

    Args:
        module: the attention module, which is named.
        given: keyword arguments of transformers' attention interface beside queries, keys, values, mask and scaling.
    """
    if names := changing_arguments(given):
        raise UserError(
            f"attention with {', '.join(f'`{name}`' for name in names)} is not supported",
            where=type(module).__name__,
            expected="causal attention, with the layer's own sliding window",
            found=", ".join(names),
            fix="take a model of another architecture; docs/support.md lists those that are supported",
        )


def _no_mask(*_: Any, **__: Any) -> None:
    """Mask function of transformers' interface: the attention functions here need none."""


def _closed(*_: Any, **__: Any) -> None:
    raise RuntimeError("this attention function belongs to a measurement that has ended")


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: int | None,
    scores: Scores | None = None,
) -> torch.Tensor:
    """Causal attention `[B, H, T, D]` without an N x N mask.

    With a sliding window shorter than the sequence, blocks of rows see a strip of at most twice the window.
    """
    length = query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if scores is not None:
        return prefill(query, key, value, (own_span(window),) * key.shape[1], scale=scaling, scores=scores)
    if window is None or window >= length:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    blocks = []
    rows = max(window, 128)
    for start in range(0, length, rows):
        end, low = min(start + rows, length), max(0, start - window + 1)
        distance = torch.arange(start, end, device=query.device)[:, None] - torch.arange(low, end, device=query.device)
        blocks.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, low:end],
                value[:, :, low:end],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(blocks, 2)


def tapped(output: torch.Tensor, hand_on: Callable[..., None], *saved: torch.Tensor) -> torch.Tensor:
    """`output`, unchanged; in the backward pass `hand_on(*saved, slope)` gets dLoss/dOutput beside what was saved.

    Under checkpointing autograd recomputes the saved tensors of a layer just before it hands them on.
    """
    result: torch.Tensor = _Tap.apply(output, hand_on, *saved)
    return result


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, hand_on: Any, *saved: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*saved)
        ctx.hand_on = hand_on
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing a second reading is refused
        ctx.hand_on(*saved, gradients[0])
        return (gradients[0], None, *(None for _ in saved))
