"""The architecture families, by the name of their model type: a row each, as in `compress/runtime/families.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        model_type: transformers' name of the stock configuration; a checkpoint's has `compress_` before it.
        name: how the stock language model class begins, and the planned one behind `Compress`.
        head: how the stock class ends.
        groups: the field of the configuration with the number of key/value heads.
        neurons: the field with the number of neurons of an MLP.
        experts: its MLPs are experts. Checkpoints have them as transformers 5 does, which vLLM reads in its backend for
            transformers' code and not in its own classes.
        own: vLLM's own class, where it has one, computes what transformers does.
    """

    model_type: str
    name: str
    head: str = "ForCausalLM"
    groups: str = "num_key_value_heads"
    neurons: str = "intermediate_size"
    experts: bool = False
    own: bool = True

    @property
    def architecture(self) -> str:
        """The stock language model class."""
        return f"{self.name}{self.head}"

    @property
    def planned(self) -> str:
        """The class that config.json of a checkpoint names, and the plugin registers."""
        return f"Compress{self.name}ForCausalLM"


HEADS = "num_attention_heads"
EXPERTS = "moe_intermediate_size"

ROWS = (
    Row("apertus", "Apertus"),
    Row("arcee", "Arcee"),
    Row("bitnet", "BitNet"),
    Row("cohere", "Cohere"),
    Row("cohere2", "Cohere2", own=False),
    Row("dots1", "Dots1", neurons=EXPERTS, experts=True),
    Row("ernie4_5", "Ernie4_5"),
    Row("exaone4", "Exaone4"),
    Row("gemma", "Gemma"),
    Row("gemma2", "Gemma2"),
    Row("gemma3_text", "Gemma3"),
    Row("glm", "Glm"),
    Row("glm4", "Glm4"),
    Row("gpt2", "GPT2", "LMHeadModel", HEADS, "n_inner"),
    Row("gpt_neox", "GPTNeoX", groups=HEADS),
    Row("gpt_oss", "GptOss"),
    Row("gptj", "GPTJ", groups=HEADS, neurons="n_inner"),
    Row("granite", "Granite"),
    Row("helium", "Helium"),
    Row("hunyuan_v1_dense", "HunYuanDenseV1"),
    Row("llama", "Llama"),
    Row("ministral", "Ministral"),
    Row("ministral3", "Ministral3", own=False),
    Row("mistral", "Mistral"),
    Row("mixtral", "Mixtral", experts=True),
    Row("nemotron", "Nemotron"),
    Row("olmo", "Olmo"),
    Row("olmo2", "Olmo2"),
    Row("olmo3", "Olmo3"),
    Row("persimmon", "Persimmon", groups=HEADS),
    Row("phi", "Phi"),
    Row("phi3", "Phi3"),
    Row("phimoe", "Phimoe", experts=True),
    Row("qwen2", "Qwen2"),
    Row("qwen2_moe", "Qwen2Moe", neurons=EXPERTS, experts=True),
    Row("qwen3", "Qwen3"),
    Row("qwen3_moe", "Qwen3Moe", neurons=EXPERTS, experts=True),
    Row("seed_oss", "SeedOss"),
    Row("smollm3", "SmolLM3"),
    Row("stablelm", "StableLm", own=False),
    Row("starcoder2", "Starcoder2"),
)
BY_CLASS = {row.planned: row for row in ROWS}
