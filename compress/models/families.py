"""Finds the family of a model, and says why an architecture is not supported or cannot be pruned.

The families are the rows of `runtime/families.py`; an architecture that is known not to work has its reason in
`REFUSED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import UserError, nearest
from compress.runtime.families import FAMILIES, Family

_CHUNKS = "some of its layers attend within chunks, which no window is"
_LATENT = "it caches latents in place of keys and values (MLA)"
_AXES = "its positions have three axes (M-RoPE), and planned models count along one"
_OWN = "its attention is its own code and does not call transformers' AttentionInterface"

# Why an architecture is not supported, where that has been looked into: what would have to be built for it.
REFUSED = {
    "bloom": _OWN,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon": _OWN,
    "llama4_text": _CHUNKS,
    "opt": "its language model runs its inner decoder past the model that would hold the plan",
    "qwen2_5_vl_text": _AXES,
    "qwen2_vl_text": _AXES,
    "qwen3_vl_text": _AXES,
}

# Models with parts that read images or sound around a text model, and the type of that text model where their
# configuration names no other. They are refused whole; `wrapper` says how to take the text model out.
WRAPPERS = {
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "gemma3": "gemma3_text",
    "idefics2": "mistral",
    "idefics3": "llama",
    "internvl": "qwen2",
    "kimi_k25": "deepseek_v3",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "shieldgemma2": "gemma3_text",
    "smolvlm": "llama",
}

# How the classes of transformers end whose head gives the next token, and those whose head gives something else.
CAUSAL = ("ForCausalLM", "LMHeadModel")
OTHER_HEADS = ("Classification", "ForQuestionAnswering", "RewardModel")


def context_of(config: Any) -> int | None:
    """Tokens of the longest input that a model is made for; None where its configuration names no such length."""
    return getattr(config, "max_position_embeddings", None)


def family_of(config: Any, spec: str | None = None) -> Family:
    """The family of a transformers configuration; a planned configuration belongs to its stock family.

    Args:
        spec: what the user called the model, for the message.

    Raises:
        UserError: the architecture is not supported, and says which are; its head gives something else than the next
            token; or its attention looks ahead.
    """
    model_type = str(config.model_type).removeprefix("compress_")
    if model_type not in FAMILIES:
        if model_type in REFUSED:
            raise unsupported(model_type, getattr(config, "architectures", None) or [])
        text = getattr(config, "text_config", None)
        if text is not None and hasattr(text, "model_type"):
            raise wrapper(model_type, str(text.model_type), spec or getattr(config, "name_or_path", "") or "MODEL")
        raise unsupported(model_type, getattr(config, "architectures", None) or [])
    check_head(getattr(config, "architectures", None) or [], spec or "config.json: architectures")
    if getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            "a model whose attention looks ahead is not supported",
            where="config.json: use_bidirectional_attention",
            expected="causal attention",
        )
    return FAMILIES[model_type]


def check_head(architectures: Iterable[str], where: str) -> None:
    """Raise UserError where a model was saved with a head that gives something else than the next token."""
    other = [name for name in architectures if name.endswith(OTHER_HEADS)]
    if other:
        raise UserError(
            "the head of this model gives something else than the next token, and would be lost",
            where=where,
            expected="a causal language model, as LlamaForCausalLM is one",
            found=", ".join(other),
            fix="name the language model that it was trained from",
        )


def unsupported(model_type: str, architectures: Iterable[str]) -> UserError:
    """The error for an architecture that is not supported, with the reason where it is known.

    Only a name that transformers does not know either may be misspelt.
    """
    named = list(architectures)
    other = named and not any(name.endswith(CAUSAL) for name in named)
    reason = REFUSED.get(model_type) or ("it is no language model that writes token after token" if other else None)
    return UserError(
        f"architecture `{model_type}` is not supported" + ("" if reason is None else f": {reason}"),
        expected=f"one of {', '.join(sorted(FAMILIES))}",
        found=", ".join(named) or model_type,
        fix=nearest(model_type, FAMILIES) if reason is None and model_type not in CONFIG_MAPPING else None,
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


def check_reordering(config: Any, where: str, fix: str) -> None:
    """Raise UserError, with the reason, where head groups of this architecture cannot change places within a layer.

    Args:
        where, fix: what asks for it, and how to do without.
    """
    family = family_of(config)
    if not family.projections:
        raise UserError(
            f"head groups of a {family.architecture} cannot be put in another order: {family.whole}",
            where=where,
            expected="an architecture whose heads are rows of linear layers",
            found=f"model_type {family.model_type}",
            fix=fix,
        )


def check_reading(config: Any, statistics: Sequence[str]) -> None:
    """Raise UserError where there are statistics that need what neurons give, and the neurons are those of experts."""
    family = family_of(config)
    if statistics and family.has_experts:
        raise UserError(
            f"what the neurons of a {family.architecture} give cannot be read: experts are no modules of their own",
            where="profile.statistics",
            expected="statistics of weights or of their gradients",
            found=", ".join(statistics),
            fix="take `name: taylor`, or without data `name: magnitude`",
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


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    return list(family_of(model.config).layers_of(model))


def attentions_of(model: nn.Module) -> list[Any]:
    """The attention module of every decoder layer, in order."""
    family = family_of(model.config)
    return [family.attention_of(layer) for layer in family.layers_of(model)]
