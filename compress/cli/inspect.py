"""`compress inspect`: what a plan, a profile or a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import arguments
from compress.cli.output import AsJson, Verbose
from compress.errors import UserError
from compress.files import listed
from compress.json_file import read_object
from compress.limits import SHOWN_LENGTHS
from compress.runfolder import PREPARED
from compress.words import counted, duration, size

if TYPE_CHECKING:
    from compress.plan import Form, Plan

MOST_OPTIONS = 8  # of one kind that are listed one by one

Artifact = Annotated[
    str, typer.Argument(metavar="PATH", help="A plan.json, a profile, prepared options, a checkpoint or a run folder.")
]


def inspect(path: Artifact, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Print a plan's head map, a profile's statistics, or a checkpoint's plan, with bytes and provenance."""
    kind, place = identify(arguments.given_path(path, "PATH"))
    if kind == "profile":
        from compress.profile.store import read_profile

        profile = read_profile(place)
        if as_json:
            typer.echo(profile.header.to_json(), nl=False)
            return
        _print_profile(profile)
        return
    if kind == "options":
        _print_options(place, as_json)
        return
    from compress.export.layout import checkpoint_form
    from compress.plan import read_plan

    plan = read_plan(place)
    if as_json:
        typer.echo(plan.to_json(), nl=False)
        return
    if kind == "checkpoint":
        _print_checkpoint(place.parent)
    _print_plan(plan, checkpoint_form(place.parent))


def identify(path: Path) -> tuple[str, Path]:
    """(`plan`, its file), (`profile`, its folder), (`options`, their folder) or (`checkpoint`, the plan in it); a run
    folder counts as its plan, and one without as what it has come to: what was prepared, or the profile.

    Raises:
        UserError: there is no such path, or it is none of these.
    """
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), fix="compress run RECIPE makes a run folder")
    if path.is_file():
        if path.name in ("profile.json", "statistics.safetensors"):
            return "profile", path.parent
        _refuse_other(path)
        return "plan", path
    for name, kind, place in (
        ("compress_plan.json", "checkpoint", path / "compress_plan.json"),
        ("profile.json", "profile", path),
        ("plan.json", "plan", path / "plan.json"),
        ("prepare.json", "options", path),
        (PREPARED, "options", (path / PREPARED).parent),
        ("profile/profile.json", "profile", path / "profile"),
    ):
        if (path / name).is_file():
            return kind, place
    raise UserError(
        "this folder holds neither a profile nor a plan",
        where=str(path),
        expected="profile.json, compress_plan.json, plan.json or prepare.json in it",
        found=listed(path),
    )


def _refuse_other(path: Path) -> None:
    """Refuse a file that is no plan by what it is, rather than as a damaged plan.

    Raises:
        UserError: what it is instead.
    """
    if path.suffix in arguments.RECIPES:
        raise UserError(
            "this is a recipe",
            where=str(path),
            expected="a plan.json, a profile, prepared options, a checkpoint or a run folder",
            fix=f"compress validate {path}",
        )
    content = read_object(path, "the plan")
    if "layers" not in content:
        made = path.name in ("evaluation.json", "bench.json", "stages.json", "environment.json")
        raise UserError(
            "not a plan",
            where=str(path),
            expected="a plan.json, with a list `layers`",
            found=f"an object with the keys {', '.join(list(content)[:6])}" if content else "an empty object",
            fix=f"compress report {path.parent}" if made else "`compress search` writes a plan.json",
        )


def _print_plan(plan: Plan, form: Form | None) -> None:
    from rich.table import Table

    from compress.cli.tables import show
    from compress.export.provenance import plain_lines
    from compress.plan import added, removal
    from compress.plan.skipped import STORED, Skipped, chooses, skipped
    from compress.plan.states import states_of

    model = plan.model
    typer.echo(
        f"{model.architecture}: {model.layers} layers, {model.kv_heads} head groups of "
        f"{model.query_heads // model.kv_heads} query heads, head size {model.head_dim}"
    )
    typer.echo(f"model {model.fingerprint}")
    for line in added(plan):
        typer.echo(line)
    left = removal(plan)
    if left is not None:
        typer.echo(left)
    table = Table(
        title="spans" + (" and widths" if left else ""),
        caption="sink|window; +0.25t: the window grows by a quarter of the position t; N: of the input's length"
        + ("; -: removed" if left else ""),
        box=None,
    )
    table.add_column("layer", justify="right")
    for group in range(model.kv_heads):
        table.add_column(f"group {group}", justify="right")
    for head in ("query heads", "neurons") if left else ():
        table.add_column(head, justify="right")
    queries = plan.kept_queries
    for number, (layer, native) in enumerate(zip(plan.layers, model.native_windows, strict=True)):
        mlp = layer.mlp
        widths = (str(queries[number]), "all" if mlp is None else f"{mlp.kept:,}") if left else ()
        table.add_row(str(number), *(group.short(native) for group in layer.groups), *widths)
    show(table)
    for line in _option_lines(plan):
        typer.echo(line)
    if plan.reordered_layers:
        typer.echo(
            f"a checkpoint of the plan has the head groups of {counted(plan.reordered_layers, 'layer')} in another "
            "order than the table, which is the model's: `order` in the plan says which"
        )
    varies = plan.in_expectation
    means = "; means over texts, spread: their standard deviation at most" if varies else ""
    costs = Table(title=f"KV cache of one sequence, float16 or bfloat16{means}", box=None)
    for column in ("tokens", "plan", "dense", "share", *(("spread", "any text, at most") if varies else ())):
        costs.add_column(column, justify="right")
    for length in sorted({*SHOWN_LENGTHS, *plan.predicted.lengths}):
        cost, dense = plan.cost(length, form=form), plan.dense_cost(length).held_bytes
        shares = [cost.held_bytes, *((cost.spread_bytes, cost.most_bytes) if varies else ())]
        costs.add_row(f"{length:,}", size(cost.held_bytes), size(dense), *(f"{part / dense:.1%}" for part in shares))
    show(costs)
    states = states_of(plan, form=form)
    if states is not None:
        typer.echo(states.words)
    if chooses(plan):
        typer.echo(STORED)
        for length in (SHOWN_LENGTHS[0], SHOWN_LENGTHS[-1]):
            typer.echo(Skipped.total(skipped(plan, length, form=form)).words())
    if plan.upcycle is None:
        stay, always = " that stay" if left else "", " for every token" if chooses(plan) else ""
        typer.echo(f"{plan.full_groups} of {sum(plan.kept_heads)} head groups{stay} see everything{always}")
    sliding = sum(native is not None for native in model.native_windows)
    if sliding:
        left_over = model.layers - sliding
        typer.echo(
            f"{sliding} of {model.layers} layers have a sliding window of the architecture and keep it; only the other "
            f"{left_over} can be given windows"
        )
    lines = plain_lines(plan.provenance)
    if lines:
        typer.echo("provenance")
    for line in lines:
        typer.echo(f"  {line}")


def _option_lines(plan: Plan) -> list[str]:
    """What head groups have that were prepared, or decided together: a line for every option of a search.

    Where shares differ from group to group, as under one threshold for all, the options of a kind are one line.
    """
    kinds: dict[Any, dict[Any, list[Any]]] = {}
    for layer in plan.layers:
        for group in layer.groups:
            if group.objective is not None or group.by_layer:
                kinds.setdefault(group.with_share(0.5), {}).setdefault(group.anywhere, []).append(group)
    lines = []
    for options in kinds.values():
        together = [group for groups in options.values() for group in groups]
        for groups in options.values() if len(options) <= MOST_OPTIONS else [together]:
            mean = groups[0].average(groups)
            parts = [counted(len(groups), "head group"), mean.words(), mean.ranges(groups)]
            lines.append(f"{mean.short()}: {', '.join(filter(None, parts))}")
    return lines


def _print_profile(profile: Any) -> None:
    from rich.table import Table

    from compress.cli.tables import show
    from compress.profile.stability import stabilities

    header = profile.header
    typer.echo(f"{header.model.architecture}: {header.model.layers} layers, {header.model.kv_heads} head groups")
    typer.echo(f"model {header.fingerprint}")
    for word, corpus in (("documents", header.documents), ("second corpus", header.second)):
        if corpus:
            counts = ", ".join(f"{count} of {length:,} tokens" for length, count in sorted(corpus.items()))
            typer.echo(f"{word} {counts}; seed {header.seed}")
    typer.echo(f"took {duration(header.seconds)}, peak memory {size(header.peak_memory_bytes)}")
    if header.loss:
        typer.echo("loss " + ", ".join(f"{loss:.4f} at {length:,}" for length, loss in sorted(header.loss.items())))
    table = Table(title="tensors", box=None)
    for column in ("statistic", "tensor", "shape", "axes", "unit"):
        table.add_column(column, no_wrap=column == "tensor", overflow="fold")
    for name, statistic in header.statistics.items():
        for key, entry in statistic.tensors.items():
            table.add_row(name, key, " x ".join(map(str, entry.shape)), ", ".join(entry.axes), entry.unit)
    show(table)
    for name, stability in stabilities(profile).items():
        typer.echo(f"{name} on two corpora: {stability.line()}")


def _print_options(folder: Path, as_json: bool) -> None:
    """What was trained before the search: how far it came, how wrong it still is, and what that costs the loss."""
    from rich.table import Table

    from compress.cli.tables import show
    from compress.models.prepared import read_options
    from compress.profile.store import read_profile
    from compress.registry import targets
    from compress.runfolder import EFFECTS

    options = read_options(folder)
    if as_json:
        typer.echo(json.dumps({name: option.model_dump(mode="json") for name, option in options.items()}, indent=1))
        return
    measured = folder / Path(EFFECTS).name
    effects = read_profile(measured) if (measured / "profile.json").is_file() else None
    lengths = effects.lengths if effects is not None else ()
    table = Table(
        title="prepared targets",
        caption="error: of a head group's outputs, squared, over the squared outputs (of a scorer: of its scores, over "
        "the variance of what they stand for); effect: the rise of the loss to first order, nats, mean over groups",
        box=None,
    )
    table.add_column("target", overflow="fold")
    table.add_column("objective", overflow="fold")
    for column in ("tokens", "first loss", "last loss", "mean error", "worst error"):
        table.add_column(column, justify="right")
    for length in lengths:
        table.add_column(f"effect at {length:,}", justify="right")
    for option in options.values():
        target = targets.parse(option.target)
        errors = [error for row in option.errors if row is not None for error in row]
        table.add_row(
            target.words(),
            " + ".join(one["name"] for one in option.objective.get("objectives", [option.objective])),
            f"{option.tokens:,}",
            f"{option.first_loss:.4g}",
            f"{option.last_loss:.4g}",
            f"{sum(errors) / len(errors):.3g}",
            f"{max(errors):.3g}",
            *(_effect(effects, target, length) for length in lengths),
        )
    for target in effects.priced if effects is not None else ():
        if target.open:  # a scorer that was prepared serves it
            table.add_row(target.words(), *[""] * 6, *(_effect(effects, target, length) for length in lengths))
    show(table)


def _effect(effects: Any, target: Any, length: int) -> str:
    """What a target costs at a length; nothing where it was not priced."""
    return f"{float(effects.effect(target, length).mean()):.3g}" if target in effects.priced else ""


def _print_checkpoint(folder: Path) -> None:
    """What is in a checkpoint besides its plan. Raises UserError for a damaged record of its verification."""
    from compress.export.verify import Checks

    weights = sorted(folder.glob("*.safetensors"))
    typer.echo(
        f"{folder}: {counted(len(weights), 'weight file')}, {size(sum(path.stat().st_size for path in weights))}"
    )
    for line in _mixer_lines(weights):
        typer.echo(line)
    checks = folder / "compress_checks.json"
    if checks.is_file():
        verified = read_object(checks, "the record of the verification", fix="export again")
        try:
            words = Checks(**verified).words()
        except (TypeError, ValueError) as error:
            raise UserError(
                "the record of the verification is damaged", where=str(checks), found=str(error), fix="export again"
            ) from None
        typer.echo(f"verified: {words}")


def _mixer_lines(weights: Sequence[Path]) -> list[str]:
    """What the plan's targets have of their own in a checkpoint: parameters by name, with their sizes in all layers."""
    from safetensors import safe_open

    shapes: dict[str, list[list[int]]] = {}
    for path in weights:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                _, found, own = name.partition(".mixers.")
                if found:
                    shapes.setdefault(own, []).append(file.get_slice(name).get_shape())
    return [
        f"{name}: {counted(len(each), 'layer')}, {sum(map(prod, each)):,} numbers"
        for name, each in sorted(shapes.items())
    ]
