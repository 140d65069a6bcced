"""The training loop: whole batches first, then split over processes and passes, so that a split changes no gradient.

Every pass seeds torch's generators from the seed, the step and its own number. So dropout is the same after an
interrupt, and no state of a generator has to be saved.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from compress.errors import UserError
from compress.models.backward import recomputed
from compress.recover.curve import Curve
from compress.recover.loss import distill_loss, text_loss
from compress.recover.settings import RecoverSettings
from compress.recover.state import Partial, capture, restore, whole
from compress.recover.stop import noted_signals
from compress.recover.windows import Windows

Progress = Callable[[int, int, str], None]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate of a step from 0: linear over the first share of the steps, then half a cosine to 0.

    The first step has more than nothing, and so has the last.
    """
    rising = warmup * steps
    if step + 1 <= rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) if step > rising else 1.0


def autocast_dtype(settings: RecoverSettings, device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products below float32; None where all is float32."""
    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if settings.precision == "bfloat16" else None


def share_of(settings: RecoverSettings, processes: int) -> int:
    """Sequences of a step in each process.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    if settings.batch_size % processes:
        raise UserError(
            "the batch does not divide among the processes",
            where="recover.batch_size",
            expected=f"a multiple of {processes}",
            found=f"{settings.batch_size}",
        )
    return settings.batch_size // processes


def train(
    model: torch.nn.Module,
    settings: RecoverSettings,
    windows: Windows,
    partial: Partial,
    curve: Curve,
    accelerator: Accelerator,
    *,
    teacher: torch.nn.Module | None,
    seed: int,
    progress: Progress | None,
) -> None:
    """Train what takes gradients, in place, and go on from a saved state if there is one.

    Raises:
        UserError: the loss or its gradient is not finite, or the batch does not divide among the processes.
        KeyboardInterrupt: SIGTERM or SIGINT came; the step was finished and the state saved.
    """
    device, steps = next(model.parameters()).device, settings.step_count
    share = share_of(settings, accelerator.num_processes)
    pass_size = min(settings.micro_batch or share, share)
    optimiser: Any = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=settings.rate,
        weight_decay=settings.weight_decay,
    )
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    raw = optimiser.optimizer
    found = partial.read()
    first = 0
    if found is not None and len(curve.steps()) >= found[0]:  # else steps of the curve are lost, and are made again
        first = found[0]
        restore(found[1], trained, raw)
    del found
    if accelerator.is_main_process:
        curve.cut(first)
    passes = _Passes(settings, wrapped, teacher, accelerator, device)
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stopped = undo.enter_context(noted_signals())
        model.train()
        itemsize = 4 if autocast_dtype(settings, device) is None else 2
        tokens = pass_size * settings.length
        undo.enter_context(recomputed(model, tokens, chosen=settings.checkpointing, itemsize=itemsize, trained=True))
        began = time.perf_counter()
        for step in range(first, steps):
            started = time.perf_counter()
            rate = settings.rate * rate_factor(step, steps, settings.warmup)
            for group in raw.param_groups:
                group["lr"] = rate
            optimiser.zero_grad()
            batch = windows.batch(step, settings.batch_size)
            own = batch[accelerator.process_index * share :][:share].to(device)
            sums = passes.run(own.split(pass_size), f"{seed}/recover/{step}/{accelerator.process_index}")
            sums = accelerator.reduce(torch.cat([sums, sums.new_tensor([float(stopped())])]), "sum").tolist()
            text, distill = passes.means(sums)
            weights = settings.weights
            loss = weights[0] * text + weights[1] * (distill or 0.0)
            norm = whole(accelerator.clip_grad_norm_(trained.values(), settings.clip))
            if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
                raise UserError(
                    "the loss of the training, or its gradient, is not finite",
                    where=f"step {step + 1}",
                    found=f"loss {loss}, norm of the gradient {float(norm)}",
                    fix="lower `recover.rate`, or set `recover.precision` to float32",
                )
            optimiser.step()
            done = step + 1
            if accelerator.is_main_process:
                seconds = time.perf_counter() - started
                tokens = done * settings.batch_size * settings.length
                facts = {"loss": loss, "text_loss": text, "distill_loss": distill, "rate": rate, "seconds": seconds}
                curve.append({"step": done, "tokens": tokens, **facts})
                if progress is not None:
                    progress(
                        done, steps, _told(settings, loss, done - first, steps - done, time.perf_counter() - began)
                    )
            if sums[-1] or (done < steps and done % settings.save_every == 0):
                state = capture(trained, raw)
                if accelerator.is_main_process:
                    partial.write(done, state)
            if sums[-1]:
                accelerator.wait_for_everyone()
                raise KeyboardInterrupt(f"stopped after step {done} of {steps}, which is saved")


class _Passes:
    """Forward and backward passes of a step; every token of the whole batch weighs the same."""

    def __init__(
        self,
        settings: RecoverSettings,
        model: Any,
        teacher: Any,
        accelerator: Accelerator,
        device: torch.device,
    ) -> None:
        self.settings, self.model, self.teacher, self.accelerator = settings, model, teacher, accelerator
        self.device = device
        self.dtype = autocast_dtype(settings, device)
        self.text_tokens = settings.batch_size * (settings.length - 1)
        self.all_tokens = settings.batch_size * settings.length

    def run(self, parts: tuple[torch.Tensor, ...], name: str) -> torch.Tensor:
        """Gradients of this process's sequences; sums of the text loss and of the KL over them, `[2]`."""
        sums = torch.zeros(2, device=self.device)
        for number, tokens in enumerate(parts):
            torch.manual_seed(random.Random(f"{name}/{number}").getrandbits(63))
            last = number == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(tokens, sums)
                # Wrappers average gradients over processes; the loss is already a share of the whole batch's mean.
                self.accelerator.backward(loss * self.accelerator.num_processes)
        return sums

    def means(self, sums: list[float]) -> tuple[float, float | None]:
        """Both losses a token, from their sums over all processes; None for the KL without a teacher."""
        distill = None if self.teacher is None else sums[1] / self.all_tokens
        return sums[0] / self.text_tokens, distill

    def _loss(self, tokens: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        weights = self.settings.weights
        logits = self._logits(self.model, tokens)
        with nullcontext() if weights[0] else torch.no_grad():
            text = text_loss(logits, tokens)
        sums[0] += text.detach()
        loss = weights[0] / self.text_tokens * text
        if self.teacher is None:
            return loss
        with torch.no_grad():
            teacher = self._logits(self.teacher, tokens)
        distill = distill_loss(logits, teacher, self.settings.temperature)
        sums[1] += distill.detach()
        return loss + weights[1] / self.all_tokens * distill

    def _logits(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits


def _told(settings: RecoverSettings, loss: float, done: int, left: int, seconds: float) -> str:
    """Loss, speed and time left, from the `done` steps of this session that took `seconds`."""
    speed = done * settings.batch_size * settings.length / seconds
    minutes, rest = divmod(round(left * seconds / done), 60)
    return f"loss {loss:.4f}, {speed:,.0f} tokens/s, {minutes} min {rest:02d} s left"
