"""Calibration documents: prompts of the requested tasks with the dense model's own answers, kept on disk.

MoA (arXiv 2406.14909, table 2) takes the loss on answer tokens alone and lets the dense model write the answers:
at a quarter of the cache, retrieval rose from .27 to .87 with the first and to .95 with both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.data.answers import answer
from compress.data.prompt import Prompt, Task
from compress.data.reader import Loaded, Progress, Reader
from compress.data.sample import TextSample
from compress.data.text import Part, TextSource
from compress.files import key_of, text_key, write_text
from compress.json_file import CHECKSUM, parse_json
from compress.models.families import context_of
from compress.models.stream import refuse_streamed
from compress.models.vocabulary import check_tokens

SCHEMA = 1


def calibration_documents(
    loaded: Loaded,
    requests: Sequence[Task],
    text: TextSource,
    split: Part,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
) -> dict[int, list[TextSample]]:
    """Documents by length in tokens (exact, answer included), in the order of the requests.

    Each request is one JSONL file in `cache_dir`, named after what it depends on (model, precision, text, request,
    seed); it is written whole or not at all, and a request that is there is not answered again.

    Args:
        loaded: the dense model.
        requests: tasks with their parameters.
        text: where the haystacks come from.
        split: which part of the text; parts never overlap.
        seed: of prompts and of sampled answers.
        cache_dir: folder of the JSONL files, made if need be.
        progress: called with (documents done, documents in all, name of the task).

    Raises:
        UserError: a request does not fit the model's context or the text. All prompts are made before the first
            answer, so this is known at once.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if any(request.answer != "text" for request in requests):
        refuse_streamed(model, "the dense model's own answer", "calibration.documents", "set `answer: text`")
    longest = max((request.length for request in requests), default=0)
    part = text.read(Reader(loaded, seed, cache_dir, progress), split, longest)
    check_tokens(part.ids, model.config, text.source)
    context = context_of(model.config)
    seeds = f"{seed}/{split}"
    prompts = [request.make(tokenizer, part.ids, seeds, context=context) for request in requests]
    for request, asked in zip(requests, prompts, strict=True):
        for prompt in asked:
            check_tokens(prompt.tokens, model.config, f"a prompt of {request.name}")
    fingerprint, dtype = loaded.shape.fingerprint, str(next(model.parameters()).dtype)
    documents: dict[int, list[TextSample]] = {}
    done, total = 0, sum(map(len, prompts))
    for request, asked in zip(requests, prompts, strict=True):
        facts = [SCHEMA, fingerprint, dtype, part.key, split, seed, request.model_dump(mode="json")]
        # The tokens themselves are part of the key: another tokenizer, or another wording, makes other documents.
        key = key_of(facts, [prompt.tokens for prompt in asked])
        path = cache_dir / f"{split}-{request.task}-{request.length}-{key}.jsonl"
        made = _read(path, asked)
        if made is None:
            made = []
            for number, prompt in enumerate(asked):
                made.append(prompt.answered(_answer(model, request, prompt, seed + number)))
                if progress is not None:
                    progress(done + len(made), total, request.name)
            write_text(path, _text_of(made))
        done += len(made)
        if progress is not None:
            progress(done, total, request.name)
        documents.setdefault(request.length, []).extend(made)
    return documents


def _answer(model: Any, request: Task, prompt: Prompt, seed: int) -> tuple[int, ...]:
    """The answer that the request asks for."""
    if request.answer == "text":
        return prompt.reference
    return answer(model, prompt.tokens, prompt.budget, **request.answering(seed))


def _text_of(documents: Sequence[TextSample]) -> str:
    """One line a document, and a last one with a checksum of those before."""
    rows = "".join(json.dumps(asdict(document)) + "\n" for document in documents)
    return rows + json.dumps({CHECKSUM: text_key(rows)}) + "\n"


def _read(path: Path, asked: Sequence[Prompt]) -> list[TextSample] | None:
    """The documents of a file if it is whole, unchanged, and answers these prompts, else None."""
    try:
        *lines, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if parse_json(last) != {CHECKSUM: text_key("".join(lines))}:
            return None
        rows = [parse_json(line) for line in lines]
        documents = [
            TextSample(
                tokens=tuple(row["tokens"]),
                answer=tuple(row["answer"]),
                evidence=tuple((start, end) for start, end in row["evidence"]),
                task=row["task"],
                expected=row["expected"],
                depth=row["depth"],
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = len(documents) == len(asked) and all(
        document == prompt.answered(document.tokens[len(prompt.tokens) :])
        if document.length == prompt.length
        else False
        for document, prompt in zip(documents, asked, strict=True)
    )
    return documents if same else None
