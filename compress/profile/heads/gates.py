"""DuoAttention's gates (arXiv 2410.10819): a trained number a head group, how much it needs full attention.

Every group's output is alpha x full + (1 - alpha) x streaming attention, weights frozen. The gates minimise the mean
squared difference of the last hidden states (behind the final norm) on the rows that predict the answers, plus
`penalty` times the mean |alpha|. The published code takes the full part from the states of a dense pass; here it
sees the mixed states, as the deployed model will. Gates saturate (of the published ones 81 to 95% of key/value heads
are at 0.5 or more), so the `heads` solver reports how far apart the two sides of its cut are.

Gradients are averaged over processes by accelerate, each of which trains on documents of its own choice.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from compress.data.document import Document
from compress.errors import UserError
from compress.limits import FACTOR, LONGEST, STEPS
from compress.models.backward import recomputed
from compress.models.replaced import AttentionCall, answer_rows, replaced_attention
from compress.profile.key import Key
from compress.profile.partial import Step
from compress.profile.passes.base import Samples
from compress.profile.passes.training import TrainedStatistic
from compress.profile.statistic import Progress, Result, Results, Subject
from compress.registry import statistics
from compress.runtime.impl import choose_impl
from compress.runtime.span import Span

if TYPE_CHECKING:
    from compress.plan import ModelShape

NAME = "compress_gates"
SAVE_EVERY = 25  # steps


@statistics.register("gates")
class Gates(TrainedStatistic):
    """Trained gate of every head group between full and streaming attention (trains; needs a backward pass a step)."""

    sink: int = Field(64, ge=0, le=LONGEST, description="tokens at the start that streaming attention sees")
    recent: int = Field(256, ge=1, le=LONGEST, description="tokens of streaming attention's window")
    task: str | None = Field("passkeys", description="task of the documents that are trained on; null takes all")
    steps: int = Field(2000, ge=1, le=STEPS, description="documents trained on, one a step")
    rate: float = Field(
        0.02, gt=0, le=FACTOR, description="learning rate of AdamW; warm-up and decay take a fifth each"
    )
    penalty: float = Field(0.05, ge=0, le=FACTOR, description="weight of the mean gate beside the squared difference")

    unit: ClassVar[str] = "gate, 0 streaming to 1 full"
    gives: ClassVar[Mapping[str, str]] = {"gates": "groups"}

    def train(
        self, subject: Subject, samples: Samples, lengths: Sequence[int], step: Step, seed: int, progress: Progress
    ) -> Results:
        """Train on the task's documents, in random order: (layer, group) under the longest length; 1 in layers that
        slide by themselves.

        Raises:
            UserError: there are no documents of the task, or the loss is not finite.
        """
        queue = [document for _, group in sorted(samples.items()) for document in group]
        chosen = [document for document in queue if self.task in (None, document.task)]
        if not chosen:
            raise UserError(
                f"the gates have no documents of task `{self.task}` to train on",
                where="calibration.training",
                expected=f"`- {{task: {self.task}, ...}}`",
                found=", ".join(sorted({document.task for document in queue})),
                fix="add such documents, or set the statistic's `task` to null to train on all",
            )
        gates = train_gates(self, subject.model, subject.shape, chosen, step, seed, progress)
        return {Key(self.name, length=max(lengths)): Result(gates.float(), ("layer", "group"), self.unit)}


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: up over the first fifth, down over the last, never below a tenth."""
    fifth = max(steps / 5, 1)
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def train_gates(
    settings: Gates,
    model: Any,
    shape: ModelShape,
    queue: Sequence[Document],
    state: Step,
    seed: int,
    progress: Progress,
) -> torch.Tensor:
    """The gates `[layers, groups]` float64 on the CPU, 1 where the architecture slides by itself."""
    if all(native is not None for native in shape.native_windows):
        return torch.ones(shape.layers, shape.kv_heads, dtype=torch.float64)
    from accelerate import Accelerator
    from accelerate.utils import reduce

    device = model.get_input_embeddings().weight.device
    accelerator = Accelerator(cpu=device.type == "cpu")
    gates = torch.nn.Parameter(torch.ones(shape.layers, shape.kv_heads, device=device))
    optimiser = torch.optim.AdamW([gates], lr=settings.rate, weight_decay=0.0)
    free = torch.tensor([native is None for native in shape.native_windows], device=device)[:, None]
    span = Span(settings.sink, settings.recent, 0.0)
    mixture = Mixture(gates, span, shape)
    first = _restore(state, gates, optimiser)
    dense: dict[int, torch.Tensor] = {}
    with replaced_attention(model, NAME, mixture):
        for step in range(first, settings.steps):
            chosen = random.Random(f"{seed}/{step}/{accelerator.process_index}").randrange(len(queue))
            document = queue[chosen]
            with torch.no_grad():
                gates.clamp_(0, 1)
            if chosen not in dense:
                mixture.mixing = False
                with torch.no_grad():
                    dense[chosen] = _last_states(model, document, device).cpu()
                mixture.mixing = True
            with recomputed(model, document.length):
                states = _last_states(model, document, device)
                difference = (states.float() - dense[chosen].to(device).float()).square().mean()
                loss = difference + settings.penalty * gates[free.expand_as(gates)].abs().mean()
                if not bool(torch.isfinite(loss)):
                    raise UserError(
                        "the loss of the gates is not finite",
                        where=f"step {step + 1}, a document of {document.length} tokens",
                        fix="train in float32 or bfloat16 instead of float16",
                    )
                optimiser.zero_grad()
                accelerator.backward(loss)
            if accelerator.num_processes > 1:
                gates.grad = reduce(gates.grad, "mean")
            for group in optimiser.param_groups:
                group["lr"] = settings.rate * schedule(step, settings.steps)
            optimiser.step()
            progress(step + 1, settings.steps, f"gates, squared difference {float(difference.detach()):.4g}")
            if (step + 1) % SAVE_EVERY == 0 and accelerator.is_main_process:
                _save(state, step + 1, gates, optimiser)
    trained = gates.detach().clamp(0, 1)
    return torch.where(free, trained, 1.0).double().cpu()


class Mixture:
    """Full attention, or its mixture with streaming attention."""

    def __init__(self, gates: torch.Tensor, span: Span, shape: ModelShape) -> None:
        self.gates = gates
        self.span = span
        self.shape = shape
        self.mixing = True

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """`[B, H, T, D]`."""
        output = call.dense()
        if self.mixing and call.window is None:
            spans = (self.span,) * self.shape.kv_heads
            prefill = choose_impl("auto", call.query).prefill
            streaming = prefill(call.query, call.key, call.value, spans, scale=call.scaling)
            gate = self.gates[call.layer].repeat_interleave(self.shape.query_heads // self.shape.kv_heads)
            # In float32: a gate's gradient is the sum of a difference over all rows.
            difference = output.float() - streaming.float()
            output = (streaming.float() + gate[None, :, None, None] * difference).to(output.dtype)
        return output


def _last_states(model: Any, document: Document, device: torch.device) -> torch.Tensor:
    """Hidden states behind the final norm on the rows that predict the answer, `[rows, hidden]`."""
    tokens = torch.tensor([document.tokens[: document.answer[1]]], device=device)
    states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    picked: torch.Tensor = states[0, answer_rows(document.answer, device)]
    return picked


def _save(state: Step, step: int, gates: torch.Tensor, optimiser: torch.optim.AdamW) -> None:
    """Gates and the optimiser's moments."""
    moments = optimiser.state[gates]
    held = {name: moments[name].detach().cpu() for name in ("step", "exp_avg", "exp_avg_sq")}
    state.write({"step": step}, {**held, "gates": gates.detach().cpu().contiguous()})


def _restore(state: Step, gates: torch.Tensor, optimiser: torch.optim.AdamW) -> int:
    """Continue an interrupted training: the number of steps done, 0 without one."""
    found = state.read()
    if found is None:
        return 0
    notes, held = found
    with torch.no_grad():
        gates.copy_(held["gates"])
    optimiser.state[gates] = {
        name: value if name == "step" else value.to(gates.device) for name, value in held.items() if name != "gates"
    }
    return int(notes["step"])
