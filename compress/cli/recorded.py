"""`compress eval --record` and `--replay`: tasks of lm-eval on a machine that has neither lm-eval nor a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from compress.cli import arguments
from compress.cli.output import progress, say
from compress.words import duration

if TYPE_CHECKING:
    from compress.evaluate.comparison import Comparison
    from compress.evaluate.measures.lm_eval import LmEval
    from compress.evaluate.requests import AnswerFile, RequestFile


def record(model: str, request: LmEval, path: Path) -> None:
    """Write every log-likelihood request of some tasks, with the token ids of a model's tokenizer.

    Raises:
        UserError: no such task, one that generates text, or an input beyond the model's context.
    """
    from compress.evaluate.harness import quiet

    quiet()
    from compress.evaluate.replay import record as recorded
    from compress.models.load import load_config, load_tokenizer

    asked = recorded(load_config(model), load_tokenizer(model), request, model)
    arguments.make_folder(path.parent)
    asked.write(path)
    for line in asked.summary():
        typer.echo(line)
    say(f"eval: {path}; `compress eval MODEL... --replay {path}` answers it, on this machine or another")


def replay(
    path: Path, specs: list[str], include: str | None, *, device: str, dtype: str, folder: Path
) -> Comparison | None:
    """Models' answers to recorded requests, and lm-eval's figures of them where lm-eval is installed.

    Args:
        path: the recorded requests.
        specs: models, which are scored here, and files of answers; the first is what the others are compared with.
        folder: where answers and the comparison go.

    Returns:
        None where lm-eval is not installed: the answers are written, to be counted elsewhere.

    Raises:
        UserError: a file of another kind or to other requests, or the tasks here ask something else than was recorded.
    """
    from compress.evaluate.requests import read_requests

    asked = read_requests(path)
    arguments.make_folder(folder)
    answered = [_answers(asked, spec, device, dtype, folder) for spec in specs]
    if importlib.util.find_spec("lm_eval") is None:
        again = " ".join(str(file) for _, file in answered)
        say(f"eval: lm-eval is not here to count these answers; where it is: compress eval {again} --replay {path}")
        return None
    from compress.evaluate.harness import quiet

    quiet()
    from compress.evaluate.replay import compare_answers

    comparison = compare_answers(asked, [answers for answers, _ in answered], include)
    comparison.write(folder / "evaluation.json")
    say(f"eval: {folder / 'evaluation.json'}; compress report {folder} makes a page of it")
    return comparison


def _answers(asked: RequestFile, spec: str, device: str, dtype: str, folder: Path) -> tuple[AnswerFile, Path]:
    """The answers in a file, or those of a model, which are kept beside the comparison; and their file."""
    import time

    from compress.evaluate.names import file_part
    from compress.evaluate.requests import read_answers

    given = Path(spec).expanduser()
    if given.suffix == ".json" and given.is_file():
        return read_answers(given, asked), given
    from compress.evaluate.likelihood import answer
    from compress.files import key_of
    from compress.models.content import content_key
    from compress.models.load import load_model
    from compress.stages.device import resolve_device

    arguments.model(spec)
    key = key_of(asked.key, content_key(spec), dtype, device)
    path = folder / f"answers-{file_part(spec)}-{key}.json"
    if path.is_file():
        say(f"eval: answered before, {path}")
        return read_answers(path, asked), path
    loaded, started = load_model(spec, dtype=dtype, device=resolve_device(device)), time.monotonic()
    with progress("eval") as report:
        answers = answer(loaded.model, asked, spec, progress=lambda done, total: report(done, total, spec))
    answers.write(path)
    say(f"eval: {path}, {len(answers.answers):,} requests in {duration(time.monotonic() - started)}")
    return answers, path
