"""The run folder: whole files or none, stages that are not repeated, and nothing foreign touched."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.files import write_json, write_text
from compress.runfolder import RunFolder, open_run, stage_key

RUN: dict[str, Any] = {"model": "m", "text": "a: 1\n", "resolved": "a: 1\nb: 2\n"}


def test_a_new_folder_holds_the_recipe_verbatim(tmp_path: Path) -> None:
    with open_run(tmp_path / "deep" / "run", **RUN) as run:
        assert (run.path / "recipe.yaml").read_text() == "a: 1\n"
        assert (run.path / "recipe.resolved.yaml").read_text() == "a: 1\nb: 2\n"


def test_stages_are_done_only_with_their_key_and_their_files(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN) as run:
        key = stage_key("profile", {"a": 1})
        assert not run.stage_done("profile", key)
        run.finish("profile", key, seconds=1.5, made=["profile/profile.json"])
        assert not run.stage_done("profile", key), "what it made is not there"
        write_json(run.path / "profile" / "profile.json", {})
        assert run.stage_done("profile", key)
        assert not run.stage_done("profile", stage_key("profile", {"a": 2}))
        run.forget("profile")
        assert not run.stage_done("profile", key)
        events = [json.loads(line)["event"] for line in (run.path / "log.jsonl").read_text().splitlines()]
        assert events == ["stage"]


def test_a_run_goes_on_and_a_changed_recipe_keeps_its_stages(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN) as run:
        run.finish("profile", "k", seconds=0, made=[])
    with open_run(tmp_path, **{**RUN, "text": "a: 2\n"}) as run:
        assert run.stage_done("profile", "k")
        assert (tmp_path / "recipe.yaml").read_text() == "a: 2\n"
    with open_run(tmp_path, **RUN, fresh=True) as run:
        assert run.stages() == {}


def test_fresh_deletes_what_stages_made_but_not_the_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN) as run:
        for name in ("profile/profile.json", "plan.json", "checkpoint/config.json", "notes.txt"):
            write_text(run.path / name, "x")
    with open_run(tmp_path, **RUN, fresh=True):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"checkpoint/config.json", "notes.txt"} <= left
    assert not {"profile/profile.json", "plan.json"} & left


def test_a_folder_with_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"already holds something[\s\S]*--overwrite"), open_run(tmp_path, **RUN):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with open_run(tmp_path, **RUN, overwrite=True) as run:
        assert run.stages() == {}
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_run_of_another_model_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN) as run:
        run.finish("profile", "k", seconds=0, made=[])
    other = {**RUN, "model": "n"}
    with pytest.raises(UserError, match="another model"), open_run(tmp_path, **other):
        pass
    assert RunFolder(tmp_path).stages(), "refused, so nothing was forgotten"
    with open_run(tmp_path, **other, overwrite=True) as run:
        assert run.stages() == {}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file"), open_run(tmp_path / "x", **RUN):
        pass
    with pytest.raises(UserError, match="cannot be made"), open_run(tmp_path / "x" / "y", **RUN):
        pass


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    second = open_run(tmp_path, **RUN)
    with open_run(tmp_path, **RUN), pytest.raises(UserError, match=f"another run[\\s\\S]*process {os.getpid()}"):
        second.__enter__()
    with open_run(tmp_path, **RUN):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99, "stages": {}}', '{"schema": 1, "stages": 3}'])
def test_a_damaged_stage_file_means_that_nothing_is_done(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    assert RunFolder(tmp_path).stages() == {}
