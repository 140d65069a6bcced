"""What `validate` lets pass does not fail later for a reason that it could have seen."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import Result

from tests.calls import call
from tests.cli.recipes import make_recipe

HELD_OUT = "- {task: continuation, length: 384, count: 1, answer_tokens: 16}"
PERPLEXITY = "perplexity: {text: *text, length: 256, windows: 2}"
ROUTED = "{target: routed, active: 1, of: %d}"
INFLUENCE = "    - {name: influence, grid: {sinks: [4]}}\n"
ATTENTION = "    - {name: attention, sink: 4}\n"
SOLVER = "solver: {name: moa, points: 1}"
BUDGET = "budget: {kv: 0.8, lengths: [320]}"
PASSKEY = "{task: passkey, length: 320, count: 1, haystack: filler}"
LONG = PASSKEY.replace("320", "2000")
OWN = "search:", "recover: {steps: 1, length: 80, text: {source: generated, tokens: %s}}\nsearch:"
NO_TEXT = "{source: file, path: FOLDER/none.txt}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its model and text, which tests change copies of."""
    return make_recipe(tmp_path_factory.mktemp("validate"))


def validate(made: Path, folder: Path, *changes: tuple[str, str]) -> Result:
    text = made.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    return call("validate", recipe)


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        # Lengths beyond the model's 1,024 positions, wherever a length can stand.
        ("lengths: [320]", "lengths: [200000]", "search.budget.lengths", "at most 1024 tokens"),
        (BUDGET, "budget: {kv: {320: 0.8, 4096: 0.8}}", "search.budget.kv", "4096"),
        (BUDGET, "budget: {density: {4096: 0.8}}", "search.budget.density", "4096"),
        ("length: 320", "length: 2000", "calibration.documents[0]", "longer than the model's context"),
        ("length: 384", "length: 2000", "calibration.held_out[0]", "longer than the model's context"),
        ("  held_out:", f"  training: [{LONG}]\n  held_out:", "calibration.training[0]", "2000"),
        (PERPLEXITY, "perplexity: {text: *text, length: 2000}", "evaluate.perplexity", "at most 1024"),
        (PERPLEXITY, f"recall: [{LONG}]", "evaluate.recall[0]", "at most 1024"),
        (PERPLEXITY, "latency: {length: 1020}", "evaluate.latency", "context"),
        (PERPLEXITY, "lm_eval: {suites: [vt], lengths: [2000]}", "evaluate.lm_eval", "1024 tokens"),
        ("search:", "recover: {steps: 1, length: 2000}\nsearch:", "recover", "at most 1024"),
        # Budgets that nothing meets.
        ("kv: 0.8", "kv: 0.01", "search", "budget"),
        (SOLVER, "solver: {name: heads, score: entropy, sink: 4096}", "search", "with a sink of 4096"),
        (SOLVER, "solver: {name: streaming, sink: 900}", "search", "with a sink of 900"),
        # Solvers and what is measured.
        (INFLUENCE, "", "search.solver|profile", "is not measured"),
        (SOLVER, "solver: {name: moa, influence: none, tables: {hidden_mass: 1}}", "", "add `{name: hidden_mass}`"),
        (SOLVER, "solver: {name: moa, tables: {entropy: 1}}", "", "cannot use `entropy`"),
        (SOLVER, "solver: {name: heads, score: retrieval}", "", "add `{name: retrieval}`"),
        (SOLVER, "solver: {name: heads, score: {entropy: 1, sink_mas: 1}}", "", "did you mean `sink_mass`?"),
        (SOLVER, "solver: {name: heads, score: influence.joint}", "", "a table of span rules"),
        (SOLVER, "solver: {name: layers}", "", "add `{name: retrieval}`"),
        (INFLUENCE, INFLUENCE + "    - {name: hidden_mass}\n", "", "different span grids"),
        (INFLUENCE, INFLUENCE + "    - {name: gates}\n", "", "no documents of task `passkeys` to train on"),
        (
            f"{SOLVER}\n  {BUDGET}",
            "solver: {name: uniform}\n  budget: {parameters: 0.5}",
            "",
            "cannot meet this kind of budget",
        ),
        (SOLVER, "solver: {name: amp}", "", "cannot meet this kind of budget|is not measured"),
        (SOLVER, f"{SOLVER}\n  refine: {{weights: {{passkey: 2}}}}", "", "no documents of task passkey to weigh"),
        ("  held_out:", "  second: {source: embedded}\n  held_out:", "", "no statistic is measured on a second corpus"),
        # Heads that tokens choose: counts of another model, single groups of a layer, and routers without weights.
        (
            SOLVER,
            f"solver: {{name: keep, statistic: entropy, target: {ROUTED % 2}}}",
            "search.solver.level",
            "write `level: layer`",
        ),
        (
            "search:",
            f"prepare: {{steps: 1, targets: [{ROUTED % 5}]}}\nsearch:",
            "prepare.targets[0]",
            "how many routed",
        ),
        (
            "search:",
            "prepare: {steps: 1, targets: [{target: routed, router: norm, active: 1, of: 2}]}\nsearch:",
            "prepare.targets",
            "has nothing to train",
        ),
        # Files.
        (BUDGET, "budget: {decode_time: 0.8, cost_table: FOLDER/none.json}", "search", "none.json"),
        (BUDGET, "budget: {decode_time: 0.8, cost_table: FOLDER/recipe.yaml}", "search", "recipe.yaml"),
        (PERPLEXITY, "lm_eval: {tasks: [mine], include: FOLDER/none}", "evaluate.lm_eval", "no such folder of task"),
        (PERPLEXITY, f"perplexity: {{text: {NO_TEXT}, length: 64}}", "none.txt", "cannot be read"),
        ("search:", f"recover: {{steps: 1, text: {NO_TEXT}}}\nsearch:", "none.txt", "cannot be read"),
        # Text that the model writes.
        (OWN[0], OWN[1] % "9000, length: 2048", "recover", "longer than its context"),
        (OWN[0], OWN[1] % 8_000_000_000, "", "for too long"),
        (OWN[0], OWN[1] % 60, "recover.text", "at least one sequence of 80 tokens"),
    ],
)
def test_what_a_run_would_stumble_over_is_found_before(
    made: Path, tmp_path: Path, old: str, new: str, place: str, message: str
) -> None:
    result = validate(made, tmp_path, (old, new.replace("FOLDER", str(tmp_path))))
    assert result.exit_code == 2, result.output
    assert any(each in result.stderr for each in place.split("|"))
    assert any(each in result.stderr for each in message.split("|")), result.stderr


def test_what_heads_retrieve_is_asked_for_with_documents_that_hide_nothing(made: Path, tmp_path: Path) -> None:
    retrieval = (ATTENTION, ATTENTION + "    - {name: retrieval, grid: {sinks: [4]}}\n")
    heads = (SOLVER, "solver: {name: heads, score: retrieval}")
    result = validate(made, tmp_path, retrieval, heads)
    assert result.exit_code == 2 and "no calibration document hides anything to retrieve" in result.stderr
    hidden = ("    - {task: continuation, length: 320, count: 1, answer_tokens: 16}", f"    - {PASSKEY}")
    assert validate(made, tmp_path, retrieval, heads, hidden).exit_code == 0
    result = validate(made, tmp_path, retrieval, (SOLVER, "solver: {name: moa, retrieval: 1.0}"), hidden)
    assert result.exit_code == 2 and "found    none at 192 tokens" in result.stderr


@pytest.mark.parametrize(
    ("solver", "share", "message"),
    [
        ("{name: amp, importance: magnitude}", 0.001, "neurons a layer stay at least"),
        ("{name: allocated, importance: magnitude}", 0.001, "no widths meet the budget"),
        ("{name: amp, importance: magnitude, protect: [9]}", 0.7, "names a layer that does not exist"),
        ("{name: amp, importance: magnitude, compensate: true}", 0.7, "`magnitude.head_means`, which is not measured"),
    ],
)
def test_what_a_pruning_would_stumble_over(made: Path, tmp_path: Path, solver: str, share: float, message: str) -> None:
    measured = (INFLUENCE, "    - {name: magnitude}\n    - {name: flap}\n")
    search = (f"{SOLVER}\n  {BUDGET}", f"solver: {solver}\n  budget: {{parameters: {share}}}")
    result = validate(made, tmp_path, measured, search)
    assert result.exit_code == 2 and message in result.stderr
    for name in ("amp", "allocated"):
        good = (
            search[0],
            f"solver: {{name: {name}, importance: flap, compensate: true}}\n  budget: {{parameters: 0.7}}",
        )
        assert validate(made, tmp_path, measured, good).exit_code == 0


def test_a_search_refuses_a_budget_beyond_the_context(made: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(made.read_text().replace("lengths: [320]", "lengths: [200000]"))
    assert call("profile", recipe).exit_code == 0
    result = call("search", recipe)
    assert result.exit_code == 2 and "lengths of at most 1024 tokens" in result.stderr


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b'{"text": "w5 w6"}\n{"text": "w5 \\ud800"}\n', ":2: half of a surrogate pair"),
        (b'{"text": "w5 w6"}\n{"text": 5}\n', ":2: `text` is not text"),
        (b'{"text": ""}\n{"text": " "}\n', "holds no text"),
        (b'{"text": "w5"}\n{"text": "\xff"}\n', "not UTF-8 in line 2, byte 25 of the file"),
        (b'{"text": "w5"}\n' + b"[" * 5000, ":2: the line is nested too deeply"),
        (b"\x00\x01\x02" * 100, ":1: a NUL character"),
    ],
)
def test_hostile_texts(made: Path, tmp_path: Path, rows: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows)
    result = validate(made, tmp_path, (str(made.parent / "text.txt"), str(path)))
    assert result.exit_code == 2 and message in result.stderr


def test_of_a_long_text_it_says_how_much_is_used(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.text.MOST", 150_000)
    text = (made.parent / "text.txt").read_text()
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'text': text})}\n" * 20)
    change = (str(made.parent / "text.txt"), str(path))
    result = validate(made, tmp_path, change, ("windows: 2", "windows: 3"))
    assert result.exit_code == 0, result.stderr
    assert f"text: {path}: the first 14" in result.stderr and "of the file" in result.stderr
    # Windows that the beginning does not have make it read on.
    result = validate(made, tmp_path, change, ("windows: 2", "windows: 100"))
    assert result.exit_code == 0, result.stderr
    assert f"text: {path}:" not in result.stderr


def test_lines_that_fill_a_length_are_made_one_by_one(made: Path, tmp_path: Path) -> None:
    recall = "recall: [{task: key_value, length: 300, count: 40, lines: null}]"
    started = time.process_time()
    assert validate(made, tmp_path, (PERPLEXITY, recall)).exit_code == 0
    assert time.process_time() - started < 10
