"""The commands around a run: validate, inspect, doctor, recipes; and how mistakes are told."""

import json
import shutil
from pathlib import Path

import pytest

from compress import __version__
from compress.cli.app import app
from compress.cli.doctor import release
from compress.cli.recipes import first_sentence
from compress.runfolder import RunFolder
from compress.words import duration, size
from tests.calls import call
from tests.cli.recipes import make_recipe
from tests.processes import run

ROOT = Path(__file__).parents[2]


def three_mistakes(folder: Path) -> Path:
    recipe = make_recipe(folder)
    text = recipe.read_text().replace("statistics:", "statistcs:").replace("windows: 2", "windows: two")
    recipe.write_text(text.replace("kv: 0.8", "kv: 8"))
    return recipe


def test_a_typo_a_wrong_type_and_an_impossible_value_at_once(tmp_path: Path) -> None:
    recipe = three_mistakes(tmp_path)
    for command in ("validate", "run", "profile"):
        result = call(command, recipe)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert f"{recipe}:12:3: unknown key `profile.statistcs`" in result.stderr
        assert "did you mean `statistics`?" in result.stderr
        assert f"{recipe}:17:16: wrong value for `search.budget.kv`" in result.stderr
        assert f"{recipe}:20:" in result.stderr and "`evaluate.perplexity.windows`" in result.stderr
        assert "3 problems" in result.stderr
        assert "Traceback" not in result.stderr
    assert "Traceback" in call("validate", recipe, "--verbose").stderr
    assert not (tmp_path / "run").exists()


def test_the_same_in_a_process_of_its_own(tmp_path: Path) -> None:
    result = run("module", "compress", "validate", three_mistakes(tmp_path))
    assert result.returncode == 2
    assert "3 problems" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_missing_recipe(tmp_path: Path) -> None:
    result = call("run", tmp_path / "no.yaml")
    assert result.exit_code == 2 and "no such recipe file" in result.stderr


def test_validate_shows_the_work(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    result = call("validate", recipe)
    assert result.exit_code == 0, result.output
    assert "the recipe is valid" in result.stderr
    assert "as just measured" in result.stdout and "GFLOP/s" in result.stdout
    assert "2 forward and" in result.stdout and "tokens" in result.stdout
    data = json.loads(call("validate", recipe, "--json").stdout)
    assert data["work"]["search"] == [{"task": "continuation", "length": 384, "count": 1}]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("length: 384", "length: 4096", "longer than the model's context"),
        ("windows: 2", "windows: 2000", "the text is too short"),
        ("/model\n", "/modell\n", "recipe.yaml: model: "),
        ("text.txt", "texd.txt", "recipe.yaml: the text of calibration.documents[0]: "),
    ],
)
def test_validate_finds_what_a_run_would_stumble_over(tmp_path: Path, old: str, new: str, expected: str) -> None:
    recipe = make_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(old, new))
    result = call("validate", recipe)
    assert result.exit_code == 2 and expected in result.stderr


@pytest.mark.parametrize("name", ["run", "run/plan.json", "run/profile", "run/profile/profile.json", "run/checkpoint"])
def test_inspect(finished: Path, name: str) -> None:
    path = finished.parent / name
    result = call("inspect", path)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM: 3 layers" in result.stdout
    assert "v2:" in result.stdout
    assert ("influence.absolute.320" if "profile" in name else "provenance") in result.stdout
    assert json.loads(call("inspect", path, "--json").stdout)["schema"] == (1 if "profile" in name else 2)


def test_a_run_that_has_come_to_its_profile(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.parent / "run" / "profile", run / "profile")
    shutil.copy(finished.parent / "run" / "stages.json", run)
    assert call("inspect", run).stdout == call("inspect", run / "profile").stdout
    told = call("report", run)
    assert told.exit_code == 2 and "this run has no plan yet" in told.stderr and "goes on with it" in told.stderr


def test_inspect_says_what_it_cannot_read(finished: Path, tmp_path: Path) -> None:
    assert "no such file or folder" in call("inspect", tmp_path / "x").stderr
    assert "an empty folder" in call("inspect", tmp_path).stderr
    damaged = tmp_path / "plan.json"
    damaged.write_bytes((finished.parent / "run" / "plan.json").read_bytes().replace(b"sink", b"sinc", 1))
    result = call("inspect", damaged)
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_doctor_reports_this_machine() -> None:
    result = call("doctor")
    assert result.exit_code == 0, result.output
    assert "To copy into an issue" in result.stdout and f"compress {__version__}" in result.stdout
    report = json.loads(call("doctor", "--json").stdout)
    assert {check["name"] for check in report["checks"]} >= {"torch", "transformers", "triton", "lm-eval"}


def test_doctor_refuses_a_version_outside_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("compress.environment", fromlist=["installed"]).installed
    monkeypatch.setattr(
        "compress.environment.installed", lambda name: "4.57.1" if name == "transformers" else real(name)
    )
    result = call("doctor", "--json")
    assert result.exit_code == 1
    (check,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "transformers"]
    assert not check["ok"] and check["fix"] == "pip install 'transformers>=5.17,<6'"


def test_versions_compare_as_numbers() -> None:
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("5.17.0rc1") == (5, 17, 0)
    assert release("2.9") < release("2.11")


def test_recipes_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = call("recipes")
    assert result.exit_code == 0
    assert "recipes/smollm2-quickstart.yaml  Half of the KV cache" in result.stdout
    lines = [line for line in result.stdout.splitlines() if line]
    assert len(lines) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert all(line.endswith(".") for line in lines), "a whole sentence of each"
    assert first_sentence("# Of a.yaml and\n# 2.5 more. Another.\nmodel: x") == "Of a.yaml and 2.5 more."
    assert first_sentence("model: x\n# Not at the beginning.") == ""


def test_help_is_paragraphs_that_a_terminal_wraps() -> None:
    for command in app.registered_commands:
        assert command.help and all("\n" not in part for part in command.help.split("\n\n")), command.name


def test_version_and_no_arguments() -> None:
    assert call("--version").stdout.strip() == f"compress {__version__}"
    assert "compress init" in call().output


def test_two_runs_of_one_folder(copied: Path) -> None:
    with RunFolder(copied.parent / "run").locked():
        result = call("profile", copied)
    assert result.exit_code == 2 and "another run is writing" in result.stderr


def test_numbers_for_people() -> None:
    assert [size(0), size(1023), size(1536), size(3 << 20), size(5 << 30)] == [
        "0 bytes",
        "1023 bytes",
        "1.50 KiB",
        "3.00 MiB",
        "5.00 GiB",
    ]
    assert [duration(1.26), duration(61), duration(3600)] == ["1.3 s", "1 min 01 s", "60 min 00 s"]
    assert [duration(7199.7), duration(665_368)] == ["2 h 00 min", "184 h 49 min"]
