"""One attention module of vLLM for each rule of a layer, in place of one for all its heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from compress_vllm.backend import backend_for
from compress_vllm.plan import Layer, Part, check_attention, check_ranks, of_rank, parts_of, slot_of
from compress_vllm.rule import Rule
from compress_vllm.spec import SpanSpec

ARGUMENTS = "_compress_arguments"
Logits = tuple[nn.Parameter, list[int]]
KNOWN = frozenset(inspect.signature(Attention.__init__).parameters) - {"self", "extra_impl_args"}


@contextmanager
def arguments_kept() -> Iterator[None]:
    """Inside, every `Attention` keeps the arguments that it was made with, so that it can be made for fewer heads."""
    stock, signature = Attention.__init__, inspect.signature(Attention.__init__)

    @wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        extra = {name: value for name, value in given.pop("extra_impl_args", {}).items() if value is not None}
        vars(self)[ARGUMENTS] = given | extra

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = stock


def split(model: nn.Module, layers: Sequence[Layer], config: Any) -> None:
    """Replace the attention of every layer by a `SplitAttention`, wherever the model class keeps it.

    Raises:
        ValueError: the ranks of tensor parallelism do not all have the same rules; or vLLM's class made attention that
            is not that of the configuration, or with what its parts cannot have.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    check_ranks(layers, ranks)
    slot, done = slot_of(layers, ranks), 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is Attention:
                whole: Any = child
                number = extract_layer_index(whole.layer_name)
                check_attention(whole.layer_name, number, whole.head_size, whole.sliding_window, config)
                rules = of_rank(layers[number].rules, rank, ranks)
                setattr(module, name, SplitAttention(whole, parts_of(rules, slot)))
                done += 1
    if not done:
        raise ValueError("the plan is not in effect: vLLM's class of this model has no attention module that is known")


class PartAttention(Attention):
    """Some heads of a layer.

    Args:
        logits: a logit of each query head in the softmax, as vLLM's class has it for all heads of the layer, and which
            of these are here; weights are not loaded yet.
    """

    def __init__(self, *args: Any, logits: Logits | None = None, **kwargs: Any) -> None:
        own = None if logits is None else logits[0].data.new_empty(len(logits[1]))
        super().__init__(*args, **kwargs if own is None else kwargs | {"sinks": own})
        self.logits = None if logits is None or own is None else (own, *logits)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the logits that were loaded, before the implementation may bring them to another form."""
        if self.logits is not None:
            own, whole, heads = self.logits
            own.copy_(whole.data[heads])
        super().process_weights_after_loading(act_dtype)


class SpanAttention(PartAttention):
    """Heads with sinks, or a window that grows: a cache and a backend of their own."""

    def __init__(self, *args: Any, rule: Rule, **kwargs: Any) -> None:
        super().__init__(*args, attn_backend=backend_for(rule), **kwargs)
        self.rule = rule

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SpanSpec:
        """What the scheduler is told."""
        return SpanSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            sliding_window=max(1, self.rule.alpha),
            rule=self.rule,
        )


class SplitAttention(nn.Module):
    """As `Attention`, for heads that differ in what they see and keep."""

    order: torch.Tensor
    back: torch.Tensor

    def __init__(self, whole: Attention, parts: Sequence[Part]) -> None:
        super().__init__()
        given = dict(getattr(whole, ARGUMENTS))
        logits = given.pop("sinks", None)
        unknown = sorted(given.keys() - KNOWN)
        if unknown or given.get("kv_sharing_target_layer_name") is not None:
            what = f"`{unknown[0]}`" if unknown else "the cache of another layer"
            raise ValueError(f"{whole.layer_name}: attention with {what} cannot be split by head groups")
        # It was entered where the scheduler looks for caches.
        del get_current_vllm_config().compilation_config.static_forward_context[whole.layer_name]
        self.groups, self.size, self.size_v = whole.num_kv_heads, whole.head_size, whole.head_size_v
        self.share = whole.num_heads // whole.num_kv_heads
        self.parts = nn.ModuleList()
        # Head groups in the order of the parts, so that each part is a slice, which costs no copy.
        order = [group for part in parts for group in part.groups]
        self.sizes = [len(part.groups) for part in parts]
        self.sorted = order == sorted(order)
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("back", torch.tensor(order).argsort(), persistent=False)
        for number, part in enumerate(parts):
            given |= {
                "num_heads": len(part.groups) * self.share,
                "num_kv_heads": len(part.groups),
                "prefix": f"{whole.layer_name}_part{number}",
            }
            heads = [group * self.share + head for group in part.groups for head in range(self.share)]
            self.parts.append(_attention(given, part.rule, None if logits is None else (logits, heads)))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Attention of `[tokens, heads x size]`, each head group in the module of its rule."""
        count = query.shape[0]
        query = query.reshape(count, self.groups, self.share * self.size)
        key = key.reshape(count, self.groups, self.size)
        value = value.reshape(count, self.groups, self.size_v)
        if not self.sorted:
            query, key, value = (tensor.index_select(1, self.order) for tensor in (query, key, value))
        shares = (tensor.split(self.sizes, dim=1) for tensor in (query, key, value))
        found = [
            part(*(share.flatten(1) for share in inputs), output_dtype=output_dtype).view(count, size, -1)
            for part, size, *inputs in zip(self.parts, self.sizes, *shares, strict=True)
        ]
        output = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        if not self.sorted:
            output = output.index_select(1, self.back)
        return output.view(count, -1) if output_shape is None else output.view(output_shape)


def _attention(given: dict[str, Any], rule: Rule | None, logits: Logits | None) -> Attention:
    """One part: vLLM's own attention where that knows the rule."""
    if rule is None:
        return PartAttention(**given, logits=logits)
    if rule.is_plain:
        return PartAttention(**given | {"per_layer_sliding_window": max(1, rule.alpha)}, logits=logits)
    return SpanAttention(**given, rule=rule, logits=logits)
