"""The attention and mask functions that a planned model registers with transformers, and the choice of `impl`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from .flash import refusal as flash_refusal
from .paged_cache import PagedCache, PagedLayer
from .reference import Rows, decode, prefill, store, store_one
from .span import Span

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Impl:
    """One implementation of what a layer does; `reference.py` documents the arguments and is the specification."""

    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]
    store: Callable[..., None]
    store_one: Callable[..., None]


IMPLS = {"reference": Impl(prefill, decode, store, store_one)}


try:
    from .triton_attention import FLASH, TRITON, refusal
except ImportError as error:  # no Triton here
    _NO_TRITON = f"Triton cannot be imported ({error})"

    def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the kernels do not run for this device, dtype and head size; None when they do."""
        return _NO_TRITON

else:
    IMPLS["triton"] = Impl(*TRITON)
    IMPLS["flash"] = Impl(*FLASH)


def choose_impl(name: str, query: torch.Tensor) -> Impl:
    """The implementation of that name; `auto` is the fastest that runs for tensors like `query`, and says so once.

    Raises:
        ValueError: no such implementation, or one that cannot run here.
    """
    return IMPLS[explain_impl(name, query.device, query.dtype, query.shape[-1])[0]]


@lru_cache(maxsize=256)
def explain_impl(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What `choose_impl` takes, and why in one line.

    Raises:
        ValueError: as `choose_impl`.
    """
    if name != "auto" and name not in WORDS:
        raise ValueError(f"compress_impl: expected auto, {', '.join(WORDS)}, got {name!r}")
    kernels = refusal(device, dtype, head_dim)
    four = kernels or flash_refusal(device, dtype, head_dim)
    if name == "auto":
        if device.type == "cpu":  # Triton's interpreter is for tests
            taken, why = "reference", "the model is on a CPU"
        elif kernels is not None:
            taken, why = "reference", kernels
        else:
            taken, why = ("triton", four) if four is not None else ("flash", "flash-attn-4 is installed")
    else:
        reason = {"reference": None, "triton": kernels, "flash": four}[name]
        if reason is not None:
            raise ValueError(f"compress_impl: {name} was asked for, but {reason}; use auto or reference")
        taken, why = name, "as asked for"
    logger.info(f"attention runs in {WORDS[taken]}: {why}")
    return taken, why


WORDS = {
    "reference": "plain PyTorch",
    "triton": "Triton kernels",
    "flash": "Triton kernels, and FlashAttention-4 for long prompts",
}


# Arguments of transformers' attention interface, and of models that hand them on to it, that change what attention
# computes. The models here give none of them by themselves: a layer's own `sliding_window` is in the plan. They matter
# whenever they are set, but for `is_causal`, which says what is so.
_CHANGING = frozenset(
    (
        *("softcap", "s_aux", "sinks", "position_bias", "attention_bias", "alibi", "is_causal"),
        *("head_mask", "layer_head_mask", "block_mask", "mask_mod", "score_mod", "indices", "block_indices"),
        *("encoder_hidden_states", "encoder_attention_mask", "output_attentions"),
        *("block_table", "page_table", "cache_seqlens", "read_index", "write_index"),
        *("past_key_value", "layer_past", "past"),
    )
)
_PACKING = frozenset(
    (
        *("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "sequence_ids", "seq_idx"),
        *("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k"),
    )
)
_KNOWN = _CHANGING | _PACKING


def changing_arguments(given: Mapping[str, Any]) -> list[str]:
    """Names of the keyword arguments that are set and ask for another attention than causal softmax over one sequence.

    All attention functions of this project compute just that, so each of them refuses what is found here.
    """
    if _KNOWN.isdisjoint(given):
        return []
    found = sorted(_KNOWN.intersection(given))
    return [name for name in found if given[name] is not None and given[name] is not (name == "is_causal")]


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError, with their names, where keyword arguments change what attention computes."""
    found = changing_arguments(given)
    if packing := [name for name in found if name in _PACKING]:
        raise ValueError(
            f"{', '.join(packing)}: packed sequences are not supported; pass one sequence per row, with padding and an "
            "attention_mask (a collator that pads, and no packing or padding_free in a trainer)"
        )
    if "output_attentions" in found:
        raise ValueError("a planned model has no attention weights to return; use the dense model for that")
    if found:
        raise ValueError(
            f"{', '.join(found)}: a planned model's attention does not know this argument, which changes what "
            "attention computes; leave it out"
        )


# The registry is global to the process and the last registration wins, so the name carries the code's hash:
# two checkpoints with different runtimes can live in one process.
_SOURCES = (
    "span.py",
    "paged_cache.py",
    "reference.py",
    "tuned.py",
    "flash.py",
    "triton_span.py",
    "triton_prefill.py",
    "triton_backward.py",
    "triton_decode.py",
    "triton_store.py",
    "triton_attention.py",
    "attention.py",
)
_HASH = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)).hexdigest()
NAME = f"compress_{_HASH[:12]}"


@dataclass
class Step:
    """What the layers of one forward pass share.

    Attributes:
        cache: the paged cache, None when nothing is cached.
        rows: which columns are tokens; None in a step of one token a sequence through a cache, until a layer that
            takes gradients asks for them.
        pick: `[B, T]` columns that bring every sequence's tokens together at the front, where they are no run
            already; None where they are.
        lengths: `[B]` int32, in a step of one token: tokens of each sequence with it, 0 where it is padding.
        gains: tokens that each sequence gains, None where only the device knows.
        columns: T.
        spans: `[layers][groups]` of this pass where the plan has spans by length; None where those of the model hold.
        seen: `[B, columns]`, which columns so far were tokens, these included; None where the cache's own holds.
        autocast: whether torch casts the inputs of matrix products meanwhile.
        stored: layers whose tokens are in the cache.
    """

    cache: PagedCache | None
    rows: Rows | None
    pick: torch.Tensor | None
    lengths: torch.Tensor | None
    gains: list[int] | None
    columns: int
    spans: Sequence[Sequence[Span]] | None = None
    seen: torch.Tensor | None = None
    autocast: bool = False
    stored: set[int] = field(default_factory=set)

    @staticmethod
    def begin(cache: PagedCache | None, valid: torch.Tensor | None, batch: int, count: int, device: Any) -> Step:
        """The step of `count` new columns `[B, T]`; `valid` says which are tokens, None when all are.

        Raises:
            ValueError: more tokens than were reserved.
        """
        step = Step._begin(cache, valid, batch, count, device)
        step.autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if cache is not None:
            cache.check_room(step.gains)
        return step

    @staticmethod
    def _begin(cache: PagedCache | None, valid: torch.Tensor | None, batch: int, count: int, device: Any) -> Step:
        if cache is None:
            runs = Rows.whole(batch, count) if valid is None else None
            return _step_of_runs(None, runs, valid, [0] * batch)
        before = cache.begin(batch, device)
        differentiable = torch.is_grad_enabled()
        if cache.max_length is not None and (count > 1 or differentiable):
            cache.synchronize()
        if count == 1:
            gains = None
            if valid is None:
                gains = [1] * batch
                lengths = before + 1
            else:
                lengths = torch.where(valid[:, 0], before + 1, 0)
                if cache.max_length is None or differentiable:  # pages, and rows of a gradient, are found on the host
                    gains = valid[:, 0].long().tolist()
            return Step(cache, None, None, lengths, gains, 1)
        past = cache.paged[0].lengths or [0] * batch
        runs = Rows(tuple(past), (0,) * batch, (count,) * batch) if valid is None else None
        return _step_of_runs(cache, runs, valid, past)

    def end(self) -> None:
        """Count the new tokens on the device, in place, and the new columns."""
        if self.cache is None or self.cache.lengths is None or self.cache.width is None:
            return
        if self.seen is not None:
            self.cache.seen = self.seen
        for layer in self.cache.paged:
            layer.columns += self.columns
        self.cache.width += self.columns
        if self.lengths is not None:
            torch.maximum(self.cache.lengths, self.lengths, out=self.cache.lengths)
        elif self.gains is not None:
            self.cache.lengths += torch.tensor(self.gains, dtype=torch.int32, device=self.cache.lengths.device)

    def fail(self) -> None:
        """Mark the cache where an error came after the first layer had stored its tokens."""
        if self.cache is not None and self.stored:
            self.cache.interrupted = True


def _step_of_runs(cache: PagedCache | None, runs: Rows | None, valid: torch.Tensor | None, past: list[int]) -> Step:
    """A step of several columns; tokens that are no run of columns are picked together."""
    if runs is not None or valid is None:
        assert runs is not None
        return Step(cache, runs, None, None, list(runs.count), max(runs.count))
    count = valid.sum(dim=1).tolist()
    start = valid.long().argmax(dim=1)
    last = valid.shape[1] - valid.flip(1).long().argmax(dim=1)
    pick = None
    if bool(((last - start != valid.sum(dim=1)) & valid.any(dim=1)).any()):
        pick = (~valid).long().argsort(dim=1, stable=True)
        start = torch.zeros_like(start)
    rows = Rows(tuple(past), tuple(start.tolist()), tuple(count))
    return Step(cache, rows, pick, None, count, valid.shape[1])


@torch.compiler.disable  # the compiler takes what lies between attention layers; kernels and pages are left alone
def plan_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    compress_step: Step | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `[B, H, T, D]` and the new `[B, G, T, D]` to `[B, T, H, D]`.

    Padding columns take part in nothing: they are neither keys nor stored, and their output is zero.

    All is computed in the dtype of the cache, without one in that of the values, whatever autocast and RoPE made of
    the others; the output has the values' dtype.

    Raises:
        RuntimeError: called outside a planned model's forward pass, or by a layer that has passed its cache over.
        ValueError: arguments that change what attention computes, or other heads than the plan has.
    """
    if compress_step is None:
        raise RuntimeError(f"attention {NAME} works only inside a model that carries a plan")
    if attention_mask is not None:
        raise ValueError("attention_mask: a planned model takes a mask `[B, columns]` at its input, and no other")
    refuse_arguments(others)
    step = compress_step
    spans = module.compress_spans if step.spans is None else step.spans[module.layer_idx]
    if key.shape[1] != len(spans):
        raise ValueError(
            f"layer {module.layer_idx} has {key.shape[1]} key/value heads here, and the plan {len(spans)}: a planned "
            "model cannot be split over processes by heads (tensor parallel)"
        )
    layer = None if step.cache is None else step.cache.paged[module.layer_idx]
    if layer is not None:
        if not layer.given:
            raise RuntimeError(
                f"layer {module.layer_idx} ran without the cache that its model was given, as gradient checkpointing "
                "does: call model.gradient_checkpointing_disable() or model.eval() before, or pass use_cache=False"
            )
        layer.given = False
    given, dtype = value.dtype, value.dtype if layer is None else layer.dtype
    if not query.dtype == key.dtype == given == dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    elsewhere = query.is_cuda and query.device.index != torch.cuda.current_device()
    if step.autocast or elsewhere:
        # Kernels run where the current device is; the layers of a model may lie on several.
        current = torch.cuda.device(query.device) if elsewhere else nullcontext()
        with torch.autocast(query.device.type, enabled=False), current:
            out = _attend(module, query, key, value, layer, spans, step, scaling, dropout)
    else:
        out = _attend(module, query, key, value, layer, spans, step, scaling, dropout)
    return out if dtype == given else out.to(given), None


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: PagedLayer | None,
    spans: Sequence[Span],
    step: Step,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """`plan_attention` in one dtype: `[B, T, H, D]`."""
    impl = choose_impl(getattr(module.config, "compress_impl", "auto"), query)
    rows = step.rows
    if layer is not None and step.lengths is not None:
        trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if not trained and dropout == 0:
            step.stored.add(module.layer_idx)
            if step.gains is not None:
                layer.advance(step.gains)
            held = layer.pages()
            lengths = step.lengths.to(key.device)
            impl.store_one(key[:, :, 0], value[:, :, 0], held, lengths, spans)
            return impl.decode(query[:, :, 0], held, lengths, spans, scale=scaling)[:, None]
        # The cache is detached, so the token's own key and value have to come from here.
        assert step.gains is not None
        if rows is None:
            rows = step.rows = Rows(tuple(layer.lengths), (0,) * len(step.gains), tuple(step.gains))
    assert rows is not None and step.gains is not None
    pick = None if step.pick is None else step.pick[:, None, :, None].to(query.device)
    if pick is not None:
        query, key, value = (x.gather(2, pick.expand(-1, x.shape[1], -1, x.shape[3])) for x in (query, key, value))
    again = module.layer_idx in step.stored
    if again and any(rows.past):
        raise RuntimeError(
            "a layer is computed again in the backward pass, as activation checkpointing does, and the cached tokens "
            "before it have changed since; train without a cache, or without checkpointing"
        )
    pages = layer.pages() if layer is not None and any(rows.past) else None
    out = impl.prefill(query, key, value, spans, rows=rows, pages=pages, scale=scaling, dropout=dropout)
    if layer is not None and not again:
        step.stored.add(module.layer_idx)
        layer.advance(step.gains)
        impl.store(key, value, layer.pages(), rows, spans)
    if pick is not None:
        out = torch.zeros_like(out).scatter(2, pick.expand_as(out), out)
    return out.transpose(1, 2)


def plan_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: no mask tensor is ever built; spans and padding reach the layers in `Step`."""
    return None


AttentionInterface.register(NAME, plan_attention)
AttentionMaskInterface.register(NAME, plan_mask)
