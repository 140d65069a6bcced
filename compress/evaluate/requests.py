"""Log-likelihood requests of tasks and the answers of a model, as files that one machine writes and another reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.files import key_of, write_bytes, write_json
from compress.json_file import parse_json

SCHEMA = 1
Answer = tuple[float, bool]  # sum of ln p over the continuation; whether it is the greedy continuation


@dataclass(frozen=True)
class Request:
    """One continuation to score behind its context.

    Attributes:
        doc: number of the task's item; choice: number of the request within the item.
        context, continuation: as the task gives them; the token ids are what the model reads.
    """

    task: str
    doc: int
    choice: int
    context: str
    continuation: str
    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]


@dataclass(frozen=True)
class RequestFile:
    """Requests of some tasks.

    Attributes:
        model: whose tokenizer made the token ids.
        limit: only the first items of every task; None for all.
    """

    model: str
    tasks: tuple[str, ...]
    limit: int | None
    requests: tuple[Request, ...]

    @property
    def key(self) -> str:
        """A hash of everything that answers depend on."""
        return key_of([astuple(request) for request in self.requests])

    def summary(self) -> list[str]:
        """Items, requests and tokens of every task and of all, a line each."""
        lines = []
        for task in (*self.tasks, "all"):
            rows = [row for row in self.requests if task in ("all", row.task)]
            read = sum(len(row.context_ids) + len(row.continuation_ids) - 1 for row in rows)
            scored = sum(len(row.continuation_ids) for row in rows)
            items = len({(row.task, row.doc) for row in rows})
            lines.append(f"{task}: {items:,} items, {len(rows):,} requests, {read:,} tokens, {scored:,} of them scored")
        return lines

    def write(self, path: Path) -> None:
        """Write gzipped JSON, the same bytes for the same requests."""
        head = {"schema": SCHEMA, "model": self.model, "tasks": self.tasks, "limit": self.limit}
        rows = [astuple(request) for request in self.requests]
        text = json.dumps(head | {"requests": rows}, separators=(",", ":"), ensure_ascii=False)
        write_bytes(path, gzip.compress(text.encode("utf-8"), mtime=0))


@dataclass(frozen=True)
class AnswerFile:
    """What one model answers.

    Attributes:
        name: of the model in tables; dtype, device: that it ran in and on.
        requests: `RequestFile.key` of what was asked.
    """

    name: str
    dtype: str
    device: str
    requests: str
    answers: tuple[Answer, ...]

    def write(self, path: Path) -> None:
        """Write JSON."""
        write_json(path, {"schema": SCHEMA, **vars(self)})


def read_requests(path: Path) -> RequestFile:
    """Read what `RequestFile.write` wrote.

    Raises:
        UserError: no such file, or not one of ours.
    """
    try:
        content = _of_schema(parse_json(gzip.decompress(path.read_bytes())))
        rows = tuple(
            Request(task, doc, choice, context, continuation, tuple(context_ids), tuple(ids))
            for task, doc, choice, context, continuation, context_ids, ids in content["requests"]
        )
        return RequestFile(content["model"], tuple(content["tasks"]), content["limit"], rows)
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _unreadable("requests", path, error) from error


def read_answers(path: Path, asked: RequestFile) -> AnswerFile:
    """Read what `AnswerFile.write` wrote, as answers to these requests.

    Raises:
        UserError: no such file, not one of ours, or answers to other requests.
    """
    try:
        content = _of_schema(parse_json(path.read_bytes(), finite=False))
        answers = tuple((float(value), bool(greedy)) for value, greedy in content["answers"])
        read = AnswerFile(content["name"], content["dtype"], content["device"], content["requests"], answers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable("answers", path, error) from error
    check_answers(read.answers, asked, str(path))
    if read.requests != asked.key:
        raise UserError(
            "the answers belong to other requests",
            where=str(path),
            fix="answer them again: compress eval MODEL --replay REQUESTS",
        )
    return read


def check_answers(answers: Sequence[Answer], asked: RequestFile, where: str | None = None) -> None:
    """Refuse answers that are not one to each request."""
    if len(answers) != len(asked.requests):
        raise UserError(
            "the number of answers differs from the number of requests",
            where=where,
            expected=f"{len(asked.requests)}",
            found=f"{len(answers)}",
        )


def _of_schema(content: Any) -> Any:
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
    return content


def _unreadable(what: str, path: Path, error: Exception) -> UserError:
    return UserError(
        f"the {what} cannot be read",
        where=str(path),
        expected="a file that `compress eval --record` or `--replay` wrote",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )
