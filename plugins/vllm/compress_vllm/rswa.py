"""Sinks and a window of one length by the mask that vLLM's Triton backend has (R-SWA): key j is seen by query t where

    j <= t   and   (j < prefix  or  t - j < window),

with the sink as the prefix of every request. The mask is exact, and saves the memory; but that kernel goes through all
keys before it, so `kernel.py` is what runs by itself, and this where `COMPRESS_VLLM_BACKEND=rswa` asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from compress_vllm.backend import check_arguments


class RswaBuilder(TritonAttentionMetadataBuilder):
    """vLLM's own, with the rule of the KV cache group in place of the one window of a model's configuration."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        rule, requests = kv_cache_spec.rule, vllm_config.scheduler_config.max_num_seqs
        self.window = max(1, rule.alpha)
        self.prefixes = torch.full((requests,), rule.sink, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> TritonAttentionMetadata:
        """See the class."""
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        found.rswa_window, found.rswa_prefix_lens = self.window, self.prefixes[: common_attn_metadata.num_reqs]
        return found


class RswaImpl(TritonAttentionImpl):
    """vLLM's own, for what heads with sinks can have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_arguments(self.alibi_slopes, self.kv_cache_dtype, self.attn_type, self.kv_sharing_target_layer_name)
        self.sliding_window = (-1, -1)  # the mask has it


class RswaBackend(TritonAttentionBackend):
    """Names the parts above for vLLM."""

    @staticmethod
    def get_name() -> str:
        """Under which the plugin registers its backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """What computes."""
        return RswaImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """What is worked out before it."""
        return RswaBuilder
