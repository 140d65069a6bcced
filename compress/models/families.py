"""The supported architecture families: one entry each, and the only place that names them.

A family is supported when its attention calls transformers' AttentionInterface on keys and values after RoPE.
A new one is an entry here, one in the table of `runtime/modeling_compress.py`, and a configuration in `tests/tiny.py`,
with which `tests/test_families.py` probes it. A family that is known not to work has its reason in `REFUSED`.
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
        whole: why heads and neurons cannot be removed; None where they can.
        whole_with: the switch of the configuration under which `whole` holds; None where it always does.
        narrows: whether the configuration can say fewer heads with a head size that is not hidden size / heads.
    """

    model_type: str
    architecture: str
    planned: str
    native: str | None
    twin: str | None = None
    twin_fields: Mapping[str, Any] = field(default_factory=dict)
    whole: str | None = None
    whole_with: str | None = None
    narrows: bool = True

    def prunes(self, config: Any) -> bool:
        """Whether heads and neurons of a model with this configuration can be removed."""
        return self.whole is None or (self.whole_with is not None and not getattr(config, self.whole_with, False))


ALL_HEADS = "its norms of queries and keys have weights of their own for every head"
EXPERTS = "its MLPs are experts, whose weights are no projections of one layer's neurons"
NAMES = "its projections have other names ({}) than those that are sliced"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("apertus", "ApertusForCausalLM", "CompressApertus", None),
        Family("arcee", "ArceeForCausalLM", "CompressArcee", None),
        Family("cohere", "CohereForCausalLM", "CompressCohere", None, whole=ALL_HEADS, whole_with="use_qk_norm"),
        # Layers that slide have RoPE and full ones have none, so a layer cannot change its kind. Its
        # configuration works the head size out from the number of heads.
        Family("cohere2", "Cohere2ForCausalLM", "CompressCohere2", None, narrows=False),
        Family("dots1", "Dots1ForCausalLM", "CompressDots1", "Dots1ForCausalLM", whole=EXPERTS),
        Family("ernie4_5", "Ernie4_5ForCausalLM", "CompressErnie4_5", None),
        Family("exaone4", "Exaone4ForCausalLM", "CompressExaone4", None),  # as Cohere 2
        Family("gemma", "GemmaForCausalLM", "CompressGemma", None),
        Family("gemma3_text", "Gemma3ForCausalLM", "CompressGemma3", "Gemma3ForCausalLM"),
        Family("glm", "GlmForCausalLM", "CompressGlm", None),
        Family("glm4", "Glm4ForCausalLM", "CompressGlm4", None),
        Family("granite", "GraniteForCausalLM", "CompressGranite", None),
        Family("helium", "HeliumForCausalLM", "CompressHelium", None, narrows=False),
        Family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "CompressHunYuanDenseV1", None),
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
        Family("ministral3", "Ministral3ForCausalLM", "CompressMinistral3", None),
        Family("mistral", "MistralForCausalLM", "CompressMistral", "MinistralForCausalLM"),
        Family("mixtral", "MixtralForCausalLM", "CompressMixtral", None, whole=EXPERTS),
        Family("olmo", "OlmoForCausalLM", "CompressOlmo", None),
        Family("olmo2", "Olmo2ForCausalLM", "CompressOlmo2", None, whole=ALL_HEADS),
        # Scaled RoPE is for full layers alone, so a layer cannot change its kind.
        Family("olmo3", "Olmo3ForCausalLM", "CompressOlmo3", None, whole=ALL_HEADS),
        Family("phi", "PhiForCausalLM", "CompressPhi", None, whole=NAMES.format("dense, fc1, fc2")),
        Family("phi3", "Phi3ForCausalLM", "CompressPhi3", None),
        Family("phimoe", "PhimoeForCausalLM", "CompressPhimoe", None, whole=EXPERTS),
        Family("qwen2", "Qwen2ForCausalLM", "CompressQwen2", "Qwen2ForCausalLM"),
        Family("qwen2_moe", "Qwen2MoeForCausalLM", "CompressQwen2Moe", "Qwen2MoeForCausalLM", whole=EXPERTS),
        Family("qwen3", "Qwen3ForCausalLM", "CompressQwen3", "Qwen3ForCausalLM"),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", "CompressQwen3Moe", None, whole=EXPERTS),
        Family("seed_oss", "SeedOssForCausalLM", "CompressSeedOss", None),
        Family("smollm3", "SmolLM3ForCausalLM", "CompressSmolLM3", "SmolLM3ForCausalLM"),
        Family("starcoder2", "Starcoder2ForCausalLM", "CompressStarcoder2", None, whole=NAMES.format("c_fc, c_proj")),
    )
}

_CAPS = "its attention caps scores before the softmax (`attn_logit_softcapping`), which planned attention does not"
_SINKS = "its heads have learned sink logits in the softmax, which planned attention does not know"
_CHUNKS = "some of its layers attend within chunks, which no window is"
_LATENT = "it caches latents in place of keys and values (MLA)"
_LAYOUT = "its layers have another layout ({}) than `model.layers[i].self_attn`"
_KEEPS = "its decoder layers hand no keyword arguments on to attention, so that a plan's step would not arrive"

# Why an architecture is not supported, where that has been looked into: what would have to be built for it.
REFUSED = {
    "bloom": _LAYOUT.format("`transformer.h`, and ALiBi in place of RoPE"),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": _LAYOUT.format("`transformer.h`"),
    "gemma2": _CAPS,
    "gpt2": _LAYOUT.format("`transformer.h`"),
    "gpt_neox": _LAYOUT.format("`gpt_neox.layers[i].attention`, with queries, keys and values in one projection"),
    "gpt_oss": _SINKS,
    "gptj": _LAYOUT.format("`transformer.h`"),
    "llama4": _CHUNKS,
    "llama4_text": _CHUNKS,
    "nemotron": _KEEPS,
    "opt": _LAYOUT.format("`model.decoder.layers`"),
    "persimmon": "its configuration names no key/value heads, and its queries, keys and values are one projection",
    "stablelm": _KEEPS,
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
        if model_type in REFUSED:
            raise unsupported(model_type, getattr(config, "architectures", None) or [])
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
    """What to say of an architecture that is none of the families: the reason, where it is known."""
    reason = REFUSED.get(model_type)
    return UserError(
        f"architecture `{model_type}` is not supported" + ("" if reason is None else f": {reason}"),
        expected=f"one of {', '.join(sorted(FAMILIES))}",
        found=", ".join(architectures) or model_type,
        fix=nearest(model_type, FAMILIES) if reason is None else None,
    )


def check_pruning(config: Any) -> None:
    """Raise UserError, with the reason, where heads and neurons of this architecture cannot be removed."""
    family = family_of(config)
    if not family.prunes(config):
        raise UserError(
            f"heads and neurons of a {family.architecture} cannot be removed: {family.whole}",
            where=f"config.json: model_type {family.model_type}",
            expected=f"one of {', '.join(name for name, row in sorted(FAMILIES.items()) if row.whole is None)}",
            fix="use windows on this model: a statistic of attention, and a solver of windows",
        )


def wrapper(model_type: str, text: str, spec: str) -> UserError:
    """What to say of a model that wraps a text model with what reads images or sound: how to take the text model out,
    where that is of a family."""
    known, reason = text in FAMILIES, REFUSED.get(text)
    return UserError(
        f"`{model_type}` wraps a text model, `{text}`, with parts that read other inputs",
        where=spec,
        expected=f"a text model alone: one of {', '.join(sorted(FAMILIES))}",
        found=f"`{model_type}`"
        + ("" if known else f", and `{text}` is not supported either")
        + ("" if reason is None else f": {reason}"),
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
