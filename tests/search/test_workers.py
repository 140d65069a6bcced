"""What several processes measure for a search is what one measures; here they are threads that look like processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.errors import UserError
from compress.models.processes import Processes
from compress.plan import Plan, make_plan, uniform_plan
from compress.search.measure import LossLog, measure
from compress.search.refine.divergence import Divergence
from compress.search.response import response_loss
from compress.search.workers import Measurer, Workers
from compress.targets.window import WindowGroup
from tests.profile.common import document
from tests.tiny import mixed_plan, shape_of, tiny_model

DOCUMENTS = [document(length, seed=seed) for seed, length in enumerate((90, 90, 60, 75, 60))]


class Meeting:
    """What threads show each other."""

    def __init__(self, world: int) -> None:
        self.barrier, self.shown = threading.Barrier(world, timeout=60), [None] * world


class Thread(Processes):
    """A thread as one of some processes."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, len(meeting.shown))
        vars(self)["meeting"] = meeting

    def gather(self, value: Any) -> list[Any]:
        meeting: Any = vars(self)["meeting"]
        meeting.shown[self.rank] = value
        meeting.barrier.wait()
        shown = list(meeting.shown)
        meeting.barrier.wait()
        return shown

    def broadcast(self, value: Any, source: int) -> Any:
        return self.gather(value)[source]


def together(world: int, lead: Callable[[Workers], Any]) -> Any:
    """What the main one of some threads gets of the others, which serve it; and what ended these."""
    meeting, ended = Meeting(world), dict[int, str]()
    models = [tiny_model("llama-gqa") for _ in range(world)]

    def help_out(rank: int) -> None:
        try:
            Workers(Thread(rank, meeting), Measurer(models[rank]).works).serve()
        except UserError as error:
            ended[rank] = str(error)

    threads = [threading.Thread(target=help_out, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    workers = Workers(Thread(0, meeting), Measurer(models[0]).works)
    try:
        return lead(workers), ended
    finally:
        workers.end()
        for thread in threads:
            thread.join()


def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    model = tiny_model("llama-gqa")
    shape = shape_of(model)
    plans: dict[str, Plan | None] = {
        "dense": None,
        "mixed": mixed_plan(shape),
        "window": uniform_plan(shape, WindowGroup(sink=0, alpha=20, beta=0.0)),
    }

    def alone(plan: Plan | None, sample: Any) -> float:
        return response_loss(Measurer(model)._planned.of(plan), [sample])

    expected = measure(plans, DOCUMENTS, alone, LossLog(tmp_path / "one", "tiny"))

    def lead(workers: Workers) -> dict[str, float]:
        return measure(
            plans,
            DOCUMENTS,
            lambda plan, sample: pytest.fail("one alone"),
            LossLog(tmp_path / "three", "tiny"),
            shared=lambda plan, samples: workers.deal("response", plan, samples),
            at_once=workers.count,
        )

    assert together(3, lead)[0] == expected
    assert (tmp_path / "three").read_text() == (tmp_path / "one").read_text()


def test_divergences_are_those_of_one_process_by_batch() -> None:
    model = tiny_model("llama-gqa")
    shape = shape_of(model)
    plan = make_plan(shape, [[WindowGroup(sink=4, alpha=16, beta=0.0)] * 2] * 3)
    divergence = Divergence(model, DOCUMENTS)
    expected = divergence.measure(Measurer(model)._planned.of(plan))
    batches = list(divergence.batches(range(len(DOCUMENTS))))

    def lead(workers: Workers) -> dict[int, float]:
        workers.deal("documents", DOCUMENTS, range(workers.count))
        return dict(pair for batch in workers.deal("divergence", plan, batches) for pair in batch)

    found, ended = together(2, lead)
    assert found == expected and list(found) == list(expected) and not ended


def test_what_one_process_refuses_ends_all() -> None:
    wrong = document(40, answer=40)

    def lead(workers: Workers) -> str:
        with pytest.raises(UserError, match="no answer that can be predicted") as error:
            workers.deal("response", None, [DOCUMENTS[0], wrong])
        return str(error.value)

    told, ended = together(2, lead)
    assert ended == {1: told}
