"""Refinement: options are exchanged between units, and an exchange stays when the measured loss has fallen.

Scores of heads, and influence, look at one unit at a time; what units do together they do not know. Here the loss is
the plan's own: the divergence from the dense model on documents, every task relative to what the uniform plan of the
same cost loses on it (at least a hundredth of a nat), so that no task outweighs another.

What to try (moves.py) is judged by a quadratic model of that loss (effects.py), made once: exchanges of at most
`radius` units that the model likes best within the budget. The model is made of samples, so the more of its
interactions between units one believes the more one fits their noise; every radius is tried with half, a quarter and
none of them. A success widens the radius, a failure of all three halves it. Where no radius is left and `rounds` are,
further passes are added to the model. The budget holds at every step, and no task may lose more than it did at the
start, or than the share `spare` of what it loses under the uniform plan: one that would counts twice in what is tried
next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from compress.data.sample import Sample
from compress.errors import UserError
from compress.files import key_of, write_text
from compress.json_file import read_sealed, sealed
from compress.limits import FACTOR, MINUTES
from compress.partial import read_partial, write_partial
from compress.plan import LayerPlan, plan_of_layers
from compress.registry import Method
from compress.search.choice.options import layers_of
from compress.search.measure import Planned
from compress.search.problem import Layers, Problem
from compress.search.refine.divergence import Divergence
from compress.search.refine.effects import sampled_effects
from compress.search.refine.exchange import exchange
from compress.search.refine.moves import Moves

if TYPE_CHECKING:
    from compress.search.workers import Workers

FLOOR = 0.01  # nats, a perplexity 1% higher: where the uniform plan loses less on a task, this is the task's unit
WIDEN, SHRINK = 1.5, 0.5
BELIEVED = (0.5, 0.25, 0.0)  # shares of the interactions between units: with all of them an exchange fits noise

Progress = Callable[[int, int, str], None]


class Refine(Method):
    """Exchanges options between units as long as the measured loss falls, within a time."""

    minutes: Annotated[float, Field(gt=0, le=MINUTES, description="time to spend, interruptions not counted")] = 10.0
    samples: Annotated[
        int, Field(ge=1, le=1000, description="passes over the documents that the quadratic model is made from")
    ] = 4
    rounds: Annotated[
        int,
        Field(
            ge=1,
            le=1000,
            description="models at most: where no exchange is left, `samples` passes more make another in the time",
        ),
    ] = 1
    doubt: Annotated[
        float,
        Field(
            ge=0,
            le=100,
            description="standard errors, over the samples, of what the quadratic model says of a move that are held "
            "against it; 0 takes the model at its word",
        ),
    ] = 0.0
    spare: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of what the uniform plan loses on a task that it may lose in any case; 0 lets no task "
            "lose more than at the start",
        ),
    ] = 0.0
    weights: dict[str, Annotated[float, Field(gt=0, le=FACTOR)]] = Field(
        default_factory=dict, description="weight of a task's loss, by the task's name; 1 where none is given"
    )

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without those that came later where they are as usual: searches from before there were any stay the same."""
        written: dict[str, Any] = write(self)
        for name in ("rounds", "doubt", "spare"):
            if written.get(name) == type(self).model_fields[name].default:
                written.pop(name)
        return written


@dataclass
class State:
    """Where a refinement is; what `search/refine.json` holds.

    Attributes:
        key: of all that the refinement depends on.
        start: name of the plan that it started from.
        decision: the layers of the plan, as `plan.json` has them.
        loss: measured loss of the decision, relative to the uniform plan's.
        first: that of the start.
        tasks: its parts, nats a row by task.
        most: what each task may lose, that of the start or what `spare` says.
        stress: how often a task counts in the quadratic model; doubled when an exchange would have cost it too much.
        radius: units that the next exchange may change; below 1 there is nothing left to try.
        step: exchanges measured.
        seconds: time spent.
        history: first the starts; then of each exchange the units changed, the share of interactions believed, the
            model's loss before and after, the measured loss, and whether it was kept.
        round: models made, each with more passes than the one before.
    """

    key: str
    start: str
    decision: list[dict[str, Any]]
    loss: float
    first: float
    tasks: dict[str, float]
    most: dict[str, float]
    stress: dict[str, float]
    radius: float
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    round: int = 1

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left to try; otherwise the time has ended it."""
        return self.radius < 1

    def widen(self, units: int) -> None:
        """Begin another round, with the widest radius that the last one had a success with, or all units."""
        kept = [row["radius"] for row in self.history if row.get("kept") and row.get("round", 1) == self.round]
        self.radius = max(kept, default=float(units))
        self.round += 1

    def layers(self) -> Layers:
        """The decision."""
        return tuple(LayerPlan.model_validate(layer) for layer in self.decision)

    def put(self, layers: Layers) -> None:
        """Take a decision."""
        self.decision = [layer.model_dump(mode="json") for layer in layers]

    def summary(self) -> dict[str, Any]:
        """What `search/pareto.json` says of it."""
        return {
            "start": self.start,
            "loss": self.loss,
            "start_loss": self.first,
            "tasks": self.tasks,
            "steps": self.step,
            "exhausted": self.exhausted,
            "seconds": self.seconds,
        }


class Loss:
    """The measured loss of decisions: divergence by task, relative to the uniform plan's, weighted mean.

    Args:
        uniform: the plan whose losses are the tasks' units.
        workers: processes that share the documents; None measures here alone.
    """

    def __init__(
        self,
        model: Any,
        problem: Problem,
        documents: Sequence[Sample],
        settings: Refine,
        uniform: Layers,
        workers: Workers | None = None,
    ) -> None:
        self.model, self.workers = model, workers
        self.shape = problem.shape
        self.divergence = Divergence(model, documents)
        self._planned = Planned(model)
        if workers is not None:
            workers.deal("documents", list(documents), range(workers.count))
        tasks = {document.task for document in documents}
        unknown = sorted(set(settings.weights) - tasks)
        if unknown:
            raise UserError(
                f"there are no documents of task {', '.join(unknown)} to weigh",
                where="search.refine.weights",
                expected=f"some of {', '.join(sorted(tasks))}",
            )
        weights = {task: settings.weights.get(task, 1.0) for task in sorted(tasks)}
        self.uniform = self.by_task(uniform)
        whole = sum(weights.values())
        self.scale = {task: weights[task] / whole / max(self.uniform[task], FLOOR) for task in weights}

    def by_task(self, layers: Layers) -> dict[str, float]:
        """Mean divergence in nats a row, by task."""
        plan = plan_of_layers(self.shape, layers)
        if self.workers is None:
            return self.divergence.by_task(self.divergence.measure(self._planned.of(plan)))
        batches = list(self.divergence.batches(range(len(self.divergence.documents))))
        return self.divergence.by_task(dict(chain.from_iterable(self.workers.deal("divergence", plan, batches))))

    def total(self, tasks: Mapping[str, float]) -> float:
        """The loss from its parts."""
        return sum(self.scale[task] * value for task, value in tasks.items())

    def passes(self, moves: Moves, samples: int, seed: int, first: int = 0) -> torch.Tensor:
        """Effects of so many passes from the first on, `[samples, documents, columns]`."""
        rules, masks = moves.rules, moves.masks
        return moves.columns(
            *sampled_effects(self.model, self.shape, self.divergence, rules, masks, samples, seed, first)
        )

    def quadratic(self, passes: torch.Tensor) -> torch.Tensor:
        """Effects `[samples x documents, columns]` whose summed squares over units model the loss."""
        documents = self.divergence.documents
        counts = Counter(document.task for document in documents)
        weights = torch.tensor([self.scale[one.task] / counts[one.task] / (2 * len(passes)) for one in documents])
        return (passes * weights.sqrt()[:, None]).flatten(0, 1)


def refine(
    model: Any,
    problem: Problem,
    settings: Refine,
    starts: Mapping[str, Layers],
    uniform: Layers,
    documents: Sequence[Sample],
    folder: Path,
    seed: int,
    progress: Progress | None = None,
    importance: str | None = None,
    workers: Workers | None = None,
) -> State:
    """Refine the best of several plans; `refine.json` in the folder holds every step and continues an interrupted run.

    Args:
        model: the dense model.
        starts: plans within the budget, by name; rules by position alone.
        uniform: the uniform plan of the budget, whose losses are the tasks' units.
        documents: what the loss is measured on.
        progress: called with (seconds spent, seconds in all, what).
        importance: the statistic that ranks neurons; None where nothing is removed.
        workers: processes that share the documents; None measures here alone.

    Returns:
        The last state. Its loss is never above that of the best start.

    Raises:
        UserError: no documents, or none of a task that has a weight.
    """
    path = folder / "refine.json"
    key = _key(problem, settings, starts, documents, seed)
    loss = Loss(model, problem, documents, settings, uniform, workers)
    report = progress or (lambda *_: None)
    budget = settings.minutes * 60
    state = _read(path, key)
    clock = time.monotonic() - (state.seconds if state else 0.0)
    if state is None:
        measured = {}
        for name, layers in starts.items():
            report(int(time.monotonic() - clock), int(budget), f"measuring {name}")
            measured[name] = loss.by_task(layers)
        best = min(measured, key=lambda name: loss.total(measured[name]))
        value = loss.total(measured[best])
        most = {task: max(lost, settings.spare * loss.uniform[task]) for task, lost in measured[best].items()}
        stress = dict.fromkeys(most, 1.0)
        units = len(Moves.of(problem, starts[best], importance).units)
        state = State(key, best, [], value, value, measured[best], most, stress, radius=float(units))
        state.put(starts[best])
        state.history = [{"start": name, "loss": loss.total(tasks), **tasks} for name, tasks in measured.items()]
    moves = Moves.of(problem, starts[state.start], importance)

    def modelled() -> torch.Tensor:
        def tell(done: int, count: int) -> None:
            seconds = int(time.monotonic() - clock)
            report(seconds, int(budget), f"making the quadratic model, pass {done + 1} of {count}")

        return _effects(folder / "refine.partial", key, loss, moves, state.round * settings.samples, seed, tell)

    def put_down() -> None:
        state.seconds = time.monotonic() - clock
        write_text(path, sealed(vars(state)))

    started, measured_before = time.monotonic(), dict[tuple[int, ...], dict[str, float]]()
    model_of_loss = modelled()
    of_passes = time.monotonic() - started
    put_down()
    while state.seconds < budget:
        if state.exhausted:
            if state.round >= settings.rounds or state.seconds + of_passes >= budget:
                break
            state.widen(len(moves.units))
            model_of_loss = modelled()
            put_down()
            continue
        report(int(state.seconds), int(budget), f"refining, loss {state.loss:.4f}, {state.first:.4f} at the start")
        _try(loss, moves, model_of_loss, state, settings.doubt, measured_before)
        put_down()
    return state


def _try(
    loss: Loss,
    moves: Moves,
    effects: torch.Tensor,
    state: State,
    doubt: float,
    measured: dict[tuple[int, ...], dict[str, float]],
) -> None:
    """Measure the next exchange; after the last of a radius, go on with another radius.

    Args:
        measured: losses by task of the exchanges before, which wider and narrower radii often ask for again.
    """
    here = [row for row in state.history if "at" in row and row.get("round", 1) == state.round]
    tried = sum(row["radius"] == state.radius and row["at"] == state.loss for row in here)
    believed = BELIEVED[tried]
    tasks_of = [document.task for document in loss.divergence.documents]
    stress = torch.tensor([state.stress[task] for task in tasks_of]).repeat(len(effects) // len(tasks_of))
    stressed = (effects * stress.sqrt()[:, None]).double().numpy()
    now = moves.options_of(state.layers())
    choice, before, after = exchange(moves.problem, moves.units, now, stressed, int(state.radius), believed, doubt)
    moved = sum(new != old for new, old in zip(choice, now, strict=True))
    proposal = layers_of(moves.problem, moves.units, choice)
    row: dict[str, Any] = {"radius": state.radius, "believed": believed, "at": state.loss, "units": moved}
    if state.round > 1:
        row["round"] = state.round
    kept = False
    if moved:
        if tuple(choice) not in measured:
            measured[tuple(choice)] = loss.by_task(proposal)
        tasks = measured[tuple(choice)]
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


def _effects(
    path: Path, key: str, loss: Loss, moves: Moves, samples: int, seed: int, tell: Callable[[int, int], None]
) -> torch.Tensor:
    """The quadratic model of so many passes; an interrupted refinement, and a later round, find those that were made.

    Args:
        tell: called before each pass with (passes that are there, `samples`).
    """
    partial = read_partial(path, key)
    made = [] if partial is None else list(partial[1].get("passes", torch.empty(0)))[:samples]
    while len(made) < samples:
        tell(len(made), samples)
        made += loss.passes(moves, 1, seed, first=len(made))
        write_partial(path, key, {}, {"passes": torch.stack(made)})
    return loss.quadratic(torch.stack(made))


def _key(
    problem: Problem,
    settings: Refine,
    starts: Mapping[str, Layers],
    documents: Sequence[Sample],
    seed: int,
) -> str:
    """Hash of all that a refinement depends on, but for the time that it may take."""
    served = [] if problem.serve is None else [problem.serve.model_dump(mode="json")]
    return key_of(
        problem.shape.fingerprint,
        [repr(row) for row in problem.rows],
        settings.model_dump(mode="json", exclude={"minutes", "rounds"}),
        {name: [layer.model_dump(mode="json") for layer in layers] for name, layers in starts.items()},
        [document.key for document in documents],
        seed,
        *served,
    )


def _read(path: Path, key: str) -> State | None:
    """An earlier state of the same refinement."""
    state = read_sealed(path)
    return State(**state) if state is not None and state["key"] == key else None
