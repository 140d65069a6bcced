"""The pipeline on a tiny model: stages in order, nothing done twice, nothing foreign touched."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.recipe.load import load_recipe
from compress.runfolder import RunFolder
from compress.stages.check import check_run
from tests.calls import call
from tests.cli.recipes import make_recipe
from tests.tiny import part_local_model


def test_a_run_leaves_everything_in_its_folder(finished: Path) -> None:
    run = finished.parent / "run"
    assert (run / "recipe.yaml").read_text() == finished.read_text()
    assert list(RunFolder(run).stages()) == ["profile", "search", "export", "evaluate"]
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"]
    plan = json.loads((run / "plan.json").read_text())
    (held,) = [row for row in plan["predicted"]["amounts"] if (row["kind"], row["length"]) == ("kv", 320)]
    assert held["plan"] <= 0.8 * held["dense"]
    numbers = json.loads((run / "evaluation.json").read_text())
    assert [row["name"] for row in numbers["variants"]] == ["dense", "plan", "uniform"]
    card = (run / "checkpoint" / "README.md").read_text()
    assert "| dense |" in card and "2 windows of 256 tokens" in card


def test_a_finished_run_is_not_repeated(copied: Path) -> None:
    run = copied.parent / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    result = call("run", copied, "--json")
    assert result.exit_code == 0, result.output
    for stage in ("profile", "search", "export", "evaluate"):
        assert f"{stage}: done before" in result.stderr
    assert json.loads(result.stdout)["variants"][0]["name"] == "dense"
    same = {path for path in before if path.stat().st_mtime_ns == before[path]}
    assert {run / "plan.json", run / "evaluation.json", run / "profile" / "profile.json"} <= same


def test_a_run_draws_its_plots(finished: Path) -> None:
    plots = finished.parent / "run" / "plots"
    names = {f"{name}.{kind}" for name in ("spans", "influence", "quality") for kind in ("svg", "png")}
    assert {path.name for path in plots.iterdir() if path.stat().st_size > 1000} == names
    assert "tokens seen at 320" in (plots / "spans.svg").read_text()


def test_a_changed_recipe_reruns_only_what_depends_on_it(copied: Path) -> None:
    copied.write_text(copied.read_text().replace("windows: 2", "windows: 3"))
    result = call("run", copied)
    assert result.exit_code == 0, result.output
    assert "export: done before" in result.stderr and "evaluate: starting" in result.stderr


def test_text_that_the_model_writes(copied: Path) -> None:
    own = "{source: generated, tokens: 96, length: 32}"
    recipe = copied.read_text().replace(
        "search:", f"recover: {{steps: 2, length: 24, batch_size: 2, text: {own}}}\nsearch:"
    )
    copied.write_text(recipe.replace("text: *text, length: 256", f"text: {own}, length: 20"))
    result = call("validate", copied)
    assert result.exit_code == 0 and "recover 96 tokens" in result.stdout and "text 0." in result.stdout, result.output
    for command, again in (("recover", False), ("recover", True), ("eval", False), ("eval", True)):
        result = call(command, copied)
        assert result.exit_code == 0, result.output
        assert ("done before" in result.stderr) is again
        assert ("text: the model wrote 96 tokens (calibration)" in result.stderr) is (
            command == "recover" and not again
        )
    run = copied.parent / "run"
    parts = {path.parent.parent.name: path for path in run.glob("*/generated-*/*.int32")}
    assert {name: (path.name, path.stat().st_size) for name, path in parts.items()} == {
        "calibration": ("calibration-0000000.int32", 4 * 96),
        "evaluation": ("evaluation-0000000.int32", 4 * 64),
    }
    trained = (run / "recover" / "recover.json").read_text()
    copied.write_text(copied.read_text().replace("tokens: 96, length: 32", "tokens: 97, length: 32"))
    assert "recover: starting" in call("recover", copied).stderr
    assert json.loads((run / "recover" / "recover.json").read_text())["tokens"] == json.loads(trained)["tokens"] == 96


def test_stages_one_by_one_and_what_is_missing(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    for command, missing in (("search", "profile"), ("export", "search"), ("eval", "search")):
        result = call(command, recipe)
        assert result.exit_code == 2
        assert f"the {missing} stage is missing" in result.stderr
        assert f"compress {missing} {recipe}" in result.stderr
    assert call("profile", recipe).exit_code == 0
    found = call("search", recipe, "--json")
    assert found.exit_code == 0
    assert json.loads(found.stdout)["layers"]
    recipe.write_text(recipe.read_text().replace("kv: 0.8", "kv: 0.9"))
    result = call("export", recipe)
    assert result.exit_code == 2 and "an earlier form of this recipe" in result.stderr


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("lengths: [320]", "lengths: [4096]", "search.budget.lengths: the budget is for inputs that are longer"),
        ("length: 256, windows: 2", "length: 256, windows: 200", "evaluate.perplexity"),
        ("search:", "recover: {steps: 1, length: 2000}\nsearch:", "recover"),
    ],
)
def test_what_a_later_stage_would_refuse_is_told_before_the_first(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    recipe = make_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(old, new))
    result = call("run", recipe)
    assert result.exit_code == 2 and told in result.stderr and "starting" not in result.stderr, result.output
    assert not (tmp_path / "run" / "profile").exists()


def test_a_text_that_is_gone_is_left_to_the_stage_that_reads_it_once_stages_may_be_done(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        check_run(load_recipe(recipe))
    assert check_run(load_recipe(recipe), resumed=True) == {}
    wrong = load_recipe(recipe, ["search.budget.lengths=[4096]"])
    with pytest.raises(UserError, match="longer than the model's context"):
        check_run(wrong, resumed=True)


def test_an_output_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    result = call("profile", recipe)
    assert result.exit_code == 2
    assert "already holds something" in result.stderr and "--overwrite" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    assert call("profile", recipe, "--overwrite").exit_code == 0
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_a_foreign_checkpoint_folder_is_refused(copied: Path) -> None:
    run = RunFolder(copied.parent / "run")
    run.forget("export")
    (run.checkpoint / "config.json").write_text("mine")
    result = call("export", copied)
    assert result.exit_code == 2 and "already holds something" in result.stderr
    assert (run.checkpoint / "config.json").read_text() == "mine"


def test_a_damaged_profile_is_reported(copied: Path) -> None:
    tensors = copied.parent / "run" / "profile" / "statistics.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    result = call("profile", copied)
    assert result.exit_code == 2
    assert "damaged profile" in result.stderr and "Traceback" not in result.output


def test_an_interrupt_says_how_to_go_on(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.stages.search.run_search", interrupt)
    (copied.parent / "run" / "plan.json").unlink()
    result = call("run", copied)
    assert result.exit_code == 130
    assert "The same command goes on from there." in result.stderr and "Traceback" not in result.output


def test_a_full_disk_is_no_traceback(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "plan.json")

    monkeypatch.setattr("compress.stages.search.run_search", full)
    (copied.parent / "run" / "plan.json").unlink()
    result = call("search", copied)
    assert result.exit_code == 2
    assert "plan.json: the disk is full" in result.stderr and "Traceback" not in result.output
    assert "Traceback" in call("search", copied, "-v").stderr


def test_a_layerwise_plan_becomes_a_stock_checkpoint(copied: Path) -> None:
    recipe = copied.read_text().replace("{name: moa, points: 1}", "{name: layers, order: first, sink: 0}")
    copied.write_text(recipe + "export: {form: native}\n")
    result = call("run", copied)
    assert result.exit_code == 0, result.output
    checkpoint = copied.parent / "run" / "checkpoint"
    assert f'AutoModelForCausalLM.from_pretrained("{checkpoint}")' in result.stderr
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "ministral"
    assert "| dense |" in (checkpoint / "README.md").read_text()


def test_importance_on_two_texts(copied: Path) -> None:
    other = copied.parent / "other.txt"
    other.write_text(" ".join(f"w{4 + number * number % 89}" for number in range(8000)))
    given = copied.read_text().replace("  documents:", f"  second: {{source: file, path: {other}}}\n  documents:")
    copied.write_text(given.replace("    - {name: attention", "    - {name: amp}\n    - {name: attention"))
    checked = call("validate", copied)
    assert checked.exit_code == 0 and "second " in checked.stdout, checked.output
    result = call("run", copied)
    assert result.exit_code == 0, result.output
    line = "amp on two corpora: rank correlation within a layer, heads "
    assert f"profile: {line}" in result.stderr
    run = copied.parent / "run"
    shown = call("inspect", run / "profile").stdout
    assert line in shown and "second corpus 1 of 192 tokens, 1 of 320 tokens" in shown
    report = call("report", run, "--out", copied.parent / "report.html")
    assert report.exit_code == 0, report.output
    assert "Importance on two texts" in (copied.parent / "report.html").read_text()
    other.write_text("short")
    broken = call("validate", copied)
    assert broken.exit_code == 2 and "calibration.documents[0]" in broken.stderr


def test_a_part_local_model_is_told_what_it_has_to_give(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, part_local_model())
    assert call("profile", recipe).exit_code == 0
    # Tokens at 320: dense 5 x 64 + 320; at least a page in each window, and in the full layer one more for the sink.
    told = (
        "search: 5 of 6 layers slide by themselves and stay as they are; only the 1 full-attention layer can be "
        "compressed. The least that any plan takes is 0.7 of the dense KV bytes at 320 tokens"
    )
    result = call("search", recipe)
    assert result.exit_code == 0, result.output
    assert told in result.stderr and result.stderr.index(told) < result.stderr.index("search: pareto")
    layers = json.loads((tmp_path / "run" / "plan.json").read_text())["layers"]
    sliding = [group["target"] for layer in layers[:5] for group in layer["groups"]]
    assert set(sliding) == {"full"} and {group["target"] for group in layers[5]["groups"]} != {"full"}
    assert "5 of 6 layers have a sliding window" in call("inspect", tmp_path / "run").stdout

    recipe.write_text(recipe.read_text().replace("kv: 0.8", "kv: 0.69"))
    result = call("search", recipe)
    assert result.exit_code == 2 and told in result.stderr
    assert "no plan meets the budget at length 320" in result.stderr and "raise the budget to 0.7" in result.stderr
