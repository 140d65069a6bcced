"""The attention and mask functions that a planned model registers with transformers, and how heads get to mixers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from .impl import current, is_elsewhere
from .mixer import Kinds, Mixer
from .paged_cache import CacheLayer
from .reference import Rows
from .scores import Scores
from .step import Step

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
    names = sorted(_KNOWN.intersection(given))
    return [name for name in names if given[name] is not None and given[name] is not (name == "is_causal")]


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Raise ValueError, with their names, where keyword arguments change what attention computes."""
    names = changing_arguments(given)
    if packing := [name for name in names if name in _PACKING]:
        raise ValueError(
            f"{', '.join(packing)}: packed sequences are not supported; pass one sequence per row, with padding and an "
            "attention_mask (a collator that pads, and no packing or padding_free in a trainer)"
        )
    if "output_attentions" in names:
        raise ValueError("a planned model has no attention weights to return; use the dense model for that")
    if names:
        raise ValueError(
            f"{', '.join(names)}: a planned model's attention does not know this argument, which changes what "
            "attention computes; leave it out"
        )


# The registry is global to the process and the last registration wins, so the name carries the hash of all the code
# beside this file: two checkpoints with different runtimes can live in one process.
_SOURCES = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != "__init__.py")
_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()
NAME = f"compress_{_HASH[:12]}"


def install(module: Any, kinds: Kinds) -> None:
    """Give an attention module its mixers, whose parameters become its own, and hand them its inputs if they ask."""
    module.compress_kinds = kinds
    module.mixers = nn.ModuleDict({mixer.name: mixer for mixer in kinds.mixers})
    handle = vars(module).pop("compress_hook", None)
    if handle is not None:
        handle.remove()
    if kinds.needs_inputs:
        module.compress_hook = module.register_forward_pre_hook(_keep_inputs, with_kwargs=True)


def _keep_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward hook before an attention module: the step gets its hidden states and rotary tables."""
    step = kwargs.get("compress_step")
    if step is not None:
        step.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        step.rotary = kwargs.get("position_embeddings")


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
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
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
    kinds = module.compress_kinds
    step.scores = Scores.given(softcap, s_aux)
    if step.scores is not None:
        kinds.check_scores()
    if key.shape[1] != kinds.count:
        raise ValueError(
            f"layer {module.layer_idx} has {key.shape[1]} key/value heads here, and the plan {kinds.count}: heads can "
            'be split over processes by from_pretrained(tp_plan="auto") alone (tensor parallel)'
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
    if step.autocast or is_elsewhere(query.device):
        with torch.autocast(query.device.type, enabled=False), current(query.device):
            out = _attend(module.layer_idx, kinds, query, key, value, layer, step, scaling, dropout)
    else:
        out = _attend(module.layer_idx, kinds, query, key, value, layer, step, scaling, dropout)
    return out if dtype == given else out.to(given), None


def _attend(
    number: int,
    kinds: Kinds,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: CacheLayer | None,
    step: Step,
    scale: float | None,
    dropout: float,
) -> torch.Tensor:
    """`plan_attention` of layer `number` in one dtype: `[B, T, H, D]`."""
    states = None if layer is None else layer.states
    if layer is not None and states is not None and step.lengths is not None:
        trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if not trained and dropout == 0:
            step.stored.add(number)
            if kinds.only is not None:
                return kinds.only.decode(query, key, value, states[0], step, scale=scale)
            return kinds.mix(query, key, value, states, partial(_decode, step=step, scale=scale))
        # The cache is detached, so the token's own key and value have to come from here.
        assert step.gains is not None
        if step.rows is None:
            step.rows = Rows(tuple(layer.lengths), (0,) * len(step.gains), tuple(step.gains))
    assert step.rows is not None
    pick = None if step.pick is None else step.on("pick", query.device)
    if pick is not None:
        by_head = pick[:, None, :, None]
        query, key, value = (x.gather(2, by_head.expand(-1, x.shape[1], -1, x.shape[3])) for x in (query, key, value))
        if kinds.needs_inputs:
            _pick_inputs(step, pick)
    if states is not None and number in step.stored:
        if any(step.rows.past):
            raise RuntimeError(
                "a layer is computed again in the backward pass, as activation checkpointing does, and the cached "
                "tokens before it have changed since; train without a cache, or without checkpointing"
            )
        states = None  # its tokens are there already
    elif states is not None:
        step.stored.add(number)
    if step.shard is not None:
        kinds.check_shard()
    if kinds.only is not None:
        state = None if states is None else states[0]
        out = kinds.only.prefill(query, key, value, state, step, scale=scale, dropout=dropout)
    else:
        run = partial(_prefill, step=step, scale=scale, dropout=dropout)
        out = kinds.mix(query, key, value, states, run)
    if pick is not None:
        out = torch.zeros_like(out).scatter(1, pick[:, :, None, None].expand_as(out), out)
    return out


def _prefill(mixer: Mixer, *args: Any, **options: Any) -> torch.Tensor:
    return mixer.prefill(*args, **options)


def _decode(mixer: Mixer, *args: Any, **options: Any) -> torch.Tensor:
    return mixer.decode(*args, **options)


def _pick_inputs(step: Step, pick: torch.Tensor) -> None:
    """Bring what the mixers ask for into the order of the picked columns."""

    def picked(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.expand(len(pick), -1, -1)
        return tensor.gather(1, pick[..., None].expand(-1, -1, tensor.shape[-1]))

    if step.hidden is not None:
        step.hidden = picked(step.hidden)
    if step.rotary is not None:
        step.rotary = (picked(step.rotary[0]), picked(step.rotary[1]))


def plan_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask interface: no mask tensor is ever built; padding reaches the layers in `Step`."""
    return None


AttentionInterface.register(NAME, plan_attention)
AttentionMaskInterface.register(NAME, plan_mask)
