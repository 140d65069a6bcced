"""What no single key of a recipe shows: the same thing twice, and parts that need one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from compress.data.prompt import Task, check_scored
from compress.errors import Problem, UserError, nearest
from compress.limits import DOCUMENT_TOKENS
from compress.profile.checks import check_second, check_shared, grid_of
from compress.profile.key import Key
from compress.profile.statistic import giving
from compress.recipe.located_yaml import KeyPath, key_path
from compress.recipe.schema import CalibrationSection, Recipe
from compress.registry import Method, statistics
from compress.search.checks import section_problems
from compress.words import either

Finding = tuple[KeyPath, Problem]  # the key that it is about, and the problem without a place

FORMS = {
    "units": "a score of every head and neuron",
    "means": "mean inputs, which removed heads and neurons are compensated with",
    "groups": "one number for every head group",
    "rules": "a table of span rules",
    "targets": "what each of some targets costs every head group",
    "worth": "a score of every head, or one number for every head group",
    "prepared": "how wrong each prepared target is in every head group",
}


WORTH = {"units", "groups"}  # what says which heads matter


def cross_checks(recipe: Recipe) -> list[Finding]:
    """All problems of a recipe whose keys are each right; those that only a search would find out after the others."""
    plain = [*_repeated(recipe), *_too_many_documents(recipe), *_no_right_answer(recipe), *_missing_scores(recipe)]
    return plain or [
        *section_problems(recipe.search.solver, recipe.search.budget, recipe.search.refine, recipe.search.serve),
        *_grids(recipe),
        *_native(recipe),
        *_shared(recipe),
        *_second(recipe),
        *_nothing_to_train_on(recipe),
        *_without_evidence(recipe),
        *_unknown_weights(recipe),
        *_seed_twice(recipe),
    ]


def _seed_twice(recipe: Recipe) -> Iterator[Finding]:
    """The seed among the experts by its name and by `seed: true`."""
    section = recipe.upcycle
    if section is not None and section.seed and recipe.model in section.experts:
        yield (
            ("upcycle", "experts"),
            Problem("the seed is an expert twice", None, "each expert once", recipe.model, "leave `seed` out"),
        )


def _repeated(recipe: Recipe) -> Iterator[Finding]:
    lists: list[tuple[KeyPath, tuple[Method, ...]]] = [
        (("calibration", "documents"), recipe.calibration.documents),
        (("calibration", "held_out"), recipe.calibration.held_out),
        (("profile", "statistics"), recipe.profile.statistics),
        (("evaluate", "recall"), recipe.evaluate.recall),
    ]
    for path, methods in lists:
        profile = path[0] == "profile"
        first: dict[Any, int] = {}
        for number, method in enumerate(methods):
            before = first.setdefault(type(method) if profile else (type(method), method.model_dump_json()), number)
            if before != number:
                yield (
                    (*path, number),
                    Problem(
                        f"duplicate entry `{key_path((*path, number))}`",
                        expected="each entry once",
                        found=f"the same as `{key_path((*path, before))}`",
                        fix="remove one of the two" if profile else "raise `count` instead",
                    ),
                )


def _too_many_documents(recipe: Recipe) -> Iterator[Finding]:
    """Lists of documents that are each within the limits, and together more than a memory holds."""
    calibration = recipe.calibration
    lists: list[tuple[KeyPath, tuple[Task, ...]]] = [
        (("calibration", "documents"), calibration.documents),
        (("calibration", "training"), calibration.training),
        (("calibration", "held_out"), calibration.held_out),
        (("evaluate", "recall"), recipe.evaluate.recall),
    ]
    for path, tasks in lists:
        tokens = sum(task.length * task.count for task in tasks)
        if tokens > DOCUMENT_TOKENS:
            yield (
                path,
                Problem(
                    f"`{key_path(path)}` asks for too many tokens",
                    expected=f"at most {DOCUMENT_TOKENS:,} tokens, length times count, of all entries together",
                    found=f"{tokens:,}",
                    fix="lower `count` or `length`",
                ),
            )


def _told(path: KeyPath, check: Callable[[], object]) -> Iterator[Finding]:
    """The problems that a check raises, which the run would raise otherwise, at a key."""
    try:
        check()
    except UserError as error:
        yield from ((path, replace(problem, where=None)) for problem in error.problems)


def _no_right_answer(recipe: Recipe) -> Iterator[Finding]:
    for number, task in enumerate(recipe.evaluate.recall):
        yield from _told(("evaluate", "recall", number), partial(check_scored, task))


def _missing_scores(recipe: Recipe) -> Iterator[Finding]:
    """What the solver reads by name and the profile would not have, which only the search would find out."""
    measured: dict[str, str] = {}
    for statistic in recipe.profile.statistics:
        measured |= statistic.gives
    if recipe.prepare is not None:
        measured |= recipe.prepare.measured
    reads: list[tuple[KeyPath, str, Mapping[str, str]]] = [
        (("search", "solver"), "the solver", recipe.search.solver.scores_read())
    ]
    for number, statistic in enumerate(recipe.profile.statistics):
        reads.append((("profile", "statistics", number), f"`{statistic.registered}`", statistic.scores_read()))
    if recipe.prepare is not None:
        reads.append((("prepare",), "`prepare.layers`", recipe.prepare.pricing().scores_read()))
    owners = {name: (owner, statistic) for owner, statistic in statistics.items() for name in statistic.gives}
    for path, reader, wanted in reads:
        for name, form in wanted.items():
            fits = WORTH if form == "worth" else {form}
            known = Key.parse(name).name if form == "worth" else name
            if measured.get(known) in fits:
                continue
            others = recipe.search.solver.other_scores if path == ("search", "solver") else ()
            fitting = [other for other in measured if measured[other] in fits or other in others]
            if known in measured:
                what, actual = f"{reader} cannot use `{name}`", f"{name}, {FORMS[measured[known]]}"
                fix = nearest(name, fitting)
            else:
                what, actual = f"{reader} reads `{name}`, which is not measured", name
                if known in owners and owners[known][1].gives[known] in fits:
                    fix = f"add `{{name: {owners[known][0]}}}` to `profile.statistics`"
                    if recipe.prepare is not None and form == "targets":
                        fix += ", or `effect: true` to `prepare`"
                else:
                    prepared = "add a section `prepare` with the targets" if form == "prepared" else None
                    fix = nearest(name, fitting) or prepared
            expected = f"{FORMS[form]}, of what is measured here: {', '.join(fitting) or 'none is listed'}"
            yield path, Problem(what, None, expected, actual, fix)


def _shared(recipe: Recipe) -> Iterator[Finding]:
    """What cannot be measured where processes share documents."""
    section = recipe.profile
    if section.context == 1:
        return
    yield from _told(("profile", "context"), lambda: check_shared(section.statistics))
    if section.stream:
        yield (
            ("profile", "context"),
            Problem("a model that is read layer by layer has whole documents", None, "1", str(section.context)),
        )


def _grids(recipe: Recipe) -> Iterator[Finding]:
    """A search of spans chooses from one grid of rules."""
    solver, measured = recipe.search.solver, recipe.profile.statistics
    if solver.spans and solver.needs_grid and all(statistic.span_grid is None for statistic in measured):
        yield (
            ("profile", "statistics"),
            Problem(
                "no statistic measures what span rules cost, which this solver needs",
                expected=either(giving("rules")),
                fix="add `{name: influence}`",
            ),
        )
    yield from _told(("profile", "statistics"), lambda: grid_of(measured))


def _native(recipe: Recipe) -> Iterator[Finding]:
    """Searches whose windows all have sinks, which no native checkpoint holds: told now, and not after the search."""
    solver = recipe.search.solver
    if recipe.export.form != "native" or recipe.upcycle is not None or solver.removes:
        return
    grids = [grid for statistic in recipe.profile.statistics if (grid := statistic.span_grid) is not None]
    sinks = {sink for grid in grids for sink in grid.sinks} if solver.sinks is None else set(solver.sinks)
    if solver.spans and solver.needs_grid and 0 not in sinks:
        yield (
            ("export", "form"),
            Problem(
                "a native checkpoint holds no windows with sinks, and this search chooses no others",
                expected="`sink: 0`, as in `solver: {name: layers, sink: 0}`",
                found=f"`{solver.registered}` with sinks of {', '.join(map(str, sorted(sinks)))} tokens",
                fix="search with that, or write `form: patched`, which holds every plan",
            ),
        )


def _second(recipe: Recipe) -> Iterator[Finding]:
    if recipe.calibration.second is not None:
        yield from _told(("calibration", "second"), lambda: check_second(recipe.profile.statistics))


def _nothing_to_train_on(recipe: Recipe) -> Iterator[Finding]:
    learnt = {task.task for task in recipe.calibration.training or recipe.calibration.documents}
    for number, statistic in enumerate(recipe.profile.statistics):
        yield from _told(("profile", "statistics", number), partial(statistic.check_training, learnt))


def _without_evidence(recipe: Recipe) -> Iterator[Finding]:
    """Lengths at which a solver reads where evidence lies, and no document hides anything."""
    lengths = recipe.calibration.lengths
    hiding = {task.length for task in recipe.calibration.documents if task.hides}
    of_evidence = {name for statistic in recipe.profile.statistics if statistic.of_evidence for name in statistic.gives}
    read = {form for name, form in recipe.search.solver.scores_read().items() if name in of_evidence}
    # A table of rules is read at every length; of a number for each head group the lengths that have it are averaged.
    everywhere = "rules" in read
    lacking = lengths - hiding if everywhere else lengths if read and not hiding else set()
    if lacking:
        yield (
            ("search", "solver"),
            Problem(
                "the solver uses what heads retrieve, but no calibration document hides anything to retrieve",
                expected="a task as `passkey` among `calibration.documents`"
                + (", at every length" if everywhere else ""),
                found=f"none at {', '.join(f'{length:,} tokens' for length in sorted(lacking))}",
            ),
        )


def _unknown_weights(recipe: Recipe) -> Iterator[Finding]:
    """Weights of tasks that a refinement has no documents of."""
    refine = recipe.search.refine
    known = _tasks(recipe.calibration)
    unknown = sorted(set(refine.weights if refine else ()) - known)
    if unknown:
        yield (
            ("search", "refine", "weights"),
            Problem(
                f"there are no documents of task {', '.join(unknown)} to weigh",
                expected=f"some of {', '.join(sorted(known))}",
                fix=nearest(unknown[0], known),
            ),
        )


def _tasks(calibration: CalibrationSection) -> set[str]:
    return {task.task for task in (*calibration.documents, *calibration.training)}
