"""The attention backends of head groups with sinks or growing windows, as vLLM wants them: plain PyTorch, and kernels.

Both read only the blocks that the rule keeps. On a GPU it is the kernels (`kernel.py`), which are captured in CUDA
graphs; elsewhere plain PyTorch (`plain.py`), which asks the device for lengths and is not.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from compress_vllm import plain
from compress_vllm.rule import Rule

CHOICE = "COMPRESS_VLLM_BACKEND"
CHOICES = ("kernel", "rswa", "plain")


class _Impl(AttentionImpl[Any]):
    """What both have: the arguments, and which of them are refused."""

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
        sinks: torch.Tensor | None = None,
    ) -> None:
        check_arguments(alibi_slopes, kv_cache_dtype, attn_type, kv_sharing_target_layer_name)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, float(scale)
        self.cap = logits_soft_cap or None
        self.extra = sinks  # vLLM's name for a logit of each query head, which stands for no value

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Fill `output`, `[tokens, heads, size]`, from the cache `[blocks, groups, tokens of a block, 2 size]`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("head groups with sinks or growing windows do not know quantised outputs")
        if attn_metadata is None:  # while vLLM measures memory
            return output.zero_()
        self._attend(query, kv_cache, attn_metadata, output)
        return output

    def _attend(self, query: torch.Tensor, cache: torch.Tensor, metadata: Any, out: torch.Tensor) -> None:
        raise NotImplementedError


def check_arguments(slopes: Any, cache_dtype: str, kind: str, shared: str | None) -> None:
    """Raise NotImplementedError for what heads with sinks or growing windows cannot have."""
    for what, there in (
        ("slopes of positions (ALiBi)", slopes is not None),
        (f"a cache in {cache_dtype}", is_quantized_kv_cache(cache_dtype)),
        (f"attention of the type {kind}", kind != AttentionType.DECODER),
        ("keys and values of another layer", shared is not None),
    ):
        if there:
            raise NotImplementedError(f"head groups with sinks or growing windows do not know {what}")


class PlainBuilder(AttentionMetadataBuilder[plain.Batch]):
    """Works out once a step, for all modules of a group, where the keys lie that queries see."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rule: Rule = kv_cache_spec.rule
        self.block = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> plain.Batch:
        """See the class."""
        batch = common_attn_metadata
        starts, lengths = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        return plain.batch_of(self.rule, self.block, starts, lengths, batch.block_table_tensor)


class PlainImpl(_Impl):
    """Softmax attention over the keys that a `plain.Batch` names."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values `[tokens, heads, size]` at their slots; a negative slot stores nothing."""
        plain.store(kv_cache, key, value, slot_mapping)

    def _attend(self, query: torch.Tensor, cache: torch.Tensor, metadata: plain.Batch, out: torch.Tensor) -> None:
        plain.attend(query, cache, metadata, self.scale, self.cap, out, self.extra)


@dataclass
class KernelMetadata:
    """What one step asks of the modules of a KV cache group; tensors are vLLM's own, which graphs may hold on to."""

    rule: Rule
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    most_queries: int
    longest: int


class KernelBuilder(AttentionMetadataBuilder[KernelMetadata]):
    """Hands on what vLLM has, so that nothing is computed or copied between steps."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rule: Rule = kv_cache_spec.rule
        self._init_reorder_batch_threshold(1)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> KernelMetadata:
        """See the class."""
        batch = common_attn_metadata
        return KernelMetadata(
            rule=self.rule,
            table=batch.block_table_tensor,
            starts=batch.query_start_loc,
            lengths=batch.seq_lens,
            tokens=batch.num_actual_tokens,
            most_queries=batch.max_query_len,
            longest=batch.max_seq_len,
        )


class KernelImpl(_Impl):
    """The kernels of `kernel.py`."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values `[tokens, heads, size]` at their slots; a negative slot stores nothing."""
        from compress_vllm import kernel  # Triton is not needed elsewhere

        kernel.store(kv_cache, key, value, slot_mapping)

    def _attend(self, query: torch.Tensor, cache: torch.Tensor, metadata: KernelMetadata, out: torch.Tensor) -> None:
        from compress_vllm import kernel

        kernel.attend(
            query[: metadata.tokens],
            cache,
            metadata.rule,
            metadata.table,
            metadata.starts,
            metadata.lengths,
            metadata.most_queries,
            metadata.longest,
            self.scale,
            self.cap,
            out[: metadata.tokens],
            self.extra,
        )


class SpanBackend(AttentionBackend):
    """Names the parts in plain PyTorch for vLLM."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Under which the plugin registers it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """What computes."""
        return PlainImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """What is worked out before it."""
        return PlainBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """The rule has a window."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """A logit of each query head in the softmax."""
        return True


class KernelBackend(SpanBackend):
    """Names the kernels for vLLM."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Tokens of a block."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """What computes."""
        return KernelImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        """What is worked out before it."""
        return KernelBuilder


def backend_for(rule: Rule) -> type[AttentionBackend]:
    """The backend of head groups with a rule on this platform; `COMPRESS_VLLM_BACKEND` asks for another one.

    Raises:
        ValueError: the variable has another value than `kernel`, `rswa` and `plain`.
    """
    on_gpu = current_platform.is_cuda_alike()
    choice = os.environ.get(CHOICE) or ("kernel" if on_gpu else "plain")
    if choice not in CHOICES:
        raise ValueError(f"{CHOICE}: expected {', '.join(CHOICES)}, found {choice!r}")
    if choice == "rswa" and rule.is_rswa:
        from compress_vllm.rswa import RswaBackend

        return RswaBackend
    return SpanBackend if choice == "plain" else KernelBackend
