"""From a model's name to a recipe that explains itself; and what a recipe may name."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compress import registry
from compress.evaluate.suites import SUITES
from compress.recipe.catalogue import entries, names
from compress.recipe.load import load_recipe
from compress.registry import solvers
from compress.runtime.families import FAMILIES
from tests.calls import call
from tests.cli.recipes import make_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recipe(tmp_path_factory.mktemp("init")).parent / "model"


@pytest.mark.parametrize("budget", [("--kv", "0.5"), ("--density=0.6", "--lengths", "512"), ("--parameters", "0.8")])
def test_a_recipe_of_a_name(budget: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    result = call("init", model, *budget, "--out", file, "--output", tmp_path / "run", "--set", "device=cpu")
    assert result.exit_code == 0 and f"compress run {file}" in result.stderr, result.output
    recipe = load_recipe(file)
    assert not recipe.chosen, "nothing is left to be chosen"
    kind = budget[0].removeprefix("--").partition("=")[0]
    assert getattr(recipe.search.budget, kind) == float(re.sub(r"--\w+=", "", budget[-1 if kind != "density" else 0]))
    keys = [line for line in file.read_text().splitlines() if re.match(r" *\w+:", line)]
    comments = [line for line in file.read_text().splitlines() if line.lstrip().startswith("#")]
    assert len(comments) > 0.7 * len(keys)
    again = call("init", model, "--out", file)
    assert again.exit_code == 2 and "a file of that name" in again.stderr


@pytest.mark.parametrize("solver", ["{name: priced}", "{name: priced, least_saving: 0.1}", "{name: heads}"])
def test_a_recipe_with_a_solver_is_written_and_read(solver: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    result = call("init", model, "--kv", "0.5", "--out", file, "--set", f"search.solver={solver}")
    assert result.exit_code == 0, result.output
    assert load_recipe(file).search.solver == solvers.parse(yaml.safe_load(solver))


def test_a_recipe_of_several_models_is_written_and_read(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    result = call("init", model, "--out", file, "--set", f"upcycle={{experts: [{model}, ./two]}}")
    assert result.exit_code == 0, result.output
    assert load_recipe(file).upcycle is not None


def test_a_recipe_of_three_lines_is_valid(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "three.yaml"
    recipe.write_text(f"model: {model}\noutput: {tmp_path / 'run'}\nsearch: {{budget: {{kv: 0.5}}}}\n")
    result = call("validate", recipe)
    assert result.exit_code == 0, result.output
    assert "the model's context is 1,024" in result.stdout
    assert re.search(r"takes +about .* and .* of memory", result.stdout)


def test_everything_registered_is_listed_with_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = names()
    for name, table in vars(registry).items():
        if isinstance(table, registry.Registry):
            for example, method in table.items():  # of other tests
                if not method.__module__.startswith("compress."):
                    monkeypatch.delitem(table._methods, example)
            assert listed[name] == tuple(table), name
    assert listed["suites"] == tuple(SUITES)
    assert set(listed["families"]) == set(FAMILIES)
    for kind, known in listed.items():
        assert tuple(entry.name for entry in entries(kind)) == known
        for entry in entries(kind):
            assert entry.line, (kind, entry.name)
            wordless = [key.name for key in entry.parameters if not key.description]
            assert not wordless, (kind, entry.name)


def test_a_wrong_name_of_a_method_takes_no_torch() -> None:
    code = (
        "import sys; from tests.calls import call\n"
        "told = [call('methods', *words.split()).stderr for words in ('solvers mao', 'mao', 'amp', 'famly llama')]\n"
        "assert 'moa' in call('methods').stdout and 'torch' not in sys.modules\n"
        "print(told)"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.count("did you mean `moa`?") == 2 and "compress methods solvers amp" in told and "`family`" in told


def test_methods_are_shown() -> None:
    assert "hidden_mass" in call("methods").stdout
    assert "2406.14909" in call("methods", "solvers").stdout
    shown = call("methods", "solvers", "moa").stdout
    assert "retrieval: number, default 0.0" in shown and "weight of the evidence" in shown
    assert json.loads(call("methods", "tasks", "facts", "--json").stdout)[0]["parameters"][0]["name"] == "length"
    assert call("methods", "moa").stdout == shown
    wrong = call("methods", "solver", "mao")
    assert wrong.exit_code == 2 and "did you mean `moa`?" in wrong.stderr
    assert "did you mean `solvers`?" in call("methods", "solvrs").stderr
    lines = call("methods", "objectives").stdout.splitlines()
    assert len(lines) == len(registry.objectives.items())
    assert all(line.count("arXiv") == len(set(re.findall(r"[0-9]{4}[.][0-9]{5}", line))) for line in lines)


def test_a_mistake_is_told_by_the_option_that_was_given(tmp_path: Path) -> None:
    made = ("--out", tmp_path / "made.yaml")
    unknown = call("init", "demo/smollm2-135m", "--kvx", "0.5", *made).stderr
    assert unknown.startswith("--kvx: unknown key") and "did you mean `kv`?" in unknown
    assert call("init", "demo/smollm2-135m", "--kv", "1.5", *made).stderr.startswith("--kv: wrong value")
    assert not (tmp_path / "made.yaml").exists()
