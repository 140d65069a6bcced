"""The supported architecture families, one row of data each, and the only place that names their modules and weights.

A family is supported when its attention calls transformers' AttentionInterface on keys and values after RoPE. A new one
is a row here and a configuration in `tests/tiny.py`, with which `tests/test_families.py` probes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Projection:
    """Where the heads or neurons of a layer sit in one of its weights, `[..., outputs, inputs]`.

    Attributes:
        axis: of the weight: -2 where they are its outputs, -1 where they are its inputs.
        parts: what that axis is made of, part behind part. A part is all heads or neurons of a kind: `query`,
            `key_value` or `neuron`.
        by_group: the axis holds head group behind head group, and within each its share of the parts.
    """

    axis: int
    parts: tuple[str, ...]
    by_group: bool = False


def outputs(*parts: str, by_group: bool = False) -> Projection:
    """A projection that computes these heads or neurons."""
    return Projection(-2, parts, by_group)


def inputs(part: str) -> Projection:
    """A projection that reads the outputs of these heads or neurons."""
    return Projection(-1, (part,))


# Projections of one layer by their names in it.
ATTENTION: Mapping[str, Projection] = {
    "self_attn.q_proj": outputs("query"),
    "self_attn.k_proj": outputs("key_value"),
    "self_attn.v_proj": outputs("key_value"),
    "self_attn.o_proj": inputs("query"),
}
DOWN: Mapping[str, Projection] = {"mlp.down_proj": inputs("neuron")}
UP: Mapping[str, Projection] = {"mlp.up_proj": outputs("neuron"), **DOWN}
GATE: Mapping[str, Projection] = {"mlp.gate_proj": outputs("neuron"), **UP}
EXPERTS: Mapping[str, Projection] = {
    **ATTENTION,
    "mlp.experts.gate_up_proj": outputs("neuron", "neuron"),
    "mlp.experts.down_proj": inputs("neuron"),
}
GATE_UP: Mapping[str, Projection] = {"mlp.gate_up_proj": outputs("neuron", "neuron"), **DOWN}
FUSED: Mapping[str, Projection] = {
    "self_attn.qkv_proj": outputs("query", "key_value", "key_value"),
    "self_attn.o_proj": inputs("query"),
}
DENSE: Mapping[str, Projection] = {
    **{name: row for name, row in ATTENTION.items() if name != "self_attn.o_proj"},
    "self_attn.dense": inputs("query"),
}


# Norms whose weight is a factor on each number that these projections read, by their names in a layer.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GAINS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
UP_GAINS: Mapping[str, tuple[str, ...]] = {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.up_proj",)}
FUSED_GAINS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.qkv_proj",),
    "post_attention_layernorm": ("mlp.gate_up_proj",),
}


def _neox(attention: str) -> Mapping[str, Projection]:
    """The projections of GPT-NeoX and what came of it: queries, keys and values of a head lie together."""
    return {
        f"{attention}.query_key_value": outputs("query", "key_value", "key_value", by_group=True),
        f"{attention}.dense": inputs("query"),
        "mlp.dense_h_to_4h": outputs("neuron"),
        "mlp.dense_4h_to_h": inputs("neuron"),
    }


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_type: transformers' name of the stock configuration.
        name: how the stock language model class begins, `LlamaForCausalLM`; the classes that carry a plan have
            `Compress` before it.
        head: how that class ends.
        body: how the stock classes of configuration and decoder begin; the name where it is empty.
        layers: where the decoder holds its layers.
        attention: where a layer holds its attention.
        projections: the weights of a layer that heads or neurons sit in, by their names in the layer. A neuron of
            experts is the one of that number in all experts of the layer.
        groups: the field of the configuration that says how many key/value heads a layer has.
        neurons: the field of the configuration that says how many neurons an MLP has.
        hands_on: whether a layer hands its keyword arguments on to its attention.
        native: the stock causal language model class with the same weights whose layers are full or slide one by
            one (`layer_types` in its configuration); None where transformers has none.
        twin: a stock causal language model class that computes the same on the same weights and takes any number of
            heads, where the family's own configuration does not; with the configuration's fields that make it so.
        whole: why heads and neurons cannot be removed; None where they can.
        whole_unless: fields of the configuration with whose values `whole` does not hold; it always does without.
        by_head: parameters and lists of modules of a layer, by their names in it, that hold something of their own for
            every head of a kind, `query` or `key_value`, one behind another; a layer may lack them.
        scores: what the layers do with their scores beside the softmax, which only some mixers know
            (`Mixer.knows_scores`); None where they do nothing.
        gains: norms of a layer whose weight can be multiplied into the projections that read them, so that 1 is left.
        normed: fields of the configuration with whose values every query head is normalised by itself, so that the
            norms of queries say next to nothing; None where it never is.
        narrows: the kinds of units that the configuration can say fewer of: `query`, with a head size that is not
            hidden size / heads, and `neuron`. With fewer of the others a model is in the patched form.
    """

    model_type: str
    name: str
    body: str = ""
    head: str = "ForCausalLM"
    layers: str = "layers"
    attention: str = "self_attn"
    projections: Mapping[str, Projection] = field(default_factory=lambda: {**ATTENTION, **GATE})
    groups: str = "num_key_value_heads"
    neurons: str = "intermediate_size"
    hands_on: bool = True
    native: str | None = None
    twin: str | None = None
    twin_fields: Mapping[str, Any] = field(default_factory=dict)
    whole: str | None = None
    whole_unless: Mapping[str, Any] = field(default_factory=dict)
    by_head: Mapping[str, str] = field(default_factory=dict)
    scores: str | None = None
    normed: Mapping[str, Any] | None = None
    gains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    narrows: tuple[str, ...] = ("query", "neuron")

    @property
    def architecture(self) -> str:
        """The stock causal language model class."""
        return f"{self.name}{self.head}"

    @property
    def planned(self) -> str:
        """How the classes begin that carry a plan."""
        return f"Compress{self.name}"

    @property
    def has_experts(self) -> bool:
        """Whether the neurons are those of experts."""
        return any(".experts." in name for name in self.projections)

    @property
    def neuron_step(self) -> int:
        """What the number of neurons of an MLP is a multiple of: PyTorch multiplies by experts in rows of 16 bytes."""
        return 8 if self.has_experts else 1

    @property
    def why_whole(self) -> str | None:
        """`whole`, with the fields of the configuration that it depends on."""
        if self.whole is None or not self.whole_unless:
            return self.whole
        unless = " and ".join(f"`{name}: {json.dumps(value)}`" for name, value in self.whole_unless.items())
        return f"{self.whole}, unless config.json says {unless}"

    def classes(self) -> tuple[str, str, str]:
        """The stock configuration, decoder and language model."""
        body = self.body or self.name
        return f"{body}Config", f"{body}Model", self.architecture

    def prunes(self, config: Any) -> bool:
        """Whether heads and neurons of a model with this configuration can be removed."""
        if self.whole is None:
            return True
        return bool(self.whole_unless) and all(
            getattr(config, name, None) in (value, None) for name, value in self.whole_unless.items()
        )

    def norms_queries(self, config: Any) -> bool:
        """Whether every query head of a model with this configuration is normalised by itself."""
        return self.normed is not None and all(getattr(config, name) == value for name, value in self.normed.items())

    def layers_of(self, model: nn.Module) -> list[Any]:
        """The decoder layers of a decoder or a language model, in order."""
        body: Any = getattr(model, "base_model", model)
        layers: Any = body.get_submodule(self.layers)
        return list(layers)

    def attention_of(self, layer: nn.Module) -> Any:
        """The attention of a decoder layer; it has an integer `layer_idx`."""
        return layer.get_submodule(self.attention)

    def reader(self, kind: str) -> str:
        """The name of the projection that reads the outputs of all units of a kind, `query` or `neuron`."""
        return next(name for name, row in self.projections.items() if row == inputs(kind))


NORMS: Mapping[str, str] = {"self_attn.q_norm.weight": "query", "self_attn.k_norm.weight": "key_value"}
ALL_HEADS = "its norms of queries and keys have weights of their own for every head"
SUB_NORMS = "it norms the outputs of all heads, and those of all neurons, together before the next projection"
DENSE_LAYERS = "some of its layers have experts and others an MLP of another width"

ROWS = (
    Family("apertus", "Apertus", projections={**ATTENTION, **UP}, normed={}),
    Family("arcee", "Arcee", projections={**ATTENTION, **UP}, gains=UP_GAINS),
    Family("bitnet", "BitNet", whole=SUB_NORMS, by_head={"self_attn.attn_sub_norm.weight": "query"}),
    Family(
        "cohere",
        "Cohere",
        whole=ALL_HEADS,
        whole_unless={"use_qk_norm": False},
        by_head=NORMS,
        normed={"use_qk_norm": True},
    ),
    # Layers that slide have RoPE and full ones have none, so a layer cannot change its kind. Its
    # configuration works the head size out from the number of heads.
    Family("cohere2", "Cohere2", narrows=("neuron",)),
    Family(
        "dots1",
        "Dots1",
        projections=EXPERTS,
        neurons="moe_intermediate_size",
        native="Dots1ForCausalLM",
        narrows=("query",),  # the experts that all tokens take are as wide as the configuration says for the others
        whole=DENSE_LAYERS,
        whole_unless={"first_k_dense_replace": 0},
        normed={},
    ),
    Family("ernie4_5", "Ernie4_5", gains=GAINS),
    Family("exaone4", "Exaone4", normed={}),  # as Cohere 2
    Family("gemma", "Gemma"),
    Family("gemma2", "Gemma2", scores="its layers cap their scores before the softmax"),
    Family("gemma3_text", "Gemma3", "Gemma3Text", native="Gemma3ForCausalLM", normed={}),
    Family("glm", "Glm", projections={**ATTENTION, **GATE_UP}),
    Family("glm4", "Glm4", projections={**ATTENTION, **GATE_UP}),
    Family(
        "gpt2",
        "GPT2",
        head="LMHeadModel",
        layers="h",
        attention="attn",
        projections={},
        groups="num_attention_heads",
        neurons="n_inner",
        whole="its projections are no linear layers of PyTorch, and hold their weights the other way round",
    ),
    Family(
        "gpt_neox",
        "GPTNeoX",
        attention="attention",
        projections=_neox("attention"),
        groups="num_attention_heads",
        narrows=("neuron",),
    ),
    Family(
        "gpt_oss",
        "GptOss",
        projections=ATTENTION,
        whole="every query head has a logit of its own beside its projections, and the gates of experts lie between",
        by_head={"self_attn.sinks": "query"},
        scores="every query head has a logit of its own in the softmax",
    ),
    Family(
        "gptj",
        "GPTJ",
        layers="h",
        attention="attn",
        projections={
            "attn.q_proj": outputs("query"),
            "attn.k_proj": outputs("key_value"),
            "attn.v_proj": outputs("key_value"),
            "attn.out_proj": inputs("query"),
            "mlp.fc_in": outputs("neuron"),
            "mlp.fc_out": inputs("neuron"),
        },
        groups="num_attention_heads",
        neurons="n_inner",
        narrows=("neuron",),
    ),
    Family("granite", "Granite", gains=GAINS),
    Family("helium", "Helium", gains=GAINS, narrows=("neuron",)),
    Family("hunyuan_v1_dense", "HunYuanDenseV1", gains=GAINS, normed={}),
    # Llama's configuration wants a hidden size that is a multiple of the number of heads, whatever `head_dim` says.
    Family(
        "llama",
        "Llama",
        native="MinistralForCausalLM",
        twin="MistralForCausalLM",
        twin_fields={"sliding_window": None},
        gains=GAINS,
    ),
    Family("ministral", "Ministral", native="MinistralForCausalLM", gains=GAINS),
    Family("ministral3", "Ministral3", gains=GAINS),
    Family("mistral", "Mistral", native="MinistralForCausalLM", gains=GAINS),
    Family("mixtral", "Mixtral", projections=EXPERTS),
    Family("nemotron", "Nemotron", projections={**ATTENTION, **UP}, hands_on=False),
    Family("olmo", "Olmo"),
    Family("olmo2", "Olmo2", whole=ALL_HEADS, by_head=NORMS),
    # Scaled RoPE is for full layers alone, so a layer cannot change its kind.
    Family("olmo3", "Olmo3", whole=ALL_HEADS, by_head=NORMS),
    Family(
        "persimmon",
        "Persimmon",
        projections=_neox("self_attn"),
        groups="num_attention_heads",
        narrows=("neuron",),
        normed={"qk_layernorm": True},
    ),
    Family(
        "phi",
        "Phi",
        projections={**DENSE, "mlp.fc1": outputs("neuron"), "mlp.fc2": inputs("neuron")},
        narrows=("neuron",),
        normed={"qk_layernorm": True},
    ),
    Family("phi3", "Phi3", projections={**FUSED, **GATE_UP}, gains=FUSED_GAINS),
    Family("phimoe", "Phimoe", projections=EXPERTS),
    Family("qwen2", "Qwen2", native="Qwen2ForCausalLM", gains=GAINS),
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        projections=EXPERTS,
        neurons="moe_intermediate_size",
        native="Qwen2MoeForCausalLM",
        whole=DENSE_LAYERS,
        whole_unless={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    Family("qwen3", "Qwen3", native="Qwen3ForCausalLM", gains=GAINS, normed={}),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        projections=EXPERTS,
        neurons="moe_intermediate_size",
        whole=DENSE_LAYERS,
        whole_unless={"mlp_only_layers": [], "decoder_sparse_step": 1},
        normed={},
    ),
    Family("seed_oss", "SeedOss", gains=GAINS),
    Family("smollm3", "SmolLM3", native="SmolLM3ForCausalLM", gains=GAINS),
    Family(
        "stablelm",
        "StableLm",
        hands_on=False,
        whole=ALL_HEADS,
        whole_unless={"qk_layernorm": False},
        by_head={"self_attn.q_layernorm.norms": "query", "self_attn.k_layernorm.norms": "key_value"},
        narrows=("neuron",),
        normed={"qk_layernorm": True},
    ),
    Family(
        "starcoder2",
        "Starcoder2",
        projections={**ATTENTION, "mlp.c_fc": outputs("neuron"), "mlp.c_proj": inputs("neuron")},
    ),
)
FAMILIES: Mapping[str, Family] = {row.model_type: row for row in ROWS}


def row_of(config: Any) -> Family:
    """The row of a configuration, stock or planned, or of one layer's.

    Raises:
        KeyError: there is none.
    """
    return FAMILIES[str(config.model_type).removeprefix("compress_")]


def groups_of(config: Any) -> int:
    """Key/value heads of a layer."""
    return int(getattr(config, row_of(config).groups))


def neurons_of(config: Any) -> int:
    """Neurons of an MLP; a configuration that leaves them out, as GPT-2's may, means four times the hidden size."""
    return int(getattr(config, row_of(config).neurons, None) or 4 * config.hidden_size)


def head_size_of(config: Any) -> int:
    """Rows of one head in its projections."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
