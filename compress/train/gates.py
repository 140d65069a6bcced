"""Trains DuoAttention's gates (arXiv 2410.10819): how much each head group needs full attention, weights frozen.

Every group's output is alpha x full + (1 - alpha) x streaming attention. The published code takes the full part from
the states of a dense pass; here it sees the mixed states, as the deployed model will.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from compress.data.sample import Sample
from compress.models.backward import recomputed
from compress.models.placement import input_device
from compress.models.replaced import AttentionCall, replaced_attention
from compress.plan import ModelShape
from compress.runtime.impl import choose_impl
from compress.runtime.span import Span
from compress.train.loop import Learn, Progress, Settings, train
from compress.train.objectives.gates import Gates
from compress.train.objectives.objective import Inputs
from compress.train.schedule import Schedule
from compress.train.state import Store

NAME = "compress_gates"
SAVE_EVERY = 25  # steps


def train_gates(
    model: Any,
    shape: ModelShape,
    queue: Sequence[Sample],
    span: Span,
    schedule: Schedule,
    penalty: float,
    store: Store,
    seed: int,
    progress: Progress,
) -> torch.Tensor:
    """The gates `[layers, groups]` float64 on the CPU, 1 where the architecture slides by itself.

    A step takes a random document of the queue in each process.

    Args:
        span: what streaming attention sees.
        penalty: weight of the mean gate beside the squared difference of the last hidden states.

    Raises:
        UserError, KeyboardInterrupt: see `train`.
    """
    if all(native is not None for native in shape.native_windows):
        return torch.ones(shape.layers, shape.kv_heads, dtype=torch.float64)
    accelerator = Accelerator(cpu=input_device(model).type == "cpu")
    mixture = Mixture(model, shape, span)
    settings = Settings(
        seed=f"{seed}/gates",
        schedule=schedule,
        save_every=SAVE_EVERY,
        advice="train in float32 or bfloat16 instead of float16",
    )
    longest = max(document.length for document in queue)
    with mixture.mixed_attention(), recomputed(model, longest):
        batches = _Draws(queue, seed, accelerator.num_processes)
        train(mixture, [Gates(penalty=penalty)], batches, settings, store, accelerator, progress=progress)
    gates = mixture.gates.detach()
    return torch.where(mixture.free[:, None], gates, 1.0).double().cpu()


class _Draws:
    """A random document a step for every process."""

    unit = "documents"

    def __init__(self, queue: Sequence[Sample], seed: int, processes: int) -> None:
        self.queue, self.seed, self.size = queue, seed, processes

    def passes(self, step: int, processes: int) -> list[list[Inputs]]:
        """One part with one document for every process."""
        draws = (random.Random(f"{self.seed}/{step}/{process}") for process in range(processes))
        return [[{"document": self.queue[draw.randrange(len(self.queue))]}] for draw in draws]


class Mixture(nn.Module):
    """The gates, and the model that runs with them, which is no part of the module.

    Attributes:
        gates: `[layers, groups]`.
        free: `[layers]`, whether a layer attends in full by itself.
        module: what the loop trains: this.
    """

    def __init__(self, model: Any, shape: ModelShape, span: Span) -> None:
        super().__init__()
        device = input_device(model)
        self.gates = nn.Parameter(torch.ones(shape.layers, shape.kv_heads, device=device))
        self.free = torch.tensor([native is None for native in shape.native_windows], device=device)
        self.shape, self.span = shape, span
        self._model = (model,)  # in a tuple, so that its weights are none of this module's
        self._mixing = True
        self._dense: dict[Sample, torch.Tensor] = {}

    @property
    def module(self) -> Mixture:
        """See `Trainee`."""
        return self

    @contextmanager
    def mixed_attention(self) -> Iterator[None]:
        """Run the model with the mixed attention while it is open."""
        with replaced_attention(self._model[0], NAME, self.attend):
            yield

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Full attention, or its mixture with streaming attention, `[B, H, T, D]`."""
        output = call.dense()
        if not self._mixing or call.window is not None:
            return output
        prefill = choose_impl("auto", call.query).prefill
        spans = (self.span,) * self.shape.kv_heads
        streaming = prefill(call.query, call.key, call.value, spans, scale=call.scaling, scores=call.scores)
        gate = self.gates[call.layer].to(output.device).repeat_interleave(self.shape.query_heads // self.shape.kv_heads)
        # In float32: a gate's gradient is the sum of a difference over all rows.
        difference = output.float() - streaming.float()
        return (streaming.float() + gate[None, :, None, None] * difference).to(output.dtype)

    def run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        """See `Trainee.run`; the dense model's states of a document are computed once."""
        document = inputs["document"]
        if document not in self._dense:
            self._mixing = False
            with torch.no_grad():
                self._dense[document] = self._last_states(document).cpu()
            self._mixing = True
        states = self._last_states(document)
        gates = self.gates[self.free[:, None].expand_as(self.gates)]
        learn({"states": states, "gates": gates}, {"states": self._dense[document].to(states.device)})

    def _last_states(self, sample: Sample) -> torch.Tensor:
        """Hidden states behind the final norm on the rows that the loss is taken on, `[rows, hidden]`."""
        states = self._model[0].base_model(**sample.body(self.gates.device)).last_hidden_state
        rows: torch.Tensor = states[0, slice(*sample.rows)]
        return rows.to(self.gates.device)
