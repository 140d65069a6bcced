"""A folder that appears whole or not at all: written beside its final place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import UserError
from compress.files import remove, sync_folder, system_error, words_of


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Refuse a target that already holds something, unless it may be replaced.

    Raises:
        UserError: the folder is not empty, or is a file.
    """
    if folder.is_file():
        raise UserError("the output is a file", where=str(folder), expected="a folder", fix="name another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            "the output folder already holds something",
            where=str(folder),
            expected="no folder, or an empty one",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:5]),
            fix="name another folder, or pass --overwrite to replace it",
        )


def settle(folder: Path) -> None:
    """Tidy up after a process that was killed in `staged`: the old folder is back in its place, or the new one is."""
    partial, old = _beside(folder)
    if old.exists() and not folder.exists():  # it died between the two renames
        old.rename(folder)
    for path in (partial, old):
        with contextlib.suppress(OSError):
            remove(path)


@contextmanager
def staged(folder: Path, *, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; rename it into place when the block ends well, else remove it.

    Whatever happens inside the block (an error, a full disk, an interrupt), an older `folder` stays as it was.

    Args:
        overwrite: replace a folder that holds something.
        need_bytes: refuse at once where the disk has less room than this.

    Raises:
        UserError: the folder holds something, the disk is full, or the system refuses to write, be it told by a
            library in words of its own.
    """
    partial, old = _beside(folder)
    refuse = f"{folder.name} could not be written; what was there before is unchanged"
    try:
        settle(folder)
        refuse_existing(folder, overwrite)
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < need_bytes:
            raise UserError(
                "not enough room on the disk",
                where=str(folder.parent),
                expected=f"{need_bytes / 1e6:,.0f} MB free",
                found=f"{free / 1e6:,.0f} MB",
                fix="free some space or name another folder",
            )
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
    except UserError:
        raise
    except Exception as error:
        refused = system_error(error)
        if refused is None:
            raise
        reason, fix = words_of(refused)
        if refused.errno == errno.ENOSPC:
            refuse = "the disk became full while writing; nothing was changed"
        raise UserError(refuse, where=refused.filename or str(folder), found=reason, fix=fix) from error
    finally:
        with contextlib.suppress(OSError):
            settle(folder)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the new folder is written, and where the old one waits between the two renames."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
