"""The fingerprint sees every value of every weight and the rules beside them; files with the older form still read."""

import copy
import json

import pytest
import torch

from compress.errors import UserError
from compress.models.fingerprint import BLOCK, BLOCKS, LANES, block_sums, fingerprint_of
from compress.models.shape import shape_of
from compress.plan import read_plan, uniform_plan
from compress.targets.full import FullGroup
from tests.tiny import CONFIGS, tiny_loaded, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama-gqa")


def unsampled(model):
    """The model with every value changed that the older fingerprint does not look at, about a third of small tensors
    and nearly all of large ones."""
    other = copy.deepcopy(model)
    for weight in other.parameters():
        flat = weight.data.reshape(-1)
        kept = flat[:: max(1, flat.numel() // 256)][:256].clone()
        flat.mul_(-3)
        flat[:: max(1, flat.numel() // 256)][:256] = kept
    return other


def test_weights_that_the_sample_does_not_see_make_another_model(model):
    shape, other = shape_of(model), shape_of(unsampled(model))
    assert shape._sampled == other._sampled and shape.fingerprint != other.fingerprint
    assert shape.differing(other.model_dump()) == ["fingerprint"]


def test_a_change_of_any_one_value_is_seen(model):
    before = fingerprint_of(model, {})
    generator = torch.Generator().manual_seed(0)
    for _, weight in model.named_parameters():
        flat = weight.data.reshape(-1)
        place = int(torch.randint(flat.numel(), (1,), generator=generator))
        value = float(flat[place])
        flat[place] = 1.01 * value or 1e-3  # the step of bfloat16 is 0.8% at most
        assert fingerprint_of(model, {}) != before
        flat[place] = value
    assert fingerprint_of(model, {}) == before


def test_values_that_change_places_are_seen(model):
    other = copy.deepcopy(model)
    weight = other.model.layers[0].mlp.up_proj.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()
    assert fingerprint_of(other, {}) != fingerprint_of(model, {})


@pytest.mark.parametrize("count", [1, 5, BLOCK * LANES, BLOCKS * BLOCK * LANES + 3])
def test_the_sums_are_those_of_whole_numbers(count):
    values = torch.arange(count, dtype=torch.float32) % 251 - 100
    found = torch.cat(list(block_sums(values))).tolist()
    bits = values.bfloat16().view(torch.int16).tolist()
    bits += [0] * (-count % (BLOCK * LANES))
    state, factors, mask = 0, [], (1 << 64) - 1
    for _ in range(BLOCK):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        factors.append((mixed ^ (mixed >> 31)) | 1)
    assert len(found) == len(bits) // (BLOCK * LANES)
    for block in {0, len(found) - 1}:
        part = bits[block * BLOCK * LANES : (block + 1) * BLOCK * LANES]
        words = [sum((part[i + lane] & 0xFFFF) << (16 * lane) for lane in range(LANES)) for i in range(0, len(part), 4)]
        assert found[block] & mask == sum(word * factor for word, factor in zip(words, factors, strict=True)) & mask


def test_one_fingerprint_in_float32_and_bfloat16(model):
    assert shape_of(copy.deepcopy(model).bfloat16()) == shape_of(model)


@pytest.mark.parametrize(
    "change",
    [{"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_weights_under_other_rules_are_another_model(model, change):
    other = copy.deepcopy(model)
    for key, value in change.items():
        setattr(other.config, key, value)
    assert shape_of(other).fingerprint != shape_of(model).fingerprint


def test_rules_are_the_same_however_they_are_written(model):
    other = copy.deepcopy(model)
    other.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0}
    assert shape_of(other) == shape_of(model)


def test_a_plan_with_the_older_fingerprint_still_reads(model, tmp_path):
    shape = shape_of(model)
    plan = json.loads(uniform_plan(shape, FullGroup()).to_json())
    assert plan["model"]["fingerprint"].startswith("v2:") and "sampled" not in plan["model"]
    del plan["checksum"]
    plan["model"]["fingerprint"] = shape._sampled
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert read_plan(path, shape).model.fingerprint == shape._sampled
    with pytest.raises(UserError, match=r"model\.fingerprint"):
        read_plan(path, shape_of(tiny_model("llama-gqa", seed=5)))
    plan["model"]["fingerprint"] = "v1:" + "0" * 64
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="fingerprint"):
        read_plan(path)


def test_the_weights_of_a_loaded_model_are_read_once(monkeypatch):
    loaded, calls = tiny_loaded("llama-gqa"), []

    def counted(*facts):
        calls.append(facts)
        return "v2:" + "0" * 64

    monkeypatch.setattr("compress.models.shape.fingerprint_of", counted)
    assert loaded.shape is loaded.shape
    assert len(calls) == 1


def test_every_family_has_a_fingerprint():
    found = {family: shape_of(tiny_model(family)).fingerprint for family in CONFIGS}
    assert len(set(found.values())) == len(found)
