"""The training loop: whole batches first, then split over processes and passes, so that a split changes no gradient.

What is trained is a `Trainee`, its losses are objectives, what it sees are `Batches`. Every pass seeds torch's
generators from the seed, the step and its own number. So dropout is the same after an interrupt, and no state of a
generator has to be saved.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from compress.errors import UserError
from compress.train.curve import Curve
from compress.train.objectives.objective import Inputs, Objective
from compress.train.schedule import Schedule
from compress.train.state import Store, capture, restore
from compress.train.stop import noted_signals
from compress.words import duration

NOTHING = 1e-6  # a loss that rounding alone leaves
Progress = Callable[[int, int, str], None]
Learn = Callable[..., None]


class Trainee(Protocol):
    """What is trained: a module, and how it and its teacher run on a part of a batch.

    Attributes:
        module: its parameters that need gradients are trained.
    """

    @property
    def module(self) -> Any: ...

    def run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        """Run a part of a batch, and call `learn(student, teacher)` with the outputs, which runs the backward pass.

        It may be called several times, with the outputs of one layer after the other, whose losses add up. Outputs of
        some sequences only come with their own inputs, `learn(student, teacher, inputs)`. A call takes some of the
        objectives alone with `which=`, and with `beside=` a number whose backward pass is to run along with theirs.

        Args:
            module: the trainee's own, or what spreads its weights over processes.
        """


class Batches(Protocol):
    """What is trained on.

    Attributes:
        unit: what the size of a batch is counted in, for instance `tokens`.
        size: of a batch, over all processes.
    """

    unit: str
    size: int

    def passes(self, step: int, processes: int) -> Sequence[Sequence[Inputs]]:
        """The batch of a step (from 0): for every process the parts that it passes through the model one by one."""


@dataclass(frozen=True)
class Settings:
    """How the loop trains.

    Attributes:
        seed: of all that is drawn in a pass, as a text.
        schedule: learning rate of each step.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        save_every: steps between two saved states.
        advice: what to do when a loss is not finite.
        idle: what to do where the first step's loss is zero; empty where that may be.
    """

    seed: str
    schedule: Schedule
    weight_decay: float = 0.0
    clip: float = math.inf
    save_every: int = 50
    advice: str = "lower the learning rate"
    idle: str = ""


def train(
    trainee: Trainee,
    objectives: Sequence[Objective],
    batches: Batches,
    settings: Settings,
    store: Store,
    accelerator: Accelerator,
    *,
    curve: Curve | None = None,
    progress: Progress | None = None,
    rates: Mapping[str, float] | None = None,
) -> Any:
    """Train in place, and go on from a saved state if there is one.

    Args:
        curve: gets a line a step; None keeps none.
        progress: called in the main process with (steps done, steps in all, losses and speed).
        rates: factors on the learning rate by the names of parameters; 1 for those that are not named.

    Returns:
        The module as it was trained: the trainee's own, or what its weights are spread over processes in.

    Raises:
        UserError: a loss or its gradient is not finite, or there is nothing to learn (see `Settings.idle`).
        KeyboardInterrupt: SIGTERM or SIGINT came; the step was finished and the state saved.
    """
    module, steps = trainee.module, settings.schedule.steps
    trained = {name: weight for objective in objectives for name, weight in objective.trained(module).items()}
    device = next(iter(trained.values())).device
    factors = sorted({(rates or {}).get(name, 1.0) for name in trained})
    groups = [
        {"params": [weight for name, weight in trained.items() if (rates or {}).get(name, 1.0) == factor]}
        for factor in factors
    ]
    spread = accelerator.distributed_type == DistributedType.FSDP
    # One kernel an update where weights lie on GPUs; what it computes is the same.
    fused = True if not spread and all(weight.is_cuda for weight in trained.values()) else None
    optimiser: Any = torch.optim.AdamW(
        groups, lr=settings.schedule.rate, weight_decay=settings.weight_decay, fused=fused
    )
    if spread:
        module, prepared = accelerator.prepare(module, optimiser)
        optimiser = prepared.optimizer
        trained = {name: weight for name, weight in module.named_parameters() if name in trained}
    first = 0
    saved = store.read()
    if saved is not None and (curve is None or len(curve.steps()) >= saved[0]):  # else steps are lost, and made again
        first = saved[0]
        restore(saved[1], module, optimiser)
    del saved
    if accelerator.is_main_process and curve is not None:
        curve.cut(first)
    passes = _Passes(trainee, module, objectives, accelerator, device, spread)
    with ExitStack() as undo:
        places = sorted({weight.device for weight in module.parameters() if weight.is_cuda}, key=str)
        undo.enter_context(torch.random.fork_rng(devices=places))
        stopped = undo.enter_context(noted_signals())
        module.train()
        began = time.perf_counter()
        for step in range(first, steps):
            started = time.perf_counter()
            for group, factor in zip(optimiser.param_groups, factors, strict=True):
                group["lr"] = factor * settings.schedule(step)
            optimiser.zero_grad()
            sums = passes.run(batches.passes(step, accelerator.num_processes), f"{settings.seed}/{step}")
            if not spread:
                _sum_gradients(list(trained.values()), accelerator.num_processes)
            sums = accelerator.reduce(torch.cat([sums, sums.new_tensor([float(stopped())])]), "sum").tolist()
            losses = [total / count for total, count in zip(sums[:-1], passes.counts, strict=True)]
            loss = sum(objective.weight * mean for objective, mean in zip(objectives, losses, strict=True))
            norm = _number(accelerator.clip_grad_norm_(trained.values(), settings.clip))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(
                    "the loss of the training, or its gradient, is not finite",
                    where=f"step {step + 1}",
                    found=f"loss {loss}, norm of the gradient {norm}",
                    fix=settings.advice,
                )
            if settings.idle and not step and abs(loss) < NOTHING:  # Adam would make whole steps of its rounding
                raise UserError(
                    "there is nothing to learn: what is trained gives what it is compared with",
                    where="the first step",
                    found=f"loss {loss:.1e}",
                    fix=settings.idle,
                )
            optimiser.step()
            for objective in objectives:
                objective.constrain(trained)
            done = step + 1
            if accelerator.is_main_process:
                if curve is not None:
                    named = {
                        f"{objective.registered}_loss": mean for objective, mean in zip(objectives, losses, strict=True)
                    }
                    facts = {"loss": loss, **named, "rate": settings.schedule(step)}
                    seconds = time.perf_counter() - started
                    curve.append({"step": done, batches.unit: done * batches.size, **facts, "seconds": seconds})
                if progress is not None:
                    line = _line(loss, batches, done - first, steps - done, time.perf_counter() - began)
                    progress(done, steps, line)
            if sums[-1] or (done < steps and done % settings.save_every == 0):
                state = capture(module, trained, optimiser)
                if accelerator.is_main_process:
                    store.write(done, state)
            if sums[-1]:
                accelerator.wait_for_everyone()
                raise KeyboardInterrupt(f"stopped after step {done} of {steps}, which is saved")
    return module


def rehearse(
    trainee: Trainee, objectives: Sequence[Objective], batches: Batches, settings: Settings, accelerator: Accelerator
) -> None:
    """Run one pass of each shape of the first step, forward and backward, and forget its gradients.

    Compilers and tuners do their work then. All that is random in a training is drawn in it as if this had not been.
    """
    module = trainee.module
    device = next(weight.device for weight in module.parameters() if weight.requires_grad)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        module.train()
        passes = _Passes(trainee, module, objectives, accelerator, device, False)
        passes.run([one_of_each_shape(batches, accelerator)] * accelerator.num_processes, f"{settings.seed}/0")
    for weight in module.parameters():
        weight.grad = None


def one_of_each_shape(batches: Batches, accelerator: Accelerator) -> list[Inputs]:
    """The parts of the first batch that this process passes through the model, one of each shape; the first is the
    largest."""
    parts = batches.passes(0, accelerator.num_processes)[accelerator.process_index]
    return list({part["input_ids"].shape: part for part in reversed(parts)}.values())[::-1]


class _Passes:
    """Forward and backward passes of a step; every term of the whole batch weighs the same."""

    def __init__(
        self,
        trainee: Trainee,
        module: Any,
        objectives: Sequence[Objective],
        accelerator: Accelerator,
        device: torch.device,
        spread: bool,
    ) -> None:
        self.trainee, self.module, self.objectives = trainee, module, objectives
        self.accelerator, self.device, self.spread = accelerator, device, spread
        self.counts: list[int] = []

    def run(self, passes: Sequence[Sequence[Inputs]], seed: str) -> torch.Tensor:
        """Gradients of this process's parts of a batch; the sum of every objective's terms over them, `[objectives]`.

        Afterwards `counts` has the terms of each objective in the whole batch.
        """
        self.counts = [
            sum(objective.count(part) for parts in passes for part in parts) for objective in self.objectives
        ]
        parts = passes[self.accelerator.process_index]
        sums = torch.zeros(len(self.objectives), device=self.device)
        for number, part in enumerate(parts):
            torch.manual_seed(random.Random(f"{seed}/{self.accelerator.process_index}/{number}").getrandbits(63))
            waits = self.spread and number < len(parts) - 1
            with self.accelerator.no_sync(self.module) if waits else nullcontext():
                inputs = {
                    name: value.to(self.device) if isinstance(value, torch.Tensor) else value
                    for name, value in part.items()
                }
                self.trainee.run(self.module, inputs, self._learn(inputs, sums))
        return sums

    def _learn(self, inputs: Inputs, sums: torch.Tensor) -> Learn:
        # Spread weights get the mean gradient over processes; the loss is already a share of the whole batch's mean.
        factor = self.accelerator.num_processes if self.spread else 1

        def learn(
            student: Any,
            teacher: Any,
            some: Inputs = inputs,
            *,
            which: Callable[[Objective], bool] = lambda objective: True,
            beside: torch.Tensor | None = None,
        ) -> None:
            loss = beside
            for number, objective in enumerate(self.objectives):
                if not which(objective):
                    continue
                with nullcontext() if objective.weight else torch.no_grad():
                    total = objective.loss(student, teacher, some)
                sums[number] += total.detach().to(sums.device)
                if objective.weight:
                    term = objective.weight / self.counts[number] * total
                    loss = term if loss is None else loss + term.to(loss.device)
            if loss is not None:
                self.accelerator.backward(loss * factor)

        return learn


def _sum_gradients(weights: Sequence[nn.Parameter], processes: int) -> None:
    """Replace the gradients by their sums over all processes."""
    if processes == 1:
        return
    waiting = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        waiting.append(distributed.all_reduce(weight.grad, async_op=True))
    for work in waiting:
        work.wait()


def _number(value: Any) -> float:
    """A tensor of one number, which may be spread over processes."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _line(loss: float, batches: Batches, done: int, left: int, seconds: float) -> str:
    """Loss, speed and time left, from the `done` steps of this session that took `seconds`."""
    speed = done * batches.size / seconds
    return f"loss {loss:.4f}, {speed:,.0f} {batches.unit}/s, {duration(left * seconds / done)} left"
