"""`compress eval`: a recipe's evaluation, or any models side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import arguments
from compress.cli.output import AsJson, Verbose, progress, say
from compress.cli.recipe import Overwrite, Settings, opened
from compress.errors import UserError, placed
from compress.files import sweep
from compress.limits import BATCH, DOCUMENTS, LONGEST, SEED, STEPS

SENTENCE = "Tokenizers of one vocabulary may still differ: 1,024 (in numbers),\n  or in spaces."

MOST_NAME = 200  # characters of a folder that is named after models
OF_RECIPES = {"what", "settings", "overwrite", "as_json", "verbose"}  # what an evaluation of a recipe heeds

if TYPE_CHECKING:
    from compress.evaluate.comparison import Comparison
    from compress.evaluate.measure import Measure, Variant
    from compress.plan import Plan
    from compress.plan.facts import ModelShape


def evaluate(
    context: typer.Context,
    what: Annotated[
        list[str], typer.Argument(metavar="RECIPE|MODEL...", help="A recipe, or models; the first is the dense one.")
    ],
    settings: Settings = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, by commas.")] = None,
    include: Annotated[str | None, typer.Option(help="A folder of lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, max=STEPS, help="Only the first items of every task.")] = None,
    suites: Annotated[str | None, typer.Option(help="Long-context suites, by commas, or all.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the suites' items, by commas.")] = "2048",
    count: Annotated[int, typer.Option(min=1, max=DOCUMENTS, help="Items of each suite and length.")] = 20,
    perplexity: Annotated[
        int | None, typer.Option(min=2, max=LONGEST, help="Perplexity in windows of this many tokens.")
    ] = None,
    latency: Annotated[
        int | None,
        typer.Option(min=2, max=LONGEST, help="Time the prefill of this many tokens, and decode steps after it."),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(metavar="YAML", help="As in a recipe: 'agreement: {length: 512}'. Repeatable."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=BATCH, help="Inputs per batch, also in timed decode steps.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Seed of the suites' items.")] = 0,
    out: Annotated[str | None, typer.Option(help="The folder for the results; runs/eval-MODELS by default.")] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Also measure the largest uniform window that takes no more bytes than a plan."),
    ] = False,
    record: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the requests of --tasks there (.json.gz), run no model.")
    ] = None,
    replay: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answer recorded requests; needs lm-eval only to count them.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a model keeps: a recipe's plan beside the dense model, or any models on the same tasks.

    A checkpoint of this project is measured beside the dense model on its own weights, without running its code;
    a plan.json after the first model stands for that model with the plan.
    Results for the same weights, task and seed are kept and not measured again.

    Where lm-eval or its data cannot be installed: --record writes the requests elsewhere, and --replay answers them.
    """
    from compress.cli.tables import show

    if any(Path(name).suffix in arguments.RECIPES for name in what):
        if len(what) > 1:
            raise UserError(
                "a recipe is evaluated on its own, because it names its models",
                where=" ".join(what),
                expected="one recipe, or models",
                fix=f"compress eval {what[0]}, or name models only",
            )
        _refuse_options(context)
        comparison = _recipe(what[0], settings, overwrite)
    elif settings:
        raise UserError(
            "`--set` can only change a recipe",
            where=settings[0],
            fix="name a recipe, or leave it out",
        )
    elif record is not None:
        asked: dict[str, Any] = {"tasks": tasks}
        file = arguments.given_path(record, "--record")
        _check(what[:1], asked, include, dtype, device)
        _record(what, _measures(asked, {"include": include, "limit": limit}, batch)[0], file)
        return
    elif replay is not None:
        folder = arguments.out_folder(out or f"runs/eval-{_folder_name(what)}")
        _check_free(folder, overwrite)
        replayed = _replay(what, replay, include, _Settings(device, dtype, seed, batch, folder))
        if replayed is None:
            return
        comparison = replayed
    else:
        asked = {"tasks": tasks, "suites": suites, "perplexity": perplexity, "latency": latency, "measure": measure}
        _check(what, asked, include, dtype, device)
        sizes = tuple(arguments.lengths(lengths))
        folder = arguments.out_folder(out or f"runs/eval-{_folder_name(what)}")
        _check_free(folder, overwrite)
        of_tasks = {"include": include, "limit": limit, "lengths": sizes, "count": count}
        measured = _measures(asked, of_tasks, batch)
        for one in measured:
            one.check(None)  # what no model is needed for, before one is loaded
        comparison = _models(what, measured, _Settings(device, dtype, seed, batch, folder, uniform))
    if as_json:
        typer.echo(comparison.model_dump_json(by_alias=True, indent=1))
    else:
        from compress.evaluate.tables import tables

        for table in tables(comparison):
            show(table)


def _refuse_options(context: typer.Context) -> None:
    """Refuse what a recipe would not heed. Raises UserError."""
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name is not None and option.name not in OF_RECIPES and _is_given(context, option.name)
    ]
    if given:
        raise UserError(
            "a recipe says itself what is measured, and how",
            where=" ".join(given),
            expected="--set with a recipe; this option with models",
            fix="--set evaluate.KEY=VALUE (`compress methods measures` lists the keys), or name models: compress eval "
            f"MODEL {' '.join(given)}",
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@dataclass(frozen=True)
class _Settings:
    """How models are measured, and the folder that the results go to."""

    device: str
    dtype: str
    seed: int
    batch: int
    folder: Path
    uniform: bool = False


def _check(specs: list[str], asked: dict[str, Any], include: str | None, dtype: str, device: str) -> None:
    """Everything that needs no model: names, paths, and that something is to be measured."""
    arguments.one_of(dtype, arguments.DTYPES, "--dtype")
    arguments.device(device)
    if include is not None and not arguments.given_path(include, "--include").is_dir():
        raise UserError(
            "no such folder of task files",
            where="--include",
            found=include,
            fix="name a folder of .yaml files",
        )
    seen: dict[str, str] = {}
    for spec in specs:
        path = Path(arguments.model(spec)).expanduser()
        place = str(path.resolve()) if path.exists() else spec
        if place in seen:
            raise UserError("a model is given twice", where=spec, expected="different models", found=seen[place])
        seen[place] = spec
    for text in asked.get("measure") or ():
        _keys(text)
    if all(value in (None, "", []) for value in asked.values()):
        raise UserError(
            "nothing to measure",
            expected="--tasks, --suites, --perplexity, --latency or --measure",
            found="none of them",
        )


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder whose own evaluation would be replaced, or that holds a model. Raises UserError."""
    taken = [name for name in (*arguments.RUN_FILES, "config.json") if (folder / name).exists()]
    if taken and not overwrite:
        raise UserError(
            "the output folder already holds something",
            where=str(folder),
            expected="no folder, an empty one, or one of earlier evaluations",
            found=", ".join(taken),
            fix="name another one with --out, or pass --overwrite to write there anyway",
        )


def _record(what: list[str], measured: Any, file: Path) -> None:
    """Write the requests that one tokenizer makes of the harness's measure."""
    from compress.cli.recorded import record

    if len(what) > 1:
        raise UserError("requests are recorded for one tokenizer", where=what[1], expected="one model", fix=what[0])
    record(what[0], measured, file)


def _replay(what: list[str], file: str, include: str | None, settings: _Settings) -> Comparison | None:
    from compress.cli.recorded import replay

    arguments.one_of(settings.dtype, arguments.DTYPES, "--dtype")
    arguments.device(settings.device)
    path, dtype = arguments.given_path(file, "--replay"), settings.dtype
    if not path.is_file():
        raise UserError("no such file of requests", where=f"--replay {file}", fix="compress eval MODEL --record FILE")
    return replay(path, what, include, device=settings.device, dtype=dtype, folder=settings.folder)


def _measures(asked: dict[str, Any], of_tasks: dict[str, Any], batch: int) -> list[Measure]:
    """The measures that the options ask for.

    Args:
        of_tasks: what else `--tasks` and `--suites` are run with.
    """
    from compress.data.text import EmbeddedText
    from compress.evaluate.measures.latency import Latency
    from compress.evaluate.measures.lm_eval import LmEval
    from compress.evaluate.measures.perplexity import Perplexity
    from compress.evaluate.suites import SUITES

    tasks, suites = arguments.words(asked.get("tasks")), arguments.words(asked.get("suites"))
    measured: list[Measure] = []
    if tasks or suites:
        names = tuple(SUITES) if suites == ("all",) else suites
        measured.append(LmEval(tasks=tasks, suites=names, batch_size=batch, **of_tasks))
    if asked.get("perplexity") is not None:
        measured.append(Perplexity(text=EmbeddedText(), length=asked["perplexity"]))
    if asked.get("latency") is not None:
        measured.append(Latency(length=asked["latency"], batch=batch))
    return [*measured, *(measure for text in asked.get("measure") or () for measure in _named(text))]


def _keys(text: str) -> dict[str, Any]:
    """One `--measure` as keys of a recipe's `evaluate` section. Raises UserError for anything else."""
    import yaml

    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("not YAML", where="--measure", found=str(error).splitlines()[0]) from None
    keys = {given: {}} if isinstance(given, str) else given
    if not isinstance(keys, dict):
        raise UserError("not a measure", where="--measure", expected="'NAME: {key: value, ...}'", found=text[:60])
    return keys


def _named(text: str) -> list[Measure]:
    """The measures of one `--measure`. Raises UserError."""
    from compress.json_file import validated
    from compress.registry import measures

    measured: list[Measure] = []
    for name, keys in _keys(text).items():
        with placed("--measure"):
            kind = measures[str(name)]
        fix = f"`compress methods measures {name}` lists its keys"
        measured += kind.of(validated(kind.key()[0], keys or {}, f"the measure {name}", "--measure", fix=fix))
    return measured


def _folder_name(specs: list[str]) -> str:
    """What all models of an evaluation are called, for a folder of results: with other models it is another one.

    A checkpoint or a plan of a run is called as its run.
    """
    from compress.evaluate.names import file_part
    from compress.runfolder import RunFolder

    paths = [Path(spec).expanduser().resolve() for spec in specs]
    runs = {path: RunFolder(path.parent) for path in paths}
    named = [path.parent if path in (runs[path].checkpoint, runs[path].plan) else path for path in paths]
    return "-".join(file_part(str(path)) for path in named)[:MOST_NAME]


def _recipe(path: str, settings: list[str] | None, overwrite: bool) -> Comparison:
    with opened(path, settings, overwrite=overwrite, helpers=True) as session:
        from compress.stages.evaluate import evaluate_stage, help_evaluate

        if session.helper:
            help_evaluate(session)
            raise typer.Exit()
        return evaluate_stage(session)


def _models(specs: list[str], measured: list[Measure], settings: _Settings) -> Comparison:
    import transformers

    from compress.evaluate.compare import compare
    from compress.stages.device import resolve_device

    transformers.utils.logging.disable_progress_bar()
    where, folder = resolve_device(settings.device), settings.folder
    arguments.make_folder(folder)
    sweep(folder)
    loaded, variants = _variants(specs, settings.dtype, where, settings.uniform)
    with progress("eval") as report:
        comparison = compare(
            loaded,
            variants,
            measured,
            seed=settings.seed,
            batch_size=settings.batch,
            cache_dir=folder / "evaluation",
            progress=report,
        )
    comparison.write(folder / "evaluation.json")
    say(f"eval: {folder / 'evaluation.json'}; compress report {folder} makes a page of it")
    return comparison


def _variants(specs: list[str], dtype: str, device: str, uniform: bool = False) -> tuple[Any, list[Variant]]:
    """The first model, dense, and every model as a row; a checkpoint that carries a plan as two.

    Args:
        specs: models; behind the first one also plan files, whose rows are the dense model with that plan.
        uniform: adds to each plan the uniform window of no more bytes.
    """

    from compress.evaluate.measure import Variant
    from compress.files import key_of
    from compress.models.content import content_key
    from compress.models.known_shapes import SHAPES
    from compress.models.load import DTYPES, LoadedModel, load_model, load_tokenizer
    from compress.models.planned import planned_model
    from compress.models.source import ModelSource
    from compress.plan import read_plan
    from compress.search.measure import plan_key

    first = ModelSource(specs[0])
    others = {spec: ModelSource(spec) for spec in specs[1:] if not _is_plan(spec)}
    for other in others.values():
        other.config()  # what cannot be loaded is told before another model is measured
    if first.carries_plan:
        model = first.dense(device, DTYPES[dtype])
        loaded = LoadedModel(model, load_tokenizer(specs[0]), specs[0])
    else:
        loaded = load_model(specs[0], dtype=dtype, device=device)
    shape, itemsize = loaded.shape, DTYPES[dtype].itemsize
    variants = [Variant("dense", lambda: loaded.model, "dense", lambda length: shape.dense_cost(length, itemsize))]

    def add(name: str, build: Any, key: str, plan: Plan | None, tokenizer: Any = None) -> None:
        cost = None if plan is None else lambda length: plan.cost(length, itemsize)
        variants.append(Variant(_row_name(name, variants), build, key, cost, tokenizer))

    def add_plan(name: str, plan: Plan) -> None:
        add(name, lambda: planned_model(loaded.model, plan), plan_key(plan), plan)

    plans: list[tuple[str, Plan]] = []
    if first.carries_plan:
        carried = _plan_in(specs[0])
        build = lambda: first.planned(loaded.model)[0]  # noqa: E731
        add("plan", build, key_of(first.checkpoint["compress_plan"]), carried)
        plans += [] if carried is None else [("plan", carried)]
    for spec in specs[1:]:
        if spec not in others:
            plans.append((spec, read_plan(spec, shape)))
            add_plan(*plans[-1])
            continue

        def build_other(source: ModelSource = others[spec]) -> Any:
            return source.carried(device, DTYPES[dtype])

        key = key_of(SHAPES[spec]) if spec in SHAPES else content_key(spec)
        add(spec, build_other, key, _plan_in(spec), _other(spec, loaded.tokenizer))
    for name, plan in plans if uniform else []:
        add_plan(f"uniform beside {name}", _uniform(plan, shape, itemsize))
    return loaded, variants


def _is_plan(spec: str) -> bool:
    """Whether a file is a plan and no configuration of a model."""
    from compress.json_file import read_object

    path = Path(spec).expanduser()
    return path.suffix == ".json" and path.is_file() and "layers" in read_object(path, "the file", finite=False)


def _plan_in(spec: str) -> Plan | None:
    """The plan of a checkpoint of this project; None for any other model."""
    from compress.plan import CHECKPOINT_PLAN, read_plan

    path = Path(spec).expanduser() / CHECKPOINT_PLAN
    return read_plan(path) if path.is_file() else None


def _uniform(plan: Plan, shape: ModelShape, itemsize: int) -> Plan:
    """The largest window behind 64 sinks, in all head groups, that holds no more bytes than a plan.

    Bytes are compared at the longest length that the plan was searched for.
    """
    from compress.plan import uniform_plan
    from compress.targets.window import WindowGroup

    length = max(plan.predicted.lengths, default=8192)
    most = plan.cost(length, itemsize).held_bytes
    for window in range(length, 0, -64):
        beside = uniform_plan(shape, WindowGroup(sink=64, alpha=window, beta=0.0))
        if beside.cost(length, itemsize).held_bytes <= most:
            return beside
    raise UserError("no uniform window has as few bytes as the plan", where="--uniform", fix="leave out --uniform")


def _row_name(spec: str, variants: list[Variant]) -> str:
    """A model's row: its path as it was given, unless a row has that name."""
    taken = {variant.name for variant in variants}
    path = Path(spec).expanduser()
    return spec if spec not in taken else str(path.resolve()) if path.exists() else f"{spec} again"


def _other(spec: str, tokenizer: Any) -> Any:
    """A function that gives a model's own tokenizer; None where it equals the dense model's."""
    from compress.models.load import load_tokenizer

    other = load_tokenizer(spec)
    same = (
        other.get_vocab() == tokenizer.get_vocab() and other(SENTENCE)["input_ids"] == tokenizer(SENTENCE)["input_ids"]
    )
    return None if same else lambda: other
