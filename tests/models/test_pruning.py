"""A pruned model equals the dense model whose removed heads and neurons are zeroed, and saves as a stock checkpoint."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import UserError
from compress.models.families import layers_of
from compress.models.pruning import (
    Kept,
    add_output_biases,
    is_uniform,
    parameters_per_unit,
    prune,
    widths,
)
from compress.runtime.widths import Width, width_of
from tests.pruned import uneven, with_biases, zero
from tests.tiny import SIZES, random_ids, tiny_model

FAMILIES = ["llama-gqa", "llama-mha", "mistral", "qwen2", "qwen3", "phi3"]


def kept_of(model: Any, queries: bool) -> list[Kept]:
    """Half of the groups and 40 of 64 neurons, others in every layer; or all groups, each with its last query head."""
    groups = model.config.num_key_value_heads
    share = model.config.num_attention_heads // groups
    generator = torch.Generator().manual_seed(2)

    def some(number: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=generator)[:number].tolist()))

    if queries:
        heads = tuple(group * share + share - 1 for group in range(groups))
        return [Kept(tuple(range(groups)), some(40, 64), heads) for _ in layers_of(model)]
    return [Kept(some(groups // 2, groups), some(40, 64)) for _ in layers_of(model)]


@pytest.mark.parametrize("queries", [False, True], ids=["groups", "queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_zeroed_and_round_trips(family: str, queries: bool, tmp_path: Path) -> None:
    zeroed, pruned = with_biases(family), with_biases(family)
    kept = kept_of(pruned, queries)
    before = sum(weight.numel() for weight in pruned.parameters())
    unit = parameters_per_unit(pruned)[0]
    zero(zeroed, kept)
    assert prune(pruned, kept)
    ids = random_ids(2, 33)
    with torch.no_grad():
        expected, found = zeroed(ids).logits, pruned(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    removed = before - sum(weight.numel() for weight in pruned.parameters())
    missing = zeroed.config.num_key_value_heads - pruned.config.num_key_value_heads
    lost = zeroed.config.num_attention_heads - pruned.config.num_attention_heads
    heads = lost * unit.query if queries else missing * unit.group
    assert removed == len(kept) * (heads + 24 * unit.neuron)

    pruned.save_pretrained(tmp_path)
    found_again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, info = found_again
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(zeroed)
    prompt = random_ids(1, 9, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, found, rtol=1e-5, atol=1e-5)
    generated = loaded.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, zeroed.generate(prompt, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_widths_run_on_the_stock_classes(family: str) -> None:
    zeroed, pruned = with_biases(family).double(), with_biases(family).double()
    kept = uneven(pruned.config)
    zero(zeroed, kept)
    sizes = pruned.config.to_dict()
    assert not is_uniform(pruned.config, kept)
    assert not prune(pruned, kept)
    assert pruned.config.to_dict() == sizes
    assert [width_of(layer, pruned.config) for layer in layers_of(pruned)] == widths(pruned.config, kept)
    ids = random_ids(2, 33)
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, zeroed(ids).logits, rtol=1e-10, atol=1e-10)
    prompt = random_ids(1, 9, 3)
    generated = pruned.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, zeroed.generate(prompt, max_new_tokens=6, do_sample=False))
    with pytest.raises(UserError, match="pruned already"):
        prune(pruned, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_layers_of_different_widths_add_up(family: str) -> None:
    model = with_biases(family)
    kept = uneven(model.config)
    units, dense = parameters_per_unit(model), Width.of(model.config)
    before = [sum(weight.numel() for weight in layer.parameters()) for layer in layers_of(model)]
    after = widths(model.config, kept)
    prune(model, kept)
    for layer, was, unit, width in zip(layers_of(model), before, units, after, strict=True):
        share = dense.query_heads // dense.groups
        expected = (dense.groups - width.groups) * (unit.group - share * unit.query)
        expected += (dense.query_heads - width.query_heads) * unit.query
        expected += (dense.neurons - width.neurons) * unit.neuron
        assert was - sum(weight.numel() for weight in layer.parameters()) == expected


def test_heads_that_the_architecture_counts_its_rope_factors_by_are_no_stock_width() -> None:
    """Phi-3 expects hidden size / heads / 2 factors, so with fewer heads and the same ones it refuses to load."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SIZES, rope_parameters=rope))
    neurons = tuple(range(40))
    assert is_uniform(model.config, [Kept((0, 1), neurons)] * 3)
    assert not prune(model, [Kept((0,), neurons)] * 3)
    assert (model.config.num_attention_heads, model.config.intermediate_size) == (4, 64)
    assert torch.isfinite(model(random_ids(1, 20)).logits).all()


def test_heads_that_do_not_divide_the_hidden_size_are_no_stock_width_of_llama() -> None:
    """22 of the 32 heads of LLaMA-2-7B are such a number: transformers refuses the configuration."""
    sizes = SIZES | {"hidden_size": 40, "num_key_value_heads": 4, "head_dim": 12}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    neurons = tuple(range(64))
    assert is_uniform(model.config, [Kept((0, 1), neurons)] * 3)
    assert not prune(model, [Kept((0, 1, 3), neurons)] * 3)
    assert model.config.num_attention_heads == 4
    assert torch.isfinite(model(random_ids(1, 20)).logits).all()
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        transformers.LlamaConfig(**sizes | {"num_attention_heads": 3, "num_key_value_heads": 3})


def test_a_copy_of_a_pruned_model_is_its_own() -> None:
    model = with_biases("phi3")
    prune(model, uneven(model.config))
    ids = random_ids(1, 20)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.set_attn_implementation("eager")
    layers: list[Any] = layers_of(model)
    copied: list[Any] = layers_of(again)
    assert copied[0].self_attn.config._attn_implementation == "eager"
    assert layers[0].self_attn.config._attn_implementation == "sdpa"


def test_parameters_of_a_group_are_those_of_its_projections() -> None:
    unit = parameters_per_unit(tiny_model("llama-gqa"))[0]
    assert unit.group == (2 * 2 + 2) * 12 * 48
    assert unit.query == 2 * 12 * 48
    assert unit.neuron == 3 * 48


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([Kept((0,), (1,))], "wrong number of layers"),
        ([Kept((), (1,))] * 3, "no head group would stay"),
        ([Kept((0, 2), (1,))] * 3, "not ascending numbers below 2"),
        ([Kept((1, 0), (1,))] * 3, "not ascending"),
        ([Kept((0,), (1,), ())] * 3, "no query head would stay"),
        ([Kept((0, 1), (1,), (0, 4))] * 3, "not ascending numbers below 4"),
        ([Kept((0, 1), (1,), (0, 1, 2))] * 3, "2 in group 0, 1 in group 1"),
        ([Kept((0,), (1,), (0, 2))] * 3, "1 in group 0, 1 in group 1"),
        ([Kept((0, 1), (1,), (2, 3))] * 3, "do not divide evenly"),
    ],
)
def test_what_cannot_be_pruned_says_so(kept: list[Kept], message: str) -> None:
    model = tiny_model("llama-gqa")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(UserError, match=message):
        prune(model, kept)
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)


def test_output_biases_stay_in_a_stock_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    ids, size = random_ids(1, 9), model.config.hidden_size
    with torch.no_grad():
        before = model(ids).logits
        add_output_biases(model, [([0.0] * size, [0.0] * size)] * 3)
        torch.testing.assert_close(model(ids).logits, before)
        layer = model.model.layers[0]
        states = torch.randn(1, 2, layer.mlp.down_proj.in_features)
        without = layer.mlp.down_proj(states)
        add_output_biases(model, [([0.5] * size, [0.25] * size)] * 3)
        torch.testing.assert_close(layer.mlp.down_proj(states), without + 0.25)
        assert bool((layer.self_attn.o_proj.bias == 0.5).all())
        after = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, after)
    with pytest.raises(UserError, match="no biases behind o_proj"):
        add_output_biases(tiny_model("qwen2"), [])
