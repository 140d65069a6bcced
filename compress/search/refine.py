"""Refinement: a plan is changed a few groups at a time, and a change stays when the measured loss has fallen.

Scores of heads, and influence, are taken at the dense model, one group at a time; what groups do together they do not
know. Here the loss is the plan's own: the divergence from the dense model on documents, every task relative to what
the uniform plan of the same bytes loses on it (at least a hundredth of a nat), so that no task outweighs another.

Each step predicts, to first order at the current plan, what every other rule of every group would change
(response_change.py), lets the knapsack choose the best exchange of at most `radius` groups within the budget, and
measures it. A success widens the radius, a failure halves it; the budget holds at every step.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from compress.data.document import Document
from compress.errors import UserError
from compress.files import write_json
from compress.models.memory import needs_checkpointing
from compress.models.replaced import checkpoint_layers
from compress.registry import Method
from compress.runtime.span import FULL, PAGE, Span
from compress.search.candidates import GroupCandidates, page_counts
from compress.search.divergence import Divergence
from compress.search.problem import CandidatePlan, Decision, SearchProblem
from compress.search.response_change import predicted_changes
from compress.search.solve import Knapsack
from compress.targets.apply import planned_model, set_plan

if TYPE_CHECKING:
    from compress.plan import Plan

FLOOR = 0.01  # nats, a perplexity 1% higher: where the uniform plan loses less on a task, this is the task's unit
WIDEN, SHRINK = 1.5, 0.5
SOLVE_SECONDS = 5.0

Progress = Callable[[int, int, str], None]


class Refine(Method):
    """Exchanges rules between head groups as long as the measured loss falls, within a time."""

    minutes: Annotated[float, Field(gt=0, description="time to spend, interruptions not counted")] = 10.0
    documents_per_step: Annotated[
        int, Field(ge=1, description="documents, a new random choice each step, that a step's prediction is made from")
    ] = 32
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of a task's loss, by the task's name; 1 where none is given"
    )
    radius: Annotated[
        float, Field(gt=0, le=1, description="share of the head groups that the first step may change")
    ] = 0.25
    patience: Annotated[int, Field(ge=1, description="predictions in a row without a success before it ends")] = 4


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
        step: predictions made.
        radius: groups that the next exchange may change.
        failures: predictions in a row that brought nothing.
        seconds: time spent.
        history: one row for each measurement: step, groups changed, predicted change, measured loss, whether kept.
    """

    key: str
    start: str
    decision: list[list[tuple[int, int, float]]]
    loss: float
    first: float
    tasks: dict[str, float]
    step: int = 0
    radius: float = 0.0
    failures: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

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
        self, model: Any, problem: SearchProblem, documents: Sequence[Document], settings: Refine, uniform: Decision
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
        self.scale = dict.fromkeys(weights, 1.0)
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

    def changes(self, decision: Decision, rules: list[list[list[Span]]], numbers: Sequence[int]) -> torch.Tensor:
        """Predicted changes of the loss from some of the documents, `[layers, groups, rules]`."""
        documents = self.divergence.documents
        counts: dict[str, int] = {}
        for number in numbers:
            counts[documents[number].task] = counts.get(documents[number].task, 0) + 1

        def backward(model: Any) -> None:
            for members in self.divergence.batches(numbers):
                self._backward(model, members, counts)

        return predicted_changes(self.model, self.problem.shape, decision, rules, backward)

    def _backward(self, model: Any, members: list[int], counts: Mapping[str, int]) -> None:
        """Forwards and backwards over documents of one length, each with its part in the loss."""
        tokens = self.divergence.tokens(members)
        embedding = model.get_input_embeddings()
        itemsize = embedding.weight.dtype.itemsize
        with ExitStack() as layers:
            if needs_checkpointing(model.config, self.problem.shape, tokens.numel(), itemsize, tokens.device):
                checkpoint_layers(model, layers)
            embedded = embedding(tokens).detach().requires_grad_()
            parts = []
            for number, rows in self.divergence.answer_logits(model, members, inputs_embeds=embedded):
                task = self.divergence.documents[number].task
                parts.append(self.divergence.of_rows(number, rows) * (self.scale[task] / counts[task]))
            torch.stack(parts).sum().backward()

    def _plan(self, decision: Decision) -> Plan:
        return CandidatePlan(decision).to_plan(self.problem, {})


def refine(
    model: Any,
    problem: SearchProblem,
    settings: Refine,
    starts: Mapping[str, Decision],
    uniform: Decision,
    documents: Sequence[Document],
    folder: Path,
    seed: int,
    progress: Progress | None = None,
) -> State:
    """Refine the best of several plans; `refine.json` in the folder holds every step and continues an interrupted run.

    Args:
        model: the dense model.
        starts: plans within the budget, by name.
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
        measured = {name: loss.by_task(decision) for name, decision in starts.items()}
        best = min(measured, key=lambda name: loss.total(measured[name]))
        value = loss.total(measured[best])
        groups = problem.shape.kv_heads * sum(native is None for native in problem.shape.native_windows)
        state = State(key, best, [], value, value, measured[best], radius=max(1.0, settings.radius * groups))
        state.put(starts[best])
        state.history = [{"start": name, "loss": loss.total(tasks), **tasks} for name, tasks in measured.items()]
    while (spent := time.monotonic() - clock) < budget and state.failures < settings.patience:
        report(
            int(spent), int(budget), f"refining, loss {state.loss:.4f} of the uniform plan's, start {state.first:.4f}"
        )
        _step(loss, problem, settings, state, seed, deadline=clock + budget)
        state.seconds = time.monotonic() - clock
        write_json(path, vars(state))
    return state


def _step(loss: Loss, problem: SearchProblem, settings: Refine, state: State, seed: int, deadline: float) -> None:
    """One prediction, and exchanges from it with a shrinking radius until one is kept or none is left."""
    decision = state.spans()
    ladder = rules_of(problem, decision)
    every = range(len(loss.divergence.documents))
    count = min(settings.documents_per_step, len(every))
    numbers = sorted(random.Random(f"{seed}/{state.step}").sample(every, count))
    changes = loss.changes(decision, ladder, numbers)
    state.step += 1
    radius, kept = int(state.radius), False
    while radius >= 1 and time.monotonic() < deadline:
        proposal, predicted = exchange(problem, decision, ladder, changes, radius)
        moved = sum(old != new for row in zip(decision, proposal, strict=True) for old, new in zip(*row, strict=True))
        if moved == 0:
            break
        tasks = loss.by_task(proposal)
        value = loss.total(tasks)
        kept = value < state.loss
        state.history.append(
            {"step": state.step, "groups": moved, "predicted": predicted, "loss": value, "kept": kept, **tasks}
        )
        if kept:
            state.put(proposal)
            state.loss, state.tasks = value, tasks
            state.radius = min(radius * WIDEN + 1, float(changes[..., 0].numel()))
            break
        # What was changed is an upper bound: a smaller radius has to change less than that.
        radius = int(min(radius, moved) * SHRINK)
        state.radius = max(1.0, radius * 2.0)
    state.failures = 0 if kept else state.failures + 1


def rules_of(problem: SearchProblem, decision: Decision) -> list[list[list[Span]]]:
    """Rules to think of, `[layers][rules][groups]`: full, windows in steps of about a half, and the group's own last.

    Windows have the group's own sink and growth (the grid's first where the group is full).
    """
    grid, longest = problem.grid, max(problem.limits)
    alphas, alpha = [], max(grid.alpha_min, PAGE)
    while alpha < longest:
        alphas.append(alpha)
        alpha = max(alpha + PAGE, round(alpha * 2**0.5 / PAGE) * PAGE)

    def window(span: Span, alpha: int) -> Span:
        return Span(grid.sinks[0], alpha, 0.0) if span.is_full else Span(span.sink, alpha, span.beta)

    return [
        [[FULL] * len(row), *([window(span, alpha) for span in row] for alpha in alphas), list(row)] for row in decision
    ]


def exchange(
    problem: SearchProblem, decision: Decision, rules: list[list[list[Span]]], changes: torch.Tensor, radius: int
) -> tuple[Decision, float]:
    """The best predicted change of at most `radius` groups within the budget, and its prediction (at most 0)."""
    candidates = []
    for layer, native in enumerate(problem.shape.native_windows):
        for group in range(problem.shape.kv_heads):
            own = decision[layer][group]
            spans = [own] if native is not None else [row[group] for row in rules[layer]]
            values = np.zeros((len(spans), 1)) if native is not None else changes[layer, group].numpy()[:, None].copy()
            moved = np.array([span != own for span in spans], dtype=np.int64)
            values[moved == 0] = 0.0
            pages = page_counts([span if native is None else Span(0, native, 0.0) for span in spans], problem)
            candidates.append(GroupCandidates(layer, group, tuple(spans), values, np.column_stack([pages, moved])))
    knapsack = Knapsack(candidates, [*problem.page_limits.values(), radius])
    solution = knapsack.solve(np.ones(1), gap=0.01, time_limit=SOLVE_SECONDS)
    if solution is None or solution.losses[0] >= 0:
        return decision, 0.0
    chosen = [group.spans[index] for group, index in zip(candidates, solution.choice, strict=True)]
    width = problem.shape.kv_heads
    return tuple(tuple(chosen[at : at + width]) for at in range(0, len(chosen), width)), float(solution.losses[0])


def _key(
    problem: SearchProblem,
    settings: Refine,
    starts: Mapping[str, Decision],
    documents: Sequence[Document],
    seed: int,
) -> str:
    """Hash of all that a refinement depends on, but for the time that it may take."""
    facts = [
        problem.shape.fingerprint,
        {str(length): limit for length, limit in problem.limits.items()},
        settings.model_dump(mode="json", exclude={"minutes"}),
        {name: repr(decision) for name, decision in starts.items()},
        [[document.tokens, document.answer] for document in documents],
        seed,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> State | None:
    """An earlier state of the same refinement."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("key") != key:
            return None
        found["decision"] = [[(rule[0], rule[1], float(rule[2])) for rule in row] for row in found["decision"]]
        return State(**found)
    except (OSError, ValueError, KeyError, TypeError):
        return None
