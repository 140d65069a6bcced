"""Writing a file: whole or not at all."""

import errno
import os
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.files import append_line, scratch, sweep, sweep_scratch, system_error, write_bytes, write_text


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written; it is as it was before"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def flush(handle: int) -> None:
        done.append("folder flushed" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file flushed")

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda beside, path: done.append("renamed"))
    write_text(tmp_path / "plan.json", "new")
    assert done == ["file flushed", "renamed", "folder flushed"]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupt_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "data"
    write_bytes(path, b"old")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["data"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    link = tmp_path / "plan.json"
    link.symlink_to(tmp_path / "thesis.tex")
    write_text(link, "new")
    assert not link.is_symlink() and link.read_text() == "new"
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_a_link_in_the_place_of_the_unfinished_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / f".plan.json.{os.getpid()}.part").symlink_to(tmp_path / "thesis.tex")
    write_text(tmp_path / "plan.json", "new")
    assert sorted(os.listdir(tmp_path)) == ["plan.json", "thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_lines_are_added_to_a_regular_file_only(tmp_path: Path) -> None:
    log, target = tmp_path / "log.jsonl", tmp_path / "thesis.tex"
    append_line(log, "one")
    log.write_text(log.read_text() + "tor")
    append_line(log, "two")
    assert log.read_text() == "one\ntor\ntwo\n"
    target.write_text("years")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(UserError, match="symbolic link"):
        append_line(tmp_path / "link", "x")
    assert target.read_text() == "years"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="the path exists already"):
        append_line(tmp_path / "pipe", "x")  # and does not wait for a reader


WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota",
    errno.EACCES: "check the rights",
    errno.EPERM: "check the rights",
    errno.EROFS: "read-only",
    errno.ENOENT: "moved or deleted",
    errno.EMFILE: "too many files",
    errno.ENFILE: "too many files",
    errno.EIO: "the disk reports an input/output error",
    errno.ENAMETOOLONG: "too long",
}


@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", WORDS, ids=errno.errorcode.get)
def test_every_refusal_of_the_system_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    path = tmp_path / "data"
    write_bytes(path, b"old")

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, moment, refuse)
    with pytest.raises(UserError, match=WORDS[number]) as caught:
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert str(path) in str(caught.value) and caught.value.problems[0].fix
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["data"]


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moved or deleted"):
        write_text(tmp_path / "run" / "profile" / "profile.json", "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("told", "number"),
    [
        (OSError(errno.EROFS, "read only"), errno.EROFS),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (Exception("Too many open files (os error 24)"), errno.EMFILE),
        (ValueError("os error 28"), None),
    ],
)
def test_refusals_that_libraries_quote(told: Exception, number: int | None) -> None:
    found = system_error(told)
    assert (found.errno if found is not None else None) == number


def ended_process() -> int:
    """The number of a process that has ended."""
    return int(subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout)


def test_left_overs_of_ended_processes_are_swept(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    dead = tmp_path / "deep" / f".plan.json.{ended_process()}.part"
    alive = tmp_path / f".plan.json.{os.getppid()}.part"
    other = tmp_path / "notes.part"
    for path in (dead, alive, other):
        path.write_text("x")
    sweep(tmp_path)
    assert not dead.exists() and alive.exists() and other.exists()
    sweep(tmp_path, held=True)
    assert not alive.exists() and other.exists()


def test_temporary_folders_of_ended_processes_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / f"compress-verify-{ended_process()}-abc"
    alive = tmp_path / f"compress-verify-{os.getppid()}-abc"
    other = tmp_path / "compress-me-1"
    for path in (dead, alive, other):
        path.mkdir()
    sweep_scratch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name])
    with scratch("verify") as folder:
        assert folder.parent == tmp_path and str(os.getpid()) in folder.name
    assert not folder.exists()
