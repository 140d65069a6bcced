"""Refinement: rules are exchanged between head groups, and an exchange stays when the measured loss has fallen.

Scores of heads, and influence, look at one group at a time; what groups do together they do not know. Here the loss is
the plan's own: the divergence from the dense model on documents, every task relative to what the uniform plan of the
same bytes loses on it (at least a hundredth of a nat), so that no task outweighs another.

What to try comes from a quadratic model of that loss (effects.py), made once: exchanges of at most `radius` groups
that the model likes best within the budget. The model is made of samples, so the more of its interactions between
groups one believes the more one fits their noise; every radius is tried with half, a quarter and none of them. A
success widens the radius, a failure of all three halves it. The budget holds at every step, and no task may lose more
than it did at the start: one that would counts twice in what is tried next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from compress.data.sample import Sample
from compress.errors import UserError
from compress.files import key_of, write_text
from compress.json_file import read_sealed, sealed
from compress.limits import FACTOR, MINUTES
from compress.models.planned import planned_model, set_plan
from compress.partial import read_partial, write_partial
from compress.registry import Method
from compress.runtime.span import FULL, PAGE, Span
from compress.search.problem import CandidatePlan, SearchProblem
from compress.search.refine.divergence import Divergence
from compress.search.refine.effects import Rules, sampled_effects
from compress.search.refine.exchange import Decision, exchange

if TYPE_CHECKING:
    from compress.plan import Plan

FLOOR = 0.01  # nats, a perplexity 1% higher: where the uniform plan loses less on a task, this is the task's unit
WIDEN, SHRINK = 1.5, 0.5
BELIEVED = (0.5, 0.25, 0.0)  # shares of the interactions between groups: with all of them an exchange fits noise

Progress = Callable[[int, int, str], None]


class Refine(Method):
    """Exchanges rules between head groups as long as the measured loss falls, within a time."""

    minutes: Annotated[float, Field(gt=0, le=MINUTES, description="time to spend, interruptions not counted")] = 10.0
    samples: Annotated[
        int, Field(ge=1, le=1000, description="passes over the documents that the quadratic model is made from")
    ] = 4
    weights: dict[str, Annotated[float, Field(gt=0, le=FACTOR)]] = Field(
        default_factory=dict, description="weight of a task's loss, by the task's name; 1 where none is given"
    )


@dataclass
class State:
    """Where a refinement is; what `search/refine.json` holds.

    Attributes:
        key: of all that the refinement depends on.
        start: name of the plan that it started from.
        decision: `[layers][groups]` of (sink, alpha, beta).
        loss: measured loss of the decision, relative to the uniform plan's.
        first: that of the start.
        tasks: its parts, nats a row by task.
        most: what each task may lose, that of the start.
        stress: how often a task counts in the quadratic model; doubled when an exchange would have cost it too much.
        radius: groups that the next exchange may change; below 1 there is nothing left to try.
        step: exchanges measured.
        seconds: time spent.
        history: first the starts; then of each exchange the groups changed, the share of interactions believed, the
            model's loss before and after, the measured loss, and whether it was kept.
    """

    key: str
    start: str
    decision: list[list[tuple[int, int, float]]]
    loss: float
    first: float
    tasks: dict[str, float]
    most: dict[str, float]
    stress: dict[str, float]
    radius: float
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to try; otherwise the time has ended it."""
        return self.radius < 1

    def spans(self) -> Decision:
        """The decision as spans."""
        return tuple(tuple(Span(*rule) for rule in row) for row in self.decision)

    def put(self, decision: Decision) -> None:
        """Take a decision."""
        self.decision = [[(span.sink, span.alpha, span.beta) for span in row] for row in decision]


class Loss:
    """The measured loss of decisions: divergence by task, relative to the uniform plan's, weighted mean.

    Args:
        uniform: the plan whose losses are the tasks' units.
    """

    def __init__(
        self, model: Any, problem: SearchProblem, documents: Sequence[Sample], settings: Refine, uniform: Decision
    ) -> None:
        self.model = model
        self.problem = problem
        self.divergence = Divergence(model, documents)
        tasks = {document.task for document in documents}
        unknown = sorted(set(settings.weights) - tasks)
        if unknown:
            raise UserError(
                f"there are no documents of task {', '.join(unknown)} to weigh",
                where="search.refine.weights",
                expected=f"some of {', '.join(sorted(tasks))}",
            )
        weights = {task: settings.weights.get(task, 1.0) for task in sorted(tasks)}
        self._planned: Any = None
        self.uniform = self.by_task(uniform)
        whole = sum(weights.values())
        self.scale = {task: weights[task] / whole / max(self.uniform[task], FLOOR) for task in weights}

    def by_task(self, decision: Decision) -> dict[str, float]:
        """Mean divergence in nats a row, by task."""
        plan = self._plan(decision)
        if self._planned is None:
            self._planned = planned_model(self.model, plan)
        set_plan(self._planned, plan)
        return self.divergence.by_task(self.divergence.measure(self._planned))

    def total(self, tasks: Mapping[str, float]) -> float:
        """The loss from its parts."""
        return sum(self.scale[task] * value for task, value in tasks.items())

    def quadratic(self, rules: Rules, samples: int, seed: int) -> torch.Tensor:
        """Effects `[samples x documents, layers, groups, rules]` whose summed squares over groups model the loss."""
        documents = self.divergence.documents
        effects = sampled_effects(self.model, self.problem.shape, self.divergence, rules, samples, seed)
        counts = Counter(document.task for document in documents)
        weights = torch.tensor([self.scale[each.task] / counts[each.task] / (2 * samples) for each in documents])
        return (effects * weights.sqrt()[:, None, None, None]).flatten(0, 1)

    def _plan(self, decision: Decision) -> Plan:
        return CandidatePlan(decision).to_plan(self.problem, {})


def refine(
    model: Any,
    problem: SearchProblem,
    settings: Refine,
    starts: Mapping[str, Decision],
    uniform: Decision,
    documents: Sequence[Sample],
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> State:
    """Refine the best of several plans; `refine.json` in the folder holds every step and continues an interrupted run.

    Args:
        model: the dense model.
        starts: plans within the budget, by name; rules by position alone.
        uniform: the uniform plan of the budget, whose losses are the tasks' units.
        documents: what the loss is measured on.
        progress: called with (seconds spent, seconds in all, what).

    Returns:
        The last state. Its loss is never above that of the best start.

    Raises:
        UserError: no documents, or none of a task that has a weight.
    """
    path = folder / "refine.json"
    key = _key(problem, settings, starts, documents, seed)
    loss = Loss(model, problem, documents, settings, uniform)
    report = progress or (lambda *_: None)
    budget = settings.minutes * 60
    state = _read(path, key)
    clock = time.monotonic() - (state.seconds if state else 0.0)
    if state is None:
        measured = {}
        for name, decision in starts.items():
            report(int(time.monotonic() - clock), int(budget), f"measuring {name}")
            measured[name] = loss.by_task(decision)
        best = min(measured, key=lambda name: loss.total(measured[name]))
        value = loss.total(measured[best])
        groups = problem.shape.kv_heads * sum(native is None for native in problem.shape.native_windows)
        most, stress = dict(measured[best]), dict.fromkeys(measured[best], 1.0)
        state = State(key, best, [], value, value, measured[best], most, stress, radius=float(groups))
        state.put(starts[best])
        state.history = [{"start": name, "loss": loss.total(tasks), **tasks} for name, tasks in measured.items()]
    report(int(time.monotonic() - clock), int(budget), "making the quadratic model")
    rules = rules_of(problem, starts[state.start])
    model_of_loss = _effects(folder / "refine.partial", key, loss, rules, settings, seed)
    state.seconds = time.monotonic() - clock
    write_text(path, sealed(vars(state)))
    while state.seconds < budget and not state.exhausted:
        report(int(state.seconds), int(budget), f"refining, loss {state.loss:.4f}, {state.first:.4f} at the start")
        _try(loss, problem, rules, model_of_loss, state)
        state.seconds = time.monotonic() - clock
        write_text(path, sealed(vars(state)))
    return state


def _try(loss: Loss, problem: SearchProblem, rules: Rules, effects: torch.Tensor, state: State) -> None:
    """Measure the next exchange; after the last of a radius, go on with another radius."""
    decision = state.spans()
    tried = sum(row.get("radius") == state.radius and row["at"] == state.loss for row in state.history if "at" in row)
    believed = BELIEVED[tried]
    tasks_of = [document.task for document in loss.divergence.documents]
    stress = torch.tensor([state.stress[task] for task in tasks_of]).repeat(len(effects) // len(tasks_of))
    stressed = effects * stress.sqrt()[:, None, None, None]
    proposal, before, after = exchange(problem, decision, rules, stressed, int(state.radius), believed)
    moved = sum(old != new for row in zip(decision, proposal, strict=True) for old, new in zip(*row, strict=True))
    row: dict[str, Any] = {"radius": state.radius, "believed": believed, "at": state.loss, "groups": moved}
    kept = False
    if moved:
        tasks = loss.by_task(proposal)
        value = loss.total(tasks)
        worse = [task for task, most in state.most.items() if tasks[task] > most]
        kept = value < state.loss and not worse
        for task in worse:
            state.stress[task] *= 2
        row |= {"model": [before, after], "loss": value, **tasks}
        state.step += 1
    state.history.append({**row, "kept": kept})
    if kept:
        state.put(proposal)
        state.loss, state.tasks = value, tasks
        state.radius = float(int(state.radius * WIDEN) + 1)
    elif tried + 1 == len(BELIEVED):
        state.radius = float(int(state.radius * SHRINK))


def _effects(path: Path, key: str, loss: Loss, rules: Rules, settings: Refine, seed: int) -> torch.Tensor:
    """The quadratic model; an interrupted refinement finds it again."""
    found = read_partial(path, key)
    if found is not None:
        return found[1]["effects"]
    effects = loss.quadratic(rules, settings.samples, seed)
    write_partial(path, key, {}, {"effects": effects.contiguous()})
    return effects


def rules_of(problem: SearchProblem, decision: Decision) -> list[list[list[Span]]]:
    """Rules to think of, `[layers][rules][groups]`: full, windows in steps of about a half, and the group's own last.

    Windows have the group's own sink and growth (the grid's first where the group is full).
    """
    grid, longest = problem.grid, max(problem.budget_lengths)
    alphas, alpha = [], max(grid.alpha_min, PAGE)
    while alpha < longest:
        alphas.append(alpha)
        alpha = max(alpha + PAGE, round(alpha * 2**0.5 / PAGE) * PAGE)

    def window(span: Span, alpha: int) -> Span:
        return Span(grid.sinks[0], alpha, 0.0) if span.is_full else Span(span.sink, alpha, span.beta)

    return [
        [[FULL] * len(row), *([window(span, alpha) for span in row] for alpha in alphas), list(row)] for row in decision
    ]


def _key(
    problem: SearchProblem,
    settings: Refine,
    starts: Mapping[str, Decision],
    documents: Sequence[Sample],
    seed: int,
) -> str:
    """Hash of all that a refinement depends on, but for the time that it may take."""
    return key_of(
        problem.shape.fingerprint,
        [repr(row) for row in problem.rows],
        settings.model_dump(mode="json", exclude={"minutes"}),
        {name: repr(decision) for name, decision in starts.items()},
        [document.key for document in documents],
        seed,
    )


def _read(path: Path, key: str) -> State | None:
    """An earlier state of the same refinement."""
    found = read_sealed(path)
    if found is None or found["key"] != key:
        return None
    found["decision"] = [[(sink, alpha, beta) for sink, alpha, beta in row] for row in found["decision"]]
    return State(**found)
