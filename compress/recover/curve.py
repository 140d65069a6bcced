"""`loss.jsonl`: one line a step, cut back to the step that an interrupted training goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.files import append_line, write_text
from compress.json_file import parse_lines


class Curve:
    """Appends steps to a JSONL file.

    A line has `step` (from 1), `tokens` (so far), `loss`, `text_loss` and `distill_loss` (nats a token, the last null
    without a teacher), `rate`, and `seconds` of the step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[dict[str, Any]]:
        """The steps from the first on, up to the end or to a line that is damaged."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        found: list[dict[str, Any]] = []
        for entry in parse_lines(lines[:-1]):
            whole = all(isinstance(entry.get(key), float) for key in ("loss", "seconds"))
            if not whole or entry.get("step") != len(found) + 1:
                break
            found.append(entry)
        return found

    def cut(self, steps: int) -> None:
        """Keep the first steps only."""
        kept = [json.dumps(entry) + "\n" for entry in self.steps()[:steps]]
        write_text(self.path, "".join(kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Add a step."""
        append_line(self.path, json.dumps(entry))
