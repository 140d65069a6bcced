"""`compress eval`: a recipe's evaluation, or any models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.output import AsJson, Overwrite, Verbose, progress, say
from compress.limits import BATCH, DOCUMENTS, ENTRIES, LONGEST, SEED, STEPS

if TYPE_CHECKING:
    from compress.evaluate.compare import Variant
    from compress.evaluate.comparison import Comparison


def evaluate(
    what: Annotated[
        list[str], typer.Argument(metavar="RECIPE|MODEL...", help="A recipe, or models; the first is the dense one.")
    ],
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, by commas.")] = None,
    include: Annotated[str | None, typer.Option(help="A folder of lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=STEPS, help="Only the first items of every task.")] = None,
    suites: Annotated[str | None, typer.Option(help="Long-context suites, by commas, or all.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the suites' items, by commas.")] = "2048",
    count: Annotated[int, typer.Option(min=1, max=DOCUMENTS, help="Items of each suite and length.")] = 20,
    perplexity: Annotated[
        int | None, typer.Option(min=2, max=LONGEST, help="Perplexity in windows of so many tokens.")
    ] = None,
    latency: Annotated[
        int | None, typer.Option(min=2, max=LONGEST, help="Time prefill and decode behind so many tokens.")
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=BATCH, help="Inputs at once, in decode steps that are timed, too.")
    ] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Of the suites.")] = 0,
    out: Annotated[str | None, typer.Option(help="The folder for the results; runs/eval-MODEL by default.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a model keeps: a recipe's plan beside the dense model, or any models on the same tasks.

    A checkpoint of this project is measured beside the dense model on its own weights, without running its code.
    What was measured before with the same weights, task and seed is read and not measured again.
    """
    from rich.console import Console

    if len(what) == 1 and Path(what[0]).suffix in (".yaml", ".yml"):
        comparison = _recipe(what[0], overwrite)
    else:
        comparison = _models(
            what, tasks, include, limit, suites, lengths, count, perplexity, latency, batch, device, dtype, seed, out
        )
    if as_json:
        typer.echo(comparison.model_dump_json(by_alias=True, indent=1))
    else:
        comparison.print(Console())


def _recipe(path: str, overwrite: bool) -> Comparison:
    from compress.cli.session import open_session
    from compress.cli.stages import evaluate_stage

    with open_session(path, overwrite=overwrite) as session:
        return evaluate_stage(session)


def _models(
    specs: list[str],
    tasks: str | None,
    include: str | None,
    limit: int | None,
    suites: str | None,
    lengths: str,
    count: int,
    perplexity: int | None,
    latency: int | None,
    batch: int,
    device: str,
    dtype: str,
    seed: int,
    out: str | None,
) -> Comparison:
    from compress.cli.session import resolve_device
    from compress.data.text import EmbeddedText
    from compress.errors import UserError
    from compress.evaluate.compare import compare
    from compress.evaluate.harness import HarnessRequest
    from compress.evaluate.latency import LatencyRequest
    from compress.evaluate.perplexity import PerplexityRequest
    from compress.evaluate.suites import SUITES

    names = tuple(SUITES) if suites == "all" else _split(suites)
    if not tasks and not names and perplexity is None and latency is None:
        raise UserError(
            "nothing to measure", expected="--tasks, --suites, --perplexity or --latency", found="none of them"
        )
    sizes = _lengths(lengths)
    request = HarnessRequest(
        tasks=_split(tasks), include=include, limit=limit, suites=names, lengths=sizes, count=count, batch_size=batch
    )
    where = resolve_device(device)
    loaded, variants = _variants(specs, sizes if names else (), dtype, where)
    folder = Path(out or f"runs/eval-{Path(specs[0]).name}").expanduser()
    with progress("eval") as report:
        comparison = compare(
            loaded,
            variants,
            perplexity_request=None
            if perplexity is None
            else PerplexityRequest(text=EmbeddedText(), length=perplexity),
            recall_requests=[],
            harness_request=request if tasks or names else None,
            latency_request=None if latency is None else LatencyRequest(length=latency, batch=batch),
            seed=seed,
            batch_size=batch,
            cache_dir=folder / "evaluation",
            progress=report,
        )
    comparison.write(folder / "evaluation.json")
    say(f"eval: {folder / 'evaluation.json'}; compress report {folder} makes a page of it")
    return comparison


def _variants(specs: list[str], lengths: tuple[int, ...], dtype: str, device: str) -> tuple[Any, list[Variant]]:
    """The first model, dense, and every model as a row; a checkpoint that carries a plan as two."""
    import torch

    from compress.bench.source import Source
    from compress.evaluate.compare import Variant
    from compress.files import key_of
    from compress.models.load import DTYPES, LoadedModel, load_model, load_tokenizer
    from compress.runtime.span import spans_of_plan
    from compress.search.budget import dense_bytes
    from compress.targets.cost import kv_bytes

    first = Source(specs[0])
    if first.carries_plan:
        model = first.dense(torch.device(device), DTYPES[dtype])
        loaded = LoadedModel(model, load_tokenizer(specs[0]), specs[0])
    else:
        loaded = load_model(specs[0], dtype=dtype, device=device)
    shape = loaded.shape
    itemsize = DTYPES[dtype].itemsize
    dense = {length: dense_bytes(shape, length, itemsize) for length in lengths}
    variants = [Variant("dense", lambda: loaded.model, "dense", dense)]
    if first.carries_plan:
        plan = first.checkpoint["compress_plan"]
        spans = spans_of_plan(plan, list(shape.native_windows))
        held = {length: kv_bytes(spans, length, shape.head_dim, itemsize) for length in lengths}
        variants.append(Variant("plan", lambda: first.planned(loaded.model, None, 0)[0], key_of(plan), held))
    for spec in specs[1:]:
        source = Source(spec)

        def build(spec: str = spec, source: Source = source) -> Any:
            return source.carried(torch.device(device), DTYPES[dtype])

        files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(spec).glob("*"))
        variants.append(
            Variant(spec, build, key_of(spec, [list(map(str, file)) for file in files]), {}, _tokenizer_of(spec))
        )
    return loaded, variants


def _tokenizer_of(spec: str) -> Any:
    from compress.models.load import load_tokenizer

    return lambda: load_tokenizer(spec)


def _lengths(text: str) -> tuple[int, ...]:
    """The numbers of `--lengths`."""
    from compress.errors import UserError

    parts = [part.strip() for part in text.split(",")]
    sizes = tuple(int(part) for part in parts if part.isdecimal() and len(part) < 12)
    if len(sizes) < len(parts) or not all(16 <= size <= LONGEST for size in sizes) or len(sizes) > ENTRIES:
        expected = f"at most {ENTRIES} whole numbers of tokens from 16 to {LONGEST:,}, by commas"
        raise UserError("these are no lengths", where="--lengths", expected=expected, found=text[:80])
    return sizes


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()
