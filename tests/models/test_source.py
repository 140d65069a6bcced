"""What `compress bench` and `compress eval` are given: a plan of other weights, damaged configurations."""

import json

import pytest
import torch

from compress.errors import UserError
from compress.models.planned import patched_model, planned_model
from compress.models.shape import shape_of
from compress.models.source import ModelSource
from compress.plan import uniform_plan
from compress.targets.window import WindowGroup
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench") / "model"
    tiny_model("llama-gqa").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


def plan_file(tmp_path, model, **change):
    plan = json.loads(uniform_plan(shape_of(model), WindowGroup(sink=4, alpha=30, beta=0.0)).to_json())
    plan["model"] |= change
    del plan["checksum"]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def test_a_plan_of_these_weights_is_measured_in_every_precision(folder, tmp_path):
    source = ModelSource(str(folder), str(plan_file(tmp_path, tiny_model("llama-gqa"))))
    for dtype in (torch.float32, torch.bfloat16):
        planned, name = source.planned(source.dense(CPU, dtype))
        assert name == "plan.json" and planned.config.compress_plan


def test_a_plan_of_other_weights_is_refused(folder, tmp_path):
    source = ModelSource(str(folder), str(plan_file(tmp_path, tiny_model("llama-gqa", seed=7))))
    with pytest.raises(UserError, match=r"fingerprint: the plan is for another model"):
        source.planned(source.dense(CPU, torch.float32))


def test_a_checkpoint_is_measured_with_a_plan_of_its_own_weights_only(folder, tmp_path):
    model = tiny_model("llama-gqa")
    plan = uniform_plan(shape_of(model), WindowGroup(sink=4, alpha=30, beta=0.0))
    patched_model(planned_model(model, plan), plan).save_pretrained(tmp_path / "checkpoint")
    for seed, right in ((0, True), (7, False)):
        source = ModelSource(str(tmp_path / "checkpoint"), str(plan_file(tmp_path, tiny_model("llama-gqa", seed=seed))))
        dense = source.dense(CPU, torch.float32)
        if right:
            assert source.planned(dense)[1] == "plan.json"
        else:
            with pytest.raises(UserError, match="plan is for another model"):
                source.planned(dense)


def test_random_weights_take_a_plan_of_their_sizes(tmp_path):
    config = tmp_path / "sizes.json"
    config.write_text(json.dumps(CONFIGS["llama-gqa"]().to_dict()))
    source = ModelSource(str(config), str(plan_file(tmp_path, tiny_model("llama-gqa", seed=7))))
    dense = source.dense(CPU, torch.float32)
    assert source.planned(dense)[1] == "plan.json"
    source = ModelSource(str(config), str(plan_file(tmp_path, tiny_model("llama-mha"))))
    with pytest.raises(UserError, match=r"kv_heads: the plan is for another model"):
        source.planned(dense)


@pytest.mark.parametrize("reader", [lambda source: source.config(), lambda source: source.layer(CPU, torch.float32)])
def test_sizes_are_known_without_weights(folder, reader):
    assert reader(ModelSource(str(folder))) is not None
    assert reader(ModelSource("tiny")) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"{" * 2000,
        b"{}",
        b'{"model_type": ["llama"]}',
        b'{"model_type": "llama", "hidden_size": 1e9}',
        b'{"model_type": "llama", "num_attention_heads": []}',
        b'{"model_type": "no-such-model"}',
        b'{"model_type": "mamba"}',
    ],
    ids=range(10),
)
def test_damaged_configurations_are_told(tmp_path, content):
    path = tmp_path / "sizes.json"
    path.write_bytes(content)
    with pytest.raises(UserError):
        ModelSource(str(path)).config()


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"intermediate_size": 2**31 - 1}])
def test_random_weights_that_no_memory_holds_are_refused_before_they_are_made(tmp_path, change):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(CONFIGS["llama-gqa"]().to_dict() | change))
    with pytest.raises(UserError, match="more memory than is available"):
        ModelSource(str(path)).dense(CPU, torch.float32)


def test_shapes_without_memory_may_be_of_any_size(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(CONFIGS["llama-gqa"]().to_dict() | {"intermediate_size": 2**31 - 1}))
    dense = ModelSource(str(path)).dense(torch.device("meta"), torch.float32)
    assert sum(weight.nbytes for weight in dense.parameters()) > 2**40


def test_no_file_of_that_name():
    with pytest.raises(UserError, match="is missing"):
        ModelSource("nowhere/config.json")


@pytest.mark.parametrize(("key", "value"), [("num_key_value_heads", 1), ("num_attention_heads", 2)])
def test_a_plan_that_its_own_configuration_contradicts_is_told(tmp_path, key, value):
    model = tiny_model("llama-gqa")
    plan = uniform_plan(shape_of(model), WindowGroup(sink=4, alpha=30, beta=0.0))
    patched_model(planned_model(model, plan), plan).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError):
        ModelSource(str(tmp_path)).dense(CPU, torch.float32)
