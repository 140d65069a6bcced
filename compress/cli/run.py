"""`compress run`."""

from __future__ import annotations

import time

import typer

from compress.cli.output import AsJson, Verbose, say
from compress.cli.recipe import Fresh, Overwrite, RecipeFile, Settings, opened
from compress.words import duration, size


def run(
    recipe: RecipeFile,
    settings: Settings = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Profile, prepare, search, recover, export, evaluate and report, and print what was kept and lost.

    With `upcycle:` in the recipe, several models become one in place of the first three.

    What an earlier run of the recipe finished is not repeated; after a change in the recipe only the stages that
    depend on it run again.
    """
    from compress.cli.tables import show

    started = time.monotonic()
    with opened(recipe, settings, overwrite=overwrite, fresh=fresh, helpers=True) as session:
        from compress.cli.report import write_report
        from compress.environment import peak_memory
        from compress.stages.check import check_ahead
        from compress.stages.evaluate import evaluate_stage, help_evaluate
        from compress.stages.export import check_target, export_stage
        from compress.stages.prepare import prepare_stage
        from compress.stages.processes import check_launch
        from compress.stages.profile import profile_stage
        from compress.stages.recover import recover_stage
        from compress.stages.search import help_search, search_stage
        from compress.stages.upcycle import upcycle_stage

        check_launch(session.recipe, session.run.path, "profile", "recover")
        if session.helper:
            if session.recipe.upcycle is None:
                profile_stage(session)
            prepare_stage(session)
            if session.recipe.upcycle is None:
                help_search(session)
            recover_stage(session)
            help_evaluate(session)
            return
        check_target(session, overwrite)
        check_ahead(session)
        if session.recipe.upcycle is not None:
            upcycle_stage(session)
        else:
            profile_stage(session)
            prepare_stage(session)
            search_stage(session)
        recover_stage(session)
        checkpoint = export_stage(session, overwrite=overwrite)
        comparison = evaluate_stage(session)
        stages = {name: entry["seconds"] for name, entry in session.run.stages().items()}
        seconds, peak = round(time.monotonic() - started, 1), peak_memory()
        write_report([session.run.path], session.run.path / "report.html")
        session.run.log("summary", seconds=seconds, peak_memory_bytes=peak, stages=stages)
    if as_json:
        typer.echo(comparison.model_dump_json(by_alias=True, indent=1))
    else:
        from compress.evaluate.tables import tables  # imports torch, which a wrong recipe is to be told without

        for table in tables(comparison):
            show(table)
        typer.echo(f"\ncheckpoint   {checkpoint}")
        typer.echo(f"run folder   {session.run.path}")
        typer.echo(f"report       {session.run.path / 'report.html'}")
        typer.echo("stages       " + ", ".join(f"{name} {duration(taken)}" for name, taken in stages.items()))
        typer.echo(f"this command {duration(seconds)}, peak memory {size(peak)}")
    from compress.export.layout import brings_code  # imports torch, which a wrong recipe is to be told without

    say("")
    say("Load it anywhere that has torch and transformers:")
    flag = ", trust_remote_code=True" if brings_code(checkpoint) else ""
    say(f'  AutoModelForCausalLM.from_pretrained("{checkpoint}"{flag})')
