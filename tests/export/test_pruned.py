"""Checkpoints of pruned models: stock where widths allow it, patched otherwise, and compressed a second time."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import UserError
from compress.export.export import export_checkpoint
from compress.models.load import LoadedModel, load_model
from compress.models.planned import kept_units, planned_model
from compress.models.shape import shape_of
from compress.plan import Plan, read_plan, uniform_plan
from compress.search.solvers.allocated import Allocated
from compress.search.solvers.amp import Amp
from compress.search.solvers.ranked import Ranked
from compress.targets.window import WindowGroup
from tests.pruned import zero
from tests.search.test_pruning import Scored, problem_of
from tests.tiny import SIZES, random_ids, tiny_loaded, tiny_tokenizer


def plan_for(loaded: Any, solver: Ranked) -> Plan:
    """A plan that keeps 70% of the parameters."""
    problem = problem_of(loaded.model, Scored(loaded.model, *solver.statistics_read()), 0.7)
    return solver.solve(problem)[0].to_plan(problem, {"solver": {"name": "amp", **solver.model_dump(mode="json")}})


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "qwen2", "qwen3", "mistral", "phi3"])
def test_equal_widths_are_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    plan = plan_for(loaded, Amp(multiple=1))
    report = export_checkpoint(loaded, plan, tmp_path / "out", form="native")
    assert report.checks.native
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, told = found
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is type(loaded.model)
    ids = random_ids(2, 17)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, planned_model(loaded.model, plan)(ids).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    amount = plan.predicted.of("parameters")[None]
    assert f"{amount.plan:,} of {amount.dense:,} parameters" in card
    assert "trust_remote_code=True" not in card


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("tied", "rope"),
    [(False, None), (True, LLAMA3 | {"original_max_position_embeddings": 64})],
    ids=["plain", "llama3"],
)
def test_heads_that_do_not_divide_the_hidden_size_are_a_stock_checkpoint_of_mistral(
    tied: bool, rope: dict[str, Any] | None, tmp_path: Path
) -> None:
    """30% of Llama-3-8B is such a plan: 24 heads on a hidden size of 4,096, which Llama's configuration refuses."""
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope)).eval()
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny/llama")
    plan = plan_for(loaded, Amp(multiple=1))
    assert plan.kept_queries == [6, 6, 6]
    zeroed = copy.deepcopy(model)
    zero(zeroed, kept_units(plan, 64))
    found = planned_model(model, plan)
    ids = random_ids(2, 90)
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, zeroed(ids).logits, rtol=1e-4, atol=1e-4)
    report = export_checkpoint(loaded, plan, tmp_path / "out", form="native")
    assert report.checks.native and report.checks.loaded_as == type(found).__name__ == "MistralForCausalLM"
    again = load_model(str(tmp_path / "out")).model
    assert again.config.sliding_window is None and again.config.num_attention_heads == 6
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, found(ids).logits)
    spans = uniform_plan(shape_of(again), WindowGroup(sink=4, alpha=64, beta=0.0))
    both = LoadedModel(again, tiny_tokenizer(), str(tmp_path / "out"))
    assert export_checkpoint(both, spans, tmp_path / "both").checks.loaded_as == "CompressMistralForCausalLM"
    patched = export_checkpoint(loaded, plan, tmp_path / "patched", form="patched")
    assert patched.checks.loaded_as == "CompressMistralForCausalLM"


def test_biases_keep_a_model_out_of_its_twin(tmp_path: Path) -> None:
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    loaded = LoadedModel(model, tiny_tokenizer(), "tiny/llama")
    plan = plan_for(loaded, Amp(multiple=1))
    with pytest.raises(UserError, match="widths that no stock configuration says"):
        export_checkpoint(loaded, plan, tmp_path / "out", form="native")
    assert export_checkpoint(loaded, plan, tmp_path / "out", form="auto").checks.loaded_as.startswith("CompressLlama")


@pytest.mark.parametrize("form", ["patched", "auto"])
def test_widths_by_layer_are_a_patched_checkpoint(form: Any, tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    plan = plan_for(loaded, Allocated(multiple=1, protect=(0,)))
    with pytest.raises(UserError, match="widths that no stock configuration says"):
        export_checkpoint(loaded, plan, tmp_path / "native", form="native")
    assert not (tmp_path / "native").exists()
    report = export_checkpoint(loaded, plan, tmp_path / "out", form=form)
    assert not report.checks.native
    assert report.checks.cache_bytes < report.checks.dense_bytes * 1.2


def test_equal_widths_can_be_patched_too(tmp_path: Path) -> None:
    loaded = tiny_loaded("qwen2")
    report = export_checkpoint(loaded, plan_for(loaded, Amp(multiple=1)), tmp_path / "out", form="patched")
    assert not report.checks.native
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of its own for every" not in card and "which brings its own code" in card


def test_compensated_plan_is_a_stock_checkpoint(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    plan = plan_for(loaded, Amp(importance="flap", compensate=True, multiple=1))
    assert export_checkpoint(loaded, plan, tmp_path / "out", form="native").checks.native


def test_pruned_checkpoint_gets_spans_and_tells_of_both(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    first = plan_for(loaded, Amp(multiple=1))
    export_checkpoint(loaded, first, tmp_path / "pruned", form="native")
    again = load_model(str(tmp_path / "pruned"), dtype="float32", device="cpu")
    shape = shape_of(again.model)
    assert shape.kv_heads == again.model.config.num_key_value_heads
    spans = uniform_plan(shape, WindowGroup(sink=4, alpha=64, beta=0.0))
    export_checkpoint(again, spans, tmp_path / "both")
    assert read_plan(tmp_path / "both" / "compress_plan.base.json") == first
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"{first.predicted.of('parameters')[None].plan:,} of" in card and "compressed before" in card
