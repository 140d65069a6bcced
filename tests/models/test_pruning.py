"""A pruned model equals the dense model whose removed heads and neurons are zeroed, and saves as a stock checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import UserError
from compress.models.pruning import (
    Kept,
    add_output_biases,
    block_parameters,
    is_uniform,
    layers_of,
    parameters_per_unit,
    prune,
)
from tests.tiny import SIZES, random_ids, tiny_model

FAMILIES = ["llama-gqa", "llama-mha", "mistral", "qwen2", "qwen3", "phi3"]


def model_of(family: str) -> Any:
    """A random model whose biases are not zero."""
    if family == "phi3":
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(transformers.Phi3Config(**SIZES)).float().eval()
    else:
        model = tiny_model(family)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def kept_of(model: Any, query_heads: int | None = None) -> list[Kept]:
    """Half of the groups (with `query_heads` of each) and 40 of 64 neurons, others in every layer."""
    groups = model.config.num_key_value_heads
    share = model.config.num_attention_heads // groups
    generator = torch.Generator().manual_seed(2)

    def some(number: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=generator)[:number].tolist()))

    rows = []
    for _ in layers_of(model):
        chosen = some(groups // 2, groups)
        queries = None
        if query_heads is not None:
            queries = tuple(group * share + head for group in chosen for head in some(query_heads, share))
        rows.append(Kept(chosen, some(40, 64), queries))
    return rows


@torch.no_grad()
def zero(model: Any, kept: list[Kept]) -> None:
    """Zero the output of what `kept` leaves out."""
    config = model.config
    share = config.num_attention_heads // config.num_key_value_heads
    layers: list[Any] = layers_of(model)
    for layer, stays in zip(layers, kept, strict=True):
        head_dim = layer.self_attn.head_dim
        for query in set(range(config.num_attention_heads)) - set(stays.query_heads(share)):
            layer.self_attn.o_proj.weight[:, query * head_dim : (query + 1) * head_dim] = 0
        for neuron in set(range(64)) - set(stays.neurons):
            layer.mlp.down_proj.weight[:, neuron] = 0


@pytest.mark.parametrize(
    ("family", "query_heads"), [*[(family, None) for family in FAMILIES], ("llama-gqa", 1), ("qwen3", 1), ("phi3", 1)]
)
def test_pruned_equals_zeroed_and_round_trips(family: str, query_heads: int | None, tmp_path: Path) -> None:
    zeroed, pruned = model_of(family), model_of(family)
    kept = kept_of(pruned, query_heads)
    before = block_parameters(pruned)
    sizes = parameters_per_unit(pruned)[0]
    share = pruned.config.num_attention_heads // pruned.config.num_key_value_heads
    zero(zeroed, kept)
    prune(pruned, kept)
    ids = random_ids(2, 33)
    with torch.no_grad():
        expected, found = zeroed(ids).logits, pruned(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    stay = pruned.config.num_key_value_heads
    missing = zeroed.config.num_key_value_heads - stay
    heads = 0 if query_heads is None else stay * (share - query_heads)
    assert before - block_parameters(pruned) == len(kept) * sizes.removed(missing, heads, 24)

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


def test_parameters_of_a_group_are_those_of_its_projections() -> None:
    sizes = parameters_per_unit(tiny_model("llama-gqa"))[0]
    assert sizes.group == (2 * 2 + 2) * 12 * 48
    assert sizes.query == 2 * 12 * 48
    assert sizes.neuron == 3 * 48


def test_layers_of_different_widths_are_sliced_and_keep_the_configuration() -> None:
    model = tiny_model("llama-gqa")
    kept = [Kept((0,), (1, 2)), Kept((0, 1), (3,), (0, 3)), Kept((1,), tuple(range(64)))]
    prune(model, kept)
    assert not is_uniform(kept, 2)
    assert model.config.num_key_value_heads == 2
    assert [layer.self_attn.q_proj.out_features for layer in model.model.layers] == [24, 24, 24]
    assert [layer.self_attn.k_proj.out_features for layer in model.model.layers] == [12, 24, 12]
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [2, 1, 64]


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


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([Kept((0,), (1,))], "wrong number of layers"),
        ([Kept((), (1,))] * 3, "no head group would stay"),
        ([Kept((0, 2), (1,))] * 3, "not ascending numbers below 2"),
        ([Kept((1, 0), (1,))] * 3, "not ascending"),
        ([Kept((0, 1), (1,), (0, 1, 2))] * 3, "not divide evenly"),
        ([Kept((0,), (1,), (2,))] * 3, "not divide evenly"),
    ],
)
def test_what_cannot_be_pruned_says_so(kept: list[Kept], message: str) -> None:
    model = tiny_model("llama-gqa")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(UserError, match=message):
        prune(model, kept)
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)
