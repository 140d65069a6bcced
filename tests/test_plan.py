"""The plan file: round trip, and every kind of damage reported at once and in the user's words."""

import json
from pathlib import Path

import pytest

from compress.errors import UserError
from compress.json_file import sealed
from compress.plan import Plan, make_plan, read_plan, uniform_plan
from compress.runtime.span import FULL, LengthSpan, Span
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from tests.pruned import uneven_plan
from tests.tiny import mixed_plan, shape_of, spans_of, tiny_model


@pytest.fixture(scope="module")
def shape():
    return shape_of(tiny_model("llama-gqa"))


def write(path: Path, plan: Plan) -> Path:
    path.write_text(plan.to_json(), encoding="utf-8")
    return path


def test_a_plan_survives_its_file(tmp_path, shape):
    plan = mixed_plan(shape)
    assert read_plan(write(tmp_path / "plan.json", plan), shape) == plan
    assert spans_of(plan)[0] == [FULL, Span(4, 30, 0.0)]


def test_a_byte_order_mark_and_other_line_ends_are_no_damage(tmp_path, shape):
    plan, path = mixed_plan(shape), tmp_path / "plan.json"
    path.write_bytes(b"\xef\xbb\xbf" + plan.to_json().replace("\n", "\r\n").encode())
    assert read_plan(path, shape) == plan
    path.write_text(plan.to_json(), encoding="utf-16")
    with pytest.raises(UserError, match="not UTF-8 text: byte 0"):
        read_plan(path, shape)


def test_a_window_has_the_rule_by_position_unless_it_says_so(tmp_path, shape):
    raw = json.loads(mixed_plan(shape).to_json())
    assert "rule" not in str(raw["layers"])  # so that plans are written, and known by, what they always were
    del raw["checksum"]
    path = tmp_path / "plan.json"
    for rule, span in (("position", Span(4, 30, 0.0)), ("length", LengthSpan(4, 30, 0.0))):
        raw["layers"][0]["groups"][1]["rule"] = rule
        path.write_text(json.dumps(raw))
        plan = read_plan(path, shape)
        assert spans_of(plan)[0] == [FULL, span]
        assert read_plan(write(path, plan), shape) == plan
        assert (plan == mixed_plan(shape)) == (rule == "position")
    raw["layers"][0]["groups"][1]["rule"] = "lenght"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="'position' or 'length'"):
        read_plan(path)


def test_a_uniform_plan_leaves_sliding_layers_alone():
    shape = shape_of(tiny_model("qwen2-part-sliding"))
    assert shape.native_windows == (None, 50, 50)
    plan = uniform_plan(shape, WindowGroup(sink=4, alpha=8, beta=0))
    assert [row[0].target for row in (layer.groups for layer in plan.layers)] == ["window", "full", "full"]
    assert spans_of(plan)[1] == [Span(0, 50, 0.0)] * 2
    with pytest.raises(UserError, match="already slides over 50 tokens"):
        make_plan(shape, [[WindowGroup(sink=4, alpha=8, beta=0)] * 2] * 3)


def test_another_models_plan_says_every_difference(tmp_path, shape):
    other = shape_of(tiny_model("llama-mha"))
    with pytest.raises(UserError) as caught:
        read_plan(write(tmp_path / "plan.json", mixed_plan(shape)), other)
    text = str(caught.value)
    assert "model.kv_heads" in text and "model.fingerprint" in text
    assert "expected 4" in text and "found    2" in text and "do       search again with this model" in text


def test_same_sizes_other_weights_are_another_model(tmp_path, shape):
    other = shape_of(tiny_model("llama-gqa", seed=5))
    with pytest.raises(UserError, match=r"model\.fingerprint"):
        read_plan(write(tmp_path / "plan.json", mixed_plan(shape)), other)


def test_all_problems_are_printed_at_once(tmp_path, shape):
    raw = json.loads(mixed_plan(shape).to_json())
    del raw["checksum"]
    raw["layers"][0]["groups"][1]["beta"] = 0.1
    raw["layers"][1]["groups"][0]["sinks"] = 4
    raw["layers"][2]["groups"][1]["target"] = "windows"
    raw["colour"] = "red"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read_plan(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert "layers.0.groups.1" in text and "the nearest is 0.099609375" in text
    assert "sinks" in text and "windows" in text and "colour" in text


def test_every_flipped_byte_is_noticed(tmp_path, shape):
    """Flip one bit of each of 60 bytes, digits inside numbers included; the file never reads as another plan."""
    plan = mixed_plan(shape)
    good = plan.to_json().encode()
    path = tmp_path / "plan.json"
    for place in range(5, len(good) - 3, len(good) // 60):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        try:
            assert read_plan(path, shape) == plan  # only white space may have changed
        except UserError:
            continue


def test_wrong_counts_and_missing_files(tmp_path, shape):
    raw = json.loads(mixed_plan(shape).to_json())
    del raw["checksum"], raw["layers"][2]
    raw["layers"][0]["groups"].append({"target": "full"})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert [problem.what for problem in caught.value.problems] == [
        "wrong number of layers",
        "wrong number of head groups",
    ]
    with pytest.raises(UserError, match="the plan is missing"):
        read_plan(tmp_path / "nothing.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="the plan is damaged"):
        read_plan(path)
    with pytest.raises(UserError, match="wrong number of layers"):
        make_plan(shape, [[FullGroup()] * 2])


def test_a_plan_of_schema_1_is_the_same_plan(tmp_path):
    model = tiny_model("llama-gqa")
    plan, shape = uneven_plan(model), shape_of(model)
    raw = json.loads(plan.to_json())
    del raw["checksum"]
    assert raw["schema"] == 2
    sizes = {"kv_bytes": {"200": 600}, "dense_kv_bytes": {"200": 1200}, "parameters": 70, "dense_parameters": 100}
    older = {**raw, "schema": 1, "predicted": {**sizes, "loss": 0.5}}
    older["layers"] = [{"mlp": None, **layer} for layer in raw["layers"]]
    path = tmp_path / "plan.json"
    path.write_text(sealed(older))
    found = read_plan(path, shape)
    assert (found.model, found.layers, found.provenance) == (plan.model, plan.layers, plan.provenance)
    assert found.predicted.of("kv")[200].fraction == 0.5 and found.predicted.of("parameters")[None].plan == 70
    assert read_plan(write(path, found), shape) == found and json.loads(path.read_text())["schema"] == 2
    path.write_text(json.dumps({**raw, "schema": 3}))
    with pytest.raises(UserError, match="schema"):
        read_plan(path)
