"""Attention by a span rule in plain PyTorch, on vLLM's blocks: only blocks that the rule keeps are read.

A query of one token is computed with those of all other requests in one call; a prompt, or a chunk of it, piece by
piece. Keys are stored behind RoPE, so that which are read is all that matters and not where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from compress_vllm.rule import Rule

PIECE = 128  # queries of a prompt that are computed together; all of them read what the first and the last see


@dataclass
class Rows:
    """Queries of one request, or single ones of R requests, and the keys that they read.

    Attributes:
        tokens: places of the queries in the batch, `[R]` for single queries, else a slice.
        blocks, offsets: where the keys lie, `[R, L]` (or `[L]` of a chunk).
        visible: which of them each query sees, `[R, 1, 1, L]` (or `[T, L]`); None where all do.
    """

    tokens: Any
    blocks: torch.Tensor
    offsets: torch.Tensor
    visible: torch.Tensor | None


@dataclass
class SpanMetadata:
    """What one step asks of the attention modules of a KV cache group."""

    single: Rows | None
    chunks: list[Rows]


class SpanMetadataBuilder(AttentionMetadataBuilder[SpanMetadata]):
    """Works out once a step, for all modules of a group, where the keys lie that queries see."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rule: Rule = kv_cache_spec.rule
        self.block = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> SpanMetadata:
        """See the class."""
        batch = common_attn_metadata
        starts, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        alone = [row for row, count in enumerate(counts) if count == 1]
        chunks = [
            self._chunk(starts[row], max(lengths[row] - count, 0), piece, count, batch.block_table_tensor[row])
            for row, count in enumerate(counts)
            if count > 1
            for piece in range(0, count, PIECE)
        ]
        return SpanMetadata(self._single(alone, starts, lengths, batch.block_table_tensor) if alone else None, chunks)

    def _single(self, rows: list[int], starts: list[int], lengths: list[int], table: torch.Tensor) -> Rows:
        """Single queries of several requests; columns are the keys of the sink, and then those of the window."""
        device = table.device
        last = torch.tensor([lengths[row] - 1 for row in rows], device=device)[:, None]
        first = self.rule.first(last)
        sinks = first.clamp(max=self.rule.sink)
        seen = sinks + last + 1 - first
        columns = torch.arange(int(seen.max()), device=device)[None]
        keys = torch.minimum(torch.where(columns < sinks, columns, first - sinks + columns), last)
        visible = None if bool((seen == seen[0]).all()) else (columns < seen)[:, None, None]
        blocks = table[rows].gather(1, keys // self.block).long()
        tokens = torch.tensor([starts[row] for row in rows], device=device)
        return Rows(tokens, blocks, keys % self.block, visible)

    def _chunk(self, start: int, before: int, piece: int, count: int, table: torch.Tensor) -> Rows:
        """A piece, from query `piece` on, of `count` queries of one request that had `before` tokens before them."""
        device, end = table.device, min(piece + PIECE, count)
        first = self.rule.first(before + piece)
        keys = torch.cat(
            [torch.arange(min(self.rule.sink, first), device=device), torch.arange(first, before + end, device=device)]
        )
        queries = torch.arange(before + piece, before + end, device=device)[:, None]
        visible = (keys <= queries) & ((keys < self.rule.sink) | (keys >= self.rule.first(queries)))
        tokens = slice(start + piece, start + end)
        return Rows(tokens, table[keys // self.block].long(), keys % self.block, visible)


class SpanAttentionImpl(AttentionImpl[SpanMetadata]):
    """Softmax attention over the keys that `SpanMetadata` names."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        for what, there in (
            ("slopes of positions (ALiBi)", alibi_slopes is not None),
            (f"a cache in {kv_cache_dtype}", is_quantized_kv_cache(kv_cache_dtype)),
            (f"attention of the type {attn_type}", attn_type != AttentionType.DECODER),
            ("keys and values of another layer", kv_sharing_target_layer_name is not None),
        ):
            if there:
                raise NotImplementedError(f"head groups with sinks or growing windows do not know {what}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.cap = logits_soft_cap or None

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values `[tokens, heads, size]` at their slots; a negative slot stores nothing."""
        stored = slot_mapping >= 0
        slots = slot_mapping[stored].long()
        new = torch.cat([key, value], dim=-1)[: len(stored)][stored]
        kv_cache.transpose(1, 2)[slots // kv_cache.shape[2], slots % kv_cache.shape[2]] = new.to(kv_cache.dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SpanMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output`, `[tokens, heads, size]`, from the cache `[blocks, groups, tokens of a block, 2 size]`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("head groups with sinks or growing windows do not know quantised outputs")
        if attn_metadata is None:  # while vLLM measures memory
            return output
        rows = attn_metadata.single
        if rows is not None:
            held = kv_cache.transpose(1, 2)[rows.blocks, rows.offsets]  # [R, L, G, 2 D]
            keys, values = held.transpose(1, 2).split(self.head_size, dim=-1)
            grouped = query[rows.tokens].unflatten(1, (self.num_kv_heads, -1))  # [R, G, heads of a group, D]
            output[rows.tokens] = self._attend(grouped, keys, values, rows.visible).flatten(1, 2).to(output.dtype)
        for rows in attn_metadata.chunks:
            held = kv_cache.transpose(1, 2)[rows.blocks, rows.offsets]  # [L, G, 2 D]
            keys, values = held.transpose(0, 1)[:, None].split(self.head_size, dim=-1)  # [G, 1, L, D]
            grouped = query[rows.tokens].unflatten(1, (self.num_kv_heads, -1)).permute(1, 2, 0, 3)
            found = self._attend(grouped, keys, values, rows.visible)  # [G, heads of a group, T, D]
            output[rows.tokens] = found.permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)
        return output

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> torch.Tensor:
        """Softmax attention of `[..., T, D]` over `[..., L, D]` where `visible` broadcasts; a cap on scores, if any."""
        key, value = key.to(query.dtype), value.to(query.dtype)
        if self.cap is None:
            key, value = (tensor.expand(*query.shape[:-2], *tensor.shape[-2:]) for tensor in (key, value))
            return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=self.scale)
        scores = self.cap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * (self.scale / self.cap))
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        return (scores.softmax(dim=-1) @ value.float()).to(query.dtype)


class SpanBackend(AttentionBackend):
    """Names the parts above for vLLM."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Under which the plugin registers it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SpanAttentionImpl]:
        """What computes."""
        return SpanAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SpanMetadataBuilder]:
        """What is worked out before it."""
        return SpanMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """The rule has a window."""
        return True
