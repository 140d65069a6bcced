"""Files that appear whole or not at all, and keys of cached results."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from compress.errors import UserError


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, rename: after a crash the path holds the old bytes or the new, never a part.

    Raises:
        UserError: the disk is full, or the folder cannot be written. Nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(
            "the file could not be written; it is as it was before",
            where=str(path),
            found=error.strerror or str(error),
            fix="free some space" if error.errno == errno.ENOSPC else "check the rights of the folder",
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """`write_bytes` for indented JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def key_of(*facts: Any) -> str:
    """16 hexadecimal digits of the facts (JSON values) that a result depends on."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def text_key(text: str) -> str:
    """Hash of a text, for `key_of`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
