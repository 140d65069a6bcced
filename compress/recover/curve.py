"""`loss.jsonl`: one line a step, cut back to the step that an interrupted training goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.files import append_line, write_text


class Curve:
    """Appends steps to a JSONL file.

    A line has `step` (from 1), `tokens` (so far), `loss`, `text_loss` and `distill_loss` (nats a token, the last null
    without a teacher), `rate`, and `seconds` of the step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[dict[str, Any]]:
        """All whole lines."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def cut(self, steps: int) -> None:
        """Keep the first steps only."""
        kept = [json.dumps(entry) + "\n" for entry in self.steps()[:steps]]
        write_text(self.path, "".join(kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Add a step."""
        append_line(self.path, json.dumps(entry))
