"""A mixer with parameters, a state, the layer's input, rotary tables, gates and a side loss, among spans."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.export.export import export_checkpoint
from compress.export.layout import runtime_files
from compress.models.planned import planned_model, set_plan, with_runtime_plan
from compress.models.source import ModelSource
from compress.plan import Plan, make_plan, uniform_plan
from compress.registry import targets
from compress.runtime.mixer import MIXERS, Kinds, LayerFacts, heads_of, take
from compress.runtime.step import Record
from compress.targets.cost import Cost
from compress.targets.full import FullGroup
from compress.targets.target import Target
from compress.targets.unit import Unit
from compress.targets.window import WindowGroup
from tests.processes import run
from tests.tiny import random_ids, shape_of, tiny_loaded, tiny_model

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = 150


class ToyGroup(Target):
    """What `toy_mixer.py` runs; not in the registry but while these tests run."""

    runtime: ClassVar[str | None] = "tests.runtime.toy_mixer"

    noun: ClassVar[str] = "a toy"

    target: Literal["toy"] = "toy"
    window: int

    def cost(self, unit: Unit, length: int) -> Cost:
        """All keys in pages, and one number."""
        held = -(-length // 64) * 64 * unit.token_bytes + 4
        return Cost(held, held, length // 3, 0, 0)

    def words(self, native: int | None = None) -> str:
        return f"toy {self.window}"

    def initial(self, attention: Any, group: int) -> dict[str, torch.Tensor]:
        """The gate starts as the mean of the group's query projection."""
        return {"gate": attention.q_proj.weight.unflatten(0, (4, -1))[group].mean(0) * 2}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    targets.register("toy")(ToyGroup)
    yield
    targets._methods.pop("toy")
    MIXERS.pop("toy", None)


def plan_of(dense: Any) -> Plan:
    """Two toy groups of four apart in the first layer, one of another kind in the second, spans alone in the third."""
    shape = shape_of(dense)
    toy, other = ToyGroup(window=20), WindowGroup(sink=4, alpha=30, beta=0.0)
    layers: list[list[Target]] = [
        [toy, FullGroup(), ToyGroup(window=7), other],
        [other, other, toy, FullGroup()],
        [FullGroup(), other] * 2,
    ]
    return make_plan(shape, layers, provenance={})


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    dense = tiny_model("llama-mha")
    return planned_model(dense, plan_of(dense))


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


def test_its_parameters_are_the_models(model: Any) -> None:
    own = {name: tensor for name, tensor in model.state_dict().items() if ".mixers." in name}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == {
        "model.layers.0.self_attn.mixers.toy.gate": (2, 48),
        "model.layers.1.self_attn.mixers.toy.gate": (1, 48),
    }
    rows = model.model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, -1)).mean(1) * 2
    assert torch.equal(own["model.layers.0.self_attn.mixers.toy.gate"], rows[[0, 2]])
    fresh = with_runtime_plan(tiny_model("llama-mha"), model.config.compress_plan)  # not converted: drawn
    assert 0.3 < float(fresh.model.layers[0].self_attn.mixers["toy"].gate.detach().std()) < 0.7


@pytest.mark.parametrize("reserve", [None, LENGTH])
def test_chunks_and_steps_are_one_prefill(model: Any, reserve: int | None) -> None:
    ids = random_ids(2, LENGTH)
    whole = logits(model, ids)
    cache = model.new_cache(reserve)
    cuts = [0, 61, 62, 63, 120, *range(140, LENGTH + 1)]
    parts = [logits(model, ids[:, a:b], past_key_values=cache) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    if reserve is None:
        held = sum(group.cost(unit, LENGTH).held_bytes for group, unit in units(model))
        assert cache.held_bytes() == 2 * held
    # Sequences are reordered with all that is kept of them.
    cache.reorder_cache(torch.tensor([1, 0]))
    if reserve is None:
        more = random_ids(2, 1, seed=4)
        expected = logits(model, torch.cat([ids.flip(0), more], dim=1))[:, -1:]
        torch.testing.assert_close(logits(model, more, past_key_values=cache), expected, **CLOSE)


def units(model: Any) -> list[tuple[Target, Unit]]:
    """Every head group of a plan, with its size."""
    dense = tiny_model("llama-mha")
    shape = shape_of(dense)
    return [
        (group, shape.unit(n, itemsize=4)) for n, layer in enumerate(plan_of(dense).layers) for group in layer.groups
    ]


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(model: Any, side: str) -> None:
    ids, mask = random_ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, {"left": slice(0, 30), "right": slice(60, 90), "between": slice(1, 80, 3)}[side]] = 0
    cache = model.new_cache()
    out = logits(model, ids, attention_mask=mask, past_key_values=cache)
    token = random_ids(2, 1, seed=9)
    step = logits(model, token, attention_mask=torch.cat([mask, mask.new_ones(2, 1)], dim=1), past_key_values=cache)
    for row in range(2):
        alone = torch.cat([ids[row, mask[row].bool()], token[row]])[None]
        expected = logits(model, alone)[0]
        torch.testing.assert_close(out[row, mask[row].bool()], expected[:-1], **CLOSE)
        torch.testing.assert_close(step[row, 0], expected[-1], **CLOSE)


def test_what_mixers_report_reaches_the_caller(model: Any) -> None:
    record, ids = Record(), random_ids(1, 40)
    model.zero_grad()
    model(ids, compress_record=record)
    assert sorted(record.gates) == [0, 1] and record.gates[0][0].shape == (1, 40, 2)
    assert list(record.losses) == ["spread"] and len(record.losses["spread"]) == 2
    torch.stack(record.losses["spread"]).sum().backward()
    assert bool(model.model.layers[0].self_attn.mixers["toy"].gate.grad.abs().sum() > 0)
    assert bool(model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0)  # through the second layer's gates


def test_it_learns_and_is_checkpointed_to_the_same_gradients(model: Any) -> None:
    trained, ids = copy.deepcopy(model).train(), random_ids(2, 60)
    gate = trained.model.layers[1].self_attn.mixers["toy"].gate
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained.zero_grad()
        trained(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(gate.grad.clone())
    torch.testing.assert_close(grads[0], grads[1])
    assert bool(grads[0].abs().sum() > 0)


def test_it_compiles_and_generates_with_a_cache_as_without(model: Any, traced: Callable[..., Any]) -> None:
    ids = random_ids(2, 40)
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 40)}
    expected = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)
    short = copy.deepcopy(model)
    short.model.layers, short.config.num_hidden_layers = short.model.layers[:1], 1
    short.set_plan({"layers": short.config.compress_plan["layers"][:1]})
    compiled = torch.compile(short, backend=traced)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), logits(short, ids), **CLOSE)


def test_another_plan_keeps_what_stays_and_asks_for_no_more_than_it_needs(model: Any) -> None:
    dense, changed = tiny_model("llama-mha"), copy.deepcopy(model)
    gate = changed.model.layers[0].self_attn.mixers["toy"].gate
    plan = plan_of(dense)
    groups = [list(layer.groups) for layer in plan.layers]
    groups[0][1] = WindowGroup(sink=4, alpha=64, beta=0.0)
    groups[1] = [FullGroup()] * 4
    set_plan(changed, make_plan(shape_of(dense), groups, provenance={}))
    assert changed.model.layers[0].self_attn.mixers["toy"].gate is gate
    assert [len(layer.self_attn._forward_pre_hooks) for layer in changed.model.layers] == [1, 0, 0]
    ids = random_ids(1, 50)
    assert float((logits(changed, ids) - logits(model, ids)).abs().max()) > 0.1
    set_plan(changed, uniform_plan(shape_of(dense), FullGroup()))
    torch.testing.assert_close(logits(changed, ids), logits(dense, ids), **CLOSE)


CHILD = """
import sys
sys.modules["compress"] = sys.modules["tests"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
out, folder = {}, sys.argv[1]
ids = torch.arange(4, 94)[None]
for turn in range(2):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        out[f"logits{turn}"] = model(ids).logits
        out[f"text{turn}"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    folder = sys.argv[2] + "/again"
    model.save_pretrained(folder)
save_file(out, sys.argv[2] + "/out.safetensors")
"""


def test_a_checkpoint_carries_its_file_and_its_parameters(model: Any, tmp_path: Path) -> None:
    """Out of another package, verified by the export, then loaded and saved and loaded where there is no toolkit."""
    loaded = tiny_loaded("llama-mha")
    folder = tmp_path / "checkpoint"
    report = export_checkpoint(loaded, plan_of(loaded.model), folder)
    assert report.checks.cache_bytes >= report.checks.predicted_bytes > 0
    text = (folder / "toy_mixer.py").read_text()
    assert "from .mixer_masked import MaskedMixer" in text and "compress.runtime" not in text
    # As if they were trained: the same weights, but other parameters of the mixers.
    weights = load_file(folder / "model.safetensors")
    trained = {name: tensor * 1.5 for name, tensor in weights.items() if ".mixers." in name}
    assert len(trained) == 2
    save_file(weights | trained, folder / "model.safetensors", metadata={"format": "pt"})
    same = copy.deepcopy(model)
    same.load_state_dict(trained, strict=False)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run("code", CHILD, folder, tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    out, ids = load_file(tmp_path / "out.safetensors"), torch.arange(4, 94)[None]
    torch.testing.assert_close(out["logits0"], logits(same, ids), **CLOSE)
    assert torch.equal(out["logits1"], out["logits0"]) and torch.equal(out["text1"], out["text0"])
    assert torch.equal(out["text0"], same.generate(ids, max_new_tokens=6, do_sample=False))
    # The toolkit's own way to run a checkpoint beside the dense model on its weights.
    source, place = ModelSource(str(folder)), (torch.device("cpu"), torch.float32)
    dense = source.dense(*place)
    torch.testing.assert_close(logits(dense, ids), logits(tiny_model("llama-mha"), ids), **CLOSE)
    for planned in (source.planned(dense)[0], source.carried(*place)):
        torch.testing.assert_close(logits(planned, ids), logits(same, ids), **CLOSE)


def test_files_beside_a_mixer_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it imports, in their own package or in the runtime."""
    package = tmp_path / "another_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "another_mixer.py").write_text("from .its_rule import RULE\n")
    (package / "its_rule.py").write_text("from compress.runtime.span import FULL as RULE\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ToyGroup, "runtime", "another_package.another_mixer")
    files = runtime_files({"layers": [{"groups": [{"target": "toy"}]}]})
    assert files["its_rule.py"] == "from .span import FULL as RULE\n" and "span.py" in files
    assert "\nfrom .another_mixer import" in files["modeling_compress.py"]  # imported, so that it registers
    assert "\n    from .its_rule import" in files["modeling_compress.py"]  # named, so that it is copied


def test_a_file_that_a_checkpoint_cannot_carry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"layers": [{"groups": [{"target": "toy"}]}]}
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, line in enumerate(
        ("from compress.plan import Plan", "import compress.runtime.span", "from . import x")
    ):
        name = f"other_mixer_{number}"
        (tmp_path / f"{name}.py").write_text(f"def late():\n    {line}\n")
        monkeypatch.setattr(ToyGroup, "runtime", name)
        with pytest.raises(ValueError, match=rf"{name}.py: `(from|import) .*: a file that checkpoints carry"):
            runtime_files(plan)
    (tmp_path / "span.py").write_text("")
    monkeypatch.setattr(ToyGroup, "runtime", "span")
    with pytest.raises(ValueError, match=r"span.py: a file that checkpoints carry has the name of .*span.py"):
        runtime_files(plan)


def test_a_layer_of_one_kind_gathers_nothing() -> None:
    """Heads that follow each other are views, and the output of a layer with one mixer is its own."""
    tensor = torch.randn(2, 6, 5, 4)
    assert take(tensor, range(6), 1) is tensor
    assert take(tensor, [2, 3], 1).data_ptr() == tensor[:, 2:4].data_ptr()
    assert torch.equal(take(tensor, [4, 1], 1), tensor[:, [4, 1]])
    assert heads_of([2, 0], 3) == [6, 7, 8, 0, 1, 2]
    facts = LayerFacts(0, 8, 32, 1, None)
    one = Kinds([{"target": "full"}, {"target": "window", "sink": 0, "alpha": 9, "beta": 0.0}], facts)
    assert one.only is one.mixers[0] and not one.needs_inputs
    with pytest.raises(ValueError, match="layer 0 group 1: this runtime has no target 'recent'"):
        Kinds([{"target": "full"}, {"target": "recent"}], facts)
