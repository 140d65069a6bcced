"""A target whose mixer owns parameters says what they start with, group by group, from the model's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from compress.models.planned import planned_model, set_plan
from compress.plan import Plan, make_plan
from compress.registry import targets
from compress.runtime.mixer import MIXERS, LayerFacts, register
from compress.runtime.mixer_span import SpanMixer
from compress.runtime.span import FULL, AnySpan
from compress.targets.full import FullGroup
from compress.targets.span import SpanTarget
from tests.tiny import shape_of, tiny_model


class ScaledGroup(SpanTarget):
    """Sees everything, with values that a vector of the group's own multiplies."""

    runtime: ClassVar[str | None] = __name__

    target: Literal["scaled"] = "scaled"

    def span(self, native: int | None = None) -> AnySpan:
        return FULL

    def initial(self, attention: Any, group: int) -> dict[str, torch.Tensor]:
        rows = attention.v_proj.weight.view(-1, attention.head_dim, attention.v_proj.in_features)
        return {"scale": rows[group].abs().amax(1)}


class ScaledMixer(SpanMixer):
    """`scale` is `[groups, D]`; `other` is not converted."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__(groups, facts)
        self.scale = nn.Parameter(torch.empty(len(groups), facts.head_dim))
        self.other = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)
        nn.init.constant_(self.other, 0.5)

    def span(self, group: Mapping[str, Any]) -> AnySpan:
        return FULL


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    targets.register("scaled")(ScaledGroup)
    register("scaled")(ScaledMixer)
    yield
    targets._methods.pop("scaled")
    MIXERS.pop("scaled")


def plan_of(shape: Any, *places: tuple[int, int]) -> Plan:
    rows = [[ScaledGroup() if (layer, group) in places else FullGroup() for group in range(2)] for layer in range(3)]
    return make_plan(shape, rows)


def test_parameters_start_as_the_target_says() -> None:
    dense = tiny_model("llama-gqa")
    shape = shape_of(dense)
    model = planned_model(dense, plan_of(shape, (0, 1), (2, 0), (2, 1)))
    weights = [layer.self_attn.v_proj.weight.view(2, 12, 48).abs().amax(2) for layer in dense.model.layers]
    mixers = [layer.self_attn.mixers for layer in model.model.layers]
    assert torch.equal(mixers[0]["scaled"].scale, weights[0][1:])
    assert torch.equal(mixers[2]["scaled"].scale, weights[2])
    assert bool((mixers[2]["scaled"].other == 0.5).all()) and "scaled" not in mixers[1]
    # What has been trained stays when the plan changes elsewhere.
    with torch.no_grad():
        mixers[0]["scaled"].scale.zero_()
    set_plan(model, plan_of(shape, (0, 1), (1, 0)))
    assert not bool(model.model.layers[0].self_attn.mixers["scaled"].scale.any())
    assert torch.equal(model.model.layers[1].self_attn.mixers["scaled"].scale, weights[1][:1])
