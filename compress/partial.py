"""Files that an interrupted stage goes on from: a checksum, then tensors with notes, all of one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from compress.files import write_bytes
from compress.json_file import parse_json

NOTES = "notes"


def write_partial(path: Path, key: str, notes: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the sha256 of what follows, then safetensors, whole or not at all.

    Args:
        key: of the run; only the same run reads the file again.
        notes: plain JSON values beside the tensors.
        tensors: on the CPU; none of them named `notes`.
    """
    text = json.dumps({"key": key, **notes}).encode()
    data = save({**tensors, NOTES: torch.frombuffer(bytearray(text), dtype=torch.uint8)})
    write_bytes(path, hashlib.sha256(data).digest() + data)


def read_partial(path: Path, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
    """Notes and tensors; None where there is no file, a damaged one, or one of another run."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    try:
        tensors = load(data[32:])
        notes = parse_json(tensors.pop(NOTES).numpy().tobytes(), finite=False)
        return (notes, tensors) if notes.pop("key") == key else None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):  # whole, but not one of these
        return None
