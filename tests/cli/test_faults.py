"""What the system refuses in the middle of a command: a sentence, 1 or 2, and what was there before stays whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import Result

from compress.cli.output import DEFECT, guarded
from compress.cli.recipe import opened
from compress.errors import UserError
from compress.export.staging import settle, staged
from compress.plots import figure
from compress.runfolder import RunFolder
from compress.stages.export import check_target
from tests.calls import call

NUMBERS = [
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
]


def refused(result: Result) -> str:
    assert result.exit_code in (1, 2), (result.exit_code, result.output)
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert DEFECT not in result.output, result.output
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raising(error: Exception) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    return refuse


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("quoted", [False, True], ids=["raised", "quoted"])
def test_an_export_that_is_refused_in_the_middle(
    copied: Path, monkeypatch: pytest.MonkeyPatch, number: int, quoted: bool
) -> None:
    """Weights are written by a library, which raises the error itself, or one of its own that quotes it."""
    run = RunFolder(copied.parent / "run")
    copied.write_text(copied.read_text() + "export: {max_shard_size: 1GB}\n")
    before = contents(run.checkpoint)
    told = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    error = RuntimeError(told) if quoted else OSError(number, os.strerror(number))
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", raising(error))
    said = refused(call("export", copied))
    assert "  do " in said and contents(run.checkpoint) == before
    assert not [path for path in run.path.iterdir() if path.name.startswith(".checkpoint")]


@pytest.mark.parametrize("command", ["profile", "search", "eval", "report"])
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_command_whose_first_write_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch, command: str, number: int
) -> None:
    run = copied.parent / "run"
    before = contents(run)
    monkeypatch.setattr("compress.files.os.replace", raising(OSError(number, os.strerror(number))))
    said = refused(call(command, run if command == "report" else copied))
    assert str(run) in said and "  do " in said
    monkeypatch.undo()
    assert contents(run) == before


@pytest.mark.parametrize("moment", ["stages.json", "evaluation.json"])
def test_a_run_whose_later_write_is_refused_is_gone_on_with(
    copied: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    run = RunFolder(copied.parent / "run")
    run.forget("search", "evaluate")
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr("compress.files.os.replace", replace)
    assert moment in refused(call("run", copied))
    monkeypatch.undo()
    assert not list(run.path.rglob("*.part"))
    assert call("run", copied).exit_code == 0


def test_a_folder_that_is_moved_away_while_a_stage_runs(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied.parent / "run"
    RunFolder(run).forget("search")

    def move(*_: Any, **__: Any) -> None:
        run.rename(copied.parent / "elsewhere")
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(run / "search"))

    monkeypatch.setattr("compress.stages.search.run_search", move)
    assert "moved or deleted" in refused(call("search", copied))
    assert not run.exists()


def test_memory_and_what_nobody_foresaw(capsys: pytest.CaptureFixture[str]) -> None:
    for error, told in (
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (KeyError("layers"), DEFECT),
    ):
        with pytest.raises(typer.Exit) as caught:
            guarded(raising(error))()
        said = capsys.readouterr().err
        assert caught.value.exit_code == 1 and told in said and "Traceback" not in said
    with pytest.raises(typer.Exit):
        guarded(raising(KeyError("layers")))(verbose=True)
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals that a shell lets the programs ignore that it starts in the background, the tests among them."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
def test_what_ends_a_process_from_outside_ends_a_command_orderly(capsys: pytest.CaptureFixture[str]) -> None:
    tidied: list[int] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            threading.Event().wait(30)
        finally:
            tidied.append(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        before = signal.getsignal(number)
        with pytest.raises(typer.Exit) as caught:
            guarded(work)()
        assert caught.value.exit_code == 130 and "interrupted; finished work is saved" in capsys.readouterr().err
        assert signal.getsignal(number) is before
    assert len(tidied) == 3


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert guarded(lambda: signal.getsignal(signal.SIGHUP))() is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("old", ["folder", "link", "nothing"])
def test_what_a_killed_export_left_is_settled(tmp_path: Path, old: str) -> None:
    """Killed while it wrote, between the renames, and before the old one was deleted; links are not followed."""
    target, folder = tmp_path / "target", tmp_path / "checkpoint"
    target.mkdir()
    (target / "config.json").write_text("old")
    for left in (".checkpoint.partial", ".checkpoint.old"):
        if old == "link":
            (tmp_path / left).symlink_to(target)
        elif old == "folder":
            shutil.copytree(target, tmp_path / left)
    settle(folder)
    assert (folder / "config.json").is_file() == (old != "nothing")
    settle(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        ["checkpoint", "target"] if old != "nothing" else ["target"]
    )
    with staged(folder, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "new" and (target / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "target"]


@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
def test_a_staged_folder_that_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    real = Path.rename

    def rename(path: Path, target: Any) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError), staged(folder, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert (folder / "config.json").read_text() == "old"


def test_plots_that_a_kill_interrupted_are_drawn_again(
    copied: Path, sketches: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "rendered", sketches)  # as those of the finished run
    plots = copied.parent / "run" / "plots"
    whole = contents(plots)
    for lost in (
        ["spans.svg"],
        ["spans.svg", "spans.png"],
        ["spans.svg", "spans.png", "influence.svg"],
        ["quality.svg"],
    ):
        for name in lost:
            (plots / name).unlink()
        assert call("run", copied).exit_code == 0
        assert contents(plots) == whole


def test_what_killed_commands_left_is_swept(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run, scratch = copied.parent / "run", tmp_path / "tmp" / f"compress-verify-{os.getpid()}-abc"
    scratch.mkdir(parents=True)
    shutil.copytree(run / "checkpoint", run / ".checkpoint.partial")
    for name in (".plan.json.1.part", "profile/.profile.json.1.part", "plots/.spans.svg.1.part"):
        (run / name).write_text("x")
    (run / "recover").mkdir()
    (run / "recover" / ".model.safetensors.part").write_text("x")
    assert call("profile", copied).exit_code == 0
    assert not list(run.rglob("*.part")) and not (run / ".checkpoint.partial").exists() and not scratch.exists()


def test_a_profile_that_was_killed_before_its_last_delete(copied: Path) -> None:
    run = RunFolder(copied.parent / "run")
    run.forget("profile")
    for name in ("profile.partial", "importance.partial"):
        (run.profile / name).write_bytes(b"x")
    before = (run.profile / "profile.json").read_bytes()
    assert call("profile", copied).exit_code == 0
    assert (run.profile / "profile.json").read_bytes() == before
    assert not list(run.profile.glob("*.partial"))


def test_a_fresh_start_replaces_its_own_checkpoint(copied: Path) -> None:
    checkpoint = copied.parent / "run" / "checkpoint"
    (checkpoint / "config.json").write_text("damaged")
    for _ in range(2):  # the second time as after a kill
        with opened(str(copied), fresh=True) as session:
            check_target(session, overwrite=False)
            assert not session.run.profile.exists() and (checkpoint / "config.json").exists()


def test_nothing_is_loaded_before_what_is_missing_is_told(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(copied.parent / "run")
    monkeypatch.setattr("compress.stages.session.load_model", raising(AssertionError("weights were loaded")))
    text = copied.read_text()

    def said(command: str, *options: str) -> str:
        return refused(call(command, copied, *options))

    for command in ("export", "eval"):  # another budget: the plan is an earlier recipe's
        copied.write_text(text.replace("kv: 0.8", "kv: 0.9"))
        assert "the search stage was run for an earlier form" in said(command)
    copied.write_text(text.replace("length: 192, count: 1", "length: 192, count: 2"))
    assert "the profile stage was run for an earlier form" in said("search")
    copied.write_text(text + "recover: {length: 32, steps: 1, batch_size: 1}\n")
    for command in ("export", "eval"):
        assert "the recover stage is missing" in said(command)
    copied.write_text(text)
    (run.path / "profile" / "profile.json").unlink()
    run.forget("search")
    assert "the profile stage" in said("search")
    run.forget()
    (run.checkpoint / "config.json").write_text("mine")
    for command in ("run", "export"):
        assert "already holds something" in said(command)
    assert (run.checkpoint / "config.json").read_text() == "mine"
    shutil.rmtree(run.checkpoint)
    for command, stage in (("search", "profile"), ("export", "search"), ("eval", "search")):
        assert f"the {stage} stage is missing" in said(command)
