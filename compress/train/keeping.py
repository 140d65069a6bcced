"""Training of what heads keep: the temperature of every step, and thresholds that are measured again afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from compress.errors import UserError
from compress.limits import LONGEST
from compress.models.planned import change_entries, mixers_of
from compress.runtime.retain_training import Decisions
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Record
from compress.train.objectives.kept import share_that_leaves
from compress.train.objectives.objective import Inputs
from compress.train.settings import RecoverSettings

ROUNDS = 2  # of measuring scores and moving thresholds: what a layer keeps changes the scores of the next


class KeptShare(BaseModel):
    """What a head group keeps after a training.

    Attributes:
        threshold: score from which on a token is kept; None where only a cap decides.
        share: of the tokens that have left the window, mean over documents.
        spread: standard deviation of that share over documents.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float | None
    share: float
    spread: float


def keepers_of(model: Any) -> list[Any]:
    """The mixers of a planned model that keep tokens; none of any other."""
    return [mixer for mixer in mixers_of(model) if mixer.keeps]


def check_decisions(model: Any, length: int) -> None:
    """Raise UserError where no sequence of `length` tokens is long enough for a decision to matter."""
    spans = [span for mixer in keepers_of(model) for span in mixer.spans]
    if spans and all(span.sees_all(length) for span in spans):
        ends = [
            next((64 * n for n in range(LONGEST // 64) if not span.sees_all(64 * n + 1)), LONGEST) for span in spans
        ]
        raise UserError(
            "the training sequences never leave the windows, so nothing can be learnt of what to keep",
            where="recover.length",
            expected=f"more than {min(ends)} tokens, better several times as many",
            found=f"{length}",
            fix="raise `recover.length`",
        )


class AnnealedDecisions:
    """Batches that say, as `decisions`, how tokens are kept in a pass: see `RecoverSettings.keep_temperature`."""

    def __init__(self, batches: Any, settings: RecoverSettings) -> None:
        self.batches, self.settings = batches, settings
        self.unit, self.size = batches.unit, batches.size

    @classmethod
    def of(cls, batches: Any, model: Any, settings: RecoverSettings) -> Any:
        """The batches as they are where nothing is decided."""
        return cls(batches, settings) if keepers_of(model) else batches

    def passes(self, step: int, processes: int) -> list[list[Inputs]]:
        """See `Batches.passes`."""
        decisions = decisions_at(self.settings, step)
        return [[{**part, "decisions": decisions} for part in parts] for parts in self.batches.passes(step, processes)]


def decisions_at(settings: RecoverSettings, step: int) -> Decisions:
    """How tokens are kept in a step, from 0: softly at a temperature that falls by the same factor in every step, and
    in the last `keep_hard` of the steps by the rule. By the rule throughout where scorers are not trained."""
    (first, last), soft = settings.keep_temperature, settings.soft_steps
    if step >= soft:
        return Decisions(last, hard=True)
    return Decisions(first * (last / first) ** (step / max(1, soft - 1)), noise=settings.keep_noise)


@contextmanager
def decided(model: Any, decisions: Decisions | None) -> Iterator[None]:
    """Let a model's heads keep tokens so while it is open."""
    mixers = keepers_of(model) if decisions is not None else []
    for mixer in mixers:
        mixer.decisions = decisions
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.decisions = None


Place = tuple[int, int]  # number of the layer, and of the head group among those that stay


@torch.no_grad()
def measure_again(model: Any, documents: Sequence[torch.Tensor], by: str, at: int | None) -> list[list[Any]]:
    """Move the thresholds of a trained model, in place, so that it keeps what its plan expects, and measure shares.

    Training moves scores, and with them what a threshold keeps. All thresholds are moved by the same number, so that
    head groups keep the differences that they have learnt, and the bytes of all together are the plan's; with `by:
    group` each is moved so that its group keeps its own share. Groups that hide nothing of these documents, or of a
    text of `at` tokens, and such without a threshold, keep what they have.

    Args:
        model: planned, in eval mode and in the dtype in which it will run.
        documents: token ids, `[T]` each, on the model's device.
        by, at: as of the objective `kept`.

    Returns:
        `[layers][groups that stay]`, a `KeptShare`, or None where a group keeps no tokens by a scorer.
    """
    entries = {
        (mixer.facts.index, group): dict(entry)
        for mixer in keepers_of(model)
        for group, entry in zip(groups_of(mixer), mixer.groups, strict=True)
    }
    for _ in range(ROUNDS):
        scores = {place: torch.cat([part[0] for part in parts]) for place, parts in _read(model, documents).items()}
        free = [place for place in scores if entries[place]["threshold"] is not None and _leave(entries[place], at)]
        for together in [free] if by == "plan" else [[place] for place in free]:
            moved = _moved(together, scores, entries, at) if together else 0.0
            for place in together:
                entries[place]["threshold"] += moved
        for mixer in keepers_of(model):
            mixer.set_thresholds([entries[mixer.facts.index, group]["threshold"] for group in groups_of(mixer)])
    for place, parts in _read(model, documents).items():
        shares = torch.tensor([float(kept.mean()) for _, kept in parts], dtype=torch.float64)
        entries[place] |= {"share": float(shares.mean()), "spread": float(shares.std(correction=0))}
    plan = copy.deepcopy(model.config.compress_plan)
    found: list[list[Any]] = [[None] * len(layer["groups"]) for layer in plan["layers"]]
    for (layer, group), entry in entries.items():
        found[layer][group] = KeptShare(**{name: entry[name] for name in KeptShare.model_fields})
        plan["layers"][layer]["groups"][group] = entry
    change_entries(model, plan)
    return found


def groups_of(mixer: Any) -> tuple[int, ...]:
    """The numbers of a mixer's head groups among those of its layer that stay."""
    size = mixer.facts.group_size
    return tuple(head // size for head in mixer.heads[::size])


def _read(model: Any, documents: Sequence[torch.Tensor]) -> dict[Place, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Scores of the tokens that have left the window of each head group, and which are kept, `[n]` each, for every
    document in which there are any."""
    found: dict[Place, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for document in documents:
        record = Record()
        model.base_model(input_ids=document[None], use_cache=False, compress_record=record)
        for layer, keepings in record.keeping.items():
            for keeping in keepings:
                for number, group in enumerate(keeping.groups):
                    gone = keeping.gone[:, number]
                    scores, kept = (values[:, number][gone].cpu() for values in (keeping.scores, keeping.kept))
                    if len(scores):
                        found.setdefault((layer, group), []).append((scores, kept))
    return found


def _leave(entry: Mapping[str, Any], at: int | None) -> float:
    """See `share_that_leaves`."""
    return share_that_leaves(Span(entry["sink"], entry["alpha"], entry["beta"], granule=PAGE), at)


def _moved(
    places: Sequence[Place], scores: Mapping[Place, torch.Tensor], entries: Mapping[Place, Any], at: int | None
) -> float:
    """What is to be added to the thresholds of some head groups, so that they keep together what is expected."""
    margins, weights, expected = [], [], 0.0
    for place in places:
        entry = entries[place]
        leave = _leave(entry, at)
        margins.append(scores[place].double() - entry["threshold"])
        weights.append(torch.full_like(margins[-1], leave / len(margins[-1])))
        expected += leave * entry["share"]
    values, order = torch.cat(margins).sort(descending=True)
    total = torch.cat(weights)[order].cumsum(0)
    count = int((total <= expected * (1 + 1e-9)).sum())
    return float(values[count - 1]) if count else float(values[0].nextafter(values.new_tensor(math.inf)))
