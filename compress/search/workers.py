"""Measuring in several processes: the main one decides what is measured, and all of them measure a share of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress.data.sample import Sample
from compress.errors import Problem, UserError
from compress.models.processes import Processes
from compress.plan import Plan
from compress.search.measure import Planned
from compress.search.refine.divergence import Divergence
from compress.search.response import response_loss

# What is done with a context and a process's share of some items: a result for each.
Work = Callable[[Any, Sequence[Any]], list[Any]]


class Workers:
    """Deals items out to all processes of a group, every one as many as the others, and puts their results in order.

    Every item is measured by one process as a single one would measure it, so that the number of processes changes no
    result. The main process calls `deal`, and at last `end`; all others are in `serve` meanwhile.

    Args:
        works: what can be done, by name.
    """

    def __init__(self, processes: Processes, works: Mapping[str, Work]) -> None:
        self.processes, self.works, self._failed = processes, works, False

    @property
    def count(self) -> int:
        """Processes that share the work."""
        return self.processes.world

    def deal(self, work: str, context: Any, items: Sequence[Any]) -> list[Any]:
        """The results of a work, in the order of the items.

        Raises:
            UserError: of any of the processes.
        """
        self.processes.broadcast((work, context, items), 0)
        return self._share(work, context, items)

    def serve(self) -> None:
        """Measure what the main process asks for, until it ends. Raises UserError as `deal` does there."""
        while (asked := self.processes.broadcast(None, 0)) is not None:
            self._share(*asked)

    def end(self) -> None:
        """Let the other processes go on; where one has failed, all have heard of it."""
        if not self._failed:
            self.processes.broadcast(None, 0)

    def _share(self, work: str, context: Any, items: Sequence[Any]) -> list[Any]:
        problems: list[Problem] = []
        own: list[Any] = []
        try:
            own = self.works[work](context, items[self.processes.rank :: self.count])
        except UserError as error:
            problems = error.problems
        shares = self.processes.gather((problems, own))
        for wrong, _ in shares:
            if wrong:
                self._failed = True
                raise UserError(wrong)
        return [shares[number % self.count][1][number // self.count] for number in range(len(items))]


class Measurer:
    """What a process measures for a search.

    Args:
        model: the dense model, with what was prepared for it.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._planned, self._refined = model, Planned(model), Planned(model)
        self._divergence: Divergence | None = None

    @property
    def works(self) -> dict[str, Work]:
        """For `Workers`."""
        return {"response": self._response, "documents": self._documents, "divergence": self._divergences}

    def _response(self, plan: Plan | None, samples: Sequence[Sample]) -> list[float]:
        return [response_loss(self._planned.of(plan), [sample]) for sample in samples] if samples else []

    def _documents(self, documents: Sequence[Sample], processes: Sequence[int]) -> list[None]:
        """Take the documents of a refinement, on which all processes measure from now on."""
        self._divergence = Divergence(self.model, documents)
        return [None for _ in processes]

    def _divergences(self, plan: Plan, batches: Sequence[Sequence[int]]) -> list[list[tuple[int, float]]]:
        assert self._divergence is not None
        model = self._refined.of(plan) if batches else None
        return [self._divergence.of_batch(model, members) for members in batches]
