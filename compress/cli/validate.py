"""`compress validate`: everything of a run that needs no weights, checked and laid out before work starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.cli.output import AsJson, RecipeFile, Verbose, say
from compress.cli.recovery import row_names

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.registry import Method

PARTS = {"documents": "calibration", "second": "calibration", "held_out": "held_out", "recall": "evaluation"}


def validate(recipe: RecipeFile, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Check a recipe against its model and texts, without loading weights, and print what a run would do.

    Makes every prompt as a run does, so a document that is too long, or a text that is too short, shows here.
    """
    from rich.console import Console

    from compress.cli import methods
    from compress.recipe import load_recipe

    loaded = load_recipe(recipe, methods.load())
    tokens = check_texts(loaded)
    if as_json:
        typer.echo(json.dumps({"recipe": loaded.resolved(), "work": work(loaded)}, indent=1))
        return
    Console().print(table(loaded))
    output = Path(loaded.output).expanduser()
    typer.echo(f"model    {loaded.model}, {loaded.dtype}, device {loaded.device}")
    typer.echo("text     " + ", ".join(f"{part.replace('_', ' ')} {count:,} tokens" for part, count in tokens.items()))
    state = "goes on in" if (output / "stages.json").is_file() else "makes"
    typer.echo(f"writes   {state} {output}/ with calibration/, profile/, search/, plan.json, checkpoint/ (the size of")
    typer.echo("         the weights; so is recover/, with a recovery), evaluation.json, plots/")
    say("the recipe is valid")


def work(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Documents and prompts by stage: task, length in tokens, count."""

    def rows(methods: tuple[Method, ...]) -> list[dict[str, Any]]:
        facts: Any = methods
        return [{"task": item.task, "length": item.length, "count": item.count} for item in facts]

    return {
        "profile": rows(recipe.calibration.documents),
        "search": rows(recipe.calibration.held_out),
        "evaluate": rows(recipe.evaluate.recall),
    }


def table(recipe: Recipe) -> Any:
    """The stages with their method, what they read, and the model passes that they take."""
    from rich.table import Table

    result = Table(title=f"{recipe.source}")
    for column in ("stage", "method", "documents", "model passes"):
        result.add_column(column)
    parts = work(recipe)
    statistics: Any = recipe.profile.statistics
    gradient = any(statistic.needs_gradient for statistic in statistics)
    documents = sum(row["count"] for row in parts["profile"])
    held_out = sum(row["count"] for row in parts["search"])
    result.add_row(
        "profile",
        "\n".join(recipe.name_of(statistic) for statistic in statistics),
        _lines(parts["profile"]),
        f"{documents} forward{' and backward' if gradient else ''}, and their answers",
    )
    budget: Any = recipe.search.budget
    result.add_row(
        "search",
        f"{recipe.name_of(recipe.search.solver)}\nbudget {_kinds(budget)}"
        + (f" at {', '.join(map(str, budget.lengths))}" if budget.lengths else ""),
        _lines(parts["search"]) or "none: chosen by prediction",
        f"{held_out} forward for each plan of the Pareto set and each baseline" if held_out else "none",
    )
    recover: Any = recipe.recover
    if recover is not None:
        size = f"{recover.step_count:,} steps of {recover.batch_size} x {recover.length:,} tokens"
        told = f"{recover.train}, loss {recover.loss}"
        result.add_row("recover", told, size, f"training{' of plan and dense model' if recover.control else ''}")
    export = recipe.export
    result.add_row(
        "export",
        f"{export.form}, {export.dtype or recipe.dtype}, shards of {export.max_shard_size}",
        "",
        "verification",
    )
    request: Any = recipe.evaluate.perplexity
    windows = [f"{request.windows} windows of {request.length:,} tokens"] if request is not None else []
    prompts = sum(row["count"] for row in parts["evaluate"])
    harness: Any = recipe.evaluate.lm_eval
    tasks = [*harness.tasks, *harness.suites] if harness is not None else []
    timing: Any = recipe.evaluate.latency
    timed = [] if timing is None else [f"time at {timing.length:,} tokens, batch {timing.batch}"]
    result.add_row(
        "evaluate",
        "\n".join(row_names(recipe)),
        "\n".join([*windows, *filter(None, [_lines(parts["evaluate"])]), *tasks, *timed]),
        f"{prompts} generations and {request.windows if request is not None else 0} forward for each of these"
        + (", and the tasks" if tasks else ""),
    )
    return result


def _kinds(budget: Any) -> str:
    """The limits that are given, in words."""
    given = {name: budget.model_dump(mode="json")[name] for name in ("kv", "density", "decode_time", "parameters")}
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in given.items() if value is not None)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"{row['count']} x {row['task']} of {row['length']:,} tokens" for row in rows)


def check_texts(recipe: Recipe) -> dict[str, int]:
    """Make every prompt of the recipe, and give the tokens of each part of the text.

    Raises:
        UserError: all that does not fit: the model, its context, a text.
    """
    from compress.cli.session import resolve_device
    from compress.data.text import split_text, tokenise
    from compress.errors import Problem, UserError
    from compress.evaluate.perplexity import check_request
    from compress.models.load import check_model
    from compress.models.vocabulary import check_tokens
    from compress.recover.windows import check_windows

    resolve_device(recipe.device)
    model = check_model(recipe.model)
    for note in model.notes:
        say(f"  {note}")
    tokenizer = model.tokenizer
    context = getattr(model.config, "max_position_embeddings", None)
    request: Any = recipe.evaluate.perplexity
    calibration: Any = recipe.calibration.text
    evaluation: Any = request.text if request is not None else calibration
    wanted: tuple[tuple[str, Any, str, Any], ...] = (
        ("documents", calibration, "calibration.documents", recipe.calibration.documents),
        ("held_out", calibration, "calibration.held_out", recipe.calibration.held_out),
        ("recall", evaluation, "evaluate.recall", recipe.evaluate.recall),
    )
    if recipe.calibration.second is not None:
        wanted += (("second", recipe.calibration.second, "calibration.documents", recipe.calibration.documents),)
    problems: list[Problem] = []
    tokens: dict[str, int] = {}
    texts: dict[str, str] = {}
    for kind, source, place, requests in wanted:
        part: Any = PARTS[kind]
        name = source.model_dump_json()
        if name not in texts:
            texts[name] = source.load()
        ids = tokenise(tokenizer, split_text(texts[name], part))
        check_tokens(ids, model.config, f"{recipe.source}: the text of {place}")
        tokens["second" if kind == "second" else part] = len(ids)
        for number, task in enumerate(requests):
            try:
                task.make(tokenizer, ids, f"{recipe.seed}/{part}", context=context)
            except UserError as error:
                problems += [_placed(problem, f"{recipe.source}: {place}[{number}]") for problem in error.problems]
        if kind == "recall" and request is not None:
            try:
                check_request(request, len(ids), context)
            except UserError as error:
                problems += [_placed(problem, f"{recipe.source}: evaluate.perplexity") for problem in error.problems]
    recover: Any = recipe.recover
    if recover is not None:
        ids = tokenise(tokenizer, split_text((recover.text or calibration).load(), "calibration"))
        try:
            check_windows(len(ids), recover.length, context)
        except UserError as error:
            problems += [_placed(problem, str(recipe.source)) for problem in error.problems]
    if problems:
        raise UserError(problems)
    return tokens


def _placed(problem: Any, where: str) -> Any:
    problem.where = f"{where}: {problem.where}" if problem.where else where
    return problem
