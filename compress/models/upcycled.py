"""The weights of an upcycled model, beside the seed that its plan is bound to; `planned_model` finds them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from compress.errors import UserError
from compress.plan import Plan

Tensors = Mapping[str, torch.Tensor]
_PLACE = "compress_upcycled"


def attach_upcycled(seed: Any, fingerprint: str, tensors: Callable[[], Tensors]) -> None:
    """Let a seed carry the weights of the model that it was upcycled to.

    Args:
        fingerprint: of that model, as its plan has it.
        tensors: gives all of its weights by name.
    """
    setattr(seed, _PLACE, (fingerprint, tensors))


def upcycled_for(seed: Any, plan: Plan) -> Tensors:
    """The weights that a plan of an upcycled model is of.

    Raises:
        UserError: the seed does not carry them.
    """
    fingerprint, tensors = getattr(seed, _PLACE, ("nothing", dict))
    if fingerprint != plan.model.fingerprint:
        raise UserError(
            "the weights of the upcycled experts are missing",
            where="plan: upcycle",
            expected=f"weights {plan.model.fingerprint}, as `compress upcycle` leaves them in the run folder",
            found=fingerprint,
            fix="run the recipe that made the plan, or use the checkpoint that was exported with it",
        )
    weights: Tensors = tensors()
    return weights
