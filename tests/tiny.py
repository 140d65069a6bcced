"""Tiny random models of every supported family, a tokenizer made on the spot, and a plan that mixes targets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from compress.models.load import LoadedModel
from compress.models.planned import mixers_of, planned_model
from compress.models.prepared import Option, PreparedOption, attach
from compress.models.shape import shape_of
from compress.plan import ModelShape, Plan, make_plan, uniform_plan
from compress.runtime.span import AnySpan
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.span import SpanTarget
from compress.targets.target import Target
from compress.targets.window import WindowGroup

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    # Large weights make attention sharp, so that a key too many or too few shows in the logits.
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}

CONFIGS = {
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        query_pre_attn_scalar=20,
        tie_word_embeddings=False,
        sliding_window=50,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "llama-gqa": lambda: LlamaConfig(**SIZES),
    "llama-mha": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "ministral": lambda: MinistralConfig(
        **SIZES, head_dim=16, sliding_window=50, layer_types=["full_attention", "sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**SIZES, sliding_window=50),
    "phi3": lambda: Phi3Config(**SIZES, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "phi3-sliding": lambda: Phi3Config(**SIZES, sliding_window=50),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-part-sliding": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=50, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
}
FAMILIES = sorted(CONFIGS)

EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
THIRD_SLIDES = {"sliding_window": 50, "layer_types": ["full_attention", "full_attention", "sliding_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 1e4}

# The families that are probed in `tests/test_families.py`, and are not in the conformance matrix: by model type.
MORE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {"mlp_bias": True},
    "bitnet": {},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5} | THIRD_SLIDES,
    "dots1": {
        **EXPERTS,
        **THIRD_SLIDES,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "head_dim": 16,
    },
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "exaone4": {"head_dim": 16} | THIRD_SLIDES,
    "gemma": {"head_dim": 16},
    "gemma2": {
        **THIRD_SLIDES,
        "head_dim": 16,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "attn_implementation": "eager",
    },
    "glm": {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "glm4": {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt2": {},
    "gpt_neox": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt_oss": {
        **THIRD_SLIDES,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attn_implementation": "eager",
    },
    "gptj": {"rotary_dim": 6},
    "granite": {
        "attention_multiplier": 0.4,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.7,
    },
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "nemotron": {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "olmo": {"clip_qkv": 1.5},
    "olmo2": {},
    "olmo3": dict(THIRD_SLIDES),
    "persimmon": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "phi": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}, "qk_layernorm": True},
    "phimoe": EXPERTS | {"num_local_experts": 4},
    "qwen2_moe": {
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "use_sliding_window": True,
        **THIRD_SLIDES,
    },
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 16},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True} | THIRD_SLIDES,
    "stablelm": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}, "qk_layernorm": True},
    "starcoder2": {"sliding_window": None},
}

MIXED = (
    FullGroup(),
    WindowGroup(sink=4, alpha=30, beta=0.0),
    WindowGroup(sink=64, alpha=70, beta=0.25),
    WindowGroup(sink=0, alpha=5, beta=0.5),
    WindowGroup(sink=130, alpha=64, beta=0.125),
)


# What else one plan may have: states, lists of kept tokens and chosen heads.
STATE = LinearGroup(sink=4, alpha=1)
LISTS = RetainGroup(sink=0, alpha=20, scorer="gate", threshold=-2.8, share=0.5)
DELTA = LinearGroup(rule="delta", decay="token", alone=True)
CAPPED = RetainGroup(sink=4, alpha=1, scorer="ridge", threshold=0.0, share=0.5, cap=(10, 0.125))
KINDS = (STATE, LISTS, DELTA, CAPPED)


def plan_of_kinds(shape: ModelShape) -> Plan:
    """Kinds in the first layer, chosen heads in the second, other kinds in the third; full where a layer slides."""
    groups = shape.kv_heads
    rows: list[list[Target]] = [
        [KINDS[number % 4] for number in range(groups)],
        [*RoutedGroup.layer(groups, groups // 2, sink=4, alpha=30, beta=0.25)],
        [KINDS[(number + 2) % 4] for number in range(groups)],
    ]
    return make_plan(
        shape,
        [
            row if native is None else [FullGroup()] * groups
            for row, native in zip(rows, shape.native_windows, strict=True)
        ],
    )


@torch.no_grad()
def model_of_kinds(dense: Any) -> Any:
    """A model under `plan_of_kinds`, in which nothing that a target has of its own is where it starts."""
    model = planned_model(dense, plan_of_kinds(shape_of(dense)), untrained=True)
    generator = torch.Generator().manual_seed(2)
    for mixer in mixers_of(model):
        for weight in mixer.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model in eval mode, float32; the same for the same seed."""
    config = (
        CONFIGS[family]() if family in CONFIGS else transformers.AutoConfig.for_model(family, **SIZES | MORE[family])
    )
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def part_local_model() -> Any:
    """Five sliding layers to one full, the form of Gemma 3."""
    sizes: dict[str, Any] = SIZES | {"num_hidden_layers": 6, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, head_dim=16, sliding_window=64)).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: w0 ... w96, with w0 as padding, w1 begin, w2 end."""
    vocabulary = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3"
    )


def tiny_loaded(family: str) -> LoadedModel:
    """Model and tokenizer as `load_model` returns them."""
    return LoadedModel(tiny_model(family), tiny_tokenizer(), f"tiny/{family}")


def attach_as_they_start(model: Any, targets: Sequence[Target]) -> None:
    """Let a model carry what targets that have to be prepared start with, as if it had been trained.

    Routers, which start at zero and would choose the same for all tokens, have random weights.
    """
    shape, options = shape_of(model), []
    free = [layer for layer, native in enumerate(shape.native_windows) if native is None]
    generator = torch.Generator().manual_seed(6)
    for target in dict.fromkeys(targets):
        tensors = {}
        if target.has_to_be_prepared:
            started = planned_model(model, uniform_plan(shape, target), untrained=True)
            for layer in free:
                for name, weight in started.base_model.compress_kinds[layer].only.named_parameters():
                    tensors[f"{layer}.{name}"] = weight.detach()
        elif isinstance(target, RoutedGroup) and target.router == "two_stage":
            heads = (shape.group_size,) if target.unit == "head" else ()
            for name, middle in (("route", heads), ("halves", (2,))):
                size = (shape.kv_heads, *middle, model.config.hidden_size)
                tensors |= {f"{layer}.router.{name}": torch.randn(size, generator=generator) for layer in free}
        if tensors:
            options.append(_as_prepared(target, shape, tensors))
    attach(model, tuple(options))


def _as_prepared(target: Target, shape: ModelShape, tensors: dict[str, torch.Tensor]) -> PreparedOption:
    errors = [[0.0] * shape.kv_heads if native is None else None for native in shape.native_windows]
    facts: dict[str, Any] = {"key": "", "objective": {}, "steps": 1, "tokens": 1, "first_loss": 0, "last_loss": 0}
    facts |= {"target": target.model_dump(mode="json"), "seconds": 0, "sha256": "", "versions": {}}
    return PreparedOption(target, Option(**facts, errors=errors), tensors)


def mixed_plan(shape: ModelShape, targets: Sequence[Target] = MIXED) -> Plan:
    """A different target in every group, as far as there are; layers that slide by themselves stay full."""
    turn = cycle(targets)
    groups = [
        [next(turn) if native is None else FullGroup() for _ in range(shape.kv_heads)]
        for native in shape.native_windows
    ]
    return make_plan(shape, groups, provenance={"made by": "tests"})


def spans_of(plan: Plan) -> list[list[AnySpan]]:
    """What every head group that stays sees, `[layers][groups]`, of a plan of windows."""
    rows: list[list[AnySpan]] = []
    for row in plan.groups_that_stay():
        targets = [(group, native) for group, native in row if isinstance(group, SpanTarget)]
        assert len(targets) == len(row)
        rows.append([group.span(native) for group, native in targets])
    return rows


@functools.cache
def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids that avoid padding, begin and end, `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


__all__ = ["CONFIGS", "FAMILIES", "mixed_plan", "random_ids", "shape_of", "tiny_loaded", "tiny_model", "tiny_tokenizer"]
