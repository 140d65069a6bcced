"""Routed heads against the paper's formulas in float64, their gradients, what they report, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

import compress.runtime.mixer_routed  # noqa: F401  (registers the mixer)
from compress.errors import UserError
from compress.models.planned import planned_model
from compress.plan import make_plan, uniform_plan
from compress.runtime.attention import plan_attention
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.routers import Router, highest, standardised
from compress.runtime.step import Record, Step
from compress.targets.full import FullGroup
from compress.targets.routed import RoutedGroup
from compress.targets.target import Target
from compress.targets.window import WindowGroup
from tests.tiny import random_ids, shape_of, tiny_model

DIM, SHARE, HIDDEN, COLUMNS = 8, 2, 12, 37
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def layer(groups: list[Any], seed: int = 0, native: int | None = None) -> Kinds:
    """The mixers of a layer in float64, with weights of routers that are not the first ones."""
    kinds = Kinds([group.model_dump() for group in groups], LayerFacts(0, DIM, HIDDEN, SHARE, native))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mixer in kinds.mixers:
            for weight in mixer.double().parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return kinds


def router_of(kinds: Kinds) -> Any:
    """The router of a layer whose groups are all routed."""
    return mixer_of(kinds).router


def mixer_of(kinds: Kinds) -> Any:
    """The mixer of such a layer."""
    assert kinds.only is not None
    return kinds.only


def inputs(groups: int, batch: int = 2, seed: int = 1) -> list[torch.Tensor]:
    """Queries, keys, values and the layer's inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, groups * SHARE, COLUMNS, DIM), *[(batch, groups, COLUMNS, DIM)] * 2, (batch, COLUMNS, HIDDEN)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run(kinds: Kinds, tensors: list[torch.Tensor], valid: torch.Tensor | None = None, record: Any = None) -> Any:
    """`[B, T, H, D]` of one pass without a cache."""
    query, key, value, hidden = tensors
    step = Step.begin(None, valid, query.shape[0], query.shape[2], query.device)
    step.hidden, step.record = hidden, record
    module = SimpleNamespace(compress_kinds=kinds, layer_idx=0)
    return plan_attention(module, query, key, value, None, compress_step=step)[0]


def dense(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Causal attention of all heads, `[B, T, H, D]`."""
    query, key, value = tensors[:3]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def two_stage(x: torch.Tensor, routed: Any, shared: Any, halves: Any, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of shared and of routed units as the released code of Mixture-of-Head computes them."""
    probs = (x @ routed.T).softmax(-1)
    mask = functional.one_hot(probs.topk(active, dim=-1).indices, len(routed)).sum(-2)
    kept = probs * mask
    gates = kept / kept.sum(-1, keepdim=True) * active
    if not len(shared):
        return x.new_zeros(*x.shape[:-1], 0), gates
    always = (x @ shared.T).softmax(-1) * len(shared)
    alphas = (x @ halves.T).softmax(-1) * 2
    return always * alphas[..., :1], gates * alphas[..., 1:]


@pytest.mark.parametrize("unit", ["group", "head"])
@pytest.mark.parametrize("shared", [(), (1,), (0, 2)])
def test_two_stages_are_the_released_form(unit: Any, shared: tuple[int, ...]) -> None:
    kinds = layer(list(RoutedGroup.layer(5, 2, shared=shared, group_size=SHARE, unit=unit)))
    tensors, router = inputs(5), router_of(kinds)
    units = 5 if unit == "group" else 10
    free = [number for number in range(units) if number not in shared]
    route, halves = router.route.view(units, HIDDEN), router.halves.mean(0)
    always, chosen = two_stage(tensors[3], route[free], route[list(shared)], halves, 2)
    gates = torch.zeros(2, COLUMNS, units, dtype=torch.float64)
    gates[..., list(shared)], gates[..., free] = always, chosen
    out = run(kinds, tensors)
    torch.testing.assert_close(out, dense(tensors) * gates.repeat_interleave(10 // units, -1)[..., None], **CLOSE)
    assert bool((out.abs().sum(-1) == 0).any()) and bool((gates[..., free] > 0).sum(-1).eq(2).all())


def test_a_layer_of_shared_heads_alone_weighs_them() -> None:
    kinds, tensors, record = layer([RoutedGroup(active=0, of=0, always=3, shared="all")] * 3), inputs(3), Record()
    gates = 3 * (tensors[3] @ router_of(kinds).route.T).softmax(-1)
    torch.testing.assert_close(
        run(kinds, tensors, record=record), dense(tensors) * gates.repeat_interleave(SHARE, -1)[..., None], **CLOSE
    )
    assert not record.routing and len(record.gates[0]) == 1


@pytest.mark.parametrize("unit", ["group", "head"])
def test_norms_are_the_form_for_llama(unit: Any) -> None:
    shared = (0, 1)
    kinds = layer(list(RoutedGroup.layer(5, 2, shared=shared, group_size=SHARE, unit=unit, router="norm")))
    tensors = [tensor.requires_grad_() for tensor in inputs(5)]
    units, query = 5 if unit == "group" else 10, tensors[0]
    scores = query.transpose(1, 2).reshape(2, COLUMNS, units, -1).norm(dim=-1)[..., 2:]
    probs = (scores / scores.std(dim=-1, keepdim=True)).softmax(-1)
    mask = functional.one_hot(probs.topk(2, dim=-1).indices, units - 2).sum(-2)
    routed = mask * (1 + probs - probs.detach())  # 1, with the gradient of the real gate
    gates = torch.cat([torch.ones(2, COLUMNS, 2, dtype=torch.float64), routed], -1)
    expected = dense(tensors) * gates.repeat_interleave(10 // units, -1)[..., None]
    found, weights = run(kinds, tensors), inputs(5, seed=3)[0].transpose(1, 2)
    torch.testing.assert_close(found, expected, **CLOSE)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors[:3])
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), tensors[:3]), wanted, **CLOSE)


@pytest.mark.parametrize("active", [1, 2, 3, 7, 13, 41, 49])
def test_zero_weights_are_gates_of_exactly_one(active: int) -> None:
    groups = [group.model_dump() for group in RoutedGroup.layer(64, active, shared=tuple(range(5, 64, 5)))]
    choice = Router(groups, LayerFacts(0, DIM, HIDDEN, 1, None))(torch.zeros(1, 64, 3, DIM), torch.randn(1, 3, HIDDEN))
    assert set(choice.gates.unique().tolist()) <= {0.0, 1.0} and torch.equal(choice.gates == 1, choice.on)
    routed = [unit for unit in range(64) if unit % 5 or unit == 0]
    assert choice.on[0, 0].nonzero().flatten().tolist() == sorted([*routed[:active], *range(5, 64, 5)])


def test_of_equal_scores_the_lower_units_are_chosen() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert highest(scores, 2).int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    many = torch.zeros(3, 900)
    assert highest(many, 400)[:, :400].all() and not highest(many, 400)[:, 400:].any()


@pytest.mark.parametrize("unit", ["group", "head"])
@pytest.mark.parametrize("gates", ["weighted", "one"])
def test_gradients_are_finite_differences(unit: Any, gates: Any) -> None:
    kinds = layer(list(RoutedGroup.layer(3, 1, shared=(1,), group_size=SHARE, unit=unit, gates=gates)))
    tensors = [tensor[..., :4, :].contiguous().requires_grad_() for tensor in inputs(3, batch=1)]
    router = router_of(kinds)
    if gates == "weighted":
        given = [*tensors, *router.parameters()]
        assert torch.autograd.gradcheck(lambda *x: run(kinds, list(x[:4])), given, fast_mode=True)
        return
    # Gates of 1 in the pass, and the gradients of the probabilities: a weight among one chosen unit would have none.
    slope = torch.randn(run(kinds, tensors).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad((run(kinds, tensors) * slope).sum(), [tensors[3], router.route])
    real = (dense(tensors) * slope).detach()

    def of_real_gates(hidden: torch.Tensor) -> torch.Tensor:
        scores = hidden @ router.route.view(router.units, -1, HIDDEN).mean(1).T
        shared, routed = scores[..., list(router.shared)], scores[..., list(router.routed)]
        alphas = 2 * (hidden @ router.halves.mean(0).T).softmax(-1)
        always = len(router.shared) * shared.softmax(-1) * alphas[..., :1]
        chosen = functional.one_hot(routed.argmax(-1), len(router.routed)) * routed.softmax(-1) * alphas[..., 1:]
        order = torch.tensor(router.shared + router.routed).argsort()
        gates = torch.cat([always, chosen], -1)[..., order]
        return (mixer_of(kinds).by_head(gates)[..., None] * real).sum()

    wanted = torch.autograd.grad(of_real_gates(tensors[3]), [tensors[3], router.route])
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert torch.autograd.gradcheck(of_real_gates, tensors[3:], fast_mode=True)


@pytest.mark.parametrize("router", ["two_stage", "norm", "random"])
def test_padding_takes_part_in_nothing(router: Any) -> None:
    groups: list[Any] = [FullGroup(), *RoutedGroup.layer(3, 1, shared=(2,), router=router)]
    kinds, tensors = layer(groups), inputs(4)
    valid = torch.ones(2, COLUMNS, dtype=torch.bool)
    valid[0, :9], valid[1, 30:] = False, False
    alone, whole = [], Record()
    for row in range(2):
        part = [x[row : row + 1, ..., valid[row], :] for x in tensors]
        alone.append((record := Record(), run(kinds, part, record=record))[0].routing[0])
    poisoned = [x.masked_fill(~(valid if x.dim() == 3 else valid[:, None])[..., None], torch.nan) for x in tensors]
    poisoned = [x.requires_grad_() for x in poisoned]
    out = run(kinds, poisoned, valid, whole)
    gradients = torch.autograd.grad(out.square().sum(), poisoned[:3])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not bool(out.detach()[~valid].count_nonzero())
    found = whole.routing[0]
    assert found.units == ((2, 3), (4, 5)) and found.shared == ((6, 7),)
    for name in ("logits", "probs", "chosen"):
        torch.testing.assert_close(getattr(found, name), torch.cat([getattr(each, name) for each in alone]), **CLOSE)
    assert bool(found.chosen.sum(-1).eq(1).all()) and whole.gates[0][0].shape == (2, COLUMNS, 6)


def test_layers_that_are_computed_again_have_the_same_gradients() -> None:
    model, ids = tiny_model("llama-gqa"), random_ids(2, 40)
    routed = planned_model(model, make_plan(shape_of(model), [RoutedGroup.layer(2, 1)] * 3)).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            routed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        routed.zero_grad()
        loss = routed(ids, labels=ids, use_cache=False, compress_record=(record := Record())).loss
        for routing in record.routing.values():
            loss = loss + (routing.probs[:, 0].mean() * routing.chosen[:, 0].double().mean())
        loss.backward()
        found.append([router_of(kinds).route.grad.clone() for kinds in routed.base_model.compress_kinds])
        assert sorted(record.routing) == [0, 1, 2]
    torch.testing.assert_close(found[1], found[0])
    assert all(bool(gradient.abs().sum() > 0) for gradient in found[0])


def test_a_factor_on_all_queries_of_a_token_changes_no_choice() -> None:
    scores = torch.rand(5, 7, dtype=torch.float64)
    torch.testing.assert_close(standardised(0.3 * scores), standardised(scores), **CLOSE)
    assert torch.equal(standardised(torch.ones(2, 3)), torch.ones(2, 3))
    alone = torch.ones(2, 1, requires_grad=True)
    standardised(alone).softmax(-1).sum().backward()
    assert alone.grad is not None and not alone.grad.count_nonzero()


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])  # layers that slide by themselves, and normalised queries
def test_all_units_at_the_start_are_the_dense_model(family: str) -> None:
    model, ids = tiny_model(family), random_ids(1, 90)
    shape = shape_of(model)
    torch.manual_seed(0)
    with torch.inference_mode():
        everything = planned_model(model, make_plan(shape, [RoutedGroup.layer(2, 2)] * shape.layers))
        torch.testing.assert_close(everything(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        routed = planned_model(model, make_plan(shape, [RoutedGroup.layer(2, 1)] * shape.layers))
        for kinds in routed.base_model.compress_kinds:
            router_of(kinds).route.normal_()
        found, cache, record = routed(ids).logits, routed.new_cache(), Record()
        parts = [
            routed(ids[:, start:stop], past_key_values=cache, compress_record=record).logits
            for start, stop in ((0, 70), (70, 71), (71, 90))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), found, rtol=1e-4, atol=1e-4)
    assert all(0 < int(routing.chosen[:, 0].sum()) < 19 for routing in record.routing.values())


def test_random_routers_learn_nothing_and_use_all_units() -> None:
    kinds = Kinds(
        [g.model_dump() for g in RoutedGroup.layer(6, 2, router="random")], LayerFacts(3, DIM, 64, SHARE, None)
    )
    x = torch.randn(1, 600, 64) + 1.0  # with a large common part, as inputs of layers have
    choice = router_of(kinds)(torch.zeros(1, 12, 600, DIM), x.requires_grad_())
    load = choice.chosen.double().mean((0, 1))
    assert bool((load > 0.15).all() and (load < 0.6).all()) and not choice.gates.requires_grad
    route, phase = router_of(kinds).route.detach(), router_of(kinds).phase.detach()
    sized = x.detach() / x.detach().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(choice.logits, (4 * sized @ route.T + phase).cos(), rtol=1e-4, atol=1e-4)
    assert 0.8 < float(route.std()) * 64**0.5 < 1.2 and len(set(phase.tolist())) == 6
    # Inputs are of all sizes, and are brought to one: by size alone a cosine would turn over and over, or not at all.
    longer = router_of(kinds)(torch.zeros(1, 12, 600, DIM), 100 * x)
    assert (longer.chosen != choice.chosen).double().mean() < 0.01
    again = Router(mixer_of(kinds).groups, LayerFacts(3, DIM, 64, SHARE, None))
    assert torch.equal(again.route, router_of(kinds).route)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"active": 3, "of": 2}, "expected 1 to 2"),
        ({"active": 0, "of": 2}, "expected 1 to 2"),
        ({"active": 1, "of": 2, "shared": (0,), "always": 1}, "whole groups are chosen"),
        ({"active": 1, "of": 2, "shared": (1, 0), "always": 2, "unit": "head"}, "ascending"),
        ({"active": 1, "of": 2, "shared": "all"}, "always: this group has shared units"),
        ({"active": 1, "of": 2, "router": "random", "gates": "weighted"}, "no weights to trust"),
        ({"active": 0, "of": 0, "always": 2}, 'expected "all"'),
    ],
)
def test_what_an_entry_cannot_say(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        RoutedGroup(**fields)


ONE = RoutedGroup(active=1, of=2)


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        ([ONE, RoutedGroup(active=2, of=2)], "differ in `active`"),
        ([ONE, RoutedGroup(active=1, of=2, router="norm")], "differ in `router`"),
        ([ONE, RoutedGroup(active=1, of=2, unit="head")], "differ in `unit`"),
        ([ONE, FullGroup()], "`of` is not how many routed units"),
        ([RoutedGroup(active=1, of=2, always=1)] * 2, "`always` is not how many shared units"),
        ([RoutedGroup(active=1, of=3, unit="head", shared=(2,), always=1)] * 2, "the group does not have"),
    ],
)
def test_entries_of_a_layer_that_do_not_go_together(groups: list[Target], what: str) -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    with pytest.raises(UserError, match=what):
        make_plan(shape, [groups, *[[FullGroup()] * 2] * 2])
    with pytest.raises(ValueError, match=what):
        Kinds([group.model_dump() for group in groups], LayerFacts(0, DIM, HIDDEN, SHARE, None))


def test_norms_of_normalised_queries_are_refused() -> None:
    model = tiny_model("qwen3")
    plan = make_plan(shape_of(model), [RoutedGroup.layer(2, 1, router="norm")] * 3)
    with pytest.raises(UserError, match=r"Qwen3ForCausalLM normalises every query head(?s:.*)router: two_stage"):
        planned_model(model, plan)


def test_a_window_beside_the_routing_is_refused_where_the_layer_slides() -> None:
    shape = shape_of(tiny_model("gemma3"))
    with pytest.raises(UserError, match="already slides"):
        uniform = uniform_plan(shape, FullGroup()).layers
        make_plan(shape, [RoutedGroup.layer(2, 1, alpha=9, beta=0.0), *[row.groups for row in uniform[1:]]])


def test_mixed_with_windows_only_the_routed_groups_are_gated() -> None:
    model, ids = tiny_model("llama-mha"), random_ids(1, 80)
    shape, window = shape_of(model), WindowGroup(sink=4, alpha=20, beta=0.0)
    first, second = RoutedGroup.layer(2, 1, sink=4, alpha=20, beta=0.0)
    with torch.inference_mode():
        plan = make_plan(shape, [[first, window, FullGroup(), second]] * 3)
        record, mixed = Record(), planned_model(model, plan)
        found = mixed(ids, compress_record=record).logits
        windows = planned_model(model, make_plan(shape, [[window, window, FullGroup(), window]] * 3))
        # Zero weights choose the first of the two everywhere: windows, without the output of the other.
        for each in windows.model.layers:
            each.self_attn.o_proj.weight[:, 36:] = 0
        torch.testing.assert_close(found, windows(ids).logits, rtol=1e-4, atol=1e-4)
    assert record.routing[1].units == ((0,), (3,)) and bool(record.routing[1].chosen[:, 0].all())
