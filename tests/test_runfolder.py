"""The run folder: whole files or none, stages that are not repeated, and nothing foreign touched."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.files import write_json, write_text
from compress.runfolder import RunFolder, open_run, stage_key
from tests.forkserver import ForkServer

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


def test_a_mistake_before_the_first_stage_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(UserError, match="no such model"), open_run(path, **RUN) as run:
        run.log("start")
        raise UserError("no such model")
    assert not path.exists()
    for left in ("profile", None):  # what a stage began with, or what was there before, stays
        with pytest.raises(UserError, match="too short"), open_run(path, **RUN) as run:
            if left is not None:
                run.begin(left)
            raise UserError("too short")
        assert (path / "recipe.yaml").is_file()


def test_a_folder_in_which_no_stage_began_takes_another_model(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN):
        pass
    with open_run(tmp_path, **{**RUN, "model": "n"}):
        assert json.loads((tmp_path / "model.json").read_text())["model"] == "n"


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
    with pytest.raises(UserError, match="below a file"), open_run(tmp_path / "x" / "y", **RUN):
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


def opened(folder: str, number: int, signal_number: int) -> None:
    """Open a run and end the process before its change of that number on the disk. For a child."""
    done = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        changes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (changes or event in ("os.rename", "os.mkdir", "os.remove")) and str(args[0]).startswith(folder):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal_number)

    sys.addaudithook(watch)
    with open_run(Path(folder), **RUN) as run:
        run.log("start")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(()) as running:
        yield running


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_an_opening_that_was_ended_anywhere_is_gone_on_with(
    tmp_path: Path, server: ForkServer, signal_number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    ended = 0
    for number in range(1, 100):
        if server.run(opened, str(folder), number, int(signal_number), timeout=60).code == 0:
            break
        ended += 1
        with open_run(folder, **RUN) as run:
            assert run.stages() == {} and (folder / "recipe.yaml").read_text() == RUN["text"]
            names = set(os.listdir(folder))
        assert names == {"model.json", "recipe.yaml", "recipe.resolved.yaml", "stages.json", ".lock"} | (
            names & {"log.jsonl"}
        )
        shutil.rmtree(folder)
    assert 12 < ended < 99


def test_a_folder_that_an_older_version_left_half_opened(tmp_path: Path) -> None:
    """It wrote `stages.json` before `model.json`."""
    for left in ({"stages.json": '{"schema": 1, "stages": {}}'}, {"stages.json": "{", "recipe.yaml": "a: 1\n"}):
        folder = tmp_path / str(len(left))
        folder.mkdir()
        for name, text in left.items():
            (folder / name).write_text(text)
        (folder / ".model.json.123.part").write_text("{")
        with open_run(folder, **RUN) as run:
            run.finish("profile", "k", seconds=0, made=[])
        with open_run(folder, **RUN) as run:
            assert run.stage_done("profile", "k")


def test_a_run_whose_model_file_is_lost_is_known_by_its_recipe(tmp_path: Path) -> None:
    run_of = {**RUN, "resolved": "schema: 1\nmodel: m\nb: 2\n"}
    with open_run(tmp_path, **run_of) as run:
        run.finish("profile", "k", seconds=0, made=[])
    (tmp_path / "model.json").write_text("{")
    with open_run(tmp_path, **run_of) as run:
        assert run.stage_done("profile", "k")
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match="another model"), open_run(tmp_path, **{**run_of, "model": "n"}):
        pass


def test_a_model_file_alone_makes_no_run_of_a_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"model": "m"}')
    (tmp_path / "data.csv").write_text("1")
    with pytest.raises(UserError, match="already holds something"), open_run(tmp_path, **RUN):
        pass
    assert sorted(os.listdir(tmp_path)) == ["data.csv", "model.json"]


@pytest.mark.parametrize("name", [".lock", "log.jsonl"])
def test_links_in_the_place_of_own_files(tmp_path: Path, name: str) -> None:
    target, folder = tmp_path / "thesis.tex", tmp_path / "run"
    target.write_text("years")
    with open_run(folder, **RUN):
        pass
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(UserError, match="symbolic link"), open_run(folder, **RUN) as run:
        run.log("start")
    assert target.read_text() == "years"


@pytest.mark.parametrize("name", ["stages.json", "model.json", "recipe.yaml", "recipe.resolved.yaml"])
def test_links_in_the_place_of_files_that_are_written_whole(tmp_path: Path, name: str) -> None:
    target, folder = tmp_path / "thesis.tex", tmp_path / "run"
    target.write_text("years")
    with open_run(folder, **RUN):
        pass
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    with open_run(folder, **RUN) as run:
        run.finish("profile", "k", seconds=0, made=[])
    assert target.read_text() == "years"


def test_a_foreign_lock_file_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("of another program")
    with pytest.raises(UserError, match="has the name of the run folder's lock"), open_run(tmp_path, **RUN):
        pass
    assert (tmp_path / ".lock").read_text() == "of another program"


def test_a_folder_that_is_moved_away_is_not_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="moved or deleted while the command"), open_run(folder, **RUN) as run:
        folder.rename(tmp_path / "elsewhere")
        run.finish("profile", "k", seconds=0, made=[])
    assert os.listdir(tmp_path) == ["elsewhere"]
    folder.mkdir()
    with pytest.raises(UserError, match="moved or deleted while the command"), open_run(folder, **RUN) as run:
        folder.rename(tmp_path / "again")
        folder.mkdir()
        run.log("x")


def test_fresh_keeps_knowing_its_checkpoint(tmp_path: Path) -> None:
    with open_run(tmp_path, **RUN) as run:
        assert not run.began("export")
        run.begin("export")
        assert run.began("export") and not run.stage_done("export", "")
        run.finish("profile", "k", seconds=0, made=[])
    with open_run(tmp_path, **RUN, fresh=True) as run:
        assert list(run.stages()) == ["export"] and not run.stage_done("export", "k")


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "y/" * 3000])
def test_names_that_no_system_takes(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"NUL character|too long"), open_run(tmp_path / name, **RUN):
        pass


@pytest.mark.parametrize(
    "entry",
    ["3", '{"key": 3}', '{"key": "k", "made": 3}', '{"key": "k", "made": [3]}', "null", '{"KEY": "k", "seconds": 1.0}'],
)
def test_an_entry_of_another_form_is_as_good_as_none(tmp_path: Path, entry: str) -> None:
    (tmp_path / "stages.json").write_text(f'{{"schema": 1, "stages": {{"profile": {entry}}}}}')
    run = RunFolder(tmp_path)
    assert not run.stage_done("profile", "k") and not run.may_be_done("profile", "o")
