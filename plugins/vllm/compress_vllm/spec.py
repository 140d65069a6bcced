"""What vLLM's scheduler has to know of a span: the memory it takes, the blocks it frees, the prefixes it hits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from compress_vllm.rule import Rule


class SpanManager(SlidingWindowManager):
    """Frees the blocks between sink and window of each request, and finds prefixes whose sink and window are cached."""

    def __init__(self, kv_cache_spec: SpanSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rule = kv_cache_spec.rule

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens at the start that need no block: those before the window where there is no sink, else none."""
        return 0 if self.rule.sink else self.rule.first(num_computed_tokens)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back the blocks that no later query of a request sees."""
        start, end = self.rule.gap(processed_computed_tokens, self.block_size)
        self._remove_blocks_in_range(request_id, start, end)

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> list[bool] | None:
        """Which full blocks are worth keeping for other requests: all that are there."""
        return None

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """The blocks of the longest cached prefix, with the null block where a block was freed; and its tokens."""
        rule, block = kv_cache_spec.rule, kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        blocks, found = min(max_length // block, len(hashes)), {}

        def cached(number: int) -> Any:
            if number not in found:
                found[number] = block_pool.get_cached_block(hashes[number], kv_cache_group_ids)
            return found[number]

        length = rule.hit(lambda number: bool(cached(number)), blocks, block, alignment_tokens, int(drop_eagle_block))
        held = set(rule.held(length * block, block))
        rows = [cached(number) if number in held else None for number in range(length)]
        null = block_pool.null_block
        taken = tuple([null if row is None else row[place] for row in rows] for place in range(len(kv_cache_group_ids)))
        return taken, length * block


@register_kv_cache_spec(manager_class=SpanManager)
@dataclass(frozen=True, kw_only=True)
class SpanSpec(SlidingWindowSpec):
    """The cache of attention modules with one rule; `sliding_window` is its window at the first token."""

    rule: Rule

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks that a request holds."""
        return self.rule.most_blocks(max_in_flight_tokens, max_model_len, self.block_size)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all modules are alike, so that one block table does for them."""
        return all(spec == self for spec in kv_cache_specs.values())
