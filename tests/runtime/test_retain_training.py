"""Training what `retain` heads keep: outputs and gradients against one float64 matrix of all pairs, soft and hard."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from compress.runtime import retain_reference, retain_training
from compress.runtime.paged_cache import PagedCache
from compress.runtime.reference import Rows
from compress.runtime.retain_training import RELAXATION, Decisions, prefill
from compress.runtime.scores import Scores
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Keeping, Record, Step
from compress.runtime.triton_retain_training import prefill as triton_prefill
from tests.runtime.test_linear_mixer import feed
from tests.runtime.test_retain import COLUMNS, DEVICE, DIM, GROUPS, HALF, ROWS, SHARE, inputs, kinds_of

WINDOWS = (Span(0, 1, 0.0, granule=PAGE), Span(0, 20, 0.25, granule=PAGE))
SCORES = {
    "softmax": Scores(),
    "capped": Scores(2.0, torch.linspace(-1, 1, GROUPS * SHARE, dtype=torch.float64, device=DEVICE)),
}


Case = tuple[list[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    return inputs(COLUMNS, 0, random.Random(1))


@pytest.fixture(scope="module")
def runs() -> Case:
    """As `case`; the tokens of each sequence are one run of columns."""
    return inputs(COLUMNS, 0, random.Random(4))


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips, the last of an odd height."""
    height = 4 * ROWS * GROUPS * SHARE * COLUMNS * 97
    monkeypatch.setattr(retain_training, "STRIP_BYTES", {"cpu": height, "cuda": height})


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, mask.cumsum(1) - 1, -1)


def rows_of(mask: torch.Tensor) -> Rows:
    rows = Step.begin(None, mask, len(mask), mask.shape[1], mask.device).rows
    assert rows is not None and torch.equal(rows.positions(mask.shape[1], mask.device), positions_of(mask))
    return rows


def naive(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, at: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Outputs `[B, H, T, D]` from weights `[B, G, T]`, or `[B, G, T, T]` of every query, that keys beside the window
    take part with."""
    outputs = []
    query, key, value = (x.nan_to_num() for x in (query, key, value))
    for head in range(query.shape[1]):
        group = head // SHARE
        window = WINDOWS[group]
        page = at.clamp(min=0) // PAGE * PAGE
        length = (window.alpha + window.beta_units * (page + 1) // 1024).clamp(min=1)
        first = (page + 1 - length).clamp(min=0) // PAGE * PAGE
        inside = at[:, None, :] >= first[:, :, None]
        causal = (at[:, None, :] <= at[:, :, None]) & (at[:, None, :] >= 0)
        own = weight[:, group] if weight.dim() == 4 else weight[:, group, None, :]
        logits = query[:, head] @ key[:, group].mT * DIM**-0.5
        logits = logits if scores.cap is None else scores.cap * torch.tanh(logits / scores.cap)
        mass = logits.exp() * causal * torch.where(inside, 1.0, own)
        total = mass.sum(-1, keepdim=True) + (0 if scores.extra is None else scores.extra[head].exp())
        outputs.append(torch.where(at[..., None] >= 0, mass @ value[:, group] / total.clamp(min=1e-30), 0))
    return torch.stack(outputs, 1)


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def leaves(case: Case, hard: bool) -> tuple[Four, torch.Tensor]:
    """Query, key, value and weights, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(ROWS, GROUPS, COLUMNS, generator=generator, dtype=torch.float64)
    weight = (weight < 0.4).double() if hard else weight
    toward = torch.randn(ROWS, GROUPS * SHARE, COLUMNS, DIM, generator=generator, dtype=torch.float64).to(DEVICE)
    one, two, three, four = (x.detach().clone().requires_grad_() for x in (*case[0][:3], weight.to(DEVICE)))
    return (one, two, three, four), toward


@pytest.mark.parametrize("name", SCORES)
def test_soft_decisions_are_weights_beside_the_window(name: str, runs: Case, strips: None) -> None:
    at, scores = positions_of(runs[1]), SCORES[name]
    given, toward = leaves(runs, hard=False)
    query, key, value, weight = given
    asked: Any = {"hard": False, "scores": scores if name == "capped" else None}
    found = prefill(query, key, value, weight.log(), WINDOWS, rows_of(runs[1]), **asked)
    expected = naive(query, key, value, weight, at, scores)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    got, wanted = (torch.autograd.grad((x * toward).sum(), given) for x in (found, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert got[3].abs().max() > 0.1


@pytest.mark.parametrize("name", SCORES)
def test_hard_decisions_are_the_rule_and_their_gradient_is_bounded(name: str, runs: Case, strips: None) -> None:
    at, scores = positions_of(runs[1]), SCORES[name]
    given, toward = leaves(runs, hard=True)
    query, key, value, weight = given
    asked: Any = {"hard": True, "scores": scores if name == "capped" else None}
    found = prefill(query, key, value, weight, WINDOWS, rows_of(runs[1]), **asked)
    expected = naive(query, key, value, weight, at, scores)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    got, wanted = (torch.autograd.grad((x * toward).sum(), given, retain_graph=True) for x in (found, expected))
    for a, b in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    kept = weight.detach() == 1
    torch.testing.assert_close(got[3][kept], wanted[3][kept], rtol=1e-8, atol=1e-9)
    # Of a key that is left out the gradient is what keeping it would change, query by query.
    row, group = 0, 1
    for j in (3, 70, 140):
        changed = weight.detach().clone()
        j = int((~kept[row, group, j:]).nonzero()[0]) + j
        changed[row, group, j] = 1
        with torch.no_grad():
            after = naive(query, key, value, changed, at, scores)
            difference = ((after - expected) * toward).sum()
        torch.testing.assert_close(got[3][row, group, j], difference, rtol=1e-8, atol=1e-9)


def keeping_of(record: Record) -> Keeping:
    (found,) = record.keeping[0]
    return found


def passed(kinds: Any, made: list[torch.Tensor], mask: torch.Tensor) -> tuple[torch.Tensor, Keeping]:
    """Outputs `[B, H, T, D]` of one pass without a cache, and what was decided."""
    record = Record()
    begin = Step.begin

    def noted(*given: Any) -> Step:
        step = begin(*given)
        step.record = record
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "begin", staticmethod(noted))
        found = feed(kinds, None, made, mask, [0, COLUMNS])
    return torch.stack(list(found)), keeping_of(record)


def test_hard_decisions_in_a_layer_are_those_of_the_rule(case: Case) -> None:
    """With a cap, sinks, padding and NaN in it; and nothing is different once nothing is trained."""
    made, mask = case
    kinds, mixer = kinds_of(HALF)
    with torch.no_grad():
        expected, plain = passed(kinds, made, mask)
    mixer.decisions = Decisions(0.1, hard=True)
    given = [x.clone().requires_grad_() for x in made]
    found, trained = passed(kinds, given, mask)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(plain.kept, trained.kept) and torch.equal(plain.gone, trained.gone)
    (trained.kept.sum() + found.sum()).backward()
    assert all(bool(x.grad.isfinite().all()) for x in given if x.grad is not None) and given[2].grad is not None
    with torch.no_grad():  # the rule as it is where nobody asks for gradients, and through a cache
        assert torch.equal(passed(kinds, made, mask)[0], expected)
        cached = feed(kinds, PagedCache([kinds]), made, mask, [0, 100, COLUMNS])
    torch.testing.assert_close(torch.stack(list(cached)), expected, rtol=1e-8, atol=1e-9)


def test_what_counts_are_tokens_that_left_every_window(case: Case) -> None:
    made, mask = case
    kinds, mixer = kinds_of(HALF)
    with torch.no_grad():
        _, found = passed(kinds, made, mask)
    assert not bool(mask[2].diff().eq(0).all())  # not one run of tokens, so that all tokens come first
    at, lengths = torch.arange(COLUMNS, device=DEVICE), mask.sum(1)
    for number, span in enumerate(mixer.spans):
        ends = torch.tensor([span.boundary(max(0, int(length) - 1)) for length in lengths], device=DEVICE)
        assert torch.equal(found.gone[:, number], (at >= span.sink) & (at < ends[:, None]))
    assert found.groups == (0, 1) and found.shares == (0.5, 0.25) and bool(found.gone.any())


def test_soft_decisions_follow_the_scores() -> None:
    scores = torch.tensor([[[-1.0, 0.0, 0.5, 3.0]] * 2], requires_grad=True)
    thresholds = torch.tensor([0.0, -torch.inf])
    kept = torch.tensor([[[False, True, True, True]] * 2])
    fixed = torch.tensor([[[False, False, False, True], [True] * 4]])
    taken, through = Decisions(0.5, noise=False).take(scores, thresholds, kept, fixed)
    assert torch.equal(through.detach(), kept.float())
    assert taken[0, 0].exp().tolist() == pytest.approx([0.0180, 0.5, 0.8808, 1], abs=1e-4)
    assert taken[0, 1].exp().tolist() == [0, 1, 1, 1]
    for given in (through[0].sum(), taken[0, 0].exp().sum()):  # of what the rule alone decides nothing has a gradient
        (gradient,) = torch.autograd.grad(given, scores, retain_graph=True)
        assert bool((gradient[0, 0, :3] > 0).all() and (gradient[0, 0, 3:] == 0).all() and (gradient[0, 1] == 0).all())
    torch.manual_seed(0)
    many = torch.full((1, 1, 40_000), 0.5)
    free = torch.zeros_like(many, dtype=torch.bool)
    drawn, _ = Decisions(0.5).take(many, torch.zeros(1), free, free)
    assert float((drawn.exp() > 0.5).float().mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.0))), abs=0.01)
    assert RELAXATION < 1 and float(((drawn.exp() > 0.9) | (drawn.exp() < 0.1)).float().mean()) > 0.5


def test_the_rule_of_the_reference_is_the_hard_one() -> None:
    """A batch without padding, against the reference itself."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, GROUPS * SHARE, 150, DIM, generator=generator)
    key, value = torch.randn(2, 2, GROUPS, 150, DIM, generator=generator)
    kept = torch.rand(2, GROUPS, 150, generator=generator) < 0.3
    expected = retain_reference.prefill(query, key, value, kept, WINDOWS, rows=Rows.whole(2, 150))
    found = prefill(query, key, value, kept.float(), WINDOWS, Rows.whole(2, 150), hard=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("hard", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(hard: bool) -> None:
    """Bytes that autograd holds until the backward pass."""
    held = []
    for length in (192, 768):
        query = torch.randn(1, GROUPS * SHARE, length, DIM, requires_grad=True)
        key, value = torch.randn(2, 1, GROUPS, length, DIM).unbind()
        taken = torch.zeros(1, GROUPS, length, requires_grad=True)
        found: dict[int, int] = {}

        def note(x: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = prefill(query, key, value, taken, WINDOWS, Rows.whole(1, length), hard=hard)
        held.append(sum(found.values()))
        assert held[-1] < 4 * length * length and out.requires_grad
    assert 0 < held[1] < 4.5 * held[0]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_the_kernels_are_the_specification(hard: bool, name: str) -> None:
    """In float32 against float64: runs of tokens between columns of NaN, tokens that are never and always kept."""
    made, _ = inputs(101, 5, random.Random(5))
    mask = torch.zeros(ROWS, 101, dtype=torch.bool, device=DEVICE)
    mask[0], mask[1, 37:], mask[2, 3:90] = True, True, True
    generator = torch.Generator().manual_seed(6)
    taken = torch.rand(ROWS, GROUPS, 101, generator=generator, dtype=torch.float64).to(DEVICE)
    taken = (taken < 0.4).double() if hard else torch.where(taken < 0.2, 0, taken).log()
    toward = torch.randn(ROWS, GROUPS * SHARE, 101, DIM, generator=generator, dtype=torch.float64).to(DEVICE)
    extra = torch.linspace(-1, 1, GROUPS * SHARE, dtype=torch.float64, device=DEVICE)
    runs: list[tuple[Any, torch.dtype]] = [(prefill, torch.float64), (triton_prefill, torch.float32)]
    given, found = [x.nan_to_num().where(mask[:, None, :, None], torch.nan) for x in made[:3]], []
    for run, dtype in runs:
        parts = [x.detach().to(dtype).requires_grad_() for x in (*given, taken, extra)]
        scores = Scores(2.0, parts[4]) if name == "capped" else None
        out = run(*parts[:4], WINDOWS, rows_of(mask), hard=hard, scores=scores)
        asked = parts if name == "capped" else parts[:4]
        found.append((out, *torch.autograd.grad((out * toward.to(dtype)).sum(), asked)))
    for exact, own in zip(*found, strict=True):
        assert bool(own.isfinite().all())
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=1e-5)
    assert bool((found[1][4][1, :, :37] == 0).all()) and float(found[0][4].abs().max()) > 0.1
