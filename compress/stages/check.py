"""Everything of a run that needs no weights, checked before work starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.prompt import Task
from compress.data.text import Part, Source, characters_for
from compress.errors import Problem, UserError, placed
from compress.evaluate.measure import Reading, asked_for, texts_of
from compress.models.families import context_of
from compress.models.load import CheckedModel, check_model
from compress.models.upcycle import check_configs, check_tokenizers, check_upcyclable
from compress.models.vocabulary import check_tokens
from compress.recipe.schema import Recipe, UpcycleSection
from compress.runfolder import check_output
from compress.search.preview import check_prepare, check_search, unlearnt
from compress.stages.device import resolve_device
from compress.stages.reporter import Reporter
from compress.stages.session import Session
from compress.stages.upcycle import LENGTH as WINDOW
from compress.train.windows import check_windows


@dataclass(frozen=True)
class Use:
    """What reads a part of a text.

    Attributes:
        label: how the printed line names the part.
        place: the recipe's key.
        tokens: of the part that are needed.
        check: called with the token ids of the part (`Source.foreseen`), raises UserError where they do not do.
    """

    label: str
    source: Source
    part: Part
    place: str
    tokens: int
    check: Callable[[Sequence[int]], Any]


def check_ahead(session: Session) -> None:
    """`check_run` before the first stage of a run that is not finished: what is wrong with a later stage is told
    before hours go into an earlier one. Notes are left to the stages. Raises UserError."""
    if not session.run.may_be_done("evaluate", session.outline(session.evaluate_key)):
        check_run(session.recipe, resumed=bool(session.run.stages()))


def check_run(recipe: Recipe, reporter: Reporter | None = None, *, resumed: bool = False) -> dict[str, int]:
    """Check all of a run that needs no weights, every prompt included, and give the tokens of each part of the text.

    Args:
        reporter: gets notes on what may not be meant.
        resumed: whether stages may be finished. What these have read need not be there any more, so a text that cannot
            be read is left to the stage that reads it.

    Raises:
        UserError: all that does not fit: the model, its context, a text, the budget, a file that the recipe names.
    """
    with placed(str(recipe.source)):
        resolve_device(recipe.device)
    with placed(f"{recipe.source}: model"):
        model = check_model(recipe.model)
    say = (lambda line: None) if reporter is None else reporter.say
    for note in model.notes:
        say(f"  {note}")
    problems: list[Problem] = []

    def noted(place: str, check: Callable[[], Any]) -> None:
        try:
            check()
        except UserError as error:
            problems.extend(_placed(problem, str(recipe.source), place) for problem in error.problems)

    noted("output", lambda: check_output(Path(recipe.output).expanduser()))
    lengths, section = recipe.calibration.lengths, recipe.search
    measured, prepare = recipe.profile.statistics, recipe.prepare
    if recipe.upcycle is None:
        if prepare is not None:
            noted("prepare", lambda: check_prepare(model.config, prepare))
        noted("search", lambda: check_search(model.config, recipe.dtype, section, measured, lengths, prepare))
        if reporter is not None and prepare is not None:
            recover = None if recipe.recover is None else recipe.recover.length
            for line in unlearnt(model.config, prepare, recover, lengths):
                say(f"  {line}")
    else:
        noted("upcycle", functools.partial(_check_experts, recipe.upcycle, model))
    for place, check in _requests(recipe, model.config):
        noted(place, check)
    uses = uses_of(recipe, model.tokenizer, model.config)
    context = context_of(model.config)
    most: dict[str, int] = {}
    for use in uses:
        name = use.source.model_dump_json()
        most[name] = max(most.get(name, 0), characters_for(use.tokens, use.part))
    tokens: dict[str, int] = {}
    texts: dict[str, str] = {}
    parts: dict[tuple[str, Part], Sequence[int]] = {}
    for use in uses:
        name = use.source.model_dump_json()
        if name not in texts:
            noted(use.place, functools.partial(use.source.check, context))
            try:
                with placed(f"{recipe.source}: the text of {use.place}"):
                    excerpt = use.source.known(most[name])
            except UserError:
                if not resumed:
                    raise
                continue
            if excerpt.used is not None:
                say(f"text: {use.source.label}: {excerpt.used}")
            texts[name] = excerpt.text
        if (name, use.part) not in parts:
            parts[name, use.part] = use.source.foreseen(model.tokenizer, texts[name], use.part)
        ids = parts[name, use.part]
        check_tokens(ids, model.config, f"{recipe.source}: the text of {use.place}")
        tokens.setdefault(use.label, max(len(ids), use.source.written(use.part)))
        noted(use.place, functools.partial(use.check, ids))
    if problems:
        raise UserError(problems)
    return tokens


def _check_experts(section: UpcycleSection, seed: CheckedModel) -> None:
    """What can be known of the experts without their weights."""
    check_upcyclable(seed.config, section.kv)
    for name in section.experts:
        expert = check_model(name)
        check_configs(seed.config, expert.config, name)
        check_tokenizers(seed.tokenizer, expert.tokenizer, name)


def _requests(recipe: Recipe, config: Any) -> list[tuple[str, Callable[[], Any]]]:
    """Checks of what an evaluation asks for that need no text, by key."""
    context = context_of(config)
    checks: list[tuple[str, Callable[[], Any]]] = []
    for measure in asked_for(recipe.evaluate):
        place = f"evaluate.{measure.registered}"
        checks.append((place, functools.partial(measure.check, context)))
        if measure.files_are:
            checks.append((place, measure.files))
    return checks


def uses_of(recipe: Recipe, tokenizer: Any = None, config: Any = None) -> list[Use]:
    """Everything that reads a text, in the order of the stages; the model's facts are needed for `Use.check` alone."""
    context = context_of(config)
    calibration, asked = recipe.calibration, asked_for(recipe.evaluate)
    evaluated = texts_of(asked, calibration.text)
    uses: list[Use] = []

    def add(label: str, source: Source, part: Part, place: str, tasks: Sequence[Task]) -> None:
        for number, task in enumerate(tasks):
            seed = f"{recipe.seed}/{part}"
            check = functools.partial(task.make, tokenizer, seed=seed, context=context)
            uses.append(Use(label, source, part, f"{place}[{number}]", task.length, check))

    add("calibration", calibration.text, "calibration", "calibration.documents", calibration.documents)
    add("calibration", calibration.text, "calibration", "calibration.training", calibration.training)
    if calibration.second is not None:
        add("second", calibration.second, "calibration", "calibration.documents", calibration.documents)
    add("held_out", calibration.text, "held_out", "calibration.held_out", calibration.held_out)
    for measure in asked:
        for reading in measure.readings(recipe.seed):
            if reading.tokens is not None:
                source, place = reading.source or evaluated, f"evaluate.{measure.registered}{reading.place}"
                fits = functools.partial(_fits, reading, tokenizer, context)
                uses.append(Use("evaluation", source, "evaluation", place, reading.tokens, fits))
    if recipe.upcycle is not None:
        for number, text in enumerate(recipe.upcycle.texts):
            length = min(WINDOW, recipe.upcycle.text_tokens, context or WINDOW)  # as the stage has it
            fits = functools.partial(_windows_fit, length, None, "upcycle", f"texts[{number}]", "text_tokens")
            tokens = recipe.upcycle.text_tokens
            uses.append(Use("experts", text, "calibration", f"upcycle.texts[{number}]", tokens, fits))
    for section, settings in (("prepare", recipe.prepare), ("recover", recipe.recover)):
        if settings is not None:
            fits = functools.partial(_windows_fit, settings.length, context, section)
            label = section if settings.text else "calibration"
            source = settings.text or calibration.text
            uses.append(Use(label, source, "calibration", section, settings.text_tokens, fits))
            if settings.second is not None:
                fits = functools.partial(_windows_fit, settings.length, context, section, "beside")
                uses.append(
                    Use(section, settings.second, "calibration", f"{section}.beside", settings.text_tokens, fits)
                )
    return uses


def _windows_fit(length: int, context: int | None, *keys_and_ids: Any) -> None:
    *keys, ids = keys_and_ids
    check_windows(len(ids), length, context, *keys)


def _fits(reading: Reading, tokenizer: Any, context: int | None, ids: Sequence[int]) -> None:
    reading.check(tokenizer, ids, context)


def _placed(problem: Problem, source: str, place: str) -> Problem:
    """The problem with the recipe and the key before its own place, which may be a key of the recipe already."""
    inner = problem.where or ""
    known = inner.startswith(place) or inner.partition(".")[0] in Recipe.model_fields
    problem.where = ": ".join([source, *([] if known else [place]), *([inner] if inner else [])])
    return problem
