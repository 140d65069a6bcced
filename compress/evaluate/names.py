"""Names of models as parts of the names of files."""

from __future__ import annotations

import re


def file_part(name: str) -> str:
    """A model's name as a part of a file's name, which leads to no other folder and is not the only key of it."""
    words = re.sub(r"[^A-Za-z0-9._]+", "-", name.rstrip("/").rpartition("/")[2])
    return words.strip("-.")[:40] or "model"
