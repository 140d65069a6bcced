"""The supported architecture families: one entry each, and the only place that names them.

A family is supported when its attention calls transformers' AttentionInterface on keys and values after RoPE.
A new one is an entry here, one in the table of `runtime/modeling_compress.py`, and a configuration in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def family_of(config: Any, spec: str | None = None) -> Family:
    """The family of a transformers configuration; a planned configuration belongs to its stock family.

    Args:
        spec: what the user called the model, for the message.

    Raises:
        UserError: the architecture is not supported, and says which are; or its attention looks ahead.
    """
    model_type = str(config.model_type).removeprefix("compress_")
    if model_type not in FAMILIES:
        text = getattr(config, "text_config", None)
        if text is not None and hasattr(text, "model_type"):
            raise wrapper(model_type, str(text.model_type), spec or getattr(config, "name_or_path", "") or "MODEL")
        raise unsupported(model_type, getattr(config, "architectures", None) or [])
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "a model whose attention looks ahead is not supported",
            where="config.json: use_bidirectional_attention",
            expected="causal attention",
        )
    return FAMILIES[model_type]


def unsupported(model_type: str, architectures: Iterable[str]) -> UserError:
    """What to say of an architecture that is none of the families."""
    return UserError(
        f"architecture `{model_type}` is not supported",
        expected=f"one of {', '.join(sorted(FAMILIES))}",
        found=", ".join(architectures) or model_type,
        fix=nearest(model_type, FAMILIES),
    )


def wrapper(model_type: str, text: str, spec: str) -> UserError:
    """What to say of a model that wraps a text model with what reads images or sound: how to take the text model out,
    where that is of a family."""
    known = text in FAMILIES
    return UserError(
        f"`{model_type}` wraps a text model, `{text}`, with parts that read other inputs",
        where=spec,
        expected=f"a text model alone: one of {', '.join(sorted(FAMILIES))}",
        found=f"`{model_type}`" + ("" if known else f", and `{text}` is not supported either"),
        fix=f"save its text part once, then name `text-part` as the model: {text_part_line(spec)}" if known else None,
    )


def text_part_line(spec: str) -> str:
    """A command that saves the text model of a wrapper, with its tokenizer, to `text-part`."""
    return (
        f'python -c "import transformers as t; '
        f"w = t.AutoModelForImageTextToText.from_pretrained('{spec}', dtype='auto'); "
        "m = t.AutoModelForCausalLM.from_config(w.config.text_config, dtype=w.dtype); "
        "m.model, m.lm_head = w.model.language_model, w.lm_head; "
        "m.config.tie_word_embeddings = m.lm_head.weight.data_ptr() == m.model.embed_tokens.weight.data_ptr(); "
        "m.generation_config = w.generation_config; m.save_pretrained('text-part'); "
        f"t.AutoTokenizer.from_pretrained('{spec}').save_pretrained('text-part')\""
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention module of every decoder layer, in order; each has an integer `layer_idx`."""
    body: Any = getattr(model, "model", model)
    return [layer.self_attn for layer in body.layers]
