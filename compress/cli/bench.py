"""`compress bench`: time and memory of a plan beside the dense model, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.cli import arguments
from compress.cli.output import AsJson, Verbose, say
from compress.errors import UserError, nearest
from compress.limits import BATCH, SEED
from compress.models.known_shapes import SHAPES

MIXES = ("A", "B", "full", "R75", "R50", "R75h", "R50h")
KINDS = ("kernel", "layer", "model")


def bench(
    model: Annotated[
        str, typer.Argument(help="A shape (llama-3-8b, llama-3-70b, qwen2.5-7b, tiny), a config.json, or a model.")
    ],
    plan: Annotated[str | None, typer.Option(help="A plan.json, for a model that carries none.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(
            help="Named plans instead, by commas: A, B, full, R75 or R50 (routed groups), R75h or R50h (heads)."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model, for a checkpoint on other weights than its own: a pruned one.")
    ] = None,
    what: Annotated[str, typer.Option(help="By commas: kernel, layer, model.")] = "kernel,layer,model",
    lengths: Annotated[str, typer.Option(help="Tokens, by commas.")] = "1024,4096,16384",
    batch: Annotated[int, typer.Option(min=1, max=BATCH, help="Sequences in a decode step.")] = 1,
    impl: Annotated[str, typer.Option(help="auto, reference, triton, fla or flash.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(min=0, max=SEED, help="Seed of random weights and inputs.")] = 0,
    out: Annotated[str | None, typer.Option(help="A folder for bench.json and bench.png.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Measure attention alone and the whole model, always beside the fastest dense attention of PyTorch."""
    kinds = arguments.names(what, KINDS, "--what")
    mixes = arguments.names(mix, MIXES, "--mix")
    sizes = arguments.lengths(lengths)
    arguments.one_of(impl, arguments.IMPLS, "--impl")
    arguments.one_of(dtype, arguments.DTYPES, "--dtype")
    arguments.device(device)
    if model not in SHAPES:
        path = arguments.model(model)
        hint = None if "/" in path or Path(path).exists() else nearest(model, SHAPES)
        if hint is not None:
            known = f"a shape ({', '.join(SHAPES)}), a config.json, or a model"
            raise UserError("no such shape, file or folder", where=model, expected=known, fix=hint)
    if plan is not None and not arguments.given_path(plan, "--plan").is_file():
        raise UserError("no such plan", where=plan, expected="a plan.json", fix="`compress search` writes one")
    if dense is not None:
        arguments.model(dense, "--dense")
    if mixes and plan is not None:
        raise UserError("--mix and --plan cannot be combined", where="--mix", fix="leave out --mix or --plan")
    if not mixes:  # kernels and single layers are measured with a named plan
        kinds = [kind for kind in kinds if kind == "model"]
        if not kinds:
            raise UserError(
                "kernels and single layers can only be measured with a named plan",
                where="--mix",
                expected=", ".join(MIXES),
                found="none",
                fix="add --mix A, or measure --what model",
            )
    elif dense is not None:
        raise UserError("--mix and --dense cannot be combined", where="--dense", fix="leave out --mix or --dense")
    if dense is not None and plan is not None:
        raise UserError("--plan and --dense cannot be combined", where="--dense", fix="leave out --plan or --dense")
    folder = None if out is None else arguments.out_folder(out)
    report = measure(model, plan, mixes, kinds, sizes, batch, impl, device, dtype, seed, dense)
    if folder is not None:
        _write(report, folder)
    if as_json:
        typer.echo(json.dumps(report["values"], indent=1))
    else:
        _show(report)


def measure(
    model: str,
    plan: str | None,
    mixes: list[str],
    kinds: list[str],
    lengths: list[int],
    batch: int,
    impl: str,
    device: str,
    dtype: str,
    seed: int,
    dense_model: str | None = None,
) -> dict[str, Any]:
    """All measurements that fit into memory; `values` is what goes into JSON."""
    from functools import partial

    import torch

    from compress.bench import kernel, measure, memory, report
    from compress.bench import model as whole
    from compress.environment import environment
    from compress.models.load import DTYPES
    from compress.models.placement import first_device, placement_of
    from compress.models.source import ModelSource
    from compress.plan.states import states_of
    from compress.registry import targets
    from compress.runtime.impl import explain_impl
    from compress.stages.device import resolve_device
    from compress.targets.target import load_mixers

    named = resolve_device(device)
    where = first_device(named)
    load_mixers(targets)  # whose files say what an implementation needs besides
    try:
        explain_impl(impl, where, DTYPES[dtype], 128)
    except ValueError as error:
        raise UserError(
            "this implementation cannot run here",
            where="--impl",
            found=str(error),
            fix="use auto or reference",
        ) from error
    torch.manual_seed(seed)
    source = ModelSource(model, plan)
    copy = measure.copy_bandwidth(where)
    rows: list[kernel.Row] = []
    skipped: list[str] = []

    def skip(line: str) -> None:
        say(f"  {line}")
        skipped.append(line)

    if "kernel" in kinds:
        shape = kernel.Shape.of(source.name, source.config())
        for name in mixes:
            for length in lengths:
                prefill = (1, kernel.prefill_row, memory.prefill_need)
                for count, take, need in (prefill, (batch, kernel.decode_row, memory.decode_need)):
                    title = f"{take.__name__.split('_')[0]} {name} batch {count}, {length} tokens"
                    say(f"  {title}")
                    call = partial(take, shape, name, count, length, impl, where, DTYPES[dtype])
                    row = memory.attempt(title, need(shape, count, length, DTYPES[dtype]), where, call, skip)
                    rows += [row] if row else []
                    measure.release(where)
    models: list[whole.ModelRow] = []
    plan_of_model = None if mixes else source.written_plan()
    for kind in ("layer", "model"):
        if kind not in kinds:
            continue
        base = source if dense_model is None else ModelSource(dense_model)
        dense = source.layer(where, DTYPES[dtype]) if kind == "layer" else base.dense(named, DTYPES[dtype])
        label = f"{source.name}, one layer" if kind == "layer" else source.name
        wanted: list[str | None] = [*mixes] or [None]
        for mix in wanted:
            for length in lengths:
                title = f"{kind} {mix or 'with its plan'}, batch {batch}, {length} tokens"
                say(f"  {title}")
                if mix is not None:
                    planned, plan_name = kernel.with_mix(dense, mix, length), mix
                elif dense_model is None:
                    planned, plan_name = source.planned(dense)
                else:
                    planned, plan_name = source.carried(named, DTYPES[dtype]), f"against {base.name}"
                planned.config.compress_impl = impl
                time_both = partial(
                    whole.model_row, dense, planned, label, plan_name, batch, length, plan=plan_of_model
                )
                need_of_one = memory.model_need(dense, batch, length) // len(placement_of(dense).devices)
                timed = memory.attempt(title, need_of_one, where, time_both, skip)
                models += [timed] if timed else []
                del planned, time_both
                measure.release(where)
        del dense
        measure.release(where)
    states = None if plan_of_model is None else states_of(plan_of_model, DTYPES[dtype].itemsize)
    reached: dict[str, int | None] = {
        f"{what}, plan {name}": report.break_even([row for row in rows if row.mix == name], what)
        for name in mixes
        for what in ("prefill", "decode")
        if rows
    }
    if states is not None:
        reached["bytes of states and cache"] = states.pays_from
    values = {
        "model": model,
        "dense_model": dense_model,
        "random_weights": source.random,
        "dtype": dtype,
        "seed": seed,
        "impl": impl,
        "copy_bytes_per_s": copy,
        "kernel": [row.values() for row in rows],
        "model_rows": [row.values() for row in models],
        "skipped": skipped,
        "break_even": reached,
        "environment": environment(),
    }
    return {"values": values, "rows": rows, "models": models, "copy": copy}


def _write(report: dict[str, Any], folder: Path) -> None:
    from compress.files import sweep, write_text
    from compress.json_file import sealed
    from compress.plots.chart import draw_charts
    from compress.plots.speed import speed_charts

    arguments.make_folder(folder)
    sweep(folder)
    write_text(folder / "bench.json", sealed(report["values"]))
    if report["rows"]:
        draw_charts(speed_charts(report["rows"]), folder / "bench")


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from compress.bench.report import KERNEL_HEAD, kernel_lines, model_lines, routed_line
    from compress.cli.tables import show

    values = report["values"]
    gpus = values["environment"]["gpus"]
    name = gpus[0]["name"] if gpus else "CPU"
    copied = f"{report['copy'] / 1e9:.0f} GB/s"
    typer.echo(f"{values['model']} on {name}, {values['dtype']}, impl {values['impl']}; a device copy moves {copied}")
    if report["rows"]:
        table = Table(box=None)
        for column in KERNEL_HEAD:
            table.add_column(column, justify="left" if column in ("", "plan") else "right")
        for row in report["rows"]:
            table.add_row(*kernel_lines(row, report["copy"]))
        show(table)
        for line in filter(None, map(routed_line, report["rows"])):
            typer.echo(line)
    for row in report["models"]:
        typer.echo("\n".join(model_lines(row)))
    for what, length in values["break_even"].items():
        typer.echo(f"break-even, {what}: {'not reached' if length is None else f'{length:,} tokens'}")
