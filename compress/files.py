"""Files that appear whole or not at all, what to say when they cannot, and keys of cached results."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.errors import UserError

PART = re.compile(r"\..+?(?:\.(\d+))?\.part")  # .NAME.PROCESS.part, the process being the writer's
SCRATCH = "compress-"  # what temporary folders begin with

_RIGHTS = ("permission to write is denied", "check the rights of the file and of its folder")
_HANDLES = ("too many files are open", "raise the limit, for instance `ulimit -n 4096`, or end other programs")
_OTHER_KIND = ("the path exists already and is of another kind", "move it away, or name another place")
_GONE = (
    "the file or its folder does not exist; it was moved or deleted",
    "check the path, and that nothing moves or deletes the folder while the command runs",
)
_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or ask for a larger quota"),
    errno.EFBIG: ("the file would be larger than this system allows", "raise the limit (`ulimit -f`)"),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: ("the disk is read-only", "name a place on a writable disk"),
    errno.ENOENT: _GONE,
    errno.ESTALE: _GONE,
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "name another place"),
    errno.EISDIR: _OTHER_KIND,
    errno.EEXIST: _OTHER_KIND,
    errno.ENOTEMPTY: _OTHER_KIND,
    errno.ENXIO: _OTHER_KIND,
    errno.EMFILE: _HANDLES,
    errno.ENFILE: _HANDLES,
    errno.ENAMETOOLONG: ("the name is too long for this system", "choose a shorter name"),
    errno.ELOOP: ("the path is a symbolic link, which compress does not write through", "remove the link"),
    errno.EIO: ("the disk reports an input/output error", "check the disk"),
    errno.ENOMEM: ("there is not enough memory", "end other programs"),
}
_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers tell of it


def words_of(error: OSError) -> tuple[str, str]:
    """What the operating system refused, and what to do about it, in plain words."""
    unknown = (error.strerror or str(error) or type(error).__name__, "check the path and its rights")
    return _WORDS.get(error.errno or 0, unknown)


def system_error(error: BaseException) -> OSError | None:
    """The operating system's refusal that an exception tells of, be it of a library that only quotes it."""
    if isinstance(error, OSError):
        return error
    quoted = _IN_TEXT.search(str(error))
    return OSError(int(quoted[1]), os.strerror(int(quoted[1]))) if quoted else None


def refusal(what: str, where: Path | str, error: OSError) -> UserError:
    """The error to raise for a user when the operating system refuses something."""
    reason, fix = words_of(error)
    return UserError(what, where=str(where), found=reason, fix=fix)


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename: after a crash the path holds the old bytes or the new, never a part.

    A symbolic link at `path` is replaced, not followed. The folder is made where only it is missing.

    Raises:
        UserError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        beside.unlink(missing_ok=True)
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise refusal("the file could not be written; it is as it was before", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def listed(folder: Path) -> str:
    """The first names in a folder, for a message on what was found; hidden ones are left out."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return ", ".join(names[:6]) or "an empty folder"


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """`write_bytes` for indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a regular file, made where it is missing; never one of what a link, pipe or device stands for.

    Args:
        flags: of `os.open`, for writing.

    Raises:
        OSError: ELOOP for a symbolic link, ENXIO for a pipe or a device, or what else the system says.
    """
    handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))
    return handle


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file; a line that an interrupt left without its end is ended first.

    Raises:
        UserError: the file is a link or no regular file, the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "ab") as file:
            size = os.fstat(file.fileno()).st_size
            torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write((("\n" if torn else "") + line + "\n").encode("utf-8"))
    except OSError as error:
        raise refusal("nothing could be added to the file", path, error) from error


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, *, held: bool = False) -> None:
    """Delete what writers that were killed left in a folder and below.

    Args:
        held: nobody else writes here; else only left-overs of processes that have ended are deleted.
    """
    for path in folder.rglob(".*.part"):
        name = PART.fullmatch(path.name)
        if name is not None and (held or (name[1] is not None and not _runs(int(name[1])))):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A temporary folder that is deleted afterwards, and, after a kill, by the next command (`sweep_scratch`)."""
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{purpose}-{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def sweep_scratch() -> None:
    """Delete this user's temporary folders of `scratch` whose processes have ended."""
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*-*"):
        process = re.fullmatch(rf"{SCRATCH}[a-z]+-(\d+)-\w+", path.name)
        with contextlib.suppress(OSError):
            if process is not None and not _runs(int(process[1])) and path.lstat().st_uid == os.getuid():
                shutil.rmtree(path)


def _runs(process: int) -> bool:
    """Whether there is another process of that number."""
    if process == os.getpid():
        return False  # an earlier one of the same number, as in containers: this one has not begun to write
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_stamp(path: Path) -> tuple[int, ...] | None:
    """Size, time of the last change, and number of a file, which change with its content; None where there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def digest_of(content: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces), 64 hexadecimal digits."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def key_of(*facts: Any) -> str:
    """Key of a result: 16 hexadecimal digits of the facts (JSON values) that it depends on."""
    return digest_of(facts)[:16]


def text_key(text: str) -> str:
    """Hash of a text, for `key_of`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_key(path: Path) -> str:
    """sha256 of a file's content, read in pieces.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refusal("the file cannot be read", path, error) from error
    except ValueError as error:  # a name that no system can be asked for
        raise UserError("the file cannot be read", where=str(path), found=str(error)) from error
