"""Every option of every command with a wrong value: 2, a sentence that names the option, and no torch for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from compress.cli.app import app
from tests.calls import call
from tests.cli.recipes import make_recipe

ROOT = Path(__file__).parents[2]
NOWHERE = "/nowhere/at/all"
LONG = "x" * 5000

# Command, options with a wrong value, and what the message has to name.
WRONG: list[tuple[list[str], str]] = [
    *(
        (["bench", "tiny", "--mix", "A", option, value], told)
        for option, value, told in [
            ("--dtype", "fp8", "--dtype"),
            ("--dtype", "", "--dtype"),
            ("--impl", "cuda", "--impl"),
            ("--impl", "Reference", "--impl"),
            ("--lengths", "", "--lengths"),
            ("--lengths", "-5", "--lengths"),
            ("--lengths", "1", "--lengths"),
            ("--lengths", "1e3", "--lengths"),
            ("--lengths", "64,,128", "--lengths"),
            ("--lengths", "99999999999999999999", "--lengths"),
            ("--lengths", "٣٢", "--lengths"),
            ("--device", "tpu", "--device"),
            ("--device", "cuda:", "--device"),
            ("--device", "cuda:-1", "--device"),
            ("--seed", "-1", "--seed"),
            ("--seed", "99999999999999999999", "--seed"),
            ("--seed", "x", "--seed"),
            ("--batch", "0", "--batch"),
            ("--batch", "99999999999", "--batch"),
            ("--what", "kernels", "--what"),
            ("--what", "", "--what"),
            ("--mix", "C", "--mix"),
            ("--plan", NOWHERE, NOWHERE),
            ("--dense", NOWHERE, NOWHERE),
            ("--out", "pyproject.toml", "pyproject.toml"),
            ("--out", "", "--out"),
            ("--out", "a\0b", "--out"),
            ("--out", LONG, "too long"),
            ("--nosuch", "1", "--nosuch"),
        ]
    ),
    *(
        (["eval", "model", "--perplexity", "64", option, value], told)
        for option, value, told in [
            ("--perplexity", "1", "--perplexity"),
            ("--perplexity", "99999999999", "--perplexity"),
            ("--latency", "0", "--latency"),
            ("--limit", "0", "--limit"),
            ("--count", "0", "--count"),
            ("--count", "99999999999", "--count"),
            ("--batch", "-1", "--batch"),
            ("--lengths", "", "--lengths"),
            ("--lengths", "-5", "--lengths"),
            ("--dtype", "int4", "--dtype"),
            ("--device", "gpu", "--device"),
            ("--seed", "-1", "--seed"),
            ("--include", NOWHERE, "--include"),
            ("--measure", "[1", "--measure"),
            ("--measure", "[1]", "NAME"),
            ("--record", "", "--record"),
            ("--replay", NOWHERE, "--record FILE"),
            ("--out", "pyproject.toml", "pyproject.toml"),
            ("--out", LONG, "too long"),
        ]
    ),
    *(([command, NOWHERE], NOWHERE) for command in ("eval", "bench")),
    (["eval", NOWHERE, "--perplexity", "64"], NOWHERE),
    (["eval", "model", "model/", "--perplexity", "64"], "given twice"),
    (["eval", "model", "recipe.yaml", "--perplexity", "64"], "evaluated on its own"),
    (["eval", "model", "/nowhere/x.gguf", "--perplexity", "64"], "/nowhere/x.gguf"),
    (["eval", "a\0b", "--perplexity", "64"], "not a path"),
    (["eval", LONG, "--perplexity", "64"], "too long"),
    (["eval", "runs", "--perplexity", "64"], "run folder"),
    (["bench", "runs", "--mix", "A"], "run folder"),
    (["bench", "recipe.yaml", "--mix", "A"], "a recipe"),
    (["bench", "pyproject.toml"], "pyproject.toml"),
    (["bench", "tiny", "--what", "kernel"], "--mix"),
    (["bench", "tiny", "--mix", "A", "--plan", "plan.json"], "leave out"),
    (["inspect", "recipe.yaml"], "compress validate recipe.yaml"),
    (["inspect", "pyproject.toml"], "pyproject.toml"),
    (["inspect", "evaluation.json"], "compress report"),
    (["inspect", "other.json"], "not a plan"),
    (["inspect", NOWHERE], NOWHERE),
    (["inspect", "a\0b"], "not a path"),
    (["inspect", LONG], "too long"),
    (["report", NOWHERE], NOWHERE),
    (["report", "pyproject.toml"], "a file"),
    (["report", LONG], "too long"),
    (["report", "runs", "--out", "runs"], "is a folder"),
    (["report", "runs", "--plots", "pyproject.toml"], "is a file"),
    (["report", "runs", "--cells", "cells.txt"], ".csv or .json"),
    *(
        ([command, "recipe.yaml", "--set", "search.budget.kv"], "not a setting")
        for command in ("run", "profile", "prepare", "upcycle", "search", "recover", "export", "eval", "validate")
    ),
    (["eval", "model", "--perplexity", "64", "--set", "seed=1"], "can only change a recipe"),
    (["bench", "llama3-8b"], "did you mean `llama-3-8b`?"),
    (["eval", "recipe.yaml", "--perplexity", "64", "--uniform"], "--perplexity --uniform: a recipe says itself"),
    (["init", NOWHERE], NOWHERE),
    (["init", "tiny", "--lengths", "1"], "--lengths"),
    (["init", "tiny", "--kv", "[1"], "not YAML"),
    (["init", "tiny", "--set", "seed"], "not a setting"),
    (["init", "tiny", "--parameters"], "a kind of budget"),
    (["init", "tiny", "--out", "pyproject.toml"], "a file of that name"),
    (["init", "tiny", "--output", "", "--kv", "]"], "not YAML"),
    (["run", "recipe.yaml", "--set", "serach.budget.kv=1"], "did you mean `search`?"),
    (["sweep", "recipe.yaml", "--set", "seed"], "key=value"),
    (["sweep", "recipe.yaml", "--set", "seed=1", "--out", "pyproject.toml"], "pyproject.toml"),
    (["sweep", "nowhere.yaml", "--set", "seed=1"], "no such recipe"),
    (["sweep", "recipe.yaml", "--set", "model.x=1"], "this key cannot be set"),
    (["sweep", "recipe.yaml"], "--set"),
    *(
        ([command, *words], told)
        for command in ("run", "profile", "upcycle", "search", "recover", "export", "validate")
        for words, told in [
            (["nowhere.yaml"], "no such recipe"),
            (["model"], "folder"),
            (["broken.yaml"], "not YAML"),
            (["unknown.yaml"], "did you mean `calibration`?"),
            (["list.yaml"], "a mapping of keys"),
            (["binary.yaml"], "UTF-8"),
            (["a\0b.yaml"], "not a path"),
            ([LONG], "too long"),
            (["recipe.yaml", "--nosuch"], "--nosuch"),
            ([], "RECIPE"),
        ]
    ),
    (["nosuch"], "nosuch"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recipe and some files that are neither."""
    path = tmp_path_factory.mktemp("arguments")
    make_recipe(path)
    text = (path / "recipe.yaml").read_text()
    (path / "unknown.yaml").write_text(text.replace("calibration:", "calibraton:"))
    (path / "broken.yaml").write_text("model: [\n")
    (path / "list.yaml").write_text("- 1\n")
    (path / "binary.yaml").write_bytes(b"model: \x80\x81")
    (path / "pyproject.toml").write_text("[project]\n")
    (path / "plan.json").write_text("{}")
    (path / "other.json").write_text('{"a": 1}')
    (path / "evaluation.json").write_text('{"variants": []}')
    (path / "runs").mkdir()
    (path / "runs" / "stages.json").write_text('{"schema": 1, "stages": {}}')
    return path


def test_wrong_values_are_told_in_a_sentence_and_without_torch(folder: Path) -> None:
    """All in one process of its own, which has not imported torch by the end."""
    code = """\
import functools, json, sys
from typer import testing
from typer.testing import CliRunner
from compress.cli.app import app
testing._get_command = functools.cache(testing._get_command)
found = []
for words in json.load(sys.stdin):
    result = CliRunner().invoke(app, words)
    found.append([result.exit_code, result.output, repr(result.exception), "torch" in sys.modules])
json.dump(found, sys.stdout)
"""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([words for words, _ in WRONG]),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        check=True,
    )
    for (words, told), (code_, output, exception, heavy) in zip(WRONG, json.loads(done.stdout), strict=True):
        shown = [word[:40] for word in words]
        assert code_ == 2 and exception.startswith(("SystemExit", "None")), (shown, code_, exception, output)
        assert told in output, (shown, output)
        assert "Traceback" not in output and "KeyError" not in output and max(map(len, output.splitlines())) < 400
        assert not heavy, f"{shown} imports torch"
    assert sorted(folder.rglob("*")) == before, "a wrong command writes nothing"


def test_every_option_of_a_command_that_takes_a_value_is_tried() -> None:
    """An option that is added has to be added above, too."""
    commands: Any = typer.main.get_command(app)
    tried = {(words[0], word) for words, _ in WRONG for word in words if word.startswith("--")}
    free = {("eval", "--tasks"), ("eval", "--suites")}  # names that only lm-eval and the suites themselves know
    for name, command in commands.commands.items():
        for parameter in command.params:
            takes = getattr(parameter, "is_flag", True) is False
            if takes and parameter.opts[0].startswith("--"):
                assert (name, parameter.opts[0]) in tried | free, (name, parameter.opts)


def told(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output, (result.exception, result.output)
    return result.stderr


def test_names_that_need_torch_to_be_known(folder: Path) -> None:
    assert "vt" in told("eval", folder / "model", "--suites", "vtt", "--out", folder / "out")
    assert "--impl" in told("bench", "tiny", "--mix", "A", "--impl", "flash", "--device", "cpu")


@pytest.mark.parametrize("name", ["../outside", "/abs/other model", "ü/ñ", "a\nb", "x" * 300, "..", "/"])
def test_a_name_becomes_a_part_of_a_file_name(name: str) -> None:
    from compress.evaluate.names import file_part

    part = file_part(name)
    assert part and "/" not in part and not part.startswith(".") and len(part) <= 40 and part.isascii()
