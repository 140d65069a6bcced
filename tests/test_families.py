"""Every family is probed with tiny random weights: against its stock model, and against a naive mask for every head."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from typer.testing import CliRunner

from compress.cli.app import app
from compress.data.sample import TextSample
from compress.errors import UserError
from compress.export.layout import copy_runtime, point_to_runtime
from compress.export.native import native_model
from compress.models.families import REFUSED, WRAPPERS, check_pruning, family_of, layers_of
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.models.pruning import Kept, block_parameters, parameters_per_unit, prune
from compress.models.replaced import causal_attention
from compress.models.units import units_of
from compress.plan import Plan, make_plan, uniform_plan
from compress.profile.passes.capture import Capture
from compress.profile.passes.tiles import LayerTensors, Workspace, tiles
from compress.runtime import modeling_compress
from compress.runtime.families import FAMILIES, Family, head_size_of
from compress.runtime.modeling_compress import CACHE
from compress.runtime.widths import Width
from compress.targets.full import FullGroup
from compress.targets.target import targets_of
from compress.targets.window import WindowGroup
from tests.pruned import targets_of as groups_of
from tests.pruned import uneven, unevenly_pruned, with_biases, zero
from tests.tiny import (
    CONFIGS,
    MORE,
    VOCABULARY,
    mixed_plan,
    model_of_kinds,
    random_ids,
    shape_of,
    tiny_model,
    tiny_tokenizer,
)

Rule = tuple[int, int, float]
LENGTH = 201  # beyond every window of `tests.tiny.MIXED`, and beyond the layers' own
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
PRUNABLE = sorted(name for name in MORE if FAMILIES[name].whole is None or FAMILIES[name].whole_unless)
WHOLE = sorted(name for name in MORE if FAMILIES[name].whole is not None)
NATIVE = sorted(name for name in MORE if FAMILIES[name].native is not None)


def naive_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **others: Any) -> Any:
    """The family's own eager attention under an additive mask for every query head."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    count = query.shape[2]
    masks = torch.full((key.shape[1], count, count), -math.inf)
    for group, (sink, alpha, beta) in enumerate(module.naive_rules):
        for position in range(count):
            span = max(1, alpha + math.floor(beta * (position + 1)))
            masks[group, position, : min(sink, position + 1)] = 0
            masks[group, position, max(0, position + 1 - span) : position + 1] = 0
    masks = masks.repeat_interleave(query.shape[1] // key.shape[1], dim=0)[None]
    return eager(module, query, key, value, masks, scaling=scaling, **others | {"dropout": 0.0})


AttentionInterface.register("naive", naive_attention)
AttentionMaskInterface.register("naive", lambda *_, **__: None)


SPREADS: list[float] = []


def note_norms(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **others: Any) -> Any:
    """Attention of every token to itself, which notes how much the norms of a head's queries differ by token."""
    norms = query.norm(dim=-1)
    SPREADS.append(float((norms.std(dim=2) / norms.mean(dim=2)).max()))
    return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2), None


AttentionInterface.register("norms", note_norms)
AttentionMaskInterface.register("norms", lambda *_, **__: None)


def rules_of(plan: Plan) -> list[list[Rule]]:
    """Sinks, alpha and beta of every group, from the plan's targets; a full group sees what its layer lets it see."""
    return [
        [
            (group.sink, group.alpha, group.beta) if isinstance(group, WindowGroup) else (0, native or LENGTH, 0.0)
            for group in row.groups
        ]
        for row, native in zip(plan.layers, plan.model.native_windows, strict=True)
    ]


def naive_model(name: str, rules: list[list[Rule]]) -> Any:
    """A stock model of the same weights whose heads see that much."""
    model = tiny_model(name)
    model.config._attn_implementation = "naive"
    for layer, row in zip(layers_of(model), rules, strict=True):
        FAMILIES[name].attention_of(layer).naive_rules = row
    return model


def slopes(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss by the embeddings of its input, `[B, T, hidden]`."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
    return torch.autograd.grad(loss, embeddings)[0]


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


@pytest.mark.parametrize("name", sorted(MORE))
def test_family(name: str) -> None:
    dense = tiny_model(name)
    shape, ids = shape_of(dense), random_ids(2, LENGTH)
    plan = mixed_plan(shape)
    assert shape.architecture == type(dense).__name__
    sliding = [kind == "sliding_attention" for kind in MORE[name].get("layer_types", ["full_attention"] * 3)]
    assert shape.native_windows == tuple(50 if slides else None for slides in sliding)

    full = planned_model(dense, uniform_plan(shape, FullGroup()))
    torch.testing.assert_close(logits(full, ids), logits(dense, ids), **CLOSE)
    everything: list[list[Rule]] = [[(0, LENGTH, 0.0)] * shape.kv_heads] * shape.layers
    unbounded = (logits(naive_model(name, everything), ids[:1]) - logits(dense, ids[:1])).abs().max()
    assert (unbounded > 0.01) == any(sliding)  # the layer's own window counts in the comparison above

    model = planned_model(dense, plan)
    whole = logits(model, ids)
    assert (whole - logits(dense, ids)).abs().max() > 0.1
    naive = naive_model(name, rules_of(plan))
    torch.testing.assert_close(whole[:1], logits(naive, ids[:1]), **CLOSE)
    expected = slopes(naive, ids[:1])
    assert expected.abs().max() > 0
    torch.testing.assert_close(slopes(model, ids[:1]), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    changed = ids.clone()
    changed[:, 150] = (changed[:, 150] - 3) % (VOCABULARY - 4) + 4
    after = logits(model, changed)
    torch.testing.assert_close(after[:, :150], whole[:, :150], **CLOSE)
    assert (after[:, 150:] - whole[:, 150:]).abs().max() > 0.01

    cache = model.new_cache()
    cuts = (0, 90, 91, 92, LENGTH)
    parts = [logits(model, ids[:, a:b], **{CACHE: cache}) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)

    cache = model.new_cache()
    logits(model, ids[:1], **{CACHE: cache})
    predicted = plan.cost(LENGTH, 4, form="patched").held_bytes
    assert cache.allocated_bytes() == cache.held_bytes() == predicted

    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1, :70], mask[1, :70] = 0, 0
    together = logits(model, padded, attention_mask=mask)
    torch.testing.assert_close(together[1:, 70:], logits(model, ids[1:, 70:]), **CLOSE)
    prompt = padded[:, 60:160]
    for more in ({"max_new_tokens": 5}, {"max_new_tokens": 3, "num_beams": 2}):
        arguments: dict[str, Any] = {"do_sample": False, "attention_mask": mask[:, 60:160], **more}
        cached = model.generate(prompt, **arguments)
        assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments))


@pytest.mark.parametrize("name", [*sorted(MORE), "ministral", "mistral", "qwen2", "qwen3"])
def test_every_kind_of_head_in_one_plan(name: str) -> None:
    """One pass, chunks and steps of a padded batch, with a cache, are each sequence alone, and nothing looks ahead."""
    model = model_of_kinds(tiny_model(name))
    assert targets_of(model.config.compress_plan) >= {"linear", "retain"}
    ids, mask = random_ids(2, 140).clone(), torch.ones(2, 140, dtype=torch.long)
    ids[1, :20] = mask[1, :20] = 0
    cache = model.new_cache()
    parts = [
        logits(model, ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache}) for a, b in pairwise((0, 83, 84, 140))
    ]
    found = torch.cat(parts, dim=1)
    assert cache.allocated_bytes() == cache.held_bytes()
    for row, start in enumerate((0, 20)):
        alone = logits(model, ids[row : row + 1, start:])
        torch.testing.assert_close(found[row : row + 1, start:], alone, rtol=1e-3, atol=1e-3)
    ids[0, 130] = (ids[0, 130] - 3) % (VOCABULARY - 4) + 4
    changed = logits(model, ids[:1])
    torch.testing.assert_close(changed[:, :130], found[:1, :130], rtol=1e-3, atol=1e-3)
    assert (changed[:, 130:] - found[:1, 130:]).abs().max() > 0.01


ALL_SLIDE, NONE_SLIDE = (50, 50, 50), (None, None, None)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128}
# What other configurations say of windows, and the windows in force: a family may give them by `layer_types` or to all
# layers alike, make `layer_types` up, or have a window that is switched off.
SAID: list[tuple[str, dict[str, Any], tuple[int | None, ...]]] = [
    ("cohere2", {"layer_types": None}, ALL_SLIDE),
    ("dots1", {"layer_types": None, "max_window_layers": 2}, (None, None, 50)),
    ("dots1", {"layer_types": None, "sliding_window": None}, NONE_SLIDE),
    ("exaone4", {"layer_types": None, "sliding_window_pattern": 2}, (50, None, 50)),
    ("exaone4", {"layer_types": ["full_attention"] * 3, "sliding_window": None}, NONE_SLIDE),
    ("ministral3", {"sliding_window": 50}, ALL_SLIDE),
    ("mixtral", {"sliding_window": 50}, ALL_SLIDE),
    ("mixtral", {"sliding_window": 4096}, NONE_SLIDE),
    ("olmo3", {"layer_types": None, "rope_parameters": YARN}, ALL_SLIDE),
    ("olmo3", {"rope_parameters": YARN}, (None, None, 50)),
    ("phimoe", {"sliding_window": 50}, ALL_SLIDE),
    ("qwen2_moe", {"layer_types": None, "use_sliding_window": False}, NONE_SLIDE),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 50}, ALL_SLIDE),
    ("qwen3_moe", {"sliding_window": 50}, NONE_SLIDE),
    ("smollm3", {"layer_types": None, "sliding_window": None, "use_sliding_window": False}, NONE_SLIDE),
    ("smollm3", {"layer_types": None}, (None, 50, None)),
    ("starcoder2", {"sliding_window": 50}, ALL_SLIDE),
]


@pytest.mark.parametrize(("name", "fields", "windows"), SAID)
def test_own_windows_are_found_as_the_stock_model_has_them(
    name: str, fields: dict[str, Any], windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MORE, name, MORE[name] | fields)
    dense = tiny_model(name)
    shape, ids = shape_of(dense), random_ids(1, LENGTH)
    assert shape.native_windows == windows
    planned = planned_model(dense, uniform_plan(shape, FullGroup()))
    torch.testing.assert_close(logits(planned, ids), logits(dense, ids), **CLOSE)
    everything: list[list[Rule]] = [[(0, LENGTH, 0.0)] * shape.kv_heads] * shape.layers
    unbounded = (logits(naive_model(name, everything), ids) - logits(dense, ids)).abs().max()
    assert (unbounded > 0.01) == any(windows)


@pytest.mark.parametrize("name", sorted(MORE))
def test_a_profile_computes_what_the_model_computes(name: str) -> None:
    model, ids = tiny_model(name), random_ids(1, 90)
    layers: list[LayerTensors] = []
    with Capture(model, layers.append, gradient=True, checkpointing=True) as capture:
        loss = capture.run(TextSample(tuple(ids[0].tolist()), (60, 90)))
    expected = torch.nn.functional.cross_entropy(logits(model, ids)[0, 59:89], ids[0, 60:])
    assert loss == pytest.approx(float(expected), rel=1e-4)
    assert [layer.layer for layer in layers] == [2, 1, 0]
    for layer in layers if layers[0].scores is not None else ():
        query, key, value = (x[None] for x in (layer.query, layer.key, layer.value))
        with torch.no_grad():
            dense = causal_attention(query, key, value, layer.scaling, layer.window, layer.scores)
            strips = [tile.attention @ tile.value[:, None] for tile in tiles(layer, Workspace(dense.device))]
        torch.testing.assert_close(torch.cat(strips, dim=2).flatten(0, 1), dense[0], **CLOSE)
    assert [layer.window for layer in layers] == list(reversed(shape_of(model).native_windows))


@pytest.mark.parametrize("name", sorted(name for name in MORE if not FAMILIES[name].hands_on))
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_hand_nothing_on_are_computed_again(name: str, reentrant: bool) -> None:
    dense, ids = tiny_model(name), random_ids(2, 80)
    model = planned_model(dense, mixed_plan(shape_of(dense)))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        # Two passes before the backward pass: each layer is computed again for its own.
        losses = [model(inputs_embeds=embeddings * scale, labels=ids, use_cache=False).loss for scale in (1, 2)]
        torch.stack(losses).sum().backward()
        found.append(embeddings.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["olmo2", "mixtral"])
def test_a_checkpoint_comes_back(name: str, tmp_path: Path) -> None:
    """From a stock folder, as its files have the weights (experts one by one), to a checkpoint and back."""
    source, folder, ids = tmp_path / "stock", tmp_path / name, random_ids(1, LENGTH)
    tiny_model(name).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    loaded = load_model(str(source), dtype="float32", device="cpu")
    torch.testing.assert_close(logits(loaded.model, ids), logits(tiny_model(name), ids), **CLOSE)
    model = planned_model(loaded.model, mixed_plan(loaded.shape))
    model.save_pretrained(folder)
    copy_runtime(folder)
    point_to_runtime(folder, family_of(model.config))
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    assert type(again).__name__ == f"{FAMILIES[name].planned}ForCausalLM"
    assert type(again).__module__ != modeling_compress.__name__
    torch.testing.assert_close(logits(again, ids), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("name", NATIVE)
def test_a_native_model_is_the_planned_one(name: str) -> None:
    dense = tiny_model(name)
    shape, ids = shape_of(dense), random_ids(1, LENGTH)
    window = shape.native_windows[-1] or 0
    slides = [WindowGroup(sink=0, alpha=window, beta=0.0), FullGroup(), FullGroup()]
    plan = make_plan(shape, [[target] * shape.kv_heads for target in slides])
    planned = planned_model(dense, plan)
    native = native_model(planned, plan)
    assert type(native).__name__ == FAMILIES[name].native
    native.config._attn_implementation = "sdpa"
    torch.testing.assert_close(logits(native, ids), logits(planned, ids), **CLOSE)
    assert (logits(native, ids) - logits(dense, ids)).abs().max() > 0.01


@pytest.mark.parametrize("name", PRUNABLE)
def test_a_pruned_model_is_the_zeroed_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MORE, name, MORE[name] | dict(FAMILIES[name].whole_unless))
    zeroed, pruned, ids = with_biases(name), with_biases(name), random_ids(1, 40)
    units, before, width = parameters_per_unit(pruned), block_parameters(pruned), Width.of(pruned.config)
    kept = uneven(pruned.config)
    size = width.query_heads // width.groups
    left_over = [Width(len(stays.query_heads(size)), len(stays.groups), len(stays.neurons)) for stays in kept]
    zero(zeroed, kept)
    assert not prune(pruned, kept)
    gone = 0
    for unit, left in zip(units, left_over, strict=True):
        queries = left.groups * size - left.query_heads
        gone += unit.removed(width.groups - left.groups, queries, width.neurons - left.neurons)
    assert before - block_parameters(pruned) == gone > 0
    torch.testing.assert_close(logits(pruned, ids), logits(zeroed, ids), **CLOSE)
    with pytest.raises(UserError, match="pruned already"):
        prune(pruned, kept)
    windows = planned_model(zeroed, make_plan(shape_of(zeroed), groups_of(zeroed)))
    torch.testing.assert_close(logits(unevenly_pruned(name), ids), logits(windows, ids), **CLOSE)

    alike = [Kept((1,), tuple(range(0, width.neurons, 2)))] * 3
    fewer = [Kept(tuple(range(width.groups)), tuple(range(width.neurons // 2)))] * 3
    said = FAMILIES[name].narrows
    for kept, narrows in ((alike, len(said) == 2), (fewer, "neuron" in said)):
        model = with_biases(name)
        assert prune(model, kept) == narrows
        if narrows:
            with torch.device("meta"):
                again = type(model)(type(model.config).from_dict(model.config.to_dict()))
            found = {key: tuple(weight.shape) for key, weight in model.named_parameters()}
            assert found == {key: tuple(weight.shape) for key, weight in again.named_parameters()}
            assert head_size_of(again.config) == head_size_of(tiny_model(name).config)


@pytest.mark.parametrize("name", WHOLE)
def test_pruning_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "mlp_only_layers" in FAMILIES[name].whole_unless:
        monkeypatch.setitem(MORE, name, MORE[name] | {"mlp_only_layers": [0]})
    model = tiny_model(name)
    kept = [Kept((0, 1), tuple(range(40)))] * 3
    for call in (
        lambda: prune(model, kept),
        lambda: units_of(model),
        lambda: parameters_per_unit(model),
        lambda: check_pruning(model.config),
    ):
        with pytest.raises(UserError, match="cannot be removed") as caught:
            call()
        assert str(FAMILIES[name].whole) in str(caught.value) and FAMILIES[name].architecture in str(caught.value)


def test_a_family_says_whether_it_normalises_every_query_head() -> None:
    for name in [*CONFIGS, *MORE]:
        model = tiny_model(name)
        model.set_attn_implementation("norms")
        SPREADS.clear()
        with torch.inference_mode():
            model(random_ids(1, 8))
        assert (max(SPREADS) < 0.01) == family_of(model.config).norms_queries(model.config), name


def test_every_family_has_a_tiny_model() -> None:
    in_matrix = {family_of(make()).model_type for make in CONFIGS.values()}
    assert in_matrix.isdisjoint(MORE)
    assert in_matrix | set(MORE) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert isinstance(family, Family) and family.model_type == name
        assert family.native is None or hasattr(transformers, family.native)
    assert list(FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("name", sorted(MORE))
def test_a_configuration_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    stock = tiny_model(name).config
    made = getattr(modeling_compress, f"{FAMILIES[name].planned}Config")
    fields = {key: value for key, value in stock.to_dict().items() if key != "model_type"}
    made(**fields, compress_plan={"layers": []}, compress_impl="reference").save_pretrained(tmp_path)
    again = made.from_pretrained(tmp_path)
    assert again.compress_plan == {"layers": []} and again.compress_impl == "reference"
    assert again.layer_types == stock.layer_types if hasattr(stock, "layer_types") else True
    assert family_of(again) is FAMILIES[name]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_names_its_reason(name: str) -> None:
    assert name not in FAMILIES
    with pytest.raises(UserError, match=f"architecture `{name}` is not supported: ") as caught:
        family_of(AutoConfig.for_model(name))
    assert REFUSED[name] in str(caught.value)


def test_a_wrapper_of_a_refused_text_model_names_the_reason() -> None:
    config = AutoConfig.for_model("qwen2_vl")
    with pytest.raises(UserError, match="`qwen2_vl` wraps a text model, `qwen2_vl_text`") as caught:
        family_of(config)
    assert f"not supported either: {REFUSED['qwen2_vl_text']}" in str(caught.value)


def test_wrappers_are_refused_and_their_text_models_named() -> None:
    for name, text in WRAPPERS.items():
        config = AutoConfig.for_model(name)
        assert config.text_config.model_type == text
        with pytest.raises(UserError) as caught:
            family_of(config)
        assert ("save its text part once" in str(caught.value)) == (text in FAMILIES)
        assert text in FAMILIES or REFUSED[text] in str(caught.value)


def test_the_doctor_lists_every_family_and_target() -> None:
    result = CliRunner().invoke(app, ["doctor", "--families", "--json"])
    assert result.exit_code == 0, result.output
    matrix = json.loads(result.stdout)
    assert set(matrix["families"]) == set(FAMILIES) and matrix["refused"] == REFUSED
    for name, row in matrix["families"].items():
        assert set(row["targets"]) >= {"full", "window", "pruned"}
        assert row["targets"]["full"] is None and row["targets"]["window"] is None
        assert (row["targets"]["pruned"] is None) == (FAMILIES[name].whole is None)
        assert row["architecture"] == FAMILIES[name].architecture and row["native"] == FAMILIES[name].native
    words = " ".join(CliRunner().invoke(app, ["doctor", "--families"]).stdout.split())
    assert all(name in words for name in (*FAMILIES, *REFUSED, *WRAPPERS))
    assert "gemma3, shieldgemma2: reads images, too; its text part alone is (gemma3_text)" in words
    assert "unless config.json says `use_qk_norm: false`" in words and "its positions have three axes" in words
