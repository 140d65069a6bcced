"""A model that is trained, beside the dense one that it may follow: its passes, with as little memory as they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from compress.models.backward import kept_bytes
from compress.models.planned import own_weights
from compress.models.replaced import frozen
from compress.runtime.shard import Shard
from compress.runtime.step import Record
from compress.train.fading import faded
from compress.train.keeping import decided
from compress.train.loop import Learn
from compress.train.objectives.objective import Inputs, Objective
from compress.train.token_losses import next_tokens, refusal
from compress.train.window_dropout import window_dropped

LOGITS_BYTES = 2**30  # of the float32 logits that losses are taken on at once
# A logit, while losses are taken: both models' and the gradient; and in plain PyTorch float32 copies and logarithms.
LOSS_BYTES = {True: 12, False: 32}


class Student:
    """A model that is trained, and the dense one that it may follow.

    Where all losses are of logits, or of routers, and the logits of a pass are large, the head runs on some sequences
    at a time, and so do the losses: their gradients meet in the last hidden states, whose backward pass comes last.

    Args:
        dtype: of matrix products; None for that of the weights.
        whole: never do so.
        as_kept: the models are kept in `dtype`, so a pass runs as the result will: all weights but those that mixers
            and routers have of their own are rounded to it once, and what lies between the products is in it as well.
            Without, only the inputs of the products are rounded, and twice as many bytes move between them.
        shard: the part of each sequence that this process has, where others have the rest.
    """

    def __init__(
        self,
        model: Any,
        teacher: Any,
        dtype: torch.dtype | None,
        *,
        whole: bool,
        as_kept: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.module, self.teacher, self.dtype, self.whole = model, teacher, dtype, whole
        self.shared = {} if shard is None else {"compress_shard": shard}
        self.rounded = _Rounded(model, dtype) if as_kept and dtype is not None else None

    def run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        """See `Trainee.run`."""
        if self.rounded is None:
            self._run(module, inputs, learn)
        else:
            self.rounded.during(lambda: self._run(module, inputs, learn))

    def _run(self, module: Any, inputs: Inputs, learn: Learn) -> None:
        record = Record()
        # Only a model that carries a plan has mixers, which may report losses.
        planned = {"compress_record": record} if hasattr(self.module.config, "compress_plan") else {}
        given = {"input_ids": inputs["input_ids"], **self.shared}
        with ExitStack() as during:
            during.enter_context(window_dropped(self.module, inputs.get("dropped", ())))
            during.enter_context(decided(self.module, inputs.get("decisions")))
            during.enter_context(faded(self.module, inputs.get("left", 0.0)))
            if not self.whole and len(parts := self._parts(given["input_ids"])) > 1:
                self._run_in_parts(module, inputs, given, planned, learn, parts)
                return
            student = {"logits": self._logits(module, {**given, **planned}), "record": record}
            if self.teacher is None:
                learn(student, None)
                return
            with torch.no_grad():
                teacher = {"logits": self._logits(self.teacher, given)}
            learn(student, teacher)

    def kept_bytes(self, inputs: Inputs, device: torch.device) -> int:
        """Bytes that a pass over a part of a batch keeps for its backward pass, with what the losses take beside."""
        there = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        ids = there["input_ids"]
        tokens = ids.numel() if self.whole else max(ids[part].numel() for part in self._parts(ids))
        logits = tokens * len(self.module.get_output_embeddings().weight)
        self.module.train()  # as the loop has it
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            kept = kept_bytes(lambda: self.run(self.module, there, _learn_nothing), self.module)
        kind = self.dtype or self.module.get_output_embeddings().weight.dtype
        return kept + LOSS_BYTES[refusal(device, kind) is None] * logits

    def _parts(self, ids: torch.Tensor) -> list[tuple[slice, slice]]:
        """Sequences and columns of the parts that a pass is split into, so that the logits of each have few bytes."""
        tokens = max(1, LOGITS_BYTES // (4 * len(self.module.get_output_embeddings().weight)))
        rows = _pieces(len(ids), max(1, tokens // ids.shape[1]))
        return [(row, columns) for row in rows for columns in _pieces(ids.shape[1], max(tokens, 1))]

    def _run_in_parts(
        self,
        module: Any,
        inputs: Inputs,
        given: Inputs,
        planned: Inputs,
        learn: Learn,
        parts: list[tuple[slice, slice]],
    ) -> None:
        with self._autocast(given):
            states = self._states(module, {**given, **planned})
            with torch.no_grad():
                dense = None if self.teacher is None else self._states(self.teacher, given)
        leaf, ids = states.detach().requires_grad_(), inputs["input_ids"]
        of_tokens = {"input_ids": ids}
        if "next_ids" in inputs:
            of_tokens["next_ids"] = inputs["next_ids"]
        elif parts[0][1] != slice(0, ids.shape[1]):  # a part does not have the token that follows its last one
            of_tokens["next_ids"] = next_tokens(ids)
        for place in parts:
            with self._autocast(given):
                device = ids.device
                logits = module.get_output_embeddings()(leaf[place]).to(device)
                with torch.no_grad():
                    other = None if dense is None else self.teacher.get_output_embeddings()(dense[place]).to(device)
            learn(
                {"logits": logits},
                None if other is None else {"logits": other},
                {name: value[place] for name, value in of_tokens.items()},
                which=_of_logits,
            )
        record: Record | None = planned.get("compress_record")
        if record is not None and (record.routing or record.mlp_routing or record.keeping):
            beside = None if leaf.grad is None else (states * leaf.grad).sum()  # its gradient is that of the losses
            learn({"record": record}, None, which=_of_record, beside=beside)
        elif leaf.grad is not None:
            states.backward(leaf.grad)

    @staticmethod
    def _states(model: Any, inputs: Inputs) -> torch.Tensor:
        states: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
        return states

    def _logits(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with self._autocast(inputs):
            logits: torch.Tensor = model(**inputs, use_cache=False).logits
        return logits

    def _autocast(self, inputs: Inputs) -> torch.autocast:
        kind = inputs["input_ids"].device.type
        casts = self.dtype is not None and self.rounded is None
        return torch.autocast(kind, self.dtype or torch.bfloat16, enabled=casts)


def _pieces(count: int, most: int) -> list[slice]:
    """Parts of `count` things, alike in size and at most so many each."""
    parts = torch.arange(count).tensor_split(math.ceil(count / most))
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


class _Rounded(nn.Module):
    """A module whose float32 weights are rounded while some work is done, its backward passes included."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        own = {id(weight) for weight in own_weights(module)}
        wide = {name: weight for name, weight in self.named_parameters() if weight.dtype == torch.float32}
        self.names = [name for name, weight in wide.items() if id(weight) not in own]
        self.dtype = dtype

    def forward(self, work: Callable[[], None]) -> None:
        """Do the work."""
        work()

    def during(self, work: Callable[[], None]) -> None:
        """Do the work with rounded weights; gradients come to the weights themselves, in float32."""
        rounded = {name: self.get_parameter(name).to(self.dtype) for name in self.names}
        functional_call(self, rounded, (work,))


def _learn_nothing(*outputs: Any, **options: Any) -> None:
    """Takes the outputs of a pass that is only measured."""


def _of_logits(objective: Objective) -> bool:
    return objective.of_logits


def _of_record(objective: Objective) -> bool:
    return objective.of_record


@torch.no_grad()
def has_plain_head(model: Any) -> bool:
    """Whether a model's logits are its output embeddings on the last hidden states, without a scale or a cap."""
    table = model.get_input_embeddings().weight
    ids = torch.arange(min(8, len(table)), device=table.device)[None]  # one alone may be padding, whose states are 0
    with frozen(model):
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.equal(model.get_output_embeddings()(states).to(logits.device), logits)
