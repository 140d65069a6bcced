"""Importance statistics against float64 sums over everything at once, for every way a layer holds its projections."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from compress.data.sample import TextSample
from compress.errors import UserError
from compress.models.processes import Processes
from compress.models.units import units_of
from compress.plan import ModelShape
from compress.profile.heads.attention import Attention
from compress.profile.partial import Partial
from compress.profile.passes import Run, projections
from compress.profile.run import measure_all, run_profile
from compress.profile.units.amp import Amp
from compress.profile.units.drawn import Random
from compress.profile.units.flap import Flap
from compress.profile.units.magnitude import Magnitude
from compress.profile.units.taylor import Taylor
from compress.profile.units.wanda_sp import WandaSp
from compress.runtime import widths
from tests.models.test_pruning import FAMILIES
from tests.processes import spawn
from tests.profile.common import document, documents, join, subject_of, tensor_bytes
from tests.pruned import with_biases
from tests.tiny import tiny_loaded, tiny_model

ALL = [Amp(), WandaSp(), Flap(), Taylor(), Magnitude()]
DOCUMENTS = {48: [document(48, seed=5), document(31, answer=3, seed=6)], 20: [document(20, seed=7)]}
QUEUE = [*DOCUMENTS[20], *DOCUMENTS[48]]
Table = dict[str, torch.Tensor]


def shape_for(model: Any) -> ModelShape:
    """A shape by hand, since Phi-3 is tested here whether it is a family or not."""
    config, layers = model.config, len(model.model.layers)
    return ModelShape(
        architecture=type(model).__name__,
        layers=layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=model.model.layers[0].self_attn.head_dim,
        native_windows=(None,) * layers,
        fingerprint="sha256:0",
    )


def taken(model: Any, chosen: list[Any], folder: Path, *corpora: dict[int, list[TextSample]], **more: Any) -> Table:
    """All tensors of some statistics, by the text of their keys."""
    subject = subject_of(model, shape_for(model))
    partial = Partial(folder, "key", writes=True)
    run = Run(subject, corpora, {}, 0, Processes(), partial, lambda *_: None, more.get("checkpointing", False), None)
    found: Table = {}
    for results in measure_all(run, chosen).values():
        found |= {str(key): result.values for key, result in results.items()}
    return found


def separate(layer: Any, config: Any, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of q, k, v, gate and up, wherever they are: name -> rows of the weight, and of its gradient."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if hasattr(layer.self_attn, "qkv_proj"):
        sizes = [heads * head_dim, groups * head_dim, groups * head_dim]
        names = [("qkv_proj", ["q", "k", "v"], sizes), ("gate_up_proj", ["gate", "up"], [width, width])]
    else:
        names = [(f"{name}_proj", [name], [-1]) for name in ("q", "k", "v", "gate", "up")]
    modules = {name.rpartition(".")[2]: module for name, module in widths.projections(layer, config).items()}
    weights: dict[str, Any] = {}
    slopes: dict[str, Any] = {}
    for module, parts, sizes in names:
        weight = modules[module].weight
        assert weight.grad is not None
        cuts = [len(weight)] if sizes == [-1] else sizes
        weights |= dict(zip(parts, weight.detach().split(cuts), strict=True))
        slopes |= dict(zip(parts, weight.grad.split(cuts), strict=True))
    return weights, slopes


def naive(model: Any, texts: list[TextSample]) -> Table:
    """Every statistic over all tokens at once, unit after unit."""
    model = model.double()
    config, layers = model.config, model.model.layers
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, layers[0].self_attn.head_dim
    inputs: dict[int, list[torch.Tensor]] = {}
    for layer in layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_pre_hook(
                lambda module, args: inputs.setdefault(id(module), []).append(args[0][0].detach())
            )
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for text in texts:
        tokens = torch.tensor(text.tokens)
        logp = model(tokens[None]).logits[0].log_softmax(-1)
        for place in range(*text.answer):
            loss, count = loss - logp[place - 1, tokens[place]], count + 1
    (loss / count).backward()
    found: dict[str, list[torch.Tensor]] = {}
    for layer in layers:
        out, down = layer.self_attn.o_proj, layer.mlp.down_proj
        x, z = torch.cat(inputs[id(out)]), torch.cat(inputs[id(down)])
        wo, wd = out.weight.detach(), down.weight.detach()
        weights, slopes = separate(layer, config, width)
        rows: dict[str, list[Any]] = {}
        for head in range(heads):
            at, group = slice(head * width, (head + 1) * width), head // (heads // groups)
            shared = slice(group * width, (group + 1) * width)
            rows.setdefault("amp", []).append((x[:, at] @ wo[:, at].T).abs().sum(-1).mean())
            norms = x[:, at].square().mean(0).sqrt()
            rows.setdefault("wanda_sp", []).append((wo[:, at].abs() * norms).sum())
            rows.setdefault("flap", []).append((x[:, at].var(0, correction=0) * wo[:, at].square().sum(0)).mean())
            share = groups / heads
            slope = (weights["q"] * slopes["q"])[at].abs().sum() + (wo * out.weight.grad)[:, at].abs().sum()
            size = weights["q"][at].square().sum() + wo[:, at].square().sum()
            for name in ("k", "v"):
                slope += share * (weights[name] * slopes[name])[shared].abs().sum()
                size += share * weights[name][shared].square().sum()
            rows.setdefault("taylor", []).append(slope)
            rows.setdefault("magnitude", []).append(size.sqrt())
        for name, values in rows.items():
            found.setdefault(f"{name}.heads", []).append(torch.stack(values).view(groups, -1))
        slope = (wd * down.weight.grad).abs().sum(0)
        size = wd.square().sum(0)
        for name in ("gate", "up"):
            slope = slope + (weights[name] * slopes[name]).abs().sum(1)
            size = size + weights[name].square().sum(1)
        for name, values in {
            "amp.neurons": z.abs().mean(0),
            "wanda_sp.neurons": wd.abs().sum(0) * z.square().mean(0).sqrt(),
            "flap.neurons": z.var(0, correction=0) * wd.square().sum(0),
            "flap.neuron_means": z.mean(0),
            "flap.head_means": x.mean(0).view(groups, heads // groups, width),
            "taylor.neurons": slope,
            "magnitude.neurons": size.sqrt(),
        }.items():
            found.setdefault(name, []).append(values)
    return {key: torch.stack(values) for key, values in found.items()}


def close(found: Table, expected: Table) -> None:
    """The passes run in float32; errors are relative to the largest number of a tensor."""
    assert set(found) == set(expected)
    for key, values in expected.items():
        tolerance = 2e-4 * float(values.abs().max())
        torch.testing.assert_close(found[key].double(), values, rtol=1e-3, atol=tolerance, msg=key)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_equal_sums_over_all_tokens(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "ROWS", 7)
    close(taken(with_biases(family), list(ALL), tmp_path, DOCUMENTS), naive(with_biases(family), QUEUE))


def test_contribution_weighs_a_neuron_by_its_column(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    plain = taken(model, [Amp()], tmp_path / "a", DOCUMENTS)["amp.neurons"]
    found = taken(model, [Amp(neurons="contribution")], tmp_path / "b", DOCUMENTS)["amp.neurons"]
    norms = torch.stack([layer.mlp.down_proj.weight.detach().abs().sum(0) for layer in model.model.layers])
    torch.testing.assert_close(found, plain * norms)


def test_recomputed_layers_count_once(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    kept = taken(model, list(ALL), tmp_path / "a", DOCUMENTS, checkpointing=False)
    again = taken(model, list(ALL), tmp_path / "b", DOCUMENTS, checkpointing=True)
    for key, values in kept.items():
        torch.testing.assert_close(again[key], values)


def test_two_corpora_are_apart_and_together(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    other = {64: [document(64, seed=11)]}
    found = taken(model, list(ALL), tmp_path / "both", DOCUMENTS, other)
    first, second = taken(model, list(ALL), tmp_path / "1", DOCUMENTS), taken(model, list(ALL), tmp_path / "2", other)
    joined = taken(model, list(ALL), tmp_path / "joined", {64: [*DOCUMENTS[20], *DOCUMENTS[48], *other[64]]})
    for key in joined:
        torch.testing.assert_close(found[key], joined[key])
        if key.endswith((".heads", ".neurons")) and not key.startswith("magnitude"):
            assert torch.equal(found[f"{key}.first"], first[key])
            assert torch.equal(found[f"{key}.second"], second[key])
            assert not torch.equal(first[key], second[key])
    assert sum(key.endswith((".first", ".second")) for key in found) == 4 * 2 * 2


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa").train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: weight.requires_grad for name, weight in model.named_parameters()}
    taken(model, list(ALL), tmp_path, DOCUMENTS)
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == before
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(UserError, match="statistic `amp` is not finite in layer 1"):
        taken(model, [Amp()], tmp_path, DOCUMENTS)


def test_projections_that_are_not_those_of_the_configuration_are_refused() -> None:
    model = tiny_model("llama-gqa")
    model.config.intermediate_size = 63
    with pytest.raises(UserError, match="do not hold the configuration's heads and neurons"):
        units_of(model)


def test_another_seed_gives_other_random_numbers(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    one, two = (taken(model, [Random(seed=seed)], tmp_path, {})["random.neurons"] for seed in (0, 1))
    again = taken(model, [Random(seed=0)], tmp_path, {})["random.neurons"]
    assert torch.equal(one, again) and not torch.equal(one, two) and not torch.equal(one[0], one[1])


def test_a_second_corpus_needs_a_statistic_that_reads_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no statistic is measured on a second corpus"):
        run_profile(tiny_loaded("llama-gqa"), documents(), [Magnitude()], tmp_path, seed=0, second=documents())


def test_an_interrupted_second_corpus_ends_with_the_same_bits(tmp_path: Path) -> None:
    loaded, second = tiny_loaded("llama-gqa"), {64: [document(64, seed=11), document(64, seed=12)]}
    chosen = [Amp(), Flap(), Taylor(), Attention(sink=8)]
    run_profile(loaded, documents(), chosen, tmp_path / "whole", seed=0, second=second)

    def stop(done: int, total: int, message: str) -> None:
        if total == 5 and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_profile(loaded, documents(), chosen, tmp_path / "parts", seed=0, second=second, progress=stop)
    seen: list[tuple[int, int]] = []
    found = run_profile(
        loaded,
        documents(),
        chosen,
        tmp_path / "parts",
        seed=0,
        second=second,
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == [(3, 3), (4, 5), (5, 5)]
    assert found.header.second == {64: 2}
    assert tensor_bytes(tmp_path / "parts") == tensor_bytes(tmp_path / "whole")


def _profile_in_process(rank: int, world: int, folder: str, stop_at: int) -> None:
    """One of some processes that share the documents."""
    torch.set_num_threads(1)
    if world > 1:
        join(rank, world, f"{folder}/store-{stop_at}")

    def stop(done: int, total: int, message: str) -> None:
        if total == 5 and done == stop_at:
            raise KeyboardInterrupt

    second = {64: [document(64, seed=11), document(64, seed=12)]}
    try:
        profile = run_profile(
            tiny_loaded("qwen2"),
            documents(),
            [Amp(), Flap(), Taylor(), Attention(sink=8)],
            Path(folder) / "profile",
            seed=0,
            second=second,
            progress=stop,
        )
        torch.save({str(key): values for key, values in profile.tensors.items()}, f"{folder}/{rank}.pt")
        if world > 1:
            _refuse_in_process(rank, folder)
    except KeyboardInterrupt:
        Path(f"{folder}/stopped-{rank}").touch()
    if world > 1:
        torch.distributed.destroy_process_group()


def _refuse_in_process(rank: int, folder: str) -> None:
    """A document that only the second process reads is refused in both."""

    def refuse(self: Any, sums: Any, tile: Any, item: Any) -> None:
        if item.where == "document 1 of 133 tokens":
            raise UserError("this one is refused", where=f"process {rank}")

    with mock.patch.object(Attention, "add", refuse), pytest.raises(UserError, match="process 1: this one is refused"):
        run_profile(tiny_loaded("qwen2"), documents(), [Attention()], Path(folder) / "refused", seed=0)


def test_two_processes_give_the_bits_of_one_and_continue_its_partial(tmp_path: Path) -> None:
    for name in ("one", "two", "mixed"):
        (tmp_path / name).mkdir()
    threads = torch.get_num_threads()
    _profile_in_process(0, 1, str(tmp_path / "one"), 99)
    spawn(_profile_in_process, (2, str(tmp_path / "two"), 99), nprocs=2)
    spawn(_profile_in_process, (2, str(tmp_path / "mixed"), 2), nprocs=2)
    assert (tmp_path / "mixed" / "stopped-0").exists() and (tmp_path / "mixed" / "stopped-1").exists()
    _profile_in_process(0, 1, str(tmp_path / "mixed"), 99)
    torch.set_num_threads(threads)
    expected = tensor_bytes(tmp_path / "one" / "profile")
    assert tensor_bytes(tmp_path / "two" / "profile") == expected
    assert tensor_bytes(tmp_path / "mixed" / "profile") == expected
    first, second = (torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
