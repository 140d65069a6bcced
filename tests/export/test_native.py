"""Native export: a stock architecture that computes the plan, or a refusal that names what is in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.export.export import export_checkpoint
from compress.export.native import form_for, layer_windows, native_model
from compress.export.verify import verify_checkpoint
from compress.models.load import LoadedModel, load_model
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import LayerPlan, Mlp, ModelShape, Plan, make_plan, plan_of_layers, uniform_plan
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup
from tests.tiny import CONFIGS, SIZES, mixed_plan, random_ids, tiny_loaded, tiny_model, tiny_tokenizer

WINDOW = 50  # that of the tiny models which slide by themselves
WRITTEN_AS = {
    "llama-gqa": "MinistralForCausalLM",
    "llama-mha": "MinistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2-part-sliding": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def window(tokens: int = WINDOW, sink: int = 0, beta: float = 0.0) -> WindowGroup:
    return WindowGroup(sink=sink, alpha=tokens, beta=beta)


def layered(shape: ModelShape, *layers: Any) -> Plan:
    """A plan with one target a layer; layers that slide by themselves stay as they are."""
    rows = [
        [FullGroup() if native else target] * shape.kv_heads
        for target, native in zip(layers, shape.native_windows, strict=True)
    ]
    return make_plan(shape, rows)


def windows_and_full(shape: ModelShape, tokens: int = WINDOW) -> Plan:
    return layered(shape, window(tokens), FullGroup(), window(tokens))


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


def generated(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=None, **kwargs
    )


@pytest.mark.parametrize("family", WRITTEN_AS)
def test_a_native_checkpoint_is_stock_and_computes_the_plan(family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    plan = windows_and_full(shape)
    report = export_checkpoint(loaded, plan, tmp_path / "new", form="native")
    checks = report.checks
    assert checks.native and checks.loaded_as == WRITTEN_AS[family]
    kept = sum(checks.probe_tokens if each is None else WINDOW for each in layer_windows(plan))
    assert checks.cache_bytes == checks.predicted_bytes == kept * shape.kv_heads * 2 * shape.head_dim * 4

    assert not list((tmp_path / "new").glob("*.py"))
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "auto_map" not in config and not any(key.startswith("compress") for key in config)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "remote" not in card and f"`t - j < {WINDOW}`" in card and "(sinks)" in card
    assert (tmp_path / "new" / "compress_plan.json").read_text() == plan.to_json()

    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    stock, loading = again
    assert not any(loading.values())
    assert type(stock).__module__.startswith("transformers.")
    planned, ids = planned_model(loaded.model, plan), random_ids(2, 301)
    expected = logits(planned, ids)
    torch.testing.assert_close(logits(stock, ids), expected, **CLOSE)
    assert (logits(loaded.model, ids) - expected).abs().max() > 0.1
    cached = generated(stock, ids[:, :120])
    assert torch.equal(cached, generated(stock, ids[:, :120], use_cache=False))
    assert torch.equal(cached, generated(planned, ids[:, :120]))


@pytest.mark.parametrize(
    ("layers", "number"),
    [
        ((window(), FullGroup(), window()), 0),  # not in the older form: vLLM stops at 0, and runs dense at 3
        ((FullGroup(), window(), window()), 1),
        ((FullGroup(), FullGroup(), window()), 2),
        ((window(), window(), window()), 0),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_older_form_of_qwen_agrees_with_the_plan(family: str, layers: Any, number: int) -> None:
    model, ids = tiny_model(family), random_ids(1, 150)
    plan = layered(shape_of(model), *layers)
    planned = planned_model(model, plan)
    stock = native_model(planned, plan)
    config = stock.config.to_dict()
    assert config["max_window_layers"] == number and config["use_sliding_window"] and config["sliding_window"] == WINDOW
    again = type(stock)(type(stock.config).from_dict(config))  # from the file's fields alone, as another process does
    again.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(again.eval(), ids), logits(planned, ids), **CLOSE)


def test_a_model_that_keeps_its_windows_says_them_in_the_older_form() -> None:
    model = tiny_model("qwen2-part-sliding")
    model.config.max_window_layers = 3  # as transformers 4 wrote beside layer_types
    plan = uniform_plan(shape_of(model), FullGroup())
    assert native_model(planned_model(model, plan), plan).config.max_window_layers == 1


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ((window(), FullGroup(), FullGroup()), 3),
        ((window(), FullGroup(), window()), 4),
        ((FullGroup(), FullGroup(), window()), None),
        ((FullGroup(), FullGroup(), FullGroup()), None),
    ],
)
def test_the_older_form_of_gemma_agrees_with_the_plan_or_is_left_out(layers: Any, pattern: int | None) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    fields = CONFIGS["gemma3"]().to_dict() | {
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window_pattern": 6,
    }
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**fields)).eval()
    plan, ids = layered(shape_of(model), *layers), random_ids(1, 150)
    planned = planned_model(model, plan)
    stock = native_model(planned, plan)
    assert getattr(stock.config, "sliding_window_pattern", None) == pattern
    torch.testing.assert_close(logits(stock, ids), logits(planned, ids), **CLOSE)


def test_the_window_is_exact_to_the_token() -> None:
    model, ids = tiny_model("llama-gqa"), random_ids(1, 200)
    shape = shape_of(model)
    stock = logits(native_model(planned_model(model, windows_and_full(shape)), windows_and_full(shape)), ids)
    for tokens in (WINDOW - 1, WINDOW, WINDOW + 1):
        found = logits(planned_model(model, windows_and_full(shape, tokens)), ids)
        first = (found - stock).abs().amax(-1)[0].gt(1e-3).nonzero()
        # A window of W tokens first hides one from the query at W.
        assert first.flatten().tolist()[:1] == ([] if tokens == WINDOW else [min(tokens, WINDOW)])


def test_windows_on_a_family_without_such_an_architecture_stay_patched(tmp_path: Path) -> None:
    loaded = tiny_loaded("phi3")
    plan = windows_and_full(shape_of(loaded.model))
    with pytest.raises(UserError, match="no native checkpoint of Phi3ForCausalLM"):
        native_model(planned_model(loaded.model, plan), plan)
    assert not export_checkpoint(loaded, plan, tmp_path / "new", form="auto").checks.native


@pytest.mark.parametrize(
    "family",
    ["gemma3", "llama-gqa", "mistral", "mistral-sliding", "phi3", "phi3-sliding", "qwen2", "qwen2-part-sliding"],
)
def test_a_plan_that_changes_nothing_is_the_model_itself(family: str) -> None:
    model, ids = tiny_model(family), random_ids(1, 150)
    plan = uniform_plan(shape_of(model), FullGroup())
    stock = native_model(planned_model(model, plan), plan)
    assert type(stock) is type(model)
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), **CLOSE)


def test_rope_parameters_come_along() -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, rms_norm_eps=1e-3)).eval()
    plan = windows_and_full(shape_of(model))
    planned, ids = planned_model(model, plan), random_ids(1, 200)
    stock = native_model(planned, plan)
    again = type(stock)(stock.config)  # RoPE made from the configuration, as in a fresh process
    again.load_state_dict(stock.state_dict())
    torch.testing.assert_close(logits(again.eval(), ids), logits(planned, ids), **CLOSE)


@pytest.mark.parametrize(
    ("layers", "where", "found"),
    [
        ((FullGroup(), window(sink=4), window()), "layers.1.groups.0", "sink 4"),
        ((window(), FullGroup(), window(beta=0.25)), "layers.2.groups.0", "0.25 of the position"),
        ((window(50), window(50), window(51)), "layers.2.groups.0", "window 51"),
        ((window(1), window(1), window(1)), "layers.0.groups.0", "window 1"),
    ],
)
def test_a_plan_that_no_stock_architecture_holds_is_refused(tmp_path, layers, where, found) -> None:
    loaded = tiny_loaded("llama-gqa")
    with pytest.raises(UserError, match="a native checkpoint cannot hold this plan") as caught:
        export_checkpoint(loaded, layered(shape_of(loaded.model), *layers), tmp_path / "new", form="native")
    text = str(caught.value)
    assert where in text and found in text and "solver: {name: layers, sink: 0}" in text
    assert list(tmp_path.iterdir()) == []


def test_groups_of_a_layer_that_differ_are_refused() -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    plan = make_plan(shape, [[FullGroup()] * 2, [FullGroup(), window()], [FullGroup()] * 2])
    with pytest.raises(UserError, match=r"layers\.1\.groups\.1"):
        layer_windows(plan)


def test_a_layer_that_slides_by_itself_sets_the_window() -> None:
    shape = shape_of(tiny_model("qwen2-part-sliding"))
    with pytest.raises(UserError, match="the window of layer 0, 64 tokens"):
        layer_windows(windows_and_full(shape, 64))
    assert layer_windows(windows_and_full(shape)) == [WINDOW] * 3


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_that_the_architecture_lacks_are_refused(bias: str) -> None:
    sizes: dict[str, Any] = SIZES | {bias: True}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    plan = windows_and_full(shape_of(model))
    with pytest.raises(UserError, match="MinistralForCausalLM does not hold its weights") as caught:
        native_model(planned_model(model, plan), plan)
    assert "bias" in str(caught.value.problems[0].found)


@pytest.mark.parametrize("one_rope", [False, True])
def test_a_layer_keeps_its_rope(one_rope: bool) -> None:
    model = tiny_model("gemma3")
    if one_rope:
        rope = model.config.rope_parameters
        model.config.rope_parameters = {kind: dict(rope["full_attention"]) for kind in rope}
        model = type(model)._from_config(model.config).eval()
    plan, ids = layered(shape_of(model), FullGroup(), window(), FullGroup()), random_ids(1, 150)
    planned = planned_model(model, plan)
    if one_rope:
        torch.testing.assert_close(logits(native_model(planned, plan), ids), logits(planned, ids), **CLOSE)
        return
    with pytest.raises(UserError, match="a full layer cannot become a sliding one") as caught:
        native_model(planned, plan)
    assert "layers.1" in str(caught.value)


def test_a_part_local_model_is_written_as_itself(tmp_path: Path) -> None:
    loaded = tiny_loaded("gemma3")
    shape = shape_of(loaded.model)
    report = export_checkpoint(loaded, uniform_plan(shape, FullGroup()), tmp_path / "new", form="native")
    checks = report.checks
    assert checks.loaded_as == "Gemma3ForCausalLM" and checks.cache_bytes == checks.dense_bytes
    assert checks.cache_bytes == (checks.probe_tokens + 2 * WINDOW) * shape.kv_heads * 2 * shape.head_dim * 4


def test_auto_is_native_where_it_can_be_and_says_why_not(tmp_path: Path) -> None:
    loaded = tiny_loaded("qwen3")
    shape = shape_of(loaded.model)
    lines: list[str] = []
    report = export_checkpoint(loaded, mixed_plan(shape), tmp_path / "a", form="auto", progress=lines.append)
    assert not report.checks.native and (tmp_path / "a" / "modeling_compress.py").is_file()
    assert "form patched" in lines[0] and "layers.0.groups.1" in lines[0]
    report = export_checkpoint(loaded, windows_and_full(shape), tmp_path / "b", form="auto", progress=lines.append)
    assert report.checks.native and "form native, as Qwen3ForCausalLM" in lines


def test_a_native_checkpoint_is_a_model_name_again(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    export_checkpoint(loaded, windows_and_full(shape_of(loaded.model)), tmp_path / "new", form="native")
    again = shape_of(load_model(str(tmp_path / "new")).model)
    assert again.architecture == "MinistralForCausalLM" and again.native_windows == (WINDOW, None, WINDOW)


def test_a_missing_tensor_is_noticed(tmp_path: Path) -> None:
    # A weight that is zero as a fresh one is: only the loader can tell.
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.bias.zero_()
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny/qwen2")
    plan = windows_and_full(shape_of(model))
    export_checkpoint(loaded, plan, tmp_path / "new", form="native")
    file = tmp_path / "new" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="not those of its architecture") as caught:
        verify_checkpoint(tmp_path / "new", planned_model(model, plan), loaded.tokenizer, plan, native=True)
    assert "layers.2.self_attn.k_proj.bias" in str(caught.value)


@pytest.mark.parametrize("family", ["gemma3", "llama-gqa", "phi3", "qwen2-part-sliding"])
def test_the_form_is_known_before_the_export(family: str) -> None:
    model = tiny_model(family)
    shape = shape_of(model)
    whole = LayerPlan(groups=(FullGroup(),) * shape.kv_heads)
    fewer = LayerPlan(groups=(FullGroup(),) * (shape.kv_heads - 1) + (PrunedGroup(),))
    narrow = LayerPlan(groups=whole.groups, mlp=Mlp.of(range(model.config.intermediate_size // 2)))
    plans = [plan_of_layers(shape, [row] * shape.layers) for row in (whole, fewer, narrow)]
    plans += [
        plan_of_layers(shape, [narrow, *[whole] * (shape.layers - 1)]),
        windows_and_full(shape),
        mixed_plan(shape),
    ]
    for plan in plans:
        assert form_for(plan, model.config, "patched") == "patched"
        try:
            native_model(planned_model(model, plan), plan)
        except UserError:
            expected = "patched"
        else:
            expected = "native"
        assert form_for(plan, model.config, "auto") == form_for(plan, model.config, "native") == expected, plan.layers
