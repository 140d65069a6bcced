"""`compress validate`: everything of a run that needs no weights, checked and laid out before work starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from compress.cli.output import AsJson, Terminal, Verbose, say
from compress.cli.recipe import RecipeFile, Settings, read_recipe
from compress.errors import placed
from compress.words import counted, duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from compress.data.prompt import Task
    from compress.recipe.defaults import Situation
    from compress.recipe.schema import Recipe, UpcycleSection
    from compress.train.settings import TrainSettings


def validate(recipe: RecipeFile, settings: Settings = None, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Check a recipe against its model and texts, without loading weights, and print what a run would do.

    Makes every prompt as a run does, so a document that is too long, or a text that is too short, shows here.
    """
    from compress.cli.tables import show

    loaded = read_recipe(recipe, settings)
    import torch

    from compress.data.sampled import check_time
    from compress.models.placement import first_device
    from compress.recipe.defaults import Situation  # imports torch, as reading the recipe has
    from compress.runfolder import occupied
    from compress.stages.check import check_run, uses_of
    from compress.stages.device import resolve_device
    from compress.stages.estimate import memory, seconds
    from compress.stages.speeds import measure_speeds

    tokens = check_run(loaded, Terminal())
    device, situation = str(first_device(resolve_device(loaded.device))), Situation.of(loaded.model, loaded.device)
    speeds = measure_speeds(device, getattr(torch, loaded.dtype), situation.hidden, situation.intermediate)
    taken = seconds(loaded, situation, speeds, device)
    written = dict.fromkeys(use.place for use in uses_of(loaded) if use.source.written(use.part))
    with placed(f"{loaded.source}: {', '.join(written)}"):
        check_time(taken.get("text", 0.0))
    held = memory(loaded, situation)
    if as_json:
        facts = {"recipe": loaded.resolved(), "work": work(loaded), "seconds": taken, "memory_bytes": held}
        typer.echo(json.dumps(facts, indent=1))
        return
    show(table(loaded, situation))
    output = Path(loaded.output).expanduser()
    for number, line in enumerate(loaded.chosen):
        typer.echo(f"{'' if number else 'default':<9}{line}")
    typer.echo(f"model    {loaded.model}, {loaded.dtype}, on {device}")
    typer.echo(
        f"takes    about {duration(sum(taken.values()))} on this machine ("
        + ", ".join(f"{stage} {duration(spent)}" for stage, spent in taken.items())
        + f") and {size(held)} of memory"
    )
    typer.echo(f"         while it does nothing else: {speeds.words()}, as just measured")
    typer.echo("text     " + ", ".join(f"{part.replace('_', ' ')} {count:,} tokens" for part, count in tokens.items()))
    state = "goes on in" if (output / "stages.json").is_file() else "makes"
    typer.echo(f"writes   {state} {output}/ with {', '.join(_parts(loaded))}")
    if (problem := occupied(output, loaded.model)) is not None:
        typer.echo(f"         with --overwrite alone: {problem.what} ({problem.found})")
    say(f"the recipe is valid; start with: compress run {loaded.words}")


def _parts(recipe: Recipe) -> list[str]:
    """What a run leaves in its folder, and what of it is large."""
    made = ["upcycle/"]
    if recipe.upcycle is None:
        prepared = ["options/"] if recipe.prepare is not None else []
        made = ["calibration/", "profile/", *prepared, "search/"]
    trained = []
    if recipe.recover is not None:
        models = 1 + recipe.recover.control + recipe.recover.window_control
        trained = [f"recover/ ({counted(models, 'model')} of the weights' size)"]
    return [*made, "plan.json", *trained, "checkpoint/ (the weights' size)", "evaluation.json", "plots/", "report.html"]


def work(recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Documents and prompts by stage: task, length in tokens, count."""

    def rows(tasks: Sequence[Task]) -> list[dict[str, Any]]:
        return [{"task": task.task, "length": task.length, "count": task.count} for task in tasks]

    return {
        "profile": rows(recipe.calibration.documents),
        "search": rows(recipe.calibration.held_out),
        "evaluate": rows(recipe.evaluate.recall),
    }


def _batches(settings: TrainSettings) -> str:
    return f"{settings.step_count:,} steps of {settings.batch_size} x {settings.length:,} tokens"


def table(recipe: Recipe, situation: Situation) -> Table:
    """The stages with their method, what they read, and the model passes that they take."""
    from rich.table import Table

    from compress.evaluate.measure import asked_for
    from compress.models.prepared import read_prepared
    from compress.runfolder import PREPARED
    from compress.stages.evaluate import row_names
    from compress.stages.expectation import expectation

    result = Table(title=f"{recipe.source}")
    for column in ("stage", "method", "documents", "model passes"):
        result.add_column(column)
    parts = work(recipe)
    statistics = recipe.profile.statistics
    gradient = any(statistic.needs_gradient for statistic in statistics)
    documents = sum(row["count"] for row in parts["profile"])
    held_out = sum(row["count"] for row in parts["search"])
    if recipe.upcycle is not None:
        result.add_row(
            "upcycle", upcycled(recipe.upcycle), "", "a pass over each text" if recipe.upcycle.texts else "none"
        )
    else:
        result.add_row(
            "profile",
            "\n".join(statistic.registered for statistic in statistics),
            _lines(parts["profile"]),
            f"{documents} forward{' and backward' if gradient else ''}, and their answers",
        )
        if recipe.prepare is not None:
            targets = "\n".join(target.words() for target in recipe.prepare.targets)
            priced = f", then {documents} forward and backward" if recipe.prepare.effect else ""
            result.add_row("prepare", targets, _batches(recipe.prepare), f"training, layer by layer{priced}")
        budget = recipe.search.budget
        result.add_row(
            "search",
            f"{recipe.search.solver.words()}\nbudget {budget.words()}"
            + (f" at {', '.join(map(str, budget.lengths))}" if budget.lengths else ""),
            _lines(parts["search"]) or "none: chosen by prediction",
            f"{held_out} forward for each plan of the Pareto set and each baseline" if held_out else "none",
        )
        done = Path(recipe.output).expanduser() / PREPARED
        expected = expectation(recipe, situation.shape)
        if expected is not None and done.is_file():
            expected = expectation(recipe, situation.shape, read_prepared(done.parent))
        if expected is not None:
            about = f"expected: {expected.mean}\nbound: {expected.bound}"
            result.add_row("on average", about, f"spread: {expected.spread}", "none")
    recover = recipe.recover
    if recover is not None:
        losses = "+".join(objective.registered for objective in recover.objectives) or recover.loss
        method = f"{recover.train}, loss {losses}"
        if recover.context > 1:
            method += f"\n{recover.context} processes share each sequence"
        if recipe.prepare is not None and any(target.in_expectation for target in recipe.prepare.targets):
            method += f"\n{recover.decisions}"
        result.add_row(
            "recover", method, _batches(recover), f"training{' of plan and dense model' if recover.control else ''}"
        )
    export = recipe.export
    result.add_row(
        "export",
        f"{export.form}, {export.dtype or recipe.dtype}, shards of {export.max_shard_size}",
        "",
        "verification",
    )
    asked = asked_for(recipe.evaluate)
    passes = ", ".join(filter(None, (measure.passes() for measure in asked)))
    result.add_row(
        "evaluate",
        "\n".join(row_names(recipe)),
        "\n".join(filter(None, (measure.words() for measure in asked))),
        f"{passes or 'none'} for each of these",
    )
    return result


def upcycled(section: UpcycleSection) -> str:
    """What becomes one model, and how, in a few words."""
    kv = "" if section.attention == "base" else f", {'shared' if section.kv == 'shared' else 'own'} keys and values"
    mlps = "all MLPs" if section.mlp.top == "all" else f"MLP top {section.mlp.top}"
    return f"{section.count} experts, attention {section.attention}{kv}\n{mlps}, rest {section.rest}"


def _lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(f"{row['count']} x {row['task']} of {row['length']:,} tokens" for row in rows)
