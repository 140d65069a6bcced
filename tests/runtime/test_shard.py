"""Attention of the last queries of a sequence: over all keys of their views, and by kernels, as in the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models.context.layout import view_of
from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.runtime.impl import IMPLS
from compress.runtime.linear_states import carry, chunk_states, passage
from compress.runtime.reference import Rows
from compress.runtime.rope import rope_change
from compress.runtime.span import BETA_UNIT, PAGE, Span
from compress.targets.routed import RoutedGroup
from tests.tiny import random_ids, shape_of, tiny_model

spans = st.builds(
    Span,
    sink=st.sampled_from([0, 1, 4, 64, 65, 130]),
    alpha=st.integers(-100, 250),
    beta=st.integers(0, 16).map(lambda units: units * 64 / BETA_UNIT),
    granule=st.sampled_from([1, PAGE]),
)


@settings(max_examples=25, deadline=None)
@given(rules=st.lists(spans, min_size=1, max_size=3), start=st.integers(0, 20), pages=st.integers(1, 6))
def test_a_view_shows_what_the_spans_show(rules: list[Span], start: int, pages: int) -> None:
    start, stop = start * PAGE, (start + pages) * PAGE
    view = view_of(rules, start, stop)
    assert view.columns == stop - view.shift and view.before == start - view.shift >= 0
    column = torch.arange(view.columns)
    position = torch.where(column < view.sink, column, column + view.shift)
    t = torch.arange(start, stop)
    for span, moved in zip(rules, view.spans, strict=True):
        seen = moved.visible((t - view.shift)[:, None], column[None])
        assert torch.equal(seen, span.visible(t[:, None], position[None]))
        assert int(seen[0].sum()) == span.keys_seen(start)  # none of them is in the gap


@pytest.mark.parametrize("name", [name for name in ("reference", "triton") if name in IMPLS])
def test_the_last_queries_are_those_of_the_whole_sequence(name: str) -> None:
    """Outputs, log-sum-exps and gradients; 50 of 150 tokens, for groups with sinks, windows and everything."""
    torch.manual_seed(0)
    rules, length, last = [Span(4, 20, 0.0), Span(0, 9, 0.25), Span()], 150, 50
    query, key, value = (torch.randn(1, heads, length, 8) for heads in (6, 3, 3))
    slope, slope_lse = torch.randn(1, 6, last, 8), torch.randn(1, 6, last)
    found = []
    for some in (True, False):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        q = leaves[0][:, :, -last:] if some else leaves[0]
        rows = Rows.whole(1, q.shape[2], length - q.shape[2])
        out, lse = IMPLS[name if some else "reference"].prefill(q, *leaves[1:], rules, rows=rows, keep_lse=True)
        out, lse = out[:, :, -last:], lse[:, :, -last:]
        ((out * slope).sum() + (lse * slope_lse).sum()).backward()
        found.append([out, lse, *(leaf.grad for leaf in leaves)])
        with torch.no_grad():  # the kernel of passes without gradients
            plain = IMPLS[name].prefill(q, key, value, rules, rows=rows)
        torch.testing.assert_close(plain[:, :, -last:], out, rtol=1e-5, atol=1e-5)
    for some, whole in zip(*found, strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("decay", ["none", "fixed", "token"])
def test_passages_of_parts_make_the_state_of_all(rule: Any, decay: str) -> None:
    torch.manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(2, 2, 4 * PAGE, 6, dtype=torch.float64), dim=-1)
    value, first = torch.randn(2, 2, 4 * PAGE, 5).double(), torch.randn(2, 2, 6, 5 + (rule == "add")).double()
    decays = {
        "none": None,
        "fixed": torch.tensor([-0.01, -0.3]).double(),
        "token": -torch.rand(2, 2, 4 * PAGE).double(),
    }
    strength = torch.rand(2, 2, 4 * PAGE).double() if rule == "delta" else None

    def part(x: torch.Tensor | None, pages: slice) -> torch.Tensor | None:
        return x if x is None or x.dim() == 1 else x.unflatten(2, (-1, PAGE))[:, :, pages].flatten(2, 3)

    given = (decays[decay], strength)
    options: dict[str, Any] = dict(zip(("log_decay", "strength"), given, strict=True))
    whole = chunk_states(key, value, first, rule=rule, count=torch.full((2, 2), 4 * PAGE - 5), **options)[:, :, -1]
    state = first
    for pages, count in ((slice(0, 3), 3 * PAGE), (slice(3, 4), PAGE - 5)):
        own: dict[str, Any] = {name: part(x, pages) for name, x in options.items()}
        k, v = part(key, pages), part(value, pages)
        assert k is not None and v is not None
        gain, made = passage(k, v, rule=rule, count=torch.full((2, 2), count), **own)
        state = carry(gain, state) + made
    torch.testing.assert_close(state, whole)


@pytest.mark.parametrize("rule", ["add", "delta"])
def test_a_part_that_writes_nothing_takes_part_in_the_backward_pass(rule: Any) -> None:
    """Else the other processes would wait for its gradients, or take a later message for them."""
    leaves = [torch.zeros(1, 2, 0, *size, requires_grad=True) for size in ((6,), (5,), (), ())]
    key, value, decay, strength = leaves
    given = [key, value, decay, *([strength] if rule == "delta" else [])]
    own = {"log_decay": decay, "strength": strength} if rule == "delta" else {"log_decay": decay}
    gain, made = passage(key, value, rule=rule, **own)
    assert torch.equal(carry(gain, torch.ones(1, 2, 6, made.shape[-1])), torch.ones_like(made)) and not made.any()
    for grad in torch.autograd.grad(gain.sum() + made.sum(), given, allow_unused=True):
        assert grad is not None and not grad.numel()


class Alone:
    """A sequence of which another process would have the rest, which is never asked for anything."""

    length, segments, numbers = 2048, ((0, 64),), (0,)

    def positions(self, device: torch.device) -> torch.Tensor:
        return torch.arange(64, device=device)


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    dense = tiny_model("llama-gqa")
    routed = planned_model(dense, uniform_plan(shape_of(dense), RoutedGroup(active=1, of=2)), untrained=True)
    ids = random_ids(1, 64)
    with pytest.raises(ValueError, match="layer 0 has heads with the target 'routed', whose sequences cannot be"):
        routed(ids, compress_shard=Alone())
    with pytest.raises(ValueError, match="attention_mask: where processes share the tokens of a sequence, no cache"):
        routed(ids, attention_mask=torch.ones_like(ids), compress_shard=Alone())
    routed.base_model.compress_rope_change = ("dynamic", 1024)
    with pytest.raises(ValueError, match=r"frequencies \(dynamic\) depend on the length beyond 1024 tokens"):
        routed(ids, compress_shard=Alone())
    assert rope_change(routed.config) is None
