"""Prefill through FlashAttention-4, where flash-attn-4 is installed: dense and windowed launches, block lists."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch

from .span import Span

BLOCK = 128  # tokens of a tile on both sides, what FlashAttention-4 takes on Hopper for head sizes up to 128
DIMS = (64, 96, 128)
KEPT_BYTES = 256 * 2**20  # of block lists, each (tokens / 128)^2 times heads numbers: those of the last layers
LEAST_WORK = 32 * 8192**2  # heads times tokens squared; below, the host's work on several launches is what takes time


@dataclass(frozen=True)
class Launch:
    """One launch over the neighbouring groups `start` to `stop`: everything, a plain window, or rules by block lists.

    Of `rules` those that are None belong to another launch: their lists are empty, and what is written for them is
    overwritten by launches behind this one.
    """

    start: int
    stop: int
    window: int | None = None
    rules: tuple[Span | None, ...] = ()


@lru_cache(maxsize=4096)
def launches_of(spans: tuple[Span, ...], length: int) -> tuple[Launch, ...]:
    """First one for all rules that need lists, then one for each run of groups that hide nothing or have one window.

    FlashAttention-4's own causal and local kernels order their tiles by length and mask only at the edges, which
    costs a tenth less than lists with a rule that is evaluated for every pair. Gathering groups that lie apart
    would cost more than a launch for each run: 2.0 of 28 ms at 64k tokens on an H200.
    """
    kinds = [_window(span, length) for span in spans]
    listed = [group for group, kind in enumerate(kinds) if kind == LISTED]
    found = []
    if listed:
        start, stop = listed[0], listed[-1] + 1
        rules = tuple(spans[group] if kinds[group] == LISTED else None for group in range(start, stop))
        found.append(Launch(start, stop, rules=rules))
    start = 0
    for kind, run in groupby(kinds):
        stop = start + len(list(run))
        if kind != LISTED:
            found.append(Launch(start, stop, window=kind))
        start = stop
    return tuple(found)


LISTED = -1


def _window(span: Span, length: int) -> int | None:
    """The window in tokens that this rule is at this length, None for everything, `LISTED` for all other rules."""
    if span.sees_all(length):
        return None
    plain = span.sink == 0 and span.beta == 0 and span.granule == 1
    return span.alpha if plain and span.alpha > 0 else LISTED


@dataclass(frozen=True)
class Blocks:
    """Which key tiles each query tile visits, `[G, query tiles]` counts and `[G, query tiles, most]` numbers, int32.

    Of a `full` tile every pair is visible; of a `part` tile the rule decides.
    """

    part_count: torch.Tensor
    part: torch.Tensor
    full_count: torch.Tensor
    full: torch.Tensor


def blocks_of(spans: Sequence[Span], length: int, device: torch.device, block: int = BLOCK) -> Blocks:
    """The tiles of a causal prefill of `length` tokens, from the bounds of the span rule; no mask is made."""
    tiles = -(-length // block)
    low = torch.arange(tiles, device=device) * block  # [tiles]
    high = (low + block).clamp(max=length) - 1
    parts, fulls = [], []
    for span in spans:
        begin = span.first(low) // block
        end = high // block + 1
        inner = torch.minimum(torch.maximum((span.first(high) + block - 1) // block, begin), end)
        outer = torch.maximum((low + 1) // block, inner)
        sinks = torch.minimum((high + 1).clamp(max=span.sink).add(block - 1) // block, begin)
        parts.append((sinks, begin, inner, outer, end))
        fulls.append((inner, outer))
    sinks, begin, inner, outer, end = (torch.stack(column) for column in zip(*parts, strict=True))  # each [G, tiles]
    part_count = sinks + inner - begin + end - outer
    at = torch.arange(int(part_count.max()), device=device)
    left = (sinks + inner - begin)[..., None]
    jump = torch.where(at < left, begin[..., None] + at - sinks[..., None], outer[..., None] + at - left)
    part = torch.where(at < sinks[..., None], at, jump)
    full_count = outer - inner
    full = inner[..., None] + torch.arange(max(1, int(full_count.max())), device=device)
    return Blocks(*(tensor.to(torch.int32) for tensor in (part_count, part, full_count, full.clamp(max=tiles - 1))))


@lru_cache
def refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention-4 does not run for this device, dtype and head size; None when it does."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "FlashAttention-4 is used on Hopper GPUs only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 has no {dtype}"
    if head_dim not in DIMS:
        return f"FlashAttention-4 is used for head sizes {', '.join(map(str, DIMS))}, not {head_dim}"
    try:
        _interface()
    except Exception as error:  # a compiler that is half installed fails in ways of its own
        return f"flash-attn-4 is not installed or does not import ({type(error).__name__}: {error})"
    return None


@lru_cache
def _interface() -> tuple[Any, Any, Any]:
    """flash-attn-4's forward function, its block lists and the span rule as a mask of its compiler."""
    try:
        import cutlass
        from cutlass import cute
        from flash_attn.cute import utils
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd
    except ImportError as error:  # transformers takes an import outside `try` for one that the checkpoint needs
        raise ImportError(f"flash-attn-4 cannot be imported: {error}") from error

    @cute.jit
    def rule(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        first = utils.scalar_to_ssa(aux_tensors[0][head[0], query[0]], cutlass.Int32)
        sink = utils.scalar_to_ssa(aux_tensors[1][head[0]], cutlass.Int32)
        return (key <= query) & ((key < sink) | (key >= first))

    return _flash_attn_fwd, BlockSparseTensorsTorch, rule


Arguments = tuple[Any, list[torch.Tensor]]
_KEPT: OrderedDict[Any, Arguments] = OrderedDict()


def _arguments(rules: tuple[Span | None, ...], share: int, length: int, device: torch.device) -> Arguments:
    """What `_make_arguments` returns, kept for the layers used last."""
    key = (rules, share, length, device)
    found = _KEPT.pop(key, None) or _make_arguments(rules, share, length, device)
    _KEPT[key] = found
    while len(_KEPT) > 1 and sum(map(_bytes, _KEPT.values())) > KEPT_BYTES:
        _KEPT.popitem(last=False)
    return found


def _bytes(arguments: Arguments) -> int:
    lists, aux = arguments
    return sum(t.numel() * t.itemsize for t in (lists.mask_block_idx, lists.full_block_idx, *aux))


def _make_arguments(rules: tuple[Span | None, ...], share: int, length: int, device: torch.device) -> Arguments:
    """Block lists `[1, H, ...]` and, per head, the first key of every query's window and the sink."""
    other = next(span for span in rules if span is not None)
    spans = [span or other for span in rules]
    blocks = blocks_of(spans, length, device)
    for group, span in enumerate(rules):
        if span is None:
            blocks.part_count[group] = 0
            blocks.full_count[group] = 0
    each = lambda tensor: tensor.repeat_interleave(share, dim=0)[None].contiguous()  # noqa: E731
    lists = _interface()[1](
        each(blocks.part_count),
        each(blocks.part),
        each(blocks.full_count),
        each(blocks.full),
        block_size=(BLOCK, BLOCK),
    )
    t = torch.arange(-(-length // BLOCK) * BLOCK, device=device)  # a tile's last rows may lie behind the end
    first = torch.stack([span.first(t) for span in spans]).to(torch.int32)
    sink = torch.tensor([min(span.sink, length) for span in spans], dtype=torch.int32, device=device)
    return lists, [first.repeat_interleave(share, dim=0).contiguous(), sink.repeat_interleave(share).contiguous()]


def applies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, plain: bool) -> bool:
    """Whether a prefill can go this way: `plain` (nothing cached, no padding, no gradients), and large enough."""
    batch, heads, length, dim = query.shape
    large = batch * heads * length**2 >= LEAST_WORK
    return plain and large and dim == value.shape[-1] and refusal(query.device, query.dtype, dim) is None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Sequence[Span], scale: float
) -> torch.Tensor:
    """Causal attention of whole sequences from position 0; `[B, H, T, D]`, no gradients."""
    forward, _, rule = _interface()
    length, share = query.shape[2], query.shape[1] // key.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for launch in launches_of(tuple(spans), length):
        groups = slice(launch.start, launch.stop)
        heads = slice(launch.start * share, launch.stop * share)
        options: dict[str, Any] = {"causal": True}
        if launch.window is not None:
            options = {"window_size_left": launch.window - 1, "window_size_right": 0}
        elif launch.rules:
            lists, aux = _arguments(launch.rules, share, length, query.device)
            options = {"mask_mod": rule, "block_sparse_tensors": lists, "aux_tensors": aux, "tile_mn": (BLOCK, BLOCK)}
        forward(
            query[:, :, heads],
            key[:, :, groups],
            value[:, :, groups],
            softmax_scale=scale,
            out=out[:, :, heads],
            **options,
        )
    return out.transpose(1, 2)
