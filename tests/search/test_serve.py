"""Plans that an engine serves: slots, ranks alike, few targets, what that costs, and refinement by slots."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from compress.errors import UserError
from compress.plan import LayerPlan, read_plan
from compress.registry import solvers
from compress.search.budget.budget import Budget
from compress.search.checks import section_problems
from compress.search.choice.options import layers_of, losses_of, room
from compress.search.choice.slots import by_counts, from_targets, in_slots, slots_of
from compress.search.problem import FULL_GROUP, Candidate, Problem
from compress.search.refine.moves import Moves
from compress.search.refine.refine import Refine
from compress.search.run import make_problem, run_search
from compress.search.serve import Serve, distinct
from compress.search.solver import Solver
from compress.search.solvers.amp import Amp
from compress.search.solvers.frontier import UnitRemoval
from compress.search.solvers.heads import Heads
from compress.search.solvers.layers import Layers
from compress.search.solvers.moa import Moa
from compress.search.solvers.priced import Priced
from compress.search.solvers.uniform import Uniform
from compress.targets.linear import LinearGroup
from compress.targets.window import WindowGroup
from compress_vllm.plan import Layer, check_ranks, of_rank, slot_of
from compress_vllm.rule import Rule
from tests.search.synthetic import dense_of, make_shape, random_profile
from tests.search.test_refine import DOCUMENTS, QUICK
from tests.search.test_search import HELD_OUT, Section
from tests.tiny import shape_of, tiny_loaded

SERVE = Serve(slot=2, spans=3, ranks=2, permute=False)
ANY_ORDER = Serve(slot=2, spans=3, ranks=2)
ONE, TWO = WindowGroup(sink=4, alpha=64, beta=0.0), WindowGroup(sink=4, alpha=128, beta=0.0)


def served(
    serve: Serve | None = SERVE,
    solver: Any = None,
    kv: float = 0.5,
    sliding: bool = False,
    lengths: tuple[int, ...] = (320, 512),
) -> Problem:
    """A problem of three layers of eight head groups."""
    shape = make_shape(3, 8, (None, 100, None) if sliding else None)
    profile = random_profile(shape, lengths)
    return make_problem(dense_of(shape), profile, Budget(kv=kv), solver or Moa(), serve=serve)


def rule(target: Any) -> Rule | None:
    span = target.span()
    return None if span.is_full else Rule(span.sink, span.alpha, span.beta_units, span.granule)


@pytest.mark.parametrize(
    "solver", [Moa(points=2), Priced(points=0), Priced(points=0, level="layer"), Layers(order="last")]
)
@pytest.mark.parametrize("sliding", [False, True])
def test_plans_are_as_the_engine_asks(solver: Any, sliding: bool) -> None:
    problem = served(solver=solver, kv=0.8 if sliding else 0.5, sliding=sliding)
    plans = solver.solve(problem)
    assert plans and plans[0].losses == solver.solve(problem)[0].losses
    for plan in plans:
        assert SERVE.holds(plan.layers) and problem.fits(plan.layers)
        assert len(distinct(plan.layers)) <= 3
        layers = [Layer(tuple(map(rule, layer.groups)), 16, 64) for layer in plan.layers]
        check_ranks(layers, 2)
        assert slot_of(layers, 2) % 2 == 0


def test_slots_and_few_targets_cost_what_they_hide() -> None:
    """By the same tables, and the more the fewer targets there may be."""
    solver = Moa(gap=0)

    def plan(serve: Serve | None) -> Candidate:
        (found,) = solver.solve(served(serve, kv=0.7, lengths=(512,)))
        return found

    free, many, three, two = map(
        plan, (None, Serve(spans=64, ranks=2, permute=False), SERVE, Serve(spans=2, ranks=2, permute=False))
    )
    assert not SERVE.holds(free.layers)
    assert [len(distinct(each.layers)) for each in (three, two)] == [3, 2] and len(distinct(many.layers)) > 3
    options = solver.group_options(served(kv=0.7, lengths=(512,)))
    lost = [losses_of(options, each.layers).item() for each in (free, many, three, two)]
    assert lost == sorted(set(lost))
    assert [each.losses["absolute.512"] for each in (free, many, three, two)] == pytest.approx(lost)


def test_in_another_order_ranks_need_equal_counts_alone() -> None:
    """The loss is smaller, and every rank has the same targets side by side, in the order that the plan is given."""
    solver = Moa(gap=0)
    lost = []
    for serve in (SERVE, ANY_ORDER):
        problem = served(serve, kv=0.7, lengths=(512,))
        (found,) = solver.solve(problem)
        assert serve.holds(found.layers) and problem.fits(found.layers)
        lost.append(found.losses["absolute.512"])
    assert lost[1] < lost[0] and not SERVE.holds(found.layers)
    plan = found.to_plan(problem, {})
    other = ANY_ORDER.ordered(plan)
    assert SERVE.ordered(plan) == plan and other.reordered_layers > 0
    assert [layer.groups for layer in other.layers] == [layer.groups for layer in plan.layers]
    rows = [tuple(rule(target) for target, _ in row) for row in other.groups_that_stay()]
    check_ranks([Layer(row, 16, 64) for row in rows], 2)
    for row in rows:
        halves = [of_rank(row, rank, 2) for rank in range(2)]
        assert halves[0] == halves[1] and len(list(groupby(halves[0]))) == len(set(row))


@pytest.mark.parametrize("serve", [ANY_ORDER, SERVE, Serve(slot=2)])
def test_the_groups_of_each_target_are_those_that_lose_least(serve: Serve) -> None:
    """Of all plans of a layer that are as asked, by trying them."""
    shape = make_shape(1, 8)
    problem = make_problem(dense_of(shape), random_profile(shape, (512,)), Budget(kv=0.5), Moa(), serve=serve)
    every = Moa().group_options(problem)
    options = from_targets(every, every[0].choices[:21:10])
    assert len(options[0].choices) == 3
    found = by_counts(options, serve, 8, np.ones(1))
    assert found is not None
    (layer,) = found
    least: dict[Any, float] = {}
    for bits in product(range(len(options[0].choices)), repeat=8):
        row = tuple(options[0].choices[index] for index in bits)
        if serve.holds([LayerPlan(groups=row)]):
            lost = sum(unit.losses[index, 0] for unit, index in zip(options, bits, strict=True))
            key = tuple(bits.count(index) for index in range(3))
            least[key] = min(lost, least.get(key, np.inf))
    counts = [tuple(row.count(target) for target in options[0].choices) for row in layer.choices]
    assert dict(zip(counts, layer.losses[:, 0].tolist(), strict=True)) == pytest.approx(least)
    for row, cost in zip(layer.choices, layer.costs, strict=True):
        np.testing.assert_array_equal(cost, problem.total([LayerPlan(groups=row)]))
    assert by_counts(every, Serve(slot=1, ranks=2), 8, np.ones(1)) is None


def test_a_slot_has_the_next_groups_of_every_rank() -> None:
    solver, problem = Moa(), served()
    options = solver.group_options(problem)
    slots = in_slots(options, SERVE, 8)
    assert len(slots) == 3 * 2 and all(len(unit.unit.places) == 4 for unit in slots)  # type: ignore[attr-defined]
    by_place = {unit.unit.place: unit for unit in options}
    smallest = int(options[0].costs.sum(1).argmin())
    for lower, upper in zip(slots[::2], slots[1::2], strict=True):
        members = [unit.unit.places for unit in (lower, upper)]  # type: ignore[attr-defined]
        assert {group for _, group in (*members[0], *members[1])} == set(range(8))
        for unit, places in zip((lower, upper), members, strict=True):
            assert sum(group < 4 for _, group in places) == 2
            np.testing.assert_allclose(unit.losses, sum(by_place[place].losses for place in places))
            np.testing.assert_array_equal(unit.costs, sum(by_place[place].costs for place in places))
        total = sum(np.abs(by_place[place].losses[smallest]) for place in (*members[0], *members[1]))
        for rank in (range(4), range(4, 8)):
            lost = [
                [(by_place[place].losses[smallest] / total).mean() for place in places if place[1] in rank]
                for places in members
            ]
            assert max(lost[0]) <= min(lost[1])


def test_what_a_plan_has_to_be() -> None:
    def holds(*groups: Any) -> bool:
        return SERVE.holds([LayerPlan(groups=groups)])

    full = FULL_GROUP
    assert holds(full, ONE, ONE, full, ONE, full, full, ONE)
    assert not holds(full, full, full, full, ONE, ONE, ONE, ONE)  # other targets on the other rank
    assert not holds(full, ONE, TWO, TWO, full, ONE, TWO, TWO)  # no slot of two
    three = [LayerPlan(groups=(target,) * 8) for target in (full, ONE, TWO)]
    assert SERVE.holds(three) and not Serve(slot=2, spans=2, ranks=2, permute=False).holds(three)
    layer = LayerPlan(groups=(full, ONE, ONE, full, ONE, full, full, ONE))
    assert slots_of(layer, SERVE) == [(0, 3, 5, 6), (1, 2, 4, 7)]
    halves = LayerPlan(groups=(ONE, full, full, full, full, ONE, ONE, ONE))
    assert ANY_ORDER.holds([halves]) and not SERVE.holds([halves])
    assert slots_of(halves, ANY_ORDER) == [(0, 5, 6, 7), (1, 2, 3, 4)]
    assert not ANY_ORDER.holds([LayerPlan(groups=(full, full, ONE, ONE, ONE, ONE, ONE, ONE))])


def test_what_does_not_go_together_is_refused() -> None:
    budget = Budget(kv=0.5)
    for able in (Moa(), Priced(), Layers(), Uniform()):
        assert not section_problems(able, budget, QUICK, SERVE)
    refused: list[tuple[Solver, str]] = [
        (Heads(), "`heads` decides head group by head group"),
        (Moa(removal=UnitRemoval()), "removal"),
    ]
    for solver, says in refused:
        ((place, problem),) = section_problems(solver, budget, None, SERVE)
        assert place == ("search", "serve") and says in problem.what
        assert problem.expected == "`layers`, `moa`, `priced`, `streaming` or `uniform`, without `removal`"
    assert section_problems(Amp(), Budget(parameters=0.5), None, SERVE)
    with pytest.raises(UserError, match="do not divide into slots"):
        served(Serve(slot=3))
    with pytest.raises(UserError, match="does not serve"):
        Moa(rule="length").solve(served(solver=Moa(rule="length")))
    shape = make_shape(3, 8)
    gpt2 = replace(dense_of(shape), model=SimpleNamespace(config=GPT2Config()))
    with pytest.raises(UserError, match="cannot be put in another order") as refused_order:
        make_problem(gpt2, random_profile(shape, (320,)), Budget(kv=0.5), Moa(), serve=ANY_ORDER)
    assert refused_order.value.problems[0].where == "search.serve.permute"
    make_problem(gpt2, random_profile(shape, (320,)), Budget(kv=0.5), Moa(), serve=SERVE)
    with pytest.raises(UserError, match="does not serve"):
        SERVE.check_targets([FULL_GROUP, ONE, LinearGroup()])


def test_refinement_moves_slots_among_the_targets_of_the_plan() -> None:
    problem = served()
    plan = Moa(points=0).solve(problem)[0]
    moves = Moves.of(problem, plan.layers)
    assert len(moves.units) == 3 * 2
    known = {*distinct(plan.layers), FULL_GROUP}
    assert all(set(unit.choices) == known for unit in moves.units)
    now = moves.options_of(plan.layers)
    assert layers_of(moves.problem, moves.units, now) == plan.layers
    assert room(moves.problem, moves.units).tolist() == problem.limits.tolist()
    # Whatever is exchanged, the plan stays one that the engine serves.
    chance = np.random.default_rng(0)
    for _ in range(5):
        choice = [int(chance.integers(len(unit.choices))) for unit in moves.units]
        other = layers_of(moves.problem, moves.units, choice)
        assert SERVE.holds(other) and moves.options_of(other) == choice
        spent = sum(unit.costs[index] for unit, index in zip(moves.units, choice, strict=True))
        assert problem.total(other).tolist() == spent.tolist()
    groups = np.arange(3 * 8 * len(known), dtype=np.float32).reshape(1, 1, 3, 8, len(known))
    found = moves.columns(torch.from_numpy(groups), torch.zeros(1, 1, 3, 0))[0, 0]
    places = [group for _, group in moves.units[1].unit.places]  # type: ignore[attr-defined]
    assert found[len(known) : 2 * len(known)].tolist() == groups[0, 0, 0, places].sum(0).tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A search of a tiny model with an engine and a refinement, and its folder."""
    folder: Path = tmp_path_factory.mktemp("serve")
    loaded = tiny_loaded("llama-mha")
    section = Section(Moa(points=0), Budget(kv=0.5), Refine(minutes=5, samples=1), Serve(slot=1, spans=2, ranks=2))
    profile = random_profile(shape_of(loaded.model), (320, 448))
    return run_search(loaded, profile, HELD_OUT, section, folder, refine_documents=DOCUMENTS[:2]), folder


def test_a_search_says_what_serving_costs(run: Any) -> None:
    result, folder = run
    told = json.loads((folder / "search" / "pareto.json").read_text())["serve"]
    assert told == result.plan.provenance["serve"] and told["measured"]
    rows = {row["name"]: row["response_loss"] for row in result.report["plans"]}
    assert told["loss"] == min(loss for name, loss in rows.items() if name != "refined")
    (free,) = [row for row in result.report["baselines"] if row["name"] == "free"]
    assert told["loss_without"] == free["response_loss"]
    line = result.lines[-1]
    assert "slots of 1 head group on each of 2 ranks, at most 2 targets" in line
    assert f"{told['loss']:.4f}" in line and f"({told['loss'] - told['loss_without']:+.4f})" in line
    asked = Serve(slot=1, spans=2, ranks=2)
    plans = [read_plan(folder / "search" / "plans" / f"{name}.json") for name in rows]
    assert all(asked.holds(plan.layers) and asked.ordered(plan) == plan for plan in plans)
    assert any(plan.reordered_layers for plan in plans) and asked.ordered(result.plan) == result.plan
    assert "refined" in rows and not asked.holds(read_plan(folder / "search" / "free.json").layers)


@pytest.mark.parametrize(
    ("solver", "budget", "refine"),
    [(Amp(), Budget(kv=0.5), None), (Uniform(), Budget(parameters=0.5), None), (Amp(), Budget(parameters=0.5), QUICK)],
)
def test_advice_names_every_solver_that_takes_a_removal(solver: Solver, budget: Budget, refine: Refine | None) -> None:
    ((_, problem),) = section_problems(solver, budget, refine)
    assert problem.fix is not None and "take `moa` or `priced` with a `removal`" in problem.fix
    able = [name for name, kind in solvers.items() if "removal" in kind.model_fields]
    assert [name for name, kind in solvers.items() if kind.takes_removal] == able == ["moa", "priced"]
