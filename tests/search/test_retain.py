"""Searches among heads that keep tokens: shares become thresholds of head groups, and bytes are means with bounds."""

import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.retention import Measured, Retention
from compress.plan import Predicted, amount_line, uniform_plan
from compress.search.baselines import drawn_places, interleaved, kept_alike, thresholds_alike
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Candidate, Problem
from compress.search.refine.moves import rules_of
from compress.search.run import make_problem
from compress.search.solvers.keep import Keep
from compress.search.solvers.priced import Priced
from compress.search.solvers.shares import Shares
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGrid, RetainGroup
from compress.targets.unit import Unit
from tests.search.synthetic import ITEMSIZE, dense_of, make_shape, random_profile
from tests.tiny import shape_of, tiny_model

SHAPE = make_shape(4, 2)
SHARES = (1 / 16, 1 / 8, 1 / 2)
OPTIONS: list[Any] = RetainGroup.options(Unit(2, 16), [512], RetainGrid(shares=SHARES, alphas=(64,)))


@pytest.fixture(scope="module")
def retention() -> Retention:
    """Scores of three texts, whose mean and spread differ from group to group."""
    measured, generator = Measured(4, 2), torch.Generator().manual_seed(0)
    for length in (300, 500, 500):
        measured.begin(length)
        for layer in range(4):
            scores = torch.randn(2, length, generator=generator) * torch.tensor([[1.0], [3.0]]) - layer
            measured.add(layer, scores, 2 * scores)
    return measured.retention()


def problem(
    solver: Any, budget: Budget, retention: Retention | None, options: Any = OPTIONS, windows: Any = (None,) * 4
) -> Problem:
    """Windows of a profile beside retained shares, whose losses are drawn and fall with the share."""
    shape = make_shape(4, 2, windows)
    drawn = torch.rand(4, 2, generator=torch.Generator().manual_seed(3)) + 0.1
    effects: Any = SimpleNamespace(
        priced=tuple(options),
        priced_layers=(),
        effect=lambda target, length, part="absolute": (
            drawn * (1 - target.share) * 1e-3 if target.target == "retain" else drawn.flip(0) * 6e-4
        ),
    )
    prepared: Any = SimpleNamespace(target=RetainGroup(scorer="ridge"), retention=retention, errors=drawn)
    profile = random_profile(shape, (512,))
    return make_problem(dense_of(shape), profile, budget, solver, prepared=[prepared], effects=effects)


def groups_of(task: Problem, layers: Any) -> list[Any]:
    return [layers[layer].groups[group] for layer, group in task.free]


def test_a_share_has_a_threshold_in_every_head_group_that_keeps_it(retention: Retention) -> None:
    for share in (1 / 64, 0.1, 0.5, 63 / 64):
        found, spread = retention.at(share)
        for layer, group in itertools.product(range(4), range(2)):
            placed = RetainGroup(scorer="ridge", threshold="share", share=share).placed(retention, layer, group)
            assert (placed.threshold, placed.spread) == (float(found[layer, group]), float(spread[layer, group]))
            assert placed.anywhere.placed(retention, layer, group) == placed and not placed.open
            kept, deviates = retention.above(float(found[layer, group]))
            assert abs(float(kept[layer, group]) - share) < 1e-5
            numbers = float(found[layer, group]), float(kept[layer, group]), float(deviates[layer, group])
            again = placed.with_threshold(*numbers)
            assert abs(again.share - share) < 1e-5 and abs(again.spread - placed.spread) < 1e-4
    everything, _ = retention.above(-1e9)
    nothing, _ = retention.above(1e9)
    assert float(everything.min()) > 63 / 64 and float(nothing.max()) < 1 / 64
    with pytest.raises(ValueError, match="expected a share from 1/64 to 63/64"):
        RetainGroup(scorer="ridge", threshold="share", share=1.0)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_shares_compete_with_windows_and_states_head_group_by_head_group(retention: Retention, share: float) -> None:
    solver = Priced(gap=0.0, points=0)
    options = [*OPTIONS, LinearGroup(sink=4, alpha=64, features=8)]
    task = problem(solver, Budget(kv=share, lengths=(4096,)), retention, options)
    (plan,) = solver.solve(task)
    chosen = groups_of(task, plan.layers)
    assert task.fits(plan.layers) and not any(group.open for group in chosen)
    options = [FULL_GROUP, *solver.choices(task)]
    lost = {target: task.effect(target, 512).double() for target in options}
    cost = {target: int(task.costs(0, [target])[0, 0]) for target in options}
    # No exchange of one or two groups within the budget is better.
    best = sum(float(lost[task.anywhere(group)][place]) for group, place in zip(chosen, task.free, strict=True))
    assert plan.losses["effect.absolute.512"] == pytest.approx(best)
    spare = int(task.limits[0] - task.total(plan.layers)[0])
    gains = [
        (
            cost[target] - cost[task.anywhere(group)],
            float(lost[target][place] - lost[task.anywhere(group)][place]),
            place,
        )
        for group, place in zip(chosen, task.free, strict=True)
        for target in options
    ]
    for first, second in itertools.product(gains, gains):
        if first[2] != second[2] and first[0] + second[0] <= spare:
            assert first[1] + second[1] > -1e-9
    assert {"retain", "linear"} <= {group.target for group in chosen}
    for group, place in zip(chosen, task.free, strict=True):
        if group.target == "retain":
            assert group.threshold == float(retention.at(group.share)[0][place])


def test_one_option_a_layer_and_one_for_the_model_have_thresholds_by_head_group(retention: Retention) -> None:
    for solver in (Priced(level="layer", points=0), Priced(level="model"), Keep(share=0.0), Keep(share=0.25)):
        task = problem(solver, Budget(kv=0.6, lengths=(4096,)), retention)
        kept = 0
        for plan in solver.solve(task):
            for group, place in zip(groups_of(task, plan.layers), task.free, strict=True):
                if group.target == "retain":
                    kept += 1
                    assert group.threshold == float(retention.at(group.share)[0][place])
        assert kept
    (everywhere,) = Keep(share=0.0, target=OPTIONS[1]).solve(task)
    assert len({group.threshold for group in groups_of(task, everywhere.layers)}) == 8


def test_baselines_place_thresholds_anew(retention: Retention) -> None:
    solver = Keep(share=0.5, statistic="retrieval", target=OPTIONS[1])
    task = problem(solver, Budget(kv=0.7, lengths=(4096,)), retention)
    (plan,) = solver.solve(task)
    drawn, hybrid = drawn_places(task, plan, seed=0), interleaved(task, plan)
    assert drawn.layers != plan.layers and hybrid is not None
    for baseline in (drawn, hybrid):
        counts = Counter(group.target for group in groups_of(task, baseline.layers))
        assert counts == {"full": 4, "retain": 4} and task.total(baseline.layers) == task.total(plan.layers)
        for group, place in zip(groups_of(task, baseline.layers), task.free, strict=True):
            assert group == FULL_GROUP or group.threshold == float(retention.at(1 / 8)[0][place])
    refined = rules_of(task, plan.layers)
    assert all([task.placed(OPTIONS[0], (n, g)) for g in range(2)] in rules for n, rules in enumerate(refined))


@pytest.mark.parametrize(("same", "caps"), [("share", (1.5,)), ("threshold", (None,)), ("score", (None,))])
def test_one_share_or_one_threshold_fills_the_budget(retention: Retention, same: Any, caps: Any) -> None:
    options: Any = RetainGroup.options(Unit(2, 16), [512], RetainGrid(shares=(0.125,), alphas=(64,), caps=caps))
    solver = Shares(same=same, target=options[0])
    task = problem(solver, Budget(kv=0.45, lengths=(4096,)), retention, options)
    (plan,) = solver.solve(task)
    assert task.fits(plan.layers) and int(task.total(plan.layers)[0]) > 0.97 * int(task.limits[0])
    groups = groups_of(task, plan.layers)
    assert len({round(group.threshold, 3) for group in groups}) == (8 if same == "share" else 1)
    assert len({group.share for group in groups}) > 1 or same == "share"
    assert all(group.cap == options[0].with_share(0.5).cap for group in groups) or same == "share"
    alike = kept_alike(task, [Candidate(task.start), Candidate(task.uniform(options[0]))])
    assert list(alike) == ["uniform-share", "global-threshold"]
    assert same == "score" or alike["uniform-share" if same == "share" else "global-threshold"] == plan
    if same == "score":  # what is stood for is twice the scores here, so both thresholds keep the same tokens
        for one, other in zip(groups, groups_of(task, alike["global-threshold"].layers), strict=True):
            assert abs(one.share - min(max(other.share, 1 / 64), 63 / 64)) < 0.02
            kept = retention.wanted_above(float(plan.note.split()[-1]))
            assert kept is not None and min((kept - one.share).abs().min().item(), one.share - 1 / 64) < 1e-3
        earlier = problem(solver, Budget(kv=0.45, lengths=(4096,)), replace(retention, wanted=None), options)
        with pytest.raises(UserError, match="does not say what the scores are"):
            solver.solve(earlier)
    assert kept_alike(task, [Candidate(task.start)]) == {}
    with pytest.raises(UserError, match="no plan meets the budget at length 4096"):
        problem(solver, Budget(kv=0.04, lengths=(4096,)), retention, options)
    unknown = Shares(same=same, target=RetainGroup(scorer="mlp"))
    with pytest.raises(UserError, match="nothing says which thresholds keep which share"):
        problem(unknown, Budget(kv=0.45), retention)


def test_a_refinement_may_start_from_one_threshold_and_one_score_of_every_window(retention: Retention) -> None:
    options: Any = RetainGroup.options(Unit(2, 16), [512], RetainGrid(shares=SHARES, alphas=(64, 256)))
    task = problem(Shares(), Budget(kv=0.45, lengths=(4096,)), retention, options)
    made = thresholds_alike(task, [*options, FULL_GROUP])
    windows = [f"sink 4, window {alpha}, by ridge" for alpha in (64, 256)]
    assert list(made) == [f"global-{what}, {words}" for words in windows for what in ("threshold", "score")]
    for name, plan in made.items():
        assert task.fits(plan.layers) and {group.chooser for group in groups_of(task, plan.layers)} == {
            name[name.index("sink") :]
        }
    # Without what scores stand for there is one threshold alone, and nothing where nothing was measured.
    earlier = problem(
        Keep(share=0.0, target=options[0]), Budget(kv=0.45, lengths=(4096,)), replace(retention, wanted=None), options
    )
    assert list(thresholds_alike(earlier, options)) == [f"global-threshold, {words}" for words in windows]
    assert thresholds_alike(replace(task, prepared=()), options) == {} == thresholds_alike(task, [FULL_GROUP])


def test_before_anything_is_measured_thresholds_are_open() -> None:
    """As `compress validate` asks for plans."""
    for solver in (Shares(same="threshold"), Shares(), Keep(share=0.0, target=OPTIONS[0])):
        task = problem(solver, Budget(kv=0.5, lengths=(4096,)), None)
        assert all(group.open for plan in solver.solve(task) for group in groups_of(task, plan.layers))
    model = tiny_model("llama-gqa")
    with pytest.raises(UserError, match="does not say which tokens a head group keeps"):
        planned_model(model, uniform_plan(shape_of(model), OPTIONS[0]), untrained=True)


def test_layers_that_slide_keep_their_windows(retention: Retention) -> None:
    windows = (100, None, 100, None)
    solver = Keep(share=0.0, target=OPTIONS[0])
    task = problem(solver, Budget(kv=0.5, lengths=(4096,)), retention, windows=windows)
    for plan in solver.solve(task):
        assert {group for layer in (0, 2) for group in plan.layers[layer].groups} == {FULL_GROUP}


@pytest.mark.parametrize("times", [None, 1.25, 2.0])
def test_a_budget_may_ask_for_the_bound(retention: Retention, times: float | None) -> None:
    options: Any = RetainGroup.options(Unit(2, 16), [4096], RetainGrid(shares=(1 / 8, 1 / 4), caps=(times,)))
    unit = dense_of(SHAPE).shape.unit(0, ITEMSIZE)
    for length in (64, 200, 4096):
        for option in options:
            cost = option.cost(unit, length)
            bound = option.model_copy(update={"share": 1.0, "threshold": None}).cost(unit, length)
            assert cost.held_bytes <= cost.most_bytes and cost.spread_bytes == 0
            assert cost.most_bytes == bound.most_bytes >= bound.held_bytes
    solver = Keep(share=0.0, target=options[0])
    placed = problem(solver, Budget(kv=1.0, lengths=(4096,)), retention, options)
    plan = Candidate(placed.uniform(options[0])).to_plan(placed, {})
    amount = plan.predicted.of("kv")[4096]
    each = [group.cost(unit, 4096) for row in plan.layers for group in row.groups]
    assert amount.plan == sum(cost.held_bytes for cost in each)
    assert amount.most == sum(cost.most_bytes for cost in each) and amount.spread == sum(c.spread_bytes for c in each)
    assert amount.spread > 0 and "on average over texts" in amount_line(amount)
    assert Predicted.model_validate_json(plan.predicted.model_dump_json()) == plan.predicted
    share = amount.most / amount.dense + 0.001
    for kind, least in (("kv_bound", share), ("kv", amount.fraction + 0.001)):
        if least <= 1:
            task = problem(solver, Budget(**{kind: least}, lengths=(4096,)), retention, options)
            assert task.fits(plan.layers)
        with pytest.raises(UserError, match="no plan meets the budget at length 4096"):
            problem(solver, Budget(**{kind: min(least - 0.02, 1.0)}, lengths=(4096,)), retention, options)


def test_a_window_counts_the_same_under_a_bound() -> None:
    model = tiny_model("llama-gqa")
    dense = Dense(shape_of(model), 4, model)
    rows = [row for kind in ("kv", "kv_bound") for row in Budget(**{kind: 0.5}).rows(dense, [512])]
    cost = dense.cost(512)
    assert rows[0].limit == rows[1].limit and rows[0].cost(cost) == rows[1].cost(cost)
    amount = rows[0].amount_of(cost)
    assert amount is not None and amount.spread is None and Budget(kv_bound=0.5).given() == {"kv_bound": 0.5}
