"""lm-eval as a library: tasks from local files, from the hub, or our suites, on a model that is in memory."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError, nearest
from compress.evaluate.suites import SUITES
from compress.evaluate.suites.documents import documents, score
from compress.evaluate.task_result import Item, TaskResult
from compress.swapped import swapped

if TYPE_CHECKING:
    from compress.evaluate.measures.lm_eval import LmEval

BOOTSTRAP = 1000  # resamples for metrics that are no means; the errors of means are exact
PREFILL = ":prefill"
MOST_FILES = 10_000  # in a folder of tasks
MOST_BYTES = 1 << 20  # of a task file that is searched for names of data
DATA_FILE = re.compile(r"[\w./-]+\.(?:json|jsonl|csv|tsv|txt|parquet|arrow)(?:\.gz)?\b")
EXTRA = "in the clone: pip install -e '.[lm-eval]'"


def task_files(include: str) -> list[Path]:
    """Task files of a folder, and the files of data that they name where they are; sorted.

    Raises:
        UserError: there is no such folder, or it holds too many files to be one of tasks.
    """
    folder = Path(include).expanduser()
    if not folder.is_dir():
        raise UserError("no such folder of task files", where=include)
    files: set[Path] = set()
    for path in folder.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            files.add(path)
        if len(files) > MOST_FILES:
            raise UserError(
                "too many files for a folder of tasks",
                where=include,
                expected=f"at most {MOST_FILES:,} files",
                fix="name a folder with the task files and their data alone",
            )
    for path in sorted(files):
        if path.suffix in (".yaml", ".yml") and path.stat().st_size <= MOST_BYTES:
            named = DATA_FILE.findall(path.read_text(encoding="utf-8", errors="replace"))
            places = (Path.cwd(), path.resolve().parent, path.resolve().parent.parent)
            files |= {place / name for name in named for place in places if (place / name).is_file()}
    return sorted(files)


def run_task(
    model: Any,
    tokenizer: Any,
    request: LmEval,
    name: str,
    length: int | None,
    *,
    seed: int,
    text: str,
    sizer: Any = None,
) -> TaskResult:
    """Run one task with lm-eval.

    Args:
        length: of a suite's items; None for a task of lm-eval or of `request.include`.
        text: what the suites' haystacks are cut from.
        sizer: the tokenizer that suites are sized with, the model's own by default; models that are compared need
            one for all, or they would not get the same items.

    Raises:
        UserError: no such task, its data cannot be read, or an input is longer than the model's context: nothing is
            ever cut to fit.
    """
    quiet()
    from compress.evaluate.strict import Strict

    # A copy, because lm-eval gives a tokenizer without a token for padding one.
    lm = Strict(model, copy.deepcopy(tokenizer), request.batch_size)
    return run_on(lm, request, name, length, seed=seed, text=text, sizer=sizer or tokenizer)


def run_on(
    lm: Any,
    request: LmEval,
    name: str,
    length: int | None = None,
    *,
    seed: int = 0,
    text: str = "",
    sizer: Any = None,
) -> TaskResult:
    """`run_task` on a model object of lm-eval; `sizer` is a tokenizer, which only suites need.

    Raises:
        UserError: no such task, or its data cannot be read.
    """
    quiet()
    from lm_eval import evaluator, simple_evaluate

    task, manager = _task(request, name, length, sizer, seed, text)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        # It would ask git for its records, and outside a repository git complains on the terminal.
        swapped(evaluator, "get_git_commit_hash", lambda: None),
    ):
        report: Any = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=manager,
            limit=request.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
        )
    (key, values), *more = report["results"].items()
    if more:
        raise UserError(f"`{name}` is a group of tasks", fix=f"name its tasks: {', '.join(report['results'])}")
    return _result(key, length, values, report)


def _result(key: str, length: int | None, values: dict[str, Any], report: dict[str, Any]) -> TaskResult:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    higher: dict[str, bool] = {}
    for name, value in values.items():
        metric, _, kind = name.partition(",")
        if not kind or isinstance(value, str):
            continue
        plain = metric.removesuffix("_stderr")
        label = _label(plain, kind)
        if plain != metric:
            errors[label] = float(value)
        else:
            metrics[label] = float(value)
            higher[label] = bool(report["higher_is_better"][key].get(metric, True))
    suite = length is not None
    by_item: dict[int, dict[str, float]] = {}
    first: dict[int, Any] = {}
    for sample in report["samples"][key]:  # once for every filter of the task
        number = int(sample["doc_id"])
        first.setdefault(number, sample)
        named = {name: sample.get(name) for name in sample["metrics"]}
        by_item.setdefault(number, {}).update(
            {_label(name, sample["filter"]): float(x) for name, x in named.items() if isinstance(x, (int, float))}
        )
    samples = []
    for number in sorted(by_item):
        doc, written = first[number]["doc"], first[number]["filtered_resps"][0]
        samples.append(
            Item(
                metrics=by_item[number],
                depth=doc.get("depth") if suite else None,
                gap=doc.get("gap") if suite else None,
                written=written if suite and isinstance(written, str) else None,
            )
        )
    return TaskResult(
        task=key,
        version=str(report["versions"].get(key, "")),
        metrics=metrics,
        errors=errors,
        higher=higher,
        length=length,
        generates=report["configs"][key]["output_type"] == "generate_until",
        samples=samples,
    )


def _label(metric: str, kind: str) -> str:
    """A metric's name, with the filter that the answers went through where the task names one."""
    return metric if kind == "none" else f"{metric} ({kind})"


def quiet() -> None:
    """To be called before lm-eval is imported: it writes a line for every step and forks for its bootstrap."""
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the bootstrap forks otherwise, with the model in memory
    import logging

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _task(request: LmEval, name: str, length: int | None, tokenizer: Any, seed: int, text: str) -> tuple[Any, Any]:
    """A loaded task and the manager that knows it."""
    from lm_eval.tasks import TaskManager

    if length is not None:
        return suite_config(name, length, request.count, tokenizer, seed, text), TaskManager(include_defaults=False)
    # Absolute, because the task is loaded from within its own folder.
    include = None if request.include is None else str(Path(request.include).expanduser().resolve())
    if include is not None and not Path(include).is_dir():
        raise UserError("no such folder of task files", where=request.include)
    manager = TaskManager(include_path=include, include_defaults=False)
    if name not in manager.task_index:
        manager = TaskManager(include_path=include)
    entry = manager.task_index.get(name)
    if entry is None:
        known = list(manager.task_index)
        raise UserError(
            f"lm-eval has no task `{name}`",
            where=request.include,
            expected="a task of lm-eval, or of the folder `include`",
            fix=nearest(name, known),
        )
    try:
        with _inside(_root(entry, request.include)), contextlib.redirect_stderr(io.StringIO()):
            (task,) = manager.load([name])["tasks"].values()
    except ValueError as error:
        raise UserError(f"`{name}` is a group of tasks", fix="name its tasks one by one") from error
    except UserError:
        raise
    except Exception as error:  # datasets, the hub client and task code raise kinds of their own
        raise UserError(
            "the task could not be loaded",
            where=name,
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="without a network only tasks with local data can run: give their folder as `include`",
        ) from error
    return task, manager


def _root(entry: Any, include: str | None) -> Path:
    """The folder that a task's data files are relative to: the current one, the task file's, or the one above it."""
    config = entry.cfg or {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if not isinstance(files, dict) or entry.yaml_path is None:
        return Path.cwd()
    names = [name for entry in files.values() for name in ([entry] if isinstance(entry, str) else entry)]
    folders = [Path.cwd(), Path(entry.yaml_path).resolve().parent, Path(entry.yaml_path).resolve().parent.parent]
    for folder in folders:
        if all((folder / name).is_file() or "://" in name for name in names):
            return folder
    raise UserError(
        "the task's data files are missing",
        where=entry.name,
        expected=f"{', '.join(names)} in the current folder, in {include} or beside it",
    )


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder for a moment: `datasets` resolves data files against the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def suite_config(name: str, length: int, count: int, tokenizer: Any, seed: int | str, text: str) -> dict[str, Any]:
    """One of our suites as a task that lm-eval takes: by generation, or as `NAME:prefill` by scoring the answer.

    Scored, an item is right when its whole answer is the greedy continuation. That is one prefill without a cache, so
    the two together tell what a smaller cache loses from what masking in the prefill loses.
    """
    kind, name = name.endswith(PREFILL), name.removesuffix(PREFILL)
    shared = {
        "custom_dataset": lambda **_: documents(name, tokenizer, length, count, seed, text),
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"].rstrip(),
        "metadata": {"version": 1.0},
    }
    if kind:
        return shared | {
            "task": f"{name}_prefill_{length}",
            "output_type": "loglikelihood",
            "doc_to_target": lambda doc: " " + " ".join(doc["answers"]),
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return shared | {
        "task": f"{name}_{length}",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["prompt"],
        "doc_to_target": lambda doc: " ".join(doc["answers"]),
        "process_results": score,
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "max_gen_toks": SUITES[name].answer_tokens, "until": []},
    }
