"""Kernels of linear heads against the states in plain PyTorch and float64: ragged, poisoned, and with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize, pad

from compress.runtime.attention import plan_attention
from compress.runtime.linear_fla import refusal as fla_refusal
from compress.runtime.linear_states import chunk_states, own_chunk, read
from compress.runtime.maps import MAPS
from compress.runtime.merge import log_mass, merge
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.paged_cache import PagedCache
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Step
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_decode import absorb, read_one
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_features import features, features_of_both
from compress.runtime.triton_linear_heads import query_features
from compress.runtime.triton_linear_layout import layout
from compress.targets.linear import LinearGroup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("on_the_gpu_where_there_is_one")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def outputs_between_guards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What kernels write into lies in NaN, and between rows of it that stay as they are."""
    guard, plain = 1024, torch.Tensor.new_empty
    made: list[torch.Tensor] = []

    def new_empty(like: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        whole = plain(like, size.numel() + 2 * guard, **options).fill_(torch.nan if like.is_floating_point() else -1)
        made.extend([whole[:guard], whole[guard + size.numel() :]])
        return whole[guard : guard + size.numel()].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert made
    assert all(bool(rows.isnan().all()) for rows in made if rows.is_floating_point())


def close(found: Any, exact: Any) -> None:
    """Tensors against their float64 twins; what is a sum of larger numbers has their rounding."""
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 + 1e-6 * float(b.detach().abs().max()))


def doubled(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Leaves of a float64 twin."""
    return [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("own", [False, True])
def test_additive_attention_is_that_of_the_states(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # With their own chunks by states that walk along the keys, else by sums of segments.
    monkeypatch.setattr("compress.runtime.triton_linear_states.linear_scans", lambda *_: own)
    # A sequence that starts in a page, behind padding, with more features than a block, and decays.
    past, start, count, features_of, values = 70, 3, 150, 40, 16
    groups, heads, shift = 1, 2, 70 % PAGE
    pages = -(-(shift + count) // PAGE)
    chunk = torch.arange(pages)[None, None].clone() if own else (torch.arange(pages)[None, None] - 1).clamp(min=0)
    tokens = shift + count if own else (pages - 2) * PAGE
    end = -(-tokens // PAGE) * PAGE
    last = (tokens - 1) // PAGE if own else tokens // PAGE
    query, key = torch.rand(1, heads, start + count, features_of), torch.rand(1, groups, end, features_of)
    value, first = torch.randn(1, groups, end, values), torch.rand(1, groups, features_of, values + 1)
    out = torch.randn(1, heads, start + count, values)
    lse, gain = torch.randn(1, heads, start + count) + 3, torch.randn(1, heads, start + count)
    log_decay = -torch.rand(1, groups, end) * 0.1
    given: Any = [query, key, value, first] if own else [query, key, value, first, out, lse, gain]

    exact = doubled(given)
    q, k, v, s, *window = exact
    options: Any = {"count": torch.tensor([[tokens]]), "log_decay": log_decay.double()}
    states = chunk_states(k, v, s, **options)
    paged = pad(q[:, :, start:], (0, 0, shift, pages * PAGE - shift - count))
    found = own_chunk(paged, k, v, states, chunk, **options) if own else read(paged, states, chunk.clamp(max=last))
    found = found[:, :, shift : shift + count]
    num, den = found[..., :-1], found[..., -1]
    if own:
        wanted = num / den[..., None]
    else:
        o, e, g = (x[:, :, start:] for x in window)
        wanted = merge(o, e, num, log_mass(den), g)
    wanted_grads = torch.autograd.grad((wanted.sin().sum() + states[:, :, last].cos().sum()), exact)

    for x in (query, out, lse, gain):
        x[:, :, :start] = torch.nan
    for x in (key, value):
        x[:, :, tokens:] = torch.nan
    where = layout(
        Rows((past,), (start,), (count,)),
        chunk.clamp(max=last),
        end,
        count=torch.tensor([[tokens]]),
        absorbed=torch.tensor([[last * PAGE]]),
        own=own,
    )
    leaves: Any = [x.requires_grad_() for x in given]
    more: dict[str, Any] = {} if own else {"window": (out, lse), "log_gain": gain}
    mine, _, state = additive(leaves[0], leaves[1], leaves[2], leaves[3], where, log_decay=log_decay, **more)
    close([mine[:, :, start:], state], [wanted, states[:, :, last]])
    assert bool((mine[:, :, :start] == 0).all())
    close(torch.autograd.grad(mine.sin().sum() + state.cos().sum(), leaves), wanted_grads)


def test_the_delta_rule_is_that_of_the_states() -> None:
    query, key = torch.randn(1, 2, 150, 40), normalize(torch.randn(1, 1, 128, 40), dim=-1)
    value, first, strength = torch.randn(1, 1, 128, 24), torch.randn(1, 1, 40, 24), torch.rand(1, 1, 128)
    given: Any = [query, key, value, first, strength, -torch.rand(1, 1, 128) * 0.1]
    chunk = torch.tensor([[[0, 1, 2]]])
    q, k, v, s, b, d = exact = doubled(given)
    states = chunk_states(k, v, s, rule="delta", strength=b, log_decay=d)
    wanted = read(pad(q, (0, 0, 0, 42)), states, chunk)[:, :, :150]
    wanted_grads = torch.autograd.grad(wanted.sin().sum() + states[:, :, -1].cos().sum(), exact)
    leaves: Any = [x.requires_grad_() for x in given]
    where = layout(Rows.whole(1, 150), chunk, 128, segment=1)
    query, key, value, first, strength, decay = leaves
    mine, state = gated_delta(query, key, value, first, where, strength=strength, log_decay=decay)
    close([mine, state], [wanted, states[:, :, -1]])
    close(torch.autograd.grad(mine.sin().sum() + state.cos().sum(), leaves), wanted_grads)


def test_the_delta_rule_without_a_window_reads_its_own_page() -> None:
    query, key = torch.randn(1, 1, 90, 16), normalize(torch.randn(1, 1, 128, 16), dim=-1)
    value, first, strength = torch.randn(1, 1, 128, 16), torch.randn(1, 1, 16, 16), torch.rand(1, 1, 128)
    given: Any = [query, key, value, first, strength, -torch.rand(1, 1, 128) * 0.1]
    chunk, count = torch.tensor([[[0, 1]]]), torch.tensor([[90]])
    q, k, v, s, b, d = exact = doubled(given)
    options: Any = {"rule": "delta", "strength": b, "log_decay": d, "count": count}
    states = chunk_states(k, v, s, **options)
    wanted = own_chunk(pad(q, (0, 0, 0, 38)), k, v, states, chunk, **options)[:, :, :90]
    wanted_grads = torch.autograd.grad(wanted.sin().sum() + states[:, :, 1].cos().sum(), exact)
    for x in (key, value, strength):
        x[:, :, 90:] = torch.nan
    query, key, value, first, strength, decay = leaves = [x.requires_grad_() for x in given]
    absorbed = torch.tensor([[PAGE]])
    where = layout(Rows.whole(1, 90), chunk, 128, count=count, absorbed=absorbed, own=True, segment=1)
    mine, state = gated_delta(query, key, value, first, where, strength=strength, log_decay=decay)
    close([mine, state], [wanted, states[:, :, 1]])
    close(torch.autograd.grad(mine.sin().sum() + state.cos().sum(), leaves), wanted_grads)
    # Without gradients there is a state for every other chunk.
    where = layout(Rows.whole(1, 90), chunk, 128, count=count, absorbed=absorbed, own=True)
    with torch.inference_mode():
        found = gated_delta(query, key, value, first, where, strength=strength, log_decay=decay)
        close(found, [wanted, states[:, :, 1]])


@pytest.mark.parametrize("decays", [False, True])
def test_the_delta_rule_has_its_gradients_with_and_without_their_launch(
    decays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One head a group in its own page: two whose keys lie token by token, as a projection leaves them; the largest one.
    size, groups, tokens, stream = (24, 2, 90, 128) if decays else (256, 1, 50, 64)
    last = stream // PAGE - 1
    query, value = torch.randn(1, groups, tokens, size), torch.randn(1, groups, stream, size)
    key = normalize(torch.randn(1, stream, groups, size), dim=-1).transpose(1, 2)
    first, strength = torch.randn(1, groups, size, size) * 0.1, torch.rand(1, groups, stream)
    given: Any = [query, key, value, first, strength, *([-torch.rand(1, groups, stream) * 0.1] if decays else [])]
    chunk = torch.arange(last + 1).expand(1, groups, -1).contiguous()
    count = torch.full((1, groups), tokens)
    q, k, v, s, b, *d = exact = doubled(given)
    options: Any = {"rule": "delta", "strength": b, "log_decay": d[0] if d else None, "count": count}
    states = chunk_states(k, v, s, **options)
    wanted = own_chunk(pad(q, (0, 0, 0, stream - tokens)), k, v, states, chunk, **options)[:, :, :tokens]
    wanted_grads = torch.autograd.grad(wanted.sin().sum() + states[:, :, last].cos().sum(), exact)
    for x in (key, value, strength):
        x[:, :, tokens:] = torch.nan
    query, key, value, first, strength, *decay = leaves = [x.requires_grad_() for x in given]
    absorbed = torch.full((1, groups), last * PAGE)
    where = layout(Rows.whole(1, tokens), chunk, stream, count=count, absorbed=absorbed, own=True, segment=1)
    log_decay = decay[0] if decay else None
    mine, state = gated_delta(query, key, value, first, where, strength=strength, log_decay=log_decay)
    close([mine, state], [wanted, states[:, :, last]])
    loss = mine.sin().sum() + state.cos().sum()
    for launched in (True, False):
        monkeypatch.setattr("compress.runtime.triton_linear_delta.linear_inside", lambda *_, by=launched: by)
        close(torch.autograd.grad(loss, leaves, retain_graph=True), wanted_grads)


def softmaxes(projected: torch.Tensor) -> torch.Tensor:
    """Hedgehog's features."""
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], dim=-1)


def test_features_and_gains_have_their_gradients() -> None:
    given: Any = [torch.randn(2, 2, 70, 24), torch.randn(2, 24, 20), torch.randn(2), torch.randn(2, 24)]
    rows, weight, gain, turn = exact = doubled(given)
    wanted = softmaxes(rows @ weight), gain[:, None] + (rows * turn[:, None]).sum(-1)
    wanted_grads = torch.autograd.grad(torch.cat([x.sin().flatten() for x in wanted]).sum(), exact)
    leaves: Any = [x.requires_grad_() for x in given]
    mine: Any = features(leaves[0], leaves[1], None, "hedgehog", 1.0, *leaves[2:])
    close(mine, wanted)
    close(torch.autograd.grad(torch.cat([x.sin().flatten() for x in mine]).sum(), leaves), wanted_grads)


@pytest.mark.parametrize("biased", [False, True])
def test_features_of_queries_and_keys_in_one_launch_are_those_of_two(biased: bool) -> None:
    # Token by token, as a model has them, and what lies behind the keys is no number.
    query, key = torch.randn(2, 70, 4, 24).transpose(1, 2), torch.full((2, 2, 70, 24), torch.nan)[:, :, :67]
    key.copy_(torch.randn(key.shape))
    weights, turn = (torch.randn(4, 24, 20), torch.randn(2, 24, 20)), torch.randn(4, 24)
    biases = (torch.randn(4, 20), torch.randn(2, 20)) if biased else None
    rows = [x.double() @ weight.double() for x, weight in zip((query, key), weights, strict=True)]
    if biases is not None:
        rows = [x + bias[:, None].double() for x, bias in zip(rows, biases, strict=True)]
    gain = torch.randn(4)
    q, gains, k = features_of_both(query, key, weights, biases, "hedgehog", 1.0, gain, turn)
    wanted = gain[:, None] + (query.double() * turn[:, None].double()).sum(-1)
    close([q, k, gains], [*(softmaxes(x) for x in rows), wanted])
    q, gains, k = features_of_both(query, key, weights, biases, "elu", 1.0)
    close([q, k], [torch.nn.functional.elu(x) + 1 for x in rows])
    assert gains is None


@torch.no_grad()
def test_features_of_one_token_are_computed_for_all_sequences_at_once() -> None:
    made, query = MAPS["hedgehog"](2, 2, 24).to(DEVICE), torch.randn(3, 4, 1, 24)
    gain = torch.randn(4), torch.randn(4, 24)
    for parameter in made.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.2)
    found = query_features(made, "hedgehog", query, 1.0, None, gain)
    gains = gain[0][:, None] + (query.double() * gain[1][:, None].double()).sum(-1)
    assert found[1] is not None and found[1].shape == gains.shape
    close(found, [softmaxes(query.double() @ made.query.flatten(0, 1).double()), gains])


@pytest.mark.parametrize(("share", "by_column"), [(2, True), (3, False)])  # heads one by one, and as a product
def test_a_page_is_taken_in_when_it_leaves_and_one_token_reads(share: int, by_column: bool) -> None:
    span, lengths = [Span(0, 64, 0.0, granule=PAGE)], torch.tensor([129, 130, 0], dtype=torch.int32)
    keys, values = torch.full((9, PAGE, 24), torch.nan), torch.full((9, PAGE, 24), torch.nan)
    table = torch.arange(9, dtype=torch.int32).view(3, 1, 3)
    held = torch.rand(3, 1, 25, 40).mT if by_column else torch.rand(3, 1, 40, 25)
    keys[0], values[0] = torch.randn(PAGE, 24), torch.randn(PAGE, 24)  # the one page that leaves
    weight, wanted = torch.randn(1, 24, 20), held.double()
    wanted[:1] = chunk_states(
        softmaxes(keys[:1].double() @ weight.double())[None], values[:1][None].double(), wanted[:1]
    )[:, :, 1]
    pages, before = Pages(keys, values, table), held.clone()
    absorb(held, pages, lengths, [Span(4, 64, 0.0, granule=PAGE)], "hedgehog", weight, None, 1.0)
    assert torch.equal(held, before)  # the page that leaves the window is that of the sink, which is always seen
    absorb(held, pages, lengths, span, "hedgehog", weight, None, 1.0)
    close([held], [wanted])
    query, out = torch.rand(3, share, 40), torch.randn(3, share, 24)
    lse, gain = torch.randn(3, share), torch.randn(3, share)
    found = query.double() @ wanted[:, 0]
    exact = merge(out.double(), lse.double(), found[..., :-1], log_mass(found[..., -1]), gain.double())
    exact[2] = 0
    mine = read_one(query, held, lengths, 24, torch.float32, mean=True, window=(out, lse), log_gain=gain)
    close([mine], [exact])


@pytest.mark.parametrize(("share", "dtype"), [(1, "float32"), (2, "bfloat16"), (8, "bfloat16"), (16, "float32")])
def test_one_token_reads_what_lies_between_nan(share: int, dtype: str) -> None:
    batch, groups, dim, count, of = 3, 2, 19, 37, getattr(torch, dtype)
    lengths = torch.tensor([70, 0, 1], dtype=torch.int32)
    # Columns and rows with something behind each, and nothing but NaN where a sequence takes no part.
    held = torch.full((batch, groups, dim + 2, count + 3), torch.nan)[:, :, 1:, :count].mT
    query, out = (torch.full((batch, groups * share, size + 2), torch.nan, dtype=of) for size in (count, dim))
    query, out = query[..., :count], out[..., 1 : dim + 1]
    lse, gain = torch.full((2, batch, groups * share), torch.nan)
    for x in (held, query, out, lse, gain):
        x[lengths > 0] = torch.rand(2, *x.shape[1:]).to(x.dtype)
    found = (query.double().unflatten(1, (groups, share)) @ held.double()).flatten(1, 2)
    found[1] = 0
    mine = read_one(query, held, lengths, dim, of, mean=False)
    assert mine.dtype == torch.float32
    close([mine], [found[..., :-1]])
    exact = merge(out.double(), lse.double(), found[..., :-1], log_mass(found[..., -1]), gain.double())
    exact[1] = 0
    mine = read_one(query, held, lengths, dim, of, mean=True, window=(out, lse), log_gain=gain)
    rounded = 2**-7 if of == torch.bfloat16 else 0.0  # the interpreter truncates
    torch.testing.assert_close(mine.double(), exact, rtol=rounded + 1e-5, atol=1e-5)


class Module:
    """What the attention function reads of an attention module."""

    layer_idx = 0

    def __init__(self, kinds: Kinds) -> None:
        self.compress_kinds = kinds


def run(kinds: Kinds, tensors: list[torch.Tensor], impl: str, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of passes over the columns between `cuts` of query, key, value and hidden states, and the last state."""
    cache, outs = PagedCache([kinds], max_length=cuts[-1]), []
    for first, stop in pairwise(cuts):
        with torch.inference_mode():
            step = Step.begin(cache, None, 1, stop - first, torch.device(DEVICE))
            step.impl, step.hidden = impl, tensors[3][:, first:stop]
            query, key, value = (x[:, :, first:stop] for x in tensors[:3])
            key, value = cache.update(key, value, 0)
            outs.append(plan_attention(Module(kinds), query, key, value, None, compress_step=step)[0])
            step.end()
    return torch.cat(outs, dim=1), cache.paged[0].states[0].tensors["state"]


def mixer_of(fields: dict[str, Any], groups: int) -> tuple[LinearMixer, Kinds, list[torch.Tensor]]:
    """A mixer with random parameters of groups of two query heads, and 150 columns for it."""
    kinds = Kinds([LinearGroup(**fields).model_dump(mode="json")] * groups, LayerFacts(0, 16, 8, 2, None))
    mixer = kinds.mixers[0]
    assert isinstance(mixer, LinearMixer)
    with torch.no_grad():
        for parameter in mixer.to(DEVICE).parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    qkv = [torch.randn(1, heads, 150, 16) for heads in (2 * groups, groups, groups)]
    return mixer, kinds, [*qkv, torch.randn(1, 150, 8)]


@pytest.mark.parametrize("fields", [{}, {"rule": "delta"}])
def test_a_mixer_runs_by_kernels_as_in_plain_pytorch(fields: dict[str, Any]) -> None:
    _, kinds, tensors = mixer_of(fields, groups=1)
    found = run(kinds, tensors, "triton", [0, 128, 129, 150])
    for mine, exact in zip(found, run(kinds, tensors, "reference", [0, 150]), strict=True):
        torch.testing.assert_close(mine, exact, **CLOSE)


@pytest.mark.parametrize("fields", [{}, {"rule": "delta"}])
def test_kernels_leave_out_the_branches_of_single_groups(fields: dict[str, Any]) -> None:
    mixer, kinds, tensors = mixer_of(fields, groups=2)
    mixer.branches = ("window", "linear")
    found = run(kinds, tensors, "triton", [0, 149, 150])[0]
    torch.testing.assert_close(found, run(kinds, tensors, "reference", [0, 150])[0], **CLOSE)


@pytest.mark.skipif(fla_refusal(torch.device(DEVICE)) is not None, reason="needs a GPU and flash-linear-attention")
@pytest.mark.parametrize(
    "fields", [{"rule": "delta"}, {"map": "silu", "out": "added", "decay": "fixed", "slope": 0.02}]
)
def test_flash_linear_attention_is_the_same_function(fields: dict[str, Any]) -> None:
    entry = LinearGroup(alone=True, **fields).model_dump(mode="json")
    kinds = Kinds([entry] * 2, LayerFacts(0, 64, 8, 2, None))
    kinds.mixers[0].to(DEVICE)
    qkv, hidden = [torch.randn(2, heads, 200, 64).bfloat16() for heads in (4, 2, 2)], torch.randn(2, 200, 8)
    found = {}
    for impl in ("reference", "triton", "fla"):
        cache = PagedCache([kinds], max_length=200)
        with torch.inference_mode():
            step = Step.begin(cache, None, 2, 200, torch.device(DEVICE))
            step.impl, step.hidden = impl, hidden
            query, key, value = qkv
            key, value = cache.update(key, value, 0)
            out = plan_attention(Module(kinds), query, key, value, None, compress_step=step)[0]
        found[impl] = out, cache.paged[0].states[0].tensors["state"]
    for impl in ("triton", "fla"):
        for mine, exact in zip(found[impl], found["reference"], strict=True):
            torch.testing.assert_close(mine, exact, rtol=0.05, atol=0.02)
