"""The search stage: the plan, chosen by measured loss on the held-out documents."""

from __future__ import annotations

from compress.bench.measure import copy_bandwidth
from compress.data.sample import Sample
from compress.models.placement import input_device
from compress.models.processes import find_processes
from compress.plan import Plan, read_plan
from compress.report.plots import search_plots
from compress.runfolder import TRAINED_PLAN
from compress.search.run import SearchResult, run_search
from compress.search.workers import Measurer, Workers
from compress.stages.prepare import effects_stage, prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.session import Session
from compress.stages.stage import documents_of, draw, missing, refuse_upcycled, require, timed
from compress.words import duration

SPANS = "spans.svg"  # written last of the stage's plots: where it is, all are

# Why a refinement measured no exchange, by whether nothing was left to try.
NO_STEPS = {
    True: "; no exchange within the budget is better by the quadratic model, so none was measured",
    False: "; the time ended before the first exchange, raise `search.refine.minutes`",
}


def help_search(session: Session) -> None:
    """What a helper does in the search stage: it measures what the main process asks for.

    Raises:
        UserError: as `search_stage` there.
    """
    run = session.run
    prepare_stage(session, must_be_done=True)
    if run.stage_done("search", session.search_key()):
        return
    with session.together():
        processes = find_processes(input_device(session.loaded.model))
        documents_of(session, session.recipe.calibration.held_out, "held_out")
        if session.recipe.search.refine is not None:
            for requests in (session.recipe.calibration.documents, session.recipe.calibration.training):
                documents_of(session, requests, "calibration")
        Workers(processes, Measurer(session.loaded.model).works).serve()


def search_stage(session: Session, *, must_be_done: bool = False) -> Plan:
    """The plan of the recipe, searched or as it was found before.

    In a launch of several processes all of them call this: the main one searches, and all share what it measures.

    Args:
        must_be_done: only read what is there.

    Raises:
        UserError: not done although it must be, there is no profile, or it failed (see `run_search`).
    """
    refuse_upcycled(session, "search")
    run, recipe, say = session.run, session.recipe, session.reporter.say
    if must_be_done:
        require(session, "search")
    elif not run.may_be_done("search", session.outline(session.search_key)):
        require(session, "profile", *(["prepare"] if recipe.prepare is not None else []))
    prepare_stage(session, must_be_done=True)
    key = session.search_key()
    if run.stage_done("search", key):
        if not must_be_done:
            say(f"search: done before, {run.plan}")
            if not (run.plots / SPANS).is_file():
                draw(session, search_plots)
        return read_plan(run.plan, session.shape)
    if must_be_done:
        raise missing(session, "search", run.plan)
    profile = profile_stage(session, must_be_done=True)
    effects = effects_stage(session, must_be_done=True)

    def work(workers: Workers | None) -> SearchResult:
        held_out = documents_of(session, recipe.calibration.held_out, "held_out")
        learnt: list[Sample] = []
        if recipe.search.refine is not None:
            for requests in (recipe.calibration.documents, recipe.calibration.training):
                for _, group in sorted(documents_of(session, requests, "calibration").items()):
                    learnt += group
        with session.reporter.progress("search") as report:
            return run_search(
                session.loaded,
                profile,
                held_out,
                recipe.search,
                run.path,
                progress=report,
                refine_documents=learnt,
                seed=recipe.seed,
                bandwidth=lambda: copy_bandwidth(input_device(session.loaded.model)),
                say=lambda line: say(f"search: {line}"),
                effects=effects,
                workers=workers,
            )

    def shared_work() -> SearchResult:
        processes = find_processes(input_device(session.loaded.model))
        if processes.world == 1:
            return work(None)
        workers = Workers(processes, Measurer(session.loaded.model).works)
        try:
            return work(workers)
        finally:
            workers.end()

    for outdated in (run.plots / SPANS, run.path / TRAINED_PLAN):
        outdated.unlink(missing_ok=True)
    with session.together():
        result = timed(session, "search", session.search_key, ["plan.json", "search"], shared_work)
    plan = result.plan
    if "refine" in result.report:
        refined = result.report["refine"]
        say(
            f"search: refined {refined['start']} in {refined['steps']} steps and {duration(refined['seconds'])}: loss "
            f"{refined['start_loss']:.4f} to {refined['loss']:.4f}, relative to the uniform plan's"
            + ("" if refined["steps"] else NO_STEPS[refined["exhausted"]])
        )
    say(f"search: {result.report['why']}")
    for line in result.lines:
        say(f"search: {line}")
    draw(session, search_plots)
    return plan
