"""The supported architecture families: one entry each, and the only place that names them.

A family is supported when its attention calls transformers' AttentionInterface on keys and values after RoPE.
A new one is an entry here, one in the table of `runtime/modeling_compress.py`, and a configuration in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from compress.errors import UserError, nearest


@dataclass(frozen=True)
class Family:
    """Names of one architecture family.

    Attributes:
        model_type: transformers' name of the stock configuration.
        architecture: the stock causal language model class.
        planned: prefix of the classes in `runtime/modeling_compress.py` that carry a plan.
        native: the stock causal language model class with the same weights whose layers are full or slide one by
            one (`layer_types` in its configuration); None where transformers has none.
        twin: a stock causal language model class that computes the same on the same weights and takes any number of
            heads, where the family's own configuration does not; with the configuration's fields that make it so.
    """

    model_type: str
    architecture: str
    planned: str
    native: str | None
    twin: str | None = None
    twin_fields: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    family.model_type: family
    for family in (
        Family("gemma3_text", "Gemma3ForCausalLM", "CompressGemma3", "Gemma3ForCausalLM"),
        # Llama's configuration wants a hidden size that is a multiple of the number of heads, whatever `head_dim` says.
        Family(
            "llama",
            "LlamaForCausalLM",
            "CompressLlama",
            "MinistralForCausalLM",
            twin="MistralForCausalLM",
            twin_fields={"sliding_window": None},
        ),
        Family("ministral", "MinistralForCausalLM", "CompressMinistral", "MinistralForCausalLM"),
        Family("mistral", "MistralForCausalLM", "CompressMistral", "MinistralForCausalLM"),
        Family("phi3", "Phi3ForCausalLM", "CompressPhi3", None),
        Family("qwen2", "Qwen2ForCausalLM", "CompressQwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", "CompressQwen3", "Qwen3ForCausalLM"),
    )
}


def family_of(config: Any) -> Family:
    """The family of a transformers configuration; a planned configuration belongs to its stock family.

    Raises:
        UserError: the architecture is not supported, and says which are; or its attention looks ahead.
    """
    model_type = str(config.model_type).removeprefix("compress_")
    if model_type not in FAMILIES:
        raise UserError(
            f"architecture `{config.model_type}` is not supported",
            expected=f"one of {', '.join(sorted(FAMILIES))}",
            found=", ".join(getattr(config, "architectures", None) or []) or model_type,
            fix=nearest(model_type, FAMILIES),
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "a model whose attention looks ahead is not supported",
            where="config.json: use_bidirectional_attention",
            expected="causal attention",
        )
    return FAMILIES[model_type]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of every decoder layer, in order; each has an integer `layer_idx`."""
    body: Any = getattr(model, "model", model)
    return [layer.self_attn for layer in body.layers]
