"""Recipes: every shipped one reads, and a wrong one reports all that is wrong, with its place."""

import codecs
import itertools
import json
import re
import time
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from compress import registry
from compress.data.text import EmbeddedText
from compress.errors import UserError
from compress.recipe.defaults import Situation
from compress.recipe.load import load_recipe
from compress.recipe.located_yaml import read_located
from compress.recipe.read import parse_located
from compress.recipe.schema import Recipe
from compress.stages.check import uses_of

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
MINIMAL = """\
model: demo/smollm2-135m
output: runs/x
calibration:
  documents:
    - {task: passkey, length: 128, count: 1}
search:
  budget: {kv: 0.5, lengths: [128]}
"""


def read(text: str, name: str = "r.yaml") -> Recipe:
    return parse_located(read_located(text, name), text, Path(name), name)


AMP = "profile: {statistics: [{name: amp}]}"
GRID = "\nprofile: {{statistics: [{{name: effect, options: {{retain: {}}}}}]}}"


@pytest.mark.parametrize(
    ("grid", "key", "expected", "found"),
    [
        ("{scorers: [ridge], shares: [0.125, 1.5]}", "retain.shares[1]", "less than or equal to 0.984375", "1.5"),
        (
            "{scorers: [rige]}",
            "retain.scorers[0]",
            "one of gate, key_norm, mlp, ridge, value_norm",
            "rige\n  do       did you mean `ridge`?",
        ),
        ("{share: [0.5]}", "retain", "keys among ", "share"),
    ],
)
def test_a_wrong_grid_of_options_is_told_at_its_key(grid: str, key: str, expected: str, found: str) -> None:
    (told,) = problems(MINIMAL + GRID.format(grid))
    what, of, got = told.split("\n", 2)
    assert what.endswith(f"wrong value for `profile.statistics[0].options.{key}`"), told
    assert of.startswith(f"  expected {expected}") and got == f"  found    {found}", told


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(text)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Situation, "of", classmethod(lambda cls, model, device: CPU))
    recipe = load_recipe(path)
    assert recipe.text == path.read_text(encoding="utf-8")
    calibration = recipe.resolved()["calibration"]
    lengths = {part: [task["length"] for task in calibration[part]] for part in ("documents", "held_out")}
    if lengths["held_out"]:
        assert max(lengths["held_out"]) >= max(lengths["documents"])
    # A training reads a text as often as its steps take; everything else has to fit into it, at four letters a token.
    for use in uses_of(recipe):
        if isinstance(use.source, EmbeddedText) and use.place not in ("prepare", "recover"):
            assert 4 * use.tokens <= len(use.source.part(use.source.known().text, use.part)), use.place


def test_defaults_are_written_out_and_read_back_the_same() -> None:
    recipe = read(MINIMAL)
    resolved = recipe.resolved()
    assert resolved["calibration"]["text"] == {"source": "embedded"}
    assert [entry["name"] for entry in resolved["profile"]["statistics"]] == ["retrieval", "hidden_mass"]
    assert resolved["search"]["solver"]["name"] == "moa" and resolved["search"]["solver"]["influence"] == "none"
    assert resolved["evaluate"]["compare"] == ["plan", "uniform"]
    again = read(json.dumps(resolved))
    assert again.resolved() == resolved
    assert json.dumps(again.resolved()) == json.dumps(resolved)


def test_an_engine_is_written_out_only_where_one_is_named() -> None:
    assert "serve" not in read(MINIMAL).resolved()["search"]
    text = MINIMAL + "  solver: {name: moa}\n  serve: {engine: vllm, ranks: 2}\n"
    resolved = read(text).resolved()
    assert resolved["search"]["serve"] == {"engine": "vllm", "slot": 2, "spans": 3, "ranks": 2, "permute": True}
    assert read(json.dumps(resolved)).resolved() == resolved
    (refused,) = problems(text.replace("moa", "heads"))
    assert refused.startswith("r.yaml:9:10: `heads` decides head group by head group")


def test_all_problems_at_once_with_line_and_nearest_name() -> None:
    text = MINIMAL.replace("output:", "outptu:").replace("count: 1", "count: four").replace("0.5", "1.5")
    found = problems(text)
    assert len(found) == 4
    assert found[0].startswith("r.yaml:1:1: missing key `output`")
    assert found[1].startswith("r.yaml:2:1: unknown key `outptu`") and "did you mean `output`?" in found[1]
    assert found[2].startswith("r.yaml:5:43: wrong value for `calibration.documents[0].count`")
    assert "valid integer" in found[2] and '"four"' in found[2]
    assert found[3].startswith("r.yaml:7:16: wrong value for `search.budget.kv`") and "1.5" in found[3]


def test_a_budget_of_other_kinds_reads() -> None:
    kinds = "{density: {128: 0.5}, decode_time: 0.8, batch_sizes: [1, 8], cost_table: [a.json, b.json], lengths: [128]}"
    recipe = read(MINIMAL.replace("{kv: 0.5, lengths: [128]}", kinds))
    budget = recipe.resolved()["search"]["budget"]
    assert budget["kv"] is None and budget["density"] == {"128": 0.5} and budget["cost_table"] == ["a.json", "b.json"]
    assert read(json.dumps(recipe.resolved())).resolved() == recipe.resolved()
    assert read(MINIMAL.replace("kv: 0.5, ", "")).resolved()["search"]["budget"]["kv"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "place", "hint"),
    [
        ("task: passkey", "task: paskey", "5:14: unknown task `paskey`", "did you mean `passkey`?"),
        ("task: passkey, ", "", "5:7: missing key `calibration.documents[0].task`", "passkey"),
        ("length: 128,", "lenght: 128,", "5:23: unknown key `calibration.documents[0].lenght`", "`length`?"),
        ("count: 1", "count: true", "5:43: wrong value", "true"),
        ("count: 1", 'count: "1"', "5:43: wrong value", '"1"'),
        ("count: 1", "count: 0", "5:43: wrong value", "greater than or equal to 1"),
        ("[128]", "[0]", "7:30: wrong value for `search.budget.lengths`", "at least 1 token"),
        ("budget:", "solver: {name: mao}\n  budget:", "7:18: unknown solver `mao`", "did you mean `moa`?"),
        ("budget:", "solver: moa\n  budget:", "7:11: wrong value for `search.solver`", "write `{name: moa}`"),
        ("model:", "seed: -1\nmodel:", "1:7: wrong value for `seed`", "greater than or equal to 0"),
        ("model:", "device: cude\nmodel:", "1:9: wrong value for `device`", "auto, cpu, mps"),
        ("model:", "dtype: float23\nmodel:", "1:8: wrong value for `dtype`", "did you mean `float32`?"),
        ("model:", "seed: 1\nseed: 2\nmodel:", "2:1: key `seed` is given twice", "line 1"),
        ("model:", "schema: 2\nmodel:", "1:9: wrong value for `schema`", "1"),
        ("model:", "profile: {statistics: [{name: entropy}]}\nmodel:", "1:31: unknown statistic", "attention"),
        (
            "model:",
            "profile: {context: 2, statistics: [{name: retrieval}, {name: hidden_mass}, {name: removal}]}\nmodel:",
            "1:20: statistics need all tokens",
            "found    `removal`",
        ),
        ("model:", "profile: {context: 2, stream: true}\nmodel:", "1:20", "read layer by layer"),
        ("model:", "recover: {steps: 1, context: 3}\nmodel:", "1:10", "a multiple of 384"),
        ("model:", "evaluate: {recall: [{task: continuation, length: 128, count: 1}]}\nmodel:", "1:21", "passkey"),
        ("model:", "evaluate: {perplexity: {text: {source: fil}, length: 64}}\nmodel:", "1:40", "`file`?"),
        ("model:", "evaluate: {perplexity: {text: {source: file, pth: x}, length: 64}}\nmodel:", "1:46", "`path`?"),
        ("model:", "export: {max_shard_size: lots}\nmodel:", "1:26: wrong value", "5GB"),
        ("demo/smollm2-135m", "3", "1:8: wrong value for `model`", "valid string"),
    ],
)
def test_one_mistake(old: str, new: str, place: str, hint: str) -> None:
    found = problems(MINIMAL.replace(old, new, 1))
    assert any(line.startswith(f"r.yaml:{place}") and hint in line for line in found), found


def test_the_same_document_twice() -> None:
    line = "    - {task: passkey, length: 128, count: 1}\n"
    (found,) = problems(MINIMAL.replace(line, line * 2))
    assert found.startswith("r.yaml:6:7: duplicate entry `calibration.documents[1]`")


def test_scores_that_are_not_measured() -> None:
    solver = "solver: {name: amp, importance: [amp, wandasp, taylor]}\n  budget: {parameters: 0.7}"
    text = MINIMAL.replace("budget: {kv: 0.5, lengths: [128]}", solver)
    measured = "profile: {statistics: [{name: amp}, {name: wanda_sp}]}\nmodel:"
    first, second = problems(text.replace("model:", measured, 1))
    assert first.startswith("r.yaml:8:11: the solver reads `wandasp`") and "did you mean `wanda_sp`?" in first
    assert "reads `taylor`" in second and "add `{name: taylor}`" in second
    assert read(text.replace("model:", measured, 1).replace("wandasp, taylor", "wanda_sp"))


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "a: [", "a: *b", "\t- x", "a: &a [*a]", "\x00"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert all(re.match(r"r\.yaml(:\d+:\d+)?: ", line) for line in problems(text))


def test_numbers_with_an_exponent_are_numbers() -> None:
    text = MINIMAL.replace("budget:", "solver: {name: moa, gap: 1e-3}\n  budget:")
    assert read(text).resolved()["search"]["solver"]["gap"] == 0.001
    assert read_located("a: '1e-3'", "x").data == {"a": "1e-3"}


def test_dates_and_keys_of_numbers() -> None:
    text = MINIMAL.replace("output: runs/x", "output: 2026-01-01").replace(
        "{kv: 0.5, lengths: [128]}", "{kv: {128: 0.5, 256: 0.25}}"
    )
    resolved = read(text).resolved()
    assert resolved["output"] == "2026-01-01"
    assert resolved["search"]["budget"]["kv"] == {"128": 0.5, "256": 0.25}


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"no such recipe file[\s\S]*did you mean"):
        load_recipe(tmp_path / "quikstart.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


DAMAGED = Path(__file__).parent / "damaged" / "recipe-25.yaml"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (DAMAGED.read_text(), "1:51", "more than 50 levels"),
        ("{a: " * 2000, "1:", "more than 50 levels"),
        ("- " * 2000, "1:101", "more than 50 levels"),
        (BOMB, "1:", "at most 20,000 values"),
        ("- a\n" * 30_000, "", "more than 20,000 values"),
        (f"a: &a {'x' * 1000}\nb: [{', '.join(['*a'] * 300)}]", "1:4", "200,000 characters, aliases written out"),
        ("a: " + "x" * 300_000, "", "300,003 characters"),
        ("a: " + "9" * 5000, "1:4", "too many digits"),
        ("a: 0x" + "f" * 4000, "1:4", "too many digits"),
        ("a: 1:1:1:1:1:1:1:1:1:1:1:1:1", "1:4", "too many digits"),
        ("a: 99999999999999999999", "1:4", "at most 18"),
        ("a: .inf", "1:4", "not finite"),
        ("a: -.inf", "1:4", "not finite"),
        ("a: .NaN", "1:4", "not finite"),
        ("a: 1e999", "1:4", "not finite"),
        ("a: !!python/object/apply:os.system [ls]", "1:4", "tags are not supported"),
        ("a: !!python/name:os.system x", "1:4", "`!!python/name:os.system`"),
        ("!mine {a: 1}", "1:1", "`!mine`"),
        ("a: !!bool maybe", "1:4", "not a valid bool"),
        ("a: !!int ''", "1:4", "not a valid int"),
        ("a: 0b_", "1:4", "not a valid int"),
        ("1: a\n1.0: b", "2:1", "given twice"),
        ("1: a\n'1': b", "2:1", "given twice"),
        ("? [1, 2]\n: 3", "1:3", "a list or a mapping"),
        ('a: "\\ud800"', "1:4", "U+D800"),
        ('a: "x\\0y"', "1:4", "U+0000"),
        ("a: 1\nb: \x07", "2:4", "U+0007"),
    ],
)
def test_what_a_few_bytes_of_yaml_may_not_do(text: str, place: str, message: str) -> None:
    started = time.process_time()
    found = problems(text)
    assert any(line.startswith(f"r.yaml:{place}") and message in line for line in found), found
    assert time.process_time() - started < 10


def numbers(schema: Any, seen: set[type]) -> Iterator[tuple[str, str, list[Any]]]:
    """Class, key and constraints of every number in a schema, through lists, mappings and inner classes."""
    if schema in seen:
        return
    seen.add(schema)
    for name, field in schema.model_fields.items():
        yield from inner_numbers(field.annotation, list(field.metadata), schema.__name__, name, seen)


def inner_numbers(
    annotation: Any, metadata: list[Any], owner: str, key: str, seen: set[type]
) -> Iterator[tuple[str, str, list[Any]]]:
    if annotation in (int, float):
        yield owner, key, metadata
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numbers(annotation, seen)
    elif typing.get_origin(annotation) is Annotated:
        inner, *more = typing.get_args(annotation)
        found = [each for part in more for each in (part.metadata if isinstance(part, FieldInfo) else [part])]
        yield from inner_numbers(inner, [*metadata, *found], owner, key, seen)
    elif typing.get_origin(annotation) is not Literal:
        for inner in typing.get_args(annotation):
            yield from inner_numbers(inner, metadata, owner, key, seen)


# Checked by validators of their own, with shares up to 1 or the limits of lengths.
ELSEWHERE = {
    ("SpanGrid", "betas"),
    *(("Budget", kind) for kind in ("bytes_read", "density", "flops", "kv", "kv_bound")),
}
ELSEWHERE |= {(task, "depth") for task in ("PassKey", "PassKeys", "KeyValue", "Facts")}
# Nothing grows with them: shares to clip, weights of scores, layers of the model, full groups of a layer.
HARMLESS = {
    ("Amp", "attention"),
    ("Allocated", "protect"),
    ("Amp", "protect"),
    ("UnitRemoval", "protect"),
    ("Heads", "score"),
    ("Layers", "score"),
    ("Heads", "most_per_layer"),
}


def test_every_number_has_a_limit() -> None:
    many = (registry.statistics, registry.solvers, registry.tasks, registry.sources)
    classes: list[Any] = [Recipe, *(method for table in many for _, method in table.items())]
    seen: set[type] = set()
    free = {
        (owner, key)
        for schema in classes
        for owner, key, constraints in numbers(schema, seen)
        if not any(hasattr(each, "le") or hasattr(each, "lt") for each in constraints)
    }
    assert len(seen) > 30
    tokens = {("PrepareSettings", "tokens"), ("RecoverSettings", "tokens")}  # steps and sequences are limited instead
    assert free == ELSEWHERE | HARMLESS | tokens


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ("count: 1", "count: 99999999999999", "less than or equal to 10000"),
        ("length: 128,", "length: 99999999999999,", "less than or equal to 16777216"),
        ("length: 128, count: 1", "length: 100000, count: 10000", "at most 67,108,864 tokens"),
        ("model:", "recover: {tokens: 999999999999999}\nmodel:", "1,000,000 steps and 100,000,000 sequences"),
        ("model:", "recover: {steps: 1, batch_size: 99999999999}\nmodel:", "less than or equal to 65536"),
        ("model:", "recover: {steps: 999999, batch_size: 60000}\nmodel:", "100,000,000 sequences"),
        ("model:", "evaluate: {perplexity: {length: 64, windows: 99999999999}}\nmodel:", "less than or equal to"),
        ("model:", "evaluate: {lm_eval: {limit: 99999999999}}\nmodel:", "less than or equal to"),
        ("model:", "evaluate: {lm_eval: {suites: [lines], lengths: [99999999999]}}\nmodel:", "less than or equal to"),
        ("model:", "evaluate: {batch_size: 99999999999}\nmodel:", "less than or equal to 65536"),
        ("lengths: [128]", "lengths: [99999999999999]", "less than or equal to 16777216"),
        ("{kv: 0.5, lengths: [128]}", "{kv: {128: 1.0e+300}}", "at most 1,000,000,000,000,000"),
        ("{kv: 0.5, lengths: [128]}", "{density: {999999999999: 0.5}}", "at most 16,777,216"),
        ("{kv: 0.5, lengths: [128]}", f"{{kv: 0.5, lengths: {list(range(1, 100))}}}", "at most 64"),
        ("budget:", "refine: {minutes: 1.0e+300}\n  budget:", "less than or equal to 100000"),
        ("budget:", "refine: {weights: {passkey: 0}}\n  budget:", "greater than 0"),
        ("count: 1", "count: 1, digits: .inf", "not finite"),
        ("output: runs/x", "output: ~nobody-of-this-name/x", "has no user `~nobody-of-this-name`"),
        ("demo/smollm2-135m", "~nobody-of-this-name/x", "has no user"),
        ("output: runs/x", f"output: runs/{'x' * 300}", "more than 255 bytes"),
        ("model:", f"evaluate: {{lm_eval: {{include: '{'x' * 300}'}}}}\nmodel:", "more than 255 bytes"),
        ("kv: 0.5", f"decode_time: 0.5, cost_table: ['{'x' * 300}']", "more than 255 bytes"),
        ("model:", "seed: 4294967296\nmodel:", "less than or equal to 4294967295"),
        ("model:", f"device: cuda:{'9' * 5000}\nmodel:", "cuda:N"),
        ("model:", f"export: {{max_shard_size: {'9' * 5000}GB}}\nmodel:", "5GB"),
    ],
)
def test_more_than_anyone_can_use_is_refused(old: str, new: str, hint: str) -> None:
    found = problems(MINIMAL.replace(old, new, 1))
    assert any(hint in line for line in found), found


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_byte_order_marks_and_line_ends(mark: bytes, encoding: str, ends: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(mark + MINIMAL.replace("runs/x", "runs/ä").replace("\n", ends).encode(encoding))
    recipe = load_recipe(path)
    assert recipe.output == "runs/ä"
    assert recipe.text == MINIMAL.replace("runs/x", "runs/ä")


def test_a_recipe_that_is_not_utf_8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("a: 1\r\nb: ä\nc: ".encode() + b"\xe4\n")
    with pytest.raises(UserError, match="not UTF-8 in line 3, byte 15 of the file"):
        load_recipe(path)
    path.write_bytes(codecs.BOM_UTF16_LE + "a: 1\nb: ".encode("utf-16-le") + b"\x00\xd8")
    with pytest.raises(UserError, match="not UTF-16-LE in line 2, byte 18"):
        load_recipe(path)
    path.write_bytes(b"#" * 1_000_000)
    with pytest.raises(UserError, match="too large for a recipe"):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("a\0b.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(MINIMAL)
    with pytest.raises(UserError, match=r"it is a folder[\s\S]*did you mean `.*run/recipe.yaml`"):
        load_recipe(tmp_path / "run")


def test_settings_take_the_place_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    settings = ["search.budget.kv=0.25", "calibration.documents[0].count=3", "export.form=auto", "seed=7"]
    recipe = load_recipe(path, settings)
    assert recipe.search.budget.kv == 0.25 and recipe.calibration.documents[0].count == 3
    assert recipe.export.form == "auto" and recipe.seed == 7
    assert recipe.words == f"{path} --set search.budget.kv=0.25 --set 'calibration.documents[0].count=3' " + (
        "--set export.form=auto --set seed=7"
    )
    assert recipe.text.startswith(MINIMAL) and "# with --set search.budget.kv=0.25" in recipe.text
    path.write_text(MINIMAL.replace("output: runs/x\n", ""))
    assert load_recipe(path, ["output=runs/y"]).output == "runs/y"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.budget.kv", "--set: not a setting"),
        ("search..kv=1", "--set: not a setting"),
        ("search.budget.kv=1.5", "--set search.budget.kv: wrong value for `search.budget.kv`"),
        ("search.budget.vk=0.5", "--set search.budget.vk: unknown key `search.budget.vk`"),
        ("sarch.budget=1", "--set sarch.budget: unknown key `sarch`"),
        ("output=''", "expected at least 1 character"),
        ("calibration.documents[4].count=1", "`calibration.documents` is a list with 1 entry"),
        ("model.name=x", "`model` is not a mapping"),
        ("seed=[1", "this is not YAML"),
    ],
)
def test_a_wrong_setting(setting: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe(path, [setting])
    assert message in str(caught.value), str(caught.value)


THREE = "model: demo/smollm2-135m\noutput: runs/x\nsearch: {budget: BUDGET}\n"


def three_lines(budget: str, monkeypatch: pytest.MonkeyPatch, situation: Situation) -> Recipe:
    monkeypatch.setattr(Situation, "of", classmethod(lambda cls, model, device: situation))
    return read(THREE.replace("{budget: BUDGET}", f"\n  budget: {budget}"))


CPU = Situation(False, 2, 16 << 30, 8192, 135_000_000, 100_000)


def test_three_lines_are_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = three_lines("{kv: 0.5}", monkeypatch, CPU)
    assert recipe.search.budget.lengths == (2048,)
    assert {task.length for task in recipe.calibration.documents} == {1024, 2048}
    assert {task.task for task in recipe.calibration.documents} == {"facts", "passkey", "key_value", "continuation"}
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["retrieval", "hidden_mass"]
    assert recipe.search.refine is None and recipe.evaluate.recall
    assert three_lines("{kv: 0.5}", monkeypatch, replace(CPU, gpu=True)).search.refine is not None
    assert recipe.resolved()["evaluate"]["perplexity"]["length"] == 2048
    assert any("1,024 tokens for each of 2 cores" in line for line in recipe.chosen)
    again = read(json.dumps(recipe.resolved()), "again.yaml")
    assert again.resolved() == recipe.resolved() and not again.chosen


@pytest.mark.parametrize(
    ("situation", "longest", "dtype"),
    [
        (CPU, 2048, "float32"),
        (replace(CPU, cores=16), 8192, "float32"),
        (replace(CPU, context=1000), 1000, "float32"),
        (replace(CPU, parameters=7_000_000_000, memory=1 << 40), 512, "float32"),
        (replace(CPU, gpu=True, memory=80 << 30), 8192, "bfloat16"),
        (replace(CPU, gpu=True, memory=1 << 30), 4096, "bfloat16"),
    ],
)
def test_lengths_follow_the_machine(
    situation: Situation, longest: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = three_lines("{kv: 0.5}", monkeypatch, situation)
    assert recipe.search.budget.lengths == (longest,) and recipe.dtype == dtype
    assert max(task.length for task in recipe.calibration.documents) == longest


@pytest.mark.parametrize("machine", [CPU, replace(CPU, gpu=True, memory=80 << 30)], ids=["cpu", "gpu"])
@pytest.mark.parametrize("lengths", ["", ", lengths: [512]", ", lengths: [4096]"])
def test_removal_beside_windows_is_measured_where_evidence_lies(
    lengths: str, machine: Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = three_lines(f"{{kv: 0.5, parameters: 0.8{lengths}}}", monkeypatch, machine)
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["retrieval", "hidden_mass", "taylor"]
    whole = recipe.calibration.documents[-1]
    assert whole.length in {task.length for task in recipe.calibration.documents if task.hides}
    assert whole.length * whole.count <= 512 * (128 if machine.gpu else 24)


@pytest.mark.parametrize("solver", ["{name: moa}", "{name: heads}", "{name: uniform}", "{name: layers, sink: 4}"])
def test_a_search_that_no_native_checkpoint_can_hold_is_told_at_once(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="a native checkpoint holds no windows with sinks"):
        three_lines(f"{{kv: 0.5}}\n  solver: {solver}\nexport: {{form: native}}", monkeypatch, CPU)


def test_a_solver_of_priced_targets_has_windows_to_price(monkeypatch: pytest.MonkeyPatch) -> None:
    (effect,) = three_lines("{kv: 0.5}\n  solver: {name: priced}", monkeypatch, CPU).profile.statistics
    assert effect.registered == "effect" and list(effect.model_dump()["options"]) == ["window"]


def test_defaults_suit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = three_lines("{parameters: 0.8}", monkeypatch, CPU)
    assert recipe.search.solver.registered == "amp" and recipe.search.refine is None
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["amp", "wanda_sp"]
    assert recipe.evaluate.compare == ("plan", "random")
    recipe = three_lines("{density: {512: 0.5}}", monkeypatch, CPU)
    assert max(task.length for task in recipe.calibration.documents) == 512
    recipe = three_lines("{kv: 0.5}\n  solver: {name: heads, score: retrieval}", monkeypatch, CPU)
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["retrieval"]
    assert recipe.search.refine is None
    linear = "\nprepare: {targets: [{target: linear}], steps: 2"
    recipe = three_lines("{kv: 0.5}" + linear + "}", monkeypatch, CPU)
    assert recipe.search.solver.words() == "keep: as many as the budget holds of the groups full, by retrieval"
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["retrieval"]
    recipe = three_lines("{kv: 0.5}\n  solver: {name: priced}" + linear + ", effect: true}", monkeypatch, CPU)
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["hidden_mass"]
    recipe = three_lines("{kv: 0.5}\n  solver: {name: keep, statistic: ar_loss}" + linear + "}", monkeypatch, CPU)
    assert [statistic.registered for statistic in recipe.profile.statistics] == ["ar_loss"]
    assert recipe.evaluate.compare == ("plan", "uniform", "interleaved")
    with pytest.raises(UserError, match="did you mean `error`"):
        three_lines("{kv: 0.5}\n  solver: {name: keep, statistic: eror}" + linear + "}", monkeypatch, CPU)
    with pytest.raises(UserError, match="`error`, which is not measured"):
        three_lines("{kv: 0.5}\n  solver: {name: keep, statistic: error}", monkeypatch, CPU)
    with pytest.raises(UserError, match=r"add `\{name: flap\}` to `profile\.statistics`"):
        three_lines("{parameters: 0.7}\n  solver: {name: amp, importance: flap}\n" + AMP, monkeypatch, CPU)
    with pytest.raises(UserError, match="did you mean `amp`"):
        three_lines("{parameters: 0.7}\n  solver: {name: amp, importance: anp}\n" + AMP, monkeypatch, CPU)
    with pytest.raises(UserError, match=r"unknown key `search\.budget\.vk`"):
        three_lines("{vk: 0.5}", monkeypatch, CPU)
