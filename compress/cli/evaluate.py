"""`compress eval`: a recipe's evaluation, or any models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import arguments
from compress.cli.output import AsJson, Verbose, progress, say
from compress.cli.recipe import Overwrite, opened
from compress.errors import UserError
from compress.files import sweep
from compress.limits import BATCH, DOCUMENTS, LONGEST, SEED, STEPS

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
    from compress.cli.tables import show

    if any(Path(name).suffix in arguments.RECIPES for name in what):
        if len(what) > 1:
            raise UserError(
                "a recipe is evaluated alone, its models are in it",
                where=" ".join(what),
                expected="one recipe, or models",
                fix=f"compress eval {what[0]}, or name models only",
            )
        comparison = _recipe(what[0], overwrite)
    else:
        kept = arguments.words(suites)
        request: dict[str, Any] = {"tasks": arguments.words(tasks), "include": include, "limit": limit, "suites": kept}
        _check(what, request, perplexity, latency, dtype, device)
        sizes = tuple(arguments.lengths(lengths))
        folder = arguments.out_folder(out or f"runs/eval-{_folder_name(what[0])}")
        request |= {"lengths": sizes, "count": count, "batch_size": batch}
        comparison = _models(what, request, perplexity, latency, batch, device, dtype, seed, folder)
    if as_json:
        typer.echo(comparison.model_dump_json(by_alias=True, indent=1))
    else:
        for table in comparison.tables():
            show(table)


def _check(
    specs: list[str], request: dict[str, Any], perplexity: int | None, latency: int | None, dtype: str, device: str
) -> None:
    """Everything that needs no model: names, paths, and that something is to be measured."""
    arguments.one_of(dtype, arguments.DTYPES, "--dtype")
    arguments.device(device)
    if request["include"] is not None and not arguments.given_path(request["include"], "--include").is_dir():
        raise UserError(
            "no such folder of task files",
            where="--include",
            found=request["include"],
            fix="name a folder of .yaml files",
        )
    seen: dict[str, str] = {}
    for spec in specs:
        path = Path(arguments.model(spec)).expanduser()
        place = str(path.resolve()) if path.exists() else spec
        if place in seen:
            raise UserError("a model is given twice", where=spec, expected="different models", found=seen[place])
        seen[place] = spec
    if not request["tasks"] and not request["suites"] and perplexity is None and latency is None:
        raise UserError(
            "nothing to measure", expected="--tasks, --suites, --perplexity or --latency", found="none of them"
        )


def _folder_name(spec: str) -> str:
    """The last part of a model's name, for a folder of results."""
    from compress.evaluate.names import file_part

    return file_part(str(Path(spec).expanduser().resolve()))


def _recipe(path: str, overwrite: bool) -> Comparison:
    with opened(path, overwrite=overwrite) as session:
        from compress.stages.evaluate import evaluate_stage

        return evaluate_stage(session)


def _models(
    specs: list[str],
    asked: dict[str, Any],
    perplexity: int | None,
    latency: int | None,
    batch: int,
    device: str,
    dtype: str,
    seed: int,
    folder: Path,
) -> Comparison:
    import transformers

    from compress.data.text import EmbeddedText
    from compress.evaluate.compare import compare
    from compress.evaluate.harness import HarnessRequest
    from compress.evaluate.latency import LatencyRequest
    from compress.evaluate.perplexity import PerplexityRequest
    from compress.evaluate.suites import SUITES
    from compress.stages.device import resolve_device

    transformers.utils.logging.disable_progress_bar()
    names = tuple(SUITES) if asked["suites"] == ("all",) else asked["suites"]
    request = HarnessRequest(**asked | {"suites": names})
    where = resolve_device(device)
    arguments.make_folder(folder)
    sweep(folder)
    sizes = request.lengths
    loaded, variants = _variants(specs, sizes if names else (), dtype, where)
    with progress("eval") as report:
        comparison = compare(
            loaded,
            variants,
            perplexity_request=None
            if perplexity is None
            else PerplexityRequest(text=EmbeddedText(), length=perplexity),
            recall_requests=[],
            harness_request=request if request.tasks or names else None,
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

    from compress.bench.shapes import SHAPES
    from compress.bench.source import Source
    from compress.evaluate.compare import Variant
    from compress.files import key_of
    from compress.models.content import content_key
    from compress.models.load import DTYPES, LoadedModel, load_model, load_tokenizer
    from compress.runtime.span import spans_of_plan
    from compress.targets.cost import kv_bytes

    first = Source(specs[0])
    if first.carries_plan:
        model = first.dense(torch.device(device), DTYPES[dtype])
        loaded = LoadedModel(model, load_tokenizer(specs[0]), specs[0])
    else:
        loaded = load_model(specs[0], dtype=dtype, device=device)
    shape = loaded.shape
    itemsize = DTYPES[dtype].itemsize
    dense = {length: shape.dense_cost(length, itemsize).held_bytes for length in lengths}
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

        key = key_of(SHAPES[spec]) if spec in SHAPES else content_key(spec)
        variants.append(Variant(_row_name(spec, variants), build, key, {}, _tokenizer_of(spec)))
    return loaded, variants


def _row_name(spec: str, variants: list[Variant]) -> str:
    """A model's row: its path as it was given, unless a row has that name."""
    taken = {variant.name for variant in variants}
    path = Path(spec).expanduser()
    return spec if spec not in taken else str(path.resolve()) if path.exists() else f"{spec} again"


def _tokenizer_of(spec: str) -> Any:
    from compress.models.load import load_tokenizer

    return lambda: load_tokenizer(spec)
