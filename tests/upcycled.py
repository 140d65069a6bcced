"""Tiny models as experts of one shape, and one model of them with random routers."""

from __future__ import annotations

import copy
from typing import Any

import torch

from compress.models.upcycle import named, upcycle
from compress.models.upcycled import attach_upcycled
from compress.plan import Plan
from tests.tiny import tiny_model


def varied(seed: Any, number: int) -> Any:
    """A copy of a model whose layers, norms included, are others."""
    model = copy.deepcopy(seed)
    torch.manual_seed(number)
    for name, weight in model.named_parameters():
        if ".layers." in name:
            weight.data += 0.3 * torch.randn_like(weight) * weight.std().clamp(min=0.1)
    return model


def with_random_routers(model: Any, scale: float = 1.0) -> Any:
    """The model, in which every token has gates of its own."""
    torch.manual_seed(9)
    for name, weight in model.named_parameters():
        if name.endswith(".router"):
            torch.nn.init.normal_(weight, std=scale)
    return model


def upcycled_model(family: str) -> tuple[Any, Plan]:
    """A seed that carries the weights of two experts, and the plan of all."""
    seed = tiny_model(family)
    model, plan, _ = upcycle(seed, {f"expert {number}": varied(seed, number) for number in range(2)})
    plan = named(with_random_routers(model), plan)
    attach_upcycled(seed, plan.model.fingerprint, model.state_dict)
    return seed, plan
