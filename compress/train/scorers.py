"""Trains scorers of cached tokens on what the dense model looks at where it repeats a text, and measures thresholds.

A scorer's number is to be the logarithm of a token's KVzip+ score, or of KVzip's. What is linear is fitted in closed
form, from sums that every token is added to and forgotten; what is not is trained by steps on the same error.
Afterwards the quantiles of the scores of other texts say which threshold keeps which share of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from compress.errors import UserError
from compress.models.placement import input_device
from compress.models.reconstruction import Reconstruct, Request, TokenScores, reconstructing
from compress.models.retention import Measured
from compress.runtime.scorer_ridge import scalars_of
from compress.runtime.scorers import Scorer
from compress.train.compressed_states import Given, States, given_to_scorers
from compress.train.loop import Learn, Progress
from compress.train.normal_equations import NormalEquations
from compress.train.objectives.objective import Inputs
from compress.train.objectives.reconstruction import Reconstruction
from compress.train.windows import WindowBatches


class Pieces:
    """Batches of windows cut to texts of several lengths, which take turns; see `loop.Batches`.

    Args:
        batches: of windows no shorter than any of the lengths.
        lengths: of the texts in tokens.
    """

    unit = "tokens"

    def __init__(self, batches: WindowBatches, lengths: Sequence[int]) -> None:
        self.batches, self.lengths, self.size = batches, tuple(lengths), batches.size

    def passes(self, step: int, processes: int) -> list[list[dict[str, torch.Tensor]]]:
        """As `Batches.passes`: parts `{"input_ids": [texts, length]}`, with all texts of a step of one length."""
        length = self.lengths[step % len(self.lengths)]
        return [
            [{"input_ids": _cut(part["input_ids"], length)} for part in parts]
            for parts in self.batches.passes(step, processes)
        ]

    def texts(self, length: int, count: int, start: int) -> Iterator[torch.Tensor]:
        """So many texts of one length, from the batch of step `start` on, `[length]` each."""
        step = start
        while count > 0:
            for text in _cut(self.batches.windows.batch(step, self.batches.sequences), length)[:count]:
                count -= 1
                yield text
            step += 1

    def stretches(self, length: int, count: int) -> list[torch.Tensor]:
        """At most so many texts of one length, evenly spread over all of the text, `[length]` each.

        Raises:
            UserError: the text is shorter.
        """
        whole = self.batches.windows.table.flatten()
        if len(whole) < length:
            raise UserError(
                "the text is too short for thresholds of this length",
                where="prepare.objectives.reconstruction.thresholds",
                expected=f"at most {len(whole):,} tokens",
                found=f"{length:,}",
                fix="give a longer text, or shorter `thresholds`",
            )
        count = min(count, len(whole) // length)
        starts = [(len(whole) - length) * number // max(count - 1, 1) for number in range(count)]
        return [whole[start : start + length] for start in starts]


def _cut(windows: torch.Tensor, length: int) -> torch.Tensor:
    whole = windows.shape[1] // length * length
    return windows[:, :whole].reshape(-1, length)


class Scorers(nn.Module):
    """The scorers of all layers that may have one, beside the dense model, which is no part of the module.

    Args:
        model: dense; tokenizer: its own, which asks for repetitions.
        layers: by number of the layer, a module whose `scorer` is what is trained, in float32.
        objective: what is minimised.
        low: the dtype of the dense model's matrix products below that of its weights, if any.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layers: Mapping[int, nn.Module],
        objective: Reconstruction,
        low: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): layer.float() for number, layer in layers.items()})
        self.requires_grad_(True)
        self._model, self._tokenizer = (model,), tokenizer  # in a tuple, so that its weights are none of this module's
        self._objective, self._low = objective, low
        self._repeat: Reconstruct | None = None
        self._states: States | None = None

    @property
    def module(self) -> Scorers:
        """See `Trainee`."""
        return self

    def scorer(self, layer: int) -> Scorer:
        """Of one layer."""
        found = self.layers[str(layer)].scorer
        assert isinstance(found, Scorer)
        return found

    @property
    def kind(self) -> type[Scorer]:
        """The class of all scorers."""
        return type(self.scorer(int(next(iter(self.layers)))))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What was trained, as an option keeps it."""
        return {name.removeprefix("layers."): weight.detach() for name, weight in self.named_parameters()}

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """While it is open the dense model repeats the texts that come."""
        with reconstructing(self._model[0], self._tokenizer, self._objective.chunk) as self._repeat:
            yield
        self._repeat = None

    @contextmanager
    def reading(self, model: Any) -> Iterator[None]:
        """While it is open the scorers see the states of another model of the same text, one that keeps tokens; what
        they are to give is still what the dense model looks at."""
        with given_to_scorers(model) as self._states:
            yield
        self._states = None

    def scored(self, text: torch.Tensor) -> Iterator[TokenScores]:
        """The scores of a text `[tokens]`, layer by layer; all layers are held until the last was taken."""
        found: list[TokenScores] = []
        self._read(text, found.append)
        yield from found

    def run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        """See `Trainee.run`; `learn` is called for one layer of one text after the other."""

        def take(scores: TokenScores) -> None:
            with torch.enable_grad():
                learn({"scores": self.judged(scores)}, {"scores": scores.wanted(self._objective.score)})

        for text in inputs["input_ids"]:
            self._read(text, take)

    def judged(self, scores: TokenScores) -> torch.Tensor:
        """What the scorer of the layer says of the tokens, `[G, n]`."""
        scorer = self.scorer(scores.layer)
        found: torch.Tensor = scorer(scores.hidden[None], scores.key[None], scores.value[None], scores.positions[None])
        return found[0]

    @torch.no_grad()
    def fit(self, batches: Pieces, steps: int, accelerator: Accelerator, progress: Progress | None = None) -> None:
        """Fit the linear parts exactly, on the texts of so many steps."""
        sums: dict[int, NormalEquations] = {}

        def take(scores: TokenScores) -> None:
            scalars = scalars_of(scores.key[None], scores.value[None], scores.positions[None])[0]
            shared = torch.cat([scores.hidden.float(), scalars[0, :, :1]], 1)
            if scores.layer not in sums:
                sums[scores.layer] = NormalEquations(len(scalars), shared.shape[1], 2, shared.device)
            sums[scores.layer].add(shared, scalars[..., 1:], scores.wanted(self._objective.score))

        device = next(self.parameters()).device
        for step in range(steps):
            for part in batches.passes(step, accelerator.num_processes)[accelerator.process_index]:
                for text in part["input_ids"].to(device):
                    self._read(text, take)
            if progress is not None and accelerator.is_main_process:
                progress(step + 1, steps, f"sums over {(step + 1) * batches.size:,} tokens")
        for layer, equations in sums.items():
            equations.sums = {name: accelerator.reduce(total, "sum") for name, total in equations.sums.items()}
            shared, own, intercept = equations.solve(self._objective.penalty)
            self.scorer(layer).take_linear(shared[:, :-1], torch.cat([shared[:, -1:], own], 1), intercept)

    @torch.no_grad()
    def measure(self, batches: Pieces, start: int, groups: int, layers: int) -> Measured:
        """What the scorers say of texts from the batch of step `start` on."""
        measured = Measured(layers, groups)

        def take(scores: TokenScores) -> None:
            measured.add(scores.layer, self.judged(scores), scores.wanted(self._objective.score))

        device = input_device(self._model[0])
        for length in batches.lengths:
            for text in batches.texts(length, self._objective.documents, start):
                measured.begin(length)
                self._read(text.to(device), take)
        if self._objective.thresholds:
            measured.longer = longer = Measured(layers, groups)

            def take_alone(scores: TokenScores) -> None:
                found = self.judged(scores)
                longer.add(scores.layer, found, found)

            for length in self._objective.thresholds:
                for text in batches.stretches(length, self._objective.documents):
                    longer.begin(length)
                    self._read(text.to(device), take_alone, repeated=False)
        return measured

    def _read(self, text: torch.Tensor, take: Any, *, repeated: bool = True) -> None:
        assert self._repeat is not None
        tokens = text.tolist()
        with torch.autocast(text.device.type, self._low or torch.bfloat16, enabled=self._low is not None):
            if self._states is not None:
                repetition = Request(self._tokenizer, self._objective.chunk).of(tokens)
                given = self._states(repetition.tokens[: repetition.end])
                take = partial(_with_states, take, given, slice(repetition.first, repetition.end))
            margin = self._objective.margin if repeated else 0
            self._repeat(tokens, partial(_before_the_last, take, margin) if margin else take, repeated=repeated)


def _before_the_last(take: Any, margin: int, scores: TokenScores) -> None:
    """Hand on the scores of a layer without those of the last tokens of the text."""
    take(scores.without_last(margin))


def _with_states(take: Any, given: Given, place: slice, scores: TokenScores) -> None:
    """Hand on the scores of a layer with what a scorer was given of the same tokens in another model."""
    hidden, key, value, _ = given[scores.layer]
    place = slice(place.start, place.start + len(scores.hidden))  # the last of a text may be left out
    hidden = scores.hidden if hidden is None else hidden[0, place]
    take(replace(scores, hidden=hidden, key=key[0, :, place], value=value[0, :, place]))
