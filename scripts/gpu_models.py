"""Models with random weights for scripts on a GPU, and the ways to the end that have to be one function."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.bench.kernel import Shape
from compress.models.graph import graph_of
from scripts.gpu_check import error

LLAMA = Shape("llama-3-8b", 32, 8, 128)
HIDDEN, NEURONS = 4096, 14336  # of Llama-3-8B
VOCABULARY = 49_152  # of SmolLM2


def smollm2_shape(end: int | None = None) -> Any:
    """SmolLM2-135M's shape in bfloat16; `end` is the token that ends a text."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.05,  # logits that say something
        rope_parameters={"rope_type": "default", "rope_theta": 100_000},
        tie_word_embeddings=True,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    return model.to("cuda", torch.bfloat16).eval()


def two_layers(groups: int, dtype: torch.dtype = torch.float32) -> Any:
    """Two Llama layers of eight query heads of 64 in so many groups, and 512 words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=groups, head_dim=64, max_position_embeddings=16384,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to("cuda", dtype).eval()


@torch.inference_mode()
def ways_to_the_end(model: Any, length: int, tail: int, cuts: Sequence[int]) -> dict[str, float]:
    """Errors of the last `tail` logits of a planned model by its kernels: of chunks that end at `cuts` and of steps in
    a CUDA graph from one prefill, and of that from plain PyTorch."""
    model.config.compress_impl = "triton"
    ids = torch.randint(model.config.vocab_size, (1, length), device="cuda")
    whole = model(ids).logits[:, -tail:].double()
    ends = [0, *cuts, length - tail, length]
    cache = model.new_cache()
    parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(ends)]
    chunked = parts[-1].double()
    cache = model.new_cache(max_length=length + 8)
    model(ids[:, : length - tail], past_key_values=cache)
    token, kept = ids[:, :1].clone(), dict[str, torch.Tensor]()
    replay = graph_of(lambda: kept.update(out=model(token, past_key_values=cache).logits))
    cache.assume(length - tail)  # what the warm-up stored is written again; it crossed no page
    steps = []
    for t in range(length - tail, length):
        token.copy_(ids[:, t : t + 1])
        replay()
        steps.append(kept["out"].clone())
    decoded = torch.cat(steps, dim=1).double()
    model.config.compress_impl = "reference"
    plain = model(ids).logits[:, -tail:].double()
    return {
        "chunked": error(chunked, whole),
        "decoded_in_a_graph": error(decoded, whole),
        "reference": error(whole, plain),
    }
