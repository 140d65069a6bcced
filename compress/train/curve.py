"""`loss.jsonl`: one line a step, cut back to the step that an interrupted training goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.files import write_text
from compress.json_file import append_entry, read_entries


class Curve:
    """Appends steps to a JSONL file.

    A line has `step` (from 1), `tokens` (so far), `loss`, `text_loss` and `distill_loss` (nats a token, the last null
    without a teacher), `rate`, and `seconds` of the step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self) -> list[dict[str, Any]]:
        """The steps from the first on, up to the end or to a line that is damaged."""
        steps: list[dict[str, Any]] = []
        for entry in read_entries(self.path):
            whole = all(isinstance(entry.get(key), float) for key in ("loss", "seconds"))
            if not whole or entry.get("step") != len(steps) + 1:
                break
            steps.append(entry)
        return steps

    def cut(self, steps: int) -> None:
        """Keep the first steps only."""
        kept = [json.dumps(entry) + "\n" for entry in self.steps()[:steps]]
        write_text(self.path, "".join(kept))

    def append(self, entry: dict[str, Any]) -> None:
        """Add a step."""
        append_entry(self.path, entry)
