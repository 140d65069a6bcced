"""Heads that are on for some tokens only: every implementation against float64, ragged, paged and poisoned."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

import compress.runtime.mixer_routed  # noqa: F401  (registers the mixer)
from compress.runtime import triton_routed
from compress.runtime.attention import plan_attention
from compress.runtime.impl import IMPLS
from compress.runtime.impl_routed import ROUTED_IMPLS
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.paged_cache import PagedCache
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.routers import Router
from compress.runtime.scores import Scores
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Step
from compress.runtime.triton_routed import rows_on
from compress.targets.routed import RoutedGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("on_the_gpu_where_there_is_one")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
IMPL_NAMES = ["reference", "triton"]
RULES = [Span(), Span(4, 40, 0.25), Span(70, 9, 0.0)]  # everything, a growing window, a sink longer than a page
SHARE, DIM = 3, 8
HEADS = SHARE * len(RULES)


@pytest.fixture(autouse=True)
def always_skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_routed, "SKIP_FROM", 0)


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, at: torch.Tensor, scores: Scores | None = None
) -> torch.Tensor:
    """Attention of queries `[H, T, D]` at positions `at` over keys `[G, N, D]` in float64, `[H, T, D]`."""
    found = []
    for head in range(HEADS):
        group = head // SHARE
        seen = RULES[group].visible(at[:, None], torch.arange(key.shape[1])[None])
        logits = query[head].double() @ key[group].double().T / DIM**0.5
        if scores is not None and scores.cap is not None:
            logits = scores.cap * torch.tanh(logits / scores.cap)
        logits = logits.masked_fill(~seen, -torch.inf)
        if scores is not None and scores.extra is not None:
            logits = torch.cat([logits, scores.extra[head].double().expand(len(at), 1)], dim=1)
        found.append(logits.softmax(-1)[:, : key.shape[1]] @ value[group].double())
    return torch.stack(found)


def by_heads(active: torch.Tensor) -> torch.Tensor:
    """Flags of groups or heads, `[B, ...]` in front, as flags of heads."""
    return active.repeat_interleave(HEADS // active.shape[1], dim=1)


def paged(key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> Pages:
    """Tokens `[B, G, N, D]` in pages of random places; what lies behind each sequence's last token is NaN."""
    batch, groups, length, _ = key.shape
    numbers = -(-length // PAGE)
    order = torch.randperm(batch * groups * numbers)
    pools = []
    for tokens in (key, value):
        whole = torch.nn.functional.pad(tokens, (0, 0, 0, numbers * PAGE - length)).clone()
        for row, count in enumerate(lengths):
            whole[row, :, count:] = torch.nan
        pool = torch.empty(len(order), PAGE, DIM)
        pool[order] = whole.reshape(-1, PAGE, DIM)
        pools.append(pool)
    return Pages(pools[0], pools[1], order.view(batch, groups, numbers).to(torch.int32))


@pytest.mark.parametrize("units", [len(RULES), HEADS])
def test_the_list_names_the_rows_that_are_on(units: int) -> None:
    columns = 71
    rows = Rows((0, 7, 0), (0, 5, 0), (columns, 50, 0))  # the second is padded on both sides, the third takes no part
    active = (torch.rand(3, columns, units) < 0.4).transpose(1, 2)  # strides as a router has them
    active[0, 0] = False
    listed, counts = rows_on(active, rows.tensor(torch.device(DEVICE)), HEADS, len(RULES))
    for b, (start, count) in enumerate(zip(rows.start, rows.count, strict=True)):
        of_heads = by_heads(active)[b, :, start : start + count].unflatten(0, (len(RULES), SHARE))
        for g in range(len(RULES)):
            wanted = of_heads[g].T.flatten().nonzero().flatten()  # token by token, the heads of one side by side
            assert int(counts[b, g]) == len(wanted)
            assert listed[b, g, : len(wanted)].tolist() == wanted.tolist()


@pytest.mark.parametrize("units", [len(RULES), HEADS])
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_prefill_computes_what_is_on_and_nothing_else(impl: str, units: int) -> None:
    columns, past, start, count = 67, (0, 70), (0, 6), (67, 50)
    lengths = [p + c for p, c in zip(past, count, strict=True)]
    query = torch.randn(2, HEADS, columns, DIM)
    key, value = torch.randn(2, 2, len(RULES), max(lengths), DIM)
    active = (torch.rand(2, columns, units) < 0.5).transpose(1, 2)
    active[:, -1] = False  # a unit that nobody chose
    gates = torch.rand(2, columns, units).transpose(1, 2)
    on, gain = by_heads(active), by_heads(gates.double())
    poisoned = query.masked_fill(~on[..., None], torch.nan)  # what is off is not read
    new_key, new_value = torch.full((2, 2, len(RULES), columns, DIM), torch.nan)
    for b in range(2):
        here = slice(start[b], start[b] + count[b])
        new_key[b, :, here], new_value[b, :, here] = key[b, :, past[b] : lengths[b]], value[b, :, past[b] : lengths[b]]
        poisoned[b, :, : start[b]] = poisoned[b, :, start[b] + count[b] :] = torch.nan
    pages = paged(key, value, list(past))
    out = ROUTED_IMPLS[impl].prefill(
        poisoned, new_key, new_value, RULES, active, gates=gates, rows=Rows(past, start, count), pages=pages
    )
    for b in range(2):
        here = slice(start[b], start[b] + count[b])
        at = torch.arange(past[b], lengths[b])
        wanted = exact(query[b, :, here], key[b, :, : lengths[b]], value[b, :, : lengths[b]], at)
        wanted *= (on * gain)[b, :, here, None]
        torch.testing.assert_close(out[b, :, here].double(), wanted, **CLOSE)
        rest = out[b].clone()
        rest[:, here] = 0
        assert not rest.any() and not out[b][~on[b]].any()


def test_prefill_with_everything_on_is_that_of_the_plain_kernel() -> None:
    query, (key, value) = torch.randn(1, HEADS, 41, DIM), torch.randn(2, 1, len(RULES), 41, DIM)
    scores = Scores(3.0, torch.randn(HEADS))
    active = torch.ones(1, HEADS, 41, dtype=torch.bool)
    out = ROUTED_IMPLS["triton"].prefill(query, key, value, RULES, active, scores=scores)
    assert torch.equal(out, IMPLS["triton"].prefill(query, key, value, RULES, scores=scores))
    wanted = exact(query[0], key[0], value[0], torch.arange(41), scores)
    torch.testing.assert_close(out[0].double(), wanted, **CLOSE)


@pytest.mark.parametrize("units", [len(RULES), HEADS])
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_decode_reads_no_key_of_a_group_that_is_off(impl: str, units: int) -> None:
    lengths = [150, 0, 67]
    query, (key, value) = torch.randn(3, HEADS, DIM), torch.randn(2, 3, len(RULES), 150, DIM)
    active = torch.rand(3, units) < 0.5
    active[0] = torch.arange(units) == 1  # one head, or one group
    active[2] = False  # a sequence whose groups are all off
    gates = torch.rand(3, units)
    on, gain = by_heads(active), by_heads(gates.double())
    group_on = on.unflatten(1, (-1, SHARE)).any(-1)
    hidden = ~group_on[..., None, None]
    pages = paged(key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.nan), lengths)
    where = torch.tensor(lengths, dtype=torch.int32)
    out, lse = IMPLS[impl].decode(query, pages, where, RULES, active=active, gates=gates, keep_lse=True)
    plain = IMPLS[impl].decode(query, pages, where, RULES, active=active)
    torch.testing.assert_close((plain * gain[..., None]).float(), out, **CLOSE)
    for b, length in enumerate(lengths):
        if length == 0:
            assert not out[b].any() and (lse[b] == -torch.inf).all()
            continue
        at = torch.tensor([length - 1])
        wanted = exact(query[b, :, None], key[b, :, :length], value[b, :, :length], at)[:, 0]
        torch.testing.assert_close(out[b].double(), wanted * (on * gain)[b, :, None], **CLOSE)
        assert not out[b][~on[b]].any() and torch.equal(lse[b].isfinite(), on[b])


@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_flags_of_another_number_of_units_are_refused(impl: str) -> None:
    query, (key, value) = torch.randn(1, HEADS, 3, DIM), torch.randn(2, 1, len(RULES), 3, DIM)
    with pytest.raises(ValueError, match=r"3 groups or 9 query heads, got torch\.bool of 4"):
        ROUTED_IMPLS[impl].prefill(query, key, value, RULES, torch.ones(1, 4, 3, dtype=torch.bool))
    pages = paged(key, value, [3])
    with pytest.raises(ValueError, match=r"got torch\.uint8 of 3"):
        flags = torch.ones(1, 3, dtype=torch.uint8)
        IMPLS[impl].decode(query[:, :, 0], pages, torch.tensor([3], dtype=torch.int32), RULES, active=flags)
    with pytest.raises(ValueError, match=r"float32 \[1, 3, 3\] as active, got torch\.float32 \[1, 9, 3\]"):
        active = torch.ones(1, 3, 3, dtype=torch.bool)
        ROUTED_IMPLS[impl].prefill(query, key, value, RULES, active, gates=torch.ones(1, 9, 3))


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (3, {"unit": "group", "shared": (1,)}),  # a program a token
        (70, {"unit": "head", "shared": (0, 7)}),  # tokens together
        (3, {"unit": "group"}),
        (70, {"unit": "head", "gates": "one", "shared": (3,)}),
        (3, {"unit": "group", "router": "norm", "shared": (0,)}),
        (3, {"unit": "head", "router": "norm", "gates": "weighted", "shared": (2, 5)}),
    ],
)
def test_the_router_kernel_chooses_as_the_router(columns: int, fields: dict[str, Any]) -> None:
    groups = RoutedGroup.layer(5, 2, group_size=SHARE, **fields)
    router = Router([group.model_dump() for group in groups], LayerFacts(0, DIM, 44, SHARE, None)).to(DEVICE)
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_()
    query, hidden = torch.randn(1, 5 * SHARE, columns, DIM), torch.randn(1, columns, 44)
    query[:, :, 1], hidden[:, 1] = 1.0, 0.0  # a token whose units are all alike
    fast = ROUTED_IMPLS["triton"].router
    assert fast is not None and fast.takes(router)
    on, gates = fast.route(router, query, hidden)
    wanted = router.double()(query.double(), hidden.double())
    assert torch.equal(on, wanted.on) and int(on[0, 0].sum()) == 2 + len(fields.get("shared", ()))
    assert (gates is None) == router.quantised
    if gates is not None:
        torch.testing.assert_close(gates[on].double(), wanted.gates[on].detach(), **CLOSE)
        assert bool((gates[0, 1][on[0, 1]] == 1).all())
    query[:, :, 2], hidden[:, 2] = torch.nan, torch.nan  # what is no token stays to itself
    again, gates = fast.route(router.float(), query, hidden)
    assert gates is None or bool(gates.isfinite().all())
    assert torch.equal(again[:, :2], on[:, :2]) and torch.equal(again[:, 3:], on[:, 3:])


@pytest.mark.parametrize("fields", [{"unit": "head", "shared": (4,)}, {"router": "norm", "sink": 3, "beta": 0.25}])
@pytest.mark.parametrize("impl", IMPL_NAMES)
def test_a_layer_skips_in_chunks_and_steps_what_training_computes(impl: str, fields: dict[str, Any]) -> None:
    groups = [group.model_dump() for group in RoutedGroup.layer(3, 2, group_size=SHARE, **fields)]
    kinds = Kinds(groups, LayerFacts(0, DIM, 20, SHARE, None))
    assert kinds.only is not None
    for weight in kinds.only.to(DEVICE).parameters():
        weight.requires_grad_(False).normal_()
    module = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    query, (key, value), hidden = torch.randn(1, HEADS, 28, DIM), torch.randn(2, 1, 3, 28, DIM), torch.randn(1, 28, 20)

    def attend(cache: PagedCache | None, here: slice) -> torch.Tensor:
        q, k, v = (x[:, :, here] for x in (query, key, value))
        step = Step.begin(cache, None, 1, q.shape[2], q.device)
        step.impl, step.hidden = impl, hidden[:, here]
        if cache is not None:
            cache.update(k, v, 0)
        out = plan_attention(module, q, k, v, None, compress_step=step)[0]
        step.end()
        return out

    cache, cuts = PagedCache([kinds]), [0, 20, 27, 28]
    without: Any = {"prefill": None}  # what computes all heads is not called
    with torch.no_grad(), patch.dict(IMPLS, {impl: replace(IMPLS[impl], **without)}):
        parts = [attend(cache, slice(a, b)) for a, b in pairwise(cuts)]
    query.requires_grad_()
    torch.testing.assert_close(torch.cat(parts, dim=1), attend(None, slice(None)).detach(), **CLOSE)
