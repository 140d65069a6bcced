"""`compress validate`: everything of a run that needs no weights, checked and laid out before work starts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.cli.inputs import input_name
from compress.cli.output import AsJson, RecipeFile, Verbose, say
from compress.cli.recovery import row_names

if TYPE_CHECKING:
    from compress.data.text import Part
    from compress.errors import Problem
    from compress.recipe import Recipe
    from compress.registry import Method


def validate(recipe: RecipeFile, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Check a recipe against its model and texts, without loading weights, and print what a run would do.

    Makes every prompt as a run does, so a document that is too long, or a text that is too short, shows here.
    """
    from compress.cli import arguments, methods
    from compress.cli.tables import show
    from compress.recipe import load_recipe

    loaded = load_recipe(arguments.recipe_file(recipe), methods.load)
    tokens = check_run(loaded)
    if as_json:
        typer.echo(json.dumps({"recipe": loaded.resolved(), "work": work(loaded)}, indent=1))
        return
    show(table(loaded))
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
        f"{recipe.name_of(recipe.search.solver)}\nbudget {budget.words()}"
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


def _lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"{row['count']} x {row['task']} of {row['length']:,} tokens" for row in rows)


@dataclass(frozen=True)
class _Use:
    """What reads a part of a text.

    Attributes:
        label: how the printed line names the part.
        place: the recipe's key.
        tokens: of the part that are needed.
        check: called with the token ids of the part, raises UserError where they do not do.
    """

    label: str
    source: Any
    part: Part
    place: str
    tokens: int
    check: Callable[[list[int]], Any]


def check_run(recipe: Recipe) -> dict[str, int]:
    """Check all of a run that needs no weights, every prompt included, and give the tokens of each part of the text.

    Raises:
        UserError: all that does not fit: the model, its context, a text, the budget, a file that the recipe names.
    """
    from compress.cli.session import resolve_device
    from compress.data.text import characters_for, split_text, tokenise
    from compress.errors import UserError
    from compress.models.load import check_model
    from compress.models.vocabulary import check_tokens
    from compress.search.preview import check_search

    resolve_device(recipe.device)
    model = check_model(recipe.model)
    for note in model.notes:
        say(f"  {note}")
    problems: list[Problem] = []

    def noted(place: str, check: Callable[[], Any]) -> None:
        try:
            check()
        except UserError as error:
            problems.extend(_placed(problem, str(recipe.source), place) for problem in error.problems)

    documents: Any = recipe.calibration.documents
    lengths, section = {task.length for task in documents}, recipe.search
    noted("search", lambda: check_search(model.config, recipe.dtype, section, recipe.profile.statistics, lengths))
    for place, check in _requests(recipe, model.config):
        noted(place, check)
    uses = _uses(recipe, model.tokenizer, model.config)
    most: dict[str, int] = {}
    for use in uses:
        name = use.source.model_dump_json()
        most[name] = max(most.get(name, 0), characters_for(use.tokens, use.part))
    tokens: dict[str, int] = {}
    texts: dict[str, str] = {}
    parts: dict[tuple[str, Part], list[int]] = {}
    for use in uses:
        name = use.source.model_dump_json()
        if name not in texts:
            excerpt = use.source.excerpt(most[name])
            if excerpt.used is not None:
                say(f"text: {input_name(use.source)}: {excerpt.used}")
            texts[name] = excerpt.text
        if (name, use.part) not in parts:
            parts[name, use.part] = tokenise(model.tokenizer, split_text(texts[name], use.part))
        ids = parts[name, use.part]
        check_tokens(ids, model.config, f"{recipe.source}: the text of {use.place}")
        tokens.setdefault(use.label, len(ids))
        noted(use.place, functools.partial(use.check, ids))
    if problems:
        raise UserError(problems)
    return tokens


def _requests(recipe: Recipe, config: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Checks of what an evaluation asks for that need no text, by key."""
    from compress.evaluate.harness import check_request as check_harness
    from compress.evaluate.latency import check_latency

    context = getattr(config, "max_position_embeddings", None)
    harness: Any = recipe.evaluate.lm_eval
    timing: Any = recipe.evaluate.latency
    checks: list[tuple[str, Callable[[], Any]]] = []
    if timing is not None:
        checks.append(("evaluate.latency", lambda: check_latency(timing, context)))
    if harness is not None:
        checks.append(("evaluate.lm_eval", lambda: check_harness(harness, context)))
        checks.append(("evaluate.lm_eval.include", harness.files))
    return checks


def _uses(recipe: Recipe, tokenizer: Any, config: Any) -> list[_Use]:
    """Everything that reads a text, in the order of the stages."""
    from compress.evaluate.perplexity import check_request
    from compress.train.windows import check_windows

    context = getattr(config, "max_position_embeddings", None)
    calibration, evaluate = recipe.calibration, recipe.evaluate
    request: Any = evaluate.perplexity
    evaluated: Any = request.text if request is not None else calibration.text
    uses: list[_Use] = []

    def add(label: str, source: Any, part: Part, place: str, tasks: Any) -> None:
        for number, task in enumerate(tasks):
            seed = f"{recipe.seed}/{part}"
            check = functools.partial(task.make, tokenizer, seed=seed, context=context)
            uses.append(_Use(label, source, part, f"{place}[{number}]", task.length, check))

    add("calibration", calibration.text, "calibration", "calibration.documents", calibration.documents)
    add("calibration", calibration.text, "calibration", "calibration.training", calibration.training)
    if calibration.second is not None:
        add("second", calibration.second, "calibration", "calibration.documents", calibration.documents)
    add("held_out", calibration.text, "held_out", "calibration.held_out", calibration.held_out)
    add("evaluation", evaluated, "evaluation", "evaluate.recall", evaluate.recall)
    if request is not None:
        check = functools.partial(_perplexity, check_request, request, context)
        uses.append(_Use("evaluation", evaluated, "evaluation", "evaluate.perplexity", request.tokens, check))
    recover: Any = recipe.recover
    if recover is not None:
        source = recover.text or calibration.text
        label = "recovery" if recover.text else "calibration"

        def windows(ids: list[int]) -> None:
            check_windows(len(ids), recover.length, context)

        uses.append(_Use(label, source, "calibration", "recover", recover.text_tokens, windows))
    return uses


def _perplexity(check: Callable[..., None], request: Any, context: int | None, ids: list[int]) -> None:
    check(request, len(ids), context)


def _placed(problem: Problem, source: str, place: str) -> Problem:
    """The problem with the recipe and the key before its own place, which may begin with that key."""
    own = problem.where or ""
    problem.where = ": ".join([source, *([] if own.startswith(place) else [place]), *([own] if own else [])])
    return problem
