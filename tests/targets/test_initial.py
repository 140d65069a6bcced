"""A target whose mixer owns parameters says what they start with, group by group, from the model's own weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from compress.models.planned import mixers_of, planned_model, set_plan
from compress.models.prepared import PreparedOption, attach
from compress.plan import Plan, make_plan, uniform_plan
from compress.registry import targets
from compress.runtime.mixer import MIXERS, LayerFacts, register
from compress.runtime.mixer_span import SpanMixer
from compress.runtime.span import FULL, AnySpan
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.span import SpanTarget
from tests.pruned import uneven_plan
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


def test_of_what_was_prepared_the_query_heads_that_stay_take_theirs() -> None:
    model, target = tiny_model("phi3"), LinearGroup(alpha=1)
    trained = {}
    dense = planned_model(model, uniform_plan(shape_of(model), target), untrained=True)
    for layer, mixer in enumerate(mixers_of(dense)):
        for name, parameter in mixer.named_parameters():
            trained[f"{layer}.{name}"] = torch.randn(parameter.shape)
    record: Any = SimpleNamespace(errors=[[0.0, 0.0]] * 3)
    attach(model, (PreparedOption(target, record, trained),))
    found = mixers_of(planned_model(model, uneven_plan(model, [target])))
    # The last group with its last query head, everything, and of both groups one query head: the first, the last.
    stay = [([1], [[1]]), ([0, 1], [[0, 1], [0, 1]]), ([0, 1], [[0], [1]])]
    for layer, (mixer, (groups, heads)) in enumerate(zip(found, stay, strict=True)):
        for name, parameter in mixer.named_parameters():
            rows = trained[f"{layer}.{name}"][groups]
            if name in mixer.by_query:
                rows = torch.stack([row[kept] for row, kept in zip(rows, heads, strict=True)])
            assert torch.equal(parameter, rows), name
