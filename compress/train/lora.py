"""LoRA (arXiv 2106.09685) on every linear projection of the decoder layers, by peft, and its merge in float32."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import LoraLayer
from torch import nn

from compress.errors import UserError
from compress.models.families import layers_of
from compress.models.planned import mixers_of, own_weights
from compress.train.settings import RecoverSettings


def projections(model: nn.Module) -> list[str]:
    """Full names of the linear modules inside the decoder layers, whatever they are called, but for mixers' own."""
    of_mixers = {id(module) for mixer in mixers_of(model) for module in mixer.modules()}
    inside = {id(module) for layer in layers_of(model) for module in layer.modules() if isinstance(module, nn.Linear)}
    inside -= of_mixers
    return [name for name, module in model.named_modules() if id(module) in inside]


def attach(model: nn.Module, settings: RecoverSettings) -> LoraModel:
    """Put adapters into the model, in place: random A, zero B, so that it computes what it did before.

    Only the adapters, and what mixers and routers have of their own, take gradients afterwards. Adapters are float32 on
    weights of any dtype. Draws from torch's global generator.

    Raises:
        UserError: the decoder layers hold no linear projection.
    """
    names = projections(model)
    if not names:
        raise UserError("the decoder layers have no linear projections to train", where="recover.train: lora")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float scales as well
        lora_dropout=settings.dropout,
        target_modules=names,
        bias="none",
    )
    adapted = LoraModel(model, config, "default")
    for weight in own_weights(model):
        weight.requires_grad_(True)
    return adapted


@torch.no_grad()
def merge(adapted: LoraModel) -> nn.Module:
    """Add the updates to the weights, which become float32, and take peft's modules out of the model again."""
    layers: list[Any] = [module for module in adapted.model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        base.weight.data = base.weight.data.float() + layer.get_delta_weight("default").float()
    return adapted.unload()
