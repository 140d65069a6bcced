"""The retain target: what a plan may say of it, and what it costs on average over texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compress.errors import UserError
from compress.models.planned import mixers_of, planned_model
from compress.models.prepared import PreparedOption, attach
from compress.models.pruning import parameters_per_unit
from compress.plan import uniform_plan
from compress.registry import targets
from compress.runtime.span import PAGE
from compress.targets.retain import COUNTERS, RetainGroup
from compress.targets.unit import Unit
from tests.tiny import shape_of, tiny_model

UNIT = Unit(query_heads=3, head_dim=16)
GIVEN: dict[str, Any] = {"scorer": "key_norm", "threshold": 0.5, "share": 0.25}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scorer": None}, "valid string"),
        ({"scorer": "key"}, "expected one of gate, key_norm, .*value_norm; did you mean `key_norm`.*, got key"),
        ({"threshold": float("nan")}, "finite"),
        ({"share": 1.5}, "less than or equal to 1"),
        ({"cap": [-1, 0.5]}, "greater than or equal to 0"),
        ({"cap": [4, 0.0001]}, "cap: expected a multiple of 1/1024"),
        ({"beta": 0.0001}, "beta: expected a multiple of 1/1024"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        targets.parse({"target": "retain", **GIVEN, **fields})


@pytest.mark.parametrize("fields", [{}, {"beta": 0.25, "cap": [30, 0.125], "spread": 0.1}])
def test_a_plan_says_all_of_it_and_is_read_again(fields: dict[str, Any]) -> None:
    group = targets.parse({"target": "retain", **GIVEN, **fields})
    assert targets.parse(targets.written(group)) == group
    assert group.stock(None) is None and not group.by_length and not group.fits_native
    assert group.in_expectation and uniform_plan(shape_of(tiny_model("llama-gqa")), group).in_expectation
    assert "before it 25% by key_norm" in group.words() and ("at most 30" in group.words()) == bool(fields)
    assert "cap" in group.rule_text() and group.short()
    with pytest.raises(ValueError, match="no stock architecture"):
        group.cost(Unit(query_heads=3, head_dim=16, paged=False), 100)


def test_the_entry_of_a_plan_in_the_docs_is_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "retain.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)
    group = targets.parse(json.loads(entry))
    assert targets.written(group) == {"spread": 0.0, **json.loads(entry)}
    assert all(f"`{field}`" in text for field in targets.written(group) if field != "target")


def pages_and_pairs(group: RetainGroup, kept: torch.Tensor) -> tuple[int, int, int]:
    """Pages that tokens with these flags hold, pairs of query and key, and keys of the last query: `kept` is `[T]`."""
    length, at, span = len(kept), torch.arange(len(kept)), group.span()
    flags = kept & (at >= span.sink)
    if group.cap is not None:
        most = group.cap[0] + ((at + 1) * group.cap[1]).long()
        count = 0
        for j in range(length):
            flags[j] &= count < int(most[j])
            count += int(flags[j])
    first = span.first(at)
    seen = (at <= at[:, None]) & (flags | (at < span.sink) | (at >= first[:, None]))
    listed = int((flags | (at < span.sink))[: int(first[-1])].sum())
    return -(-listed // PAGE) - (-length // PAGE) - int(first[-1]) // PAGE, int(seen.sum()), int(seen[-1].sum())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("cap", [None, (16, 0.125)])
def test_costs_are_means_over_texts(share: float, cap: Any) -> None:
    group = RetainGroup(sink=4, alpha=100, scorer="key_norm", threshold=0.0, share=share, cap=cap)
    generator = torch.Generator().manual_seed(1)
    for length in (1, 64, 200, 500):
        drawn = [pages_and_pairs(group, torch.rand(length, generator=generator) < share) for _ in range(20)]
        pages, pairs, keys = torch.tensor(drawn, dtype=torch.float64).mean(0).tolist()
        cost = group.cost(UNIT, length)
        held = (cost.held_bytes - COUNTERS) / (UNIT.token_bytes + 1) / PAGE
        assert abs(held - pages) <= (0 if share in (0, 1) and cap is None else 0.6)
        assert cost.read_bytes == round(held * PAGE) * UNIT.token_bytes
        flops = cost.flops - 2 * 16 * length
        assert abs(flops / (4 * 16 * 3) - pairs) <= 0.1 * pairs * (0 < share < 1 or cap is not None)
        hidden = int(group.span().boundary(length - 1)) - group.span().sink
        varies = group.model_copy(update={"spread": 0.25}).cost(UNIT, length).spread_bytes
        assert varies == round(min(0.25 * hidden, group.listed(length)[1]) * (UNIT.token_bytes + 1))
        assert abs(cost.keys - keys) <= (0.1 * keys if 0 < share < 1 or cap is not None else 0)


@pytest.mark.parametrize("cap", [None, (0, 0.0), (3, 0.0), (0, 1.0), (2, 0.25), (70, 0.0625), (0, 33 / 1024)])
@pytest.mark.parametrize("sink", [0, 4])
def test_the_bound_is_what_a_text_that_wants_to_keep_all_keeps(sink: int, cap: Any) -> None:
    group = RetainGroup(sink=sink, alpha=70, beta=0.125, scorer="key_norm", threshold=None, share=1.0, cap=cap)
    span, count, kept = group.span(), 0, [0]
    for j in range(700):
        count += j >= span.sink and (cap is None or count < cap[0] + int(cap[1] * (j + 1)))
        kept.append(count)
    for length in range(1, 700):
        assert group.listed(length)[1] == kept[int(span.boundary(length - 1))]


@pytest.mark.parametrize("scorer", ["key_norm", "ridge", "gate"])
def test_scorers_are_counted_and_prepared(scorer: str) -> None:
    model, group = tiny_model("llama-gqa"), RetainGroup(**{**GIVEN, "scorer": scorer, "cap": (4, 0.5)})
    plan = uniform_plan(shape_of(model), group)
    mixers = mixers_of(planned_model(model, plan, untrained=True))
    own = sum(weight.numel() for mixer in mixers for weight in mixer.parameters())
    dense = sum(weight.numel() for layer in model.model.layers for weight in layer.parameters())
    assert plan.cost(100, sizes=parameters_per_unit(model)).parameters == dense + own
    assert group.has_to_be_prepared == (own > 0) and group.learns
    assert group.prepared_as == RetainGroup(scorer=scorer) == RetainGroup(scorer=scorer).prepared_as
    # A scorer that is prepared serves all thresholds; what was not prepared is not run.
    scorers = {
        f"{layer}.{name}": torch.randn(weight.shape)
        for layer, mixer in enumerate(mixers)
        for name, weight in mixer.named_parameters()
    }
    if own:
        with pytest.raises(UserError, match="prepare"):
            planned_model(model, plan)
    record: Any = SimpleNamespace(errors=[[0.0, 0.0]] * 3)
    attach(model, (PreparedOption(group.prepared_as, record, scorers),))
    for layer, mixer in enumerate(mixers_of(planned_model(model, plan))):
        for name, weight in mixer.named_parameters():
            assert torch.equal(weight, scorers[f"{layer}.{name}"])


def test_another_share_opens_the_threshold_and_takes_the_cap_along() -> None:
    group = RetainGroup(**GIVEN, spread=0.1, cap=(10, 0.125))
    assert group.with_share(0.5) == RetainGroup(scorer="key_norm", threshold="share", share=0.5, cap=(10, 0.25))
    full, least = (RetainGroup(**GIVEN, cap=(0, part)) for part in (0.75, 1 / 1024))
    assert full.with_share(0.5).cap == (0, 1.0) and least.with_share(0.125).cap == (0, 1 / 1024)
    assert group.anywhere == RetainGroup(scorer="key_norm", threshold="share", share=0.25, cap=(10, 0.125))
    for share in (0.0, 1 / 65, 1.0):  # for which no threshold is measured
        alone = group.model_copy(update={"share": share})
        assert alone.anywhere is alone


def test_the_ranges_of_several_groups_are_told() -> None:
    group = RetainGroup(**GIVEN)
    other = group.model_copy(update={"share": 0.5, "threshold": 1.0, "spread": 0.2})
    assert RetainGroup.ranges([group, group]) == "threshold 0.5, shares of texts deviate by 0 points"
    assert (
        RetainGroup.ranges([other, group])
        == "shares 25 to 50%, thresholds 0.5 to 1, shares of texts deviate by 0 to 20 points"
    )
    assert RetainGroup.ranges([group.with_share(0.5)]) == ""
