"""What the stages of a run read besides the model: by content, so that a file that was replaced is another file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.data.text import Source
from compress.errors import UserError
from compress.files import file_key, file_stamp, text_key, write_json
from compress.json_file import JsonError, parse_json
from compress.models.content import content_key
from compress.stages.reporter import Reporter

RECORD = "inputs.json"
SCHEMA = 1


class Inputs:
    """Hashes of texts, files and folders, each taken once in a command and kept in the run folder.

    An input that cannot be read any more counts as unchanged since it was read last, so that a finished stage does not
    need it. Only the main process keeps them.

    Args:
        folder: the run folder.
        reporter: gets a line for a text that is not read whole, and for an input that can no longer be read.
        keeps: whether this process writes there.
    """

    def __init__(self, folder: Path, reporter: Reporter, *, keeps: bool = True) -> None:
        self.path = folder / RECORD
        self.reporter = reporter
        self.keeps = keeps
        self._contents: dict[str, str] = {}
        self._stamps: dict[str, Any] = {}
        self._again: dict[str, tuple[Callable[[], Any], Callable[[], str]]] = {}

    def text(self, source: Source, most: int) -> str:
        """Hash of what is read of a text source, its first `most` characters; says so when that is not all.

        Raises:
            UserError: it cannot be read, and never was.
        """

        def read(aloud: bool = False) -> str:
            excerpt = source.known(most)
            if aloud and excerpt.used is not None:
                self.reporter.say(f"text: {source.label}: {excerpt.used}")
            return text_key(excerpt.text)

        label = f"text, {most:,} characters: {source.model_dump_json()}"
        return self._hash(label, source.stamp, read, lambda: read(aloud=True))

    def file(self, path: str) -> str:
        """Hash of a file's bytes. Raises UserError: it cannot be read, and never was."""
        place = Path(path).expanduser()
        return self._hash(f"file: {path}", lambda: file_stamp(place), lambda: file_key(place))

    def model(self, name: str) -> str:
        """Hash of a model's files. Raises UserError: they cannot be read, and never were."""

        def stamp() -> Any:
            path = Path(name).expanduser()
            return [(str(file), file_stamp(file)) for file in sorted(path.iterdir())] if path.is_dir() else name

        return self._hash(f"model: {name}", stamp, lambda: content_key(name))

    def files(self, what: str, listed: Callable[[], list[Path]]) -> str:
        """Hash of the names and bytes of some files. Raises UserError: they cannot be read, and never were."""

        def stamp() -> Any:
            return [(str(path), file_stamp(path)) for path in listed()]

        def read() -> str:
            return text_key(json.dumps([(str(path), file_key(path)) for path in listed()]))

        return self._hash(what, stamp, read)

    def check(self) -> None:
        """Raise UserError where an input is another than when the command began."""
        for label, (stamp, read) in self._again.items():
            try:
                changed = stamp() != self._stamps[label] and read() != self._contents[label]
            except UserError:
                continue  # it is gone; what was made of it is of the one that was there
            if changed:
                raise UserError(
                    "an input of this stage changed while the stage ran, so its result is discarded",
                    where=label,
                    expected="the content that was there when the command began",
                    fix="run the same command again",
                )

    def _hash(
        self, label: str, stamp: Callable[[], Any], read: Callable[[], str], first: Callable[[], str] | None = None
    ) -> str:
        if label in self._contents:
            return self._contents[label]
        recorded = self._recorded()
        try:
            self._stamps[label] = stamp()
            content = (first or read)()
        except UserError as error:
            if label not in recorded:
                raise
            problem = error.problems[0]
            self.reporter.say(f"{problem.where}: {problem.what}; it counts as unchanged since it was last read")
            self._contents[label] = recorded[label]
            return recorded[label]
        self._contents[label] = content
        self._again[label] = (stamp, read)
        if self.keeps and recorded.get(label) != content:
            write_json(self.path, {"schema": SCHEMA, "inputs": recorded | {label: content}})
        return content

    def _recorded(self) -> dict[str, str]:
        """What an earlier command kept; nothing where that is damaged."""
        try:
            data = parse_json(self.path.read_bytes())
            kept = data["inputs"] if data["schema"] == SCHEMA else {}
            return {label: value for label, value in kept.items() if isinstance(value, str)}
        except (OSError, JsonError, KeyError, TypeError, AttributeError):
            return {}
