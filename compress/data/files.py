"""Atomic writes and keys of cached results."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the whole new one.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def key_of(*facts: Any) -> str:
    """16 hexadecimal digits of the facts (JSON values) that a result depends on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def text_key(text: str) -> str:
    """Hash of a text, for `key_of`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
