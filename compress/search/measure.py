"""Measures plans: every loss is on disk at once, so that an interrupt loses none; the best of measured plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.data.sample import Sample
from compress.files import key_of
from compress.json_file import append_entry, read_entries
from compress.models.planned import planned_model, set_plan
from compress.plan import Plan

Progress = Callable[[int, int, str], None]


class Planned:
    """A dense model under one plan after another, on its own weights.

    Plans that leave the same heads and neurons share a model, whose plan is switched in place.
    """

    def __init__(self, model: Any) -> None:
        self.dense = model
        self._plan: Plan | None = None
        self._model: Any = None

    def of(self, plan: Plan | None) -> Any:
        """The model of a plan, until the next call; None is the dense model."""
        if plan is None:
            return self.dense
        if self._plan is None or not hasattr(self._model, "set_plan") or _widths(plan) != _widths(self._plan):
            self._model = None  # before the next one takes memory
            self._model = planned_model(self.dense, plan)
        elif plan.layers != self._plan.layers:
            set_plan(self._model, plan)
        self._plan = plan
        return self._model


def _widths(plan: Plan) -> list[Any]:
    """What a plan leaves of every layer, and adds to it."""
    return [(layer.kept_groups, layer.queries, layer.mlp, layer.bias) for layer in plan.layers]


def plan_key(plan: Plan | None) -> str:
    """Identity of what a plan does, without its provenance and predictions; None is the dense model."""
    return "dense" if plan is None else key_of(plan.model_dump(mode="json", by_alias=True)["layers"])


class LossLog:
    """Append-only JSONL file of losses, one line for each plan and document.

    A line is a whole measurement: a torn last line (an interrupt while writing) is skipped and measured again.

    Args:
        context: what else the losses depend on, for instance fingerprint and dtype; lines of another are ignored.
    """

    def __init__(self, path: Path, context: str) -> None:
        self.path = path
        self.context = context
        self._losses: dict[tuple[str, str], float] = {}
        for entry in read_entries(path, checked=True, finite=False):
            if entry["context"] == self.context:
                self._losses[entry["plan"], entry["document"]] = entry["loss"]

    def get(self, plan: str, document: str) -> float | None:
        """The loss of a plan on a document, None when it was not measured yet."""
        return self._losses.get((plan, document))

    def put(self, plan: str, document: str, loss: float) -> None:
        """Add a measurement; it is in the file when this returns."""
        entry = {"context": self.context, "plan": plan, "document": document, "loss": loss}
        append_entry(self.path, entry, checked=True)
        self._losses[plan, document] = loss


def measure(
    plans: Mapping[str, Plan | None],
    documents: Sequence[Sample],
    loss: Callable[[Plan | None, Sample], float],
    log: LossLog,
    progress: Progress | None = None,
    shared: Callable[[Plan | None, Sequence[Sample]], Sequence[float]] | None = None,
    at_once: int = 1,
) -> dict[str, float]:
    """Mean loss of every plan over the documents, by the plan's name; known losses are taken from the log.

    Args:
        plans: plans by name; None is the dense model.
        loss: measures one plan on one document.
        progress: called with (measured, in all, name of the plan).
        shared: in place of `loss`, measures one plan on several documents, in as many processes.
        at_once: how many documents that are.
    """
    keys = [document.key for document in documents]
    total = len(plans) * len(documents)
    done = 0
    means = {}
    for name, plan in plans.items():
        identity = plan_key(plan)
        values: dict[int, float] = {}
        for first in range(0, len(documents), at_once):
            part = range(first, min(first + at_once, len(documents)))
            values |= {number: known for number in part if (known := log.get(identity, keys[number])) is not None}
            fresh = [number for number in part if number not in values]
            asked = [documents[number] for number in fresh]
            found = [loss(plan, document) for document in asked] if shared is None else shared(plan, asked)
            for number, value in zip(fresh, found if fresh else (), strict=True):
                log.put(identity, keys[number], value)
                values[number] = value
            done += len(part)
            if progress is not None:
                progress(done, total, name)
        means[name] = sum(values[number] for number in range(len(documents))) / len(values)
    return means


def best_plan(losses: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """The name with the lowest loss; of equal losses the one with fewer bytes, then the first name."""
    return min(losses, key=lambda name: (losses[name], sizes[name], name))
