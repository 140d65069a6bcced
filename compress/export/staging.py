"""A folder that appears whole or not at all: written beside its final place, then renamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import UserError
from compress.files import sync_folder


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


@contextmanager
def staged(folder: Path, *, overwrite: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; rename it into place when the block ends well, else remove it.

    Whatever happens inside the block (an error, a full disk, an interrupt), an older `folder` stays as it was.

    Args:
        overwrite: replace a folder that holds something.
        need_bytes: refuse at once where the disk has less room than this.

    Raises:
        UserError: the folder holds something, or the disk is full.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a process died between the two renames below
        old.rename(folder)
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
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            "the disk became full while writing; nothing was changed",
            where=str(folder),
            fix="free some space or name another folder",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
