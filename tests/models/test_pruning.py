"""A pruned model equals the dense model whose removed heads and neurons are zeroed, and saves as a stock checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import UserError
from compress.models.pruning import Kept, layers_of, parameters_per_unit, prune
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


def kept_of(model: Any) -> list[Kept]:
    """Half of the groups and 40 of 64 neurons, others in every layer."""
    groups = model.config.num_key_value_heads
    generator = torch.Generator().manual_seed(2)

    def some(number: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(of, generator=generator)[:number].tolist()))

    return [Kept(some(groups // 2, groups), some(40, 64)) for _ in layers_of(model)]


@torch.no_grad()
def zero(model: Any, kept: list[Kept]) -> None:
    """Zero the output of what `kept` leaves out."""
    config = model.config
    share = config.num_attention_heads // config.num_key_value_heads
    layers: list[Any] = layers_of(model)
    for layer, stays in zip(layers, kept, strict=True):
        head_dim = layer.self_attn.head_dim
        for group in set(range(config.num_key_value_heads)) - set(stays.groups):
            layer.self_attn.o_proj.weight[:, group * share * head_dim : (group + 1) * share * head_dim] = 0
        for neuron in set(range(64)) - set(stays.neurons):
            layer.mlp.down_proj.weight[:, neuron] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_zeroed_and_round_trips(family: str, tmp_path: Path) -> None:
    zeroed, pruned = model_of(family), model_of(family)
    kept = kept_of(pruned)
    before = sum(weight.numel() for weight in pruned.parameters())
    group, neuron = parameters_per_unit(pruned)[0]
    zero(zeroed, kept)
    prune(pruned, kept)
    ids = random_ids(2, 33)
    with torch.no_grad():
        expected, found = zeroed(ids).logits, pruned(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    removed = before - sum(weight.numel() for weight in pruned.parameters())
    missing = zeroed.config.num_key_value_heads - pruned.config.num_key_value_heads
    assert removed == len(kept) * (missing * group + 24 * neuron)

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
    group, neuron = parameters_per_unit(tiny_model("llama-gqa"))[0]
    assert group == (2 * 2 + 2) * 12 * 48
    assert neuron == 3 * 48


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([Kept((0,), (1,))], "wrong number of layers"),
        ([Kept((), (1,))] * 3, "no head group would stay"),
        ([Kept((0, 2), (1,))] * 3, "not ascending numbers below 2"),
        ([Kept((1, 0), (1,))] * 3, "not ascending"),
        ([Kept((0,), (1,)), Kept((0, 1), (1,)), Kept((0,), (1,))], "layers would differ"),
    ],
)
def test_what_cannot_be_pruned_says_so(kept: list[Kept], message: str) -> None:
    model = tiny_model("llama-gqa")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(UserError, match=message):
        prune(model, kept)
    assert torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)
