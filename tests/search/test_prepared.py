"""Solvers of targets that were trained first: what stays full, what a state costs, and what plans are compared with."""

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field, ValidationError

from compress.errors import UserError
from compress.plan import LayerPlan
from compress.registry import targets
from compress.search.baselines import drawn_places, interleaved
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Candidate, Problem
from compress.search.refine.moves import rules_of
from compress.search.run import make_problem
from compress.search.solvers.keep import Keep
from compress.search.solvers.priced import Priced
from compress.targets.cost import Cost
from compress.targets.target import Target
from compress.targets.window import WindowGroup
from tests.search.synthetic import ITEMSIZE, dense_of, make_shape, random_profile
from tests.tiny import shape_of, tiny_model

STATE = 4 * 24 * 17  # bytes: no whole number of cache pages, which have 4096


class StateGroup(Target):
    """A window of a page, and a state of one size whatever the length."""

    objective: ClassVar[str | None] = "transfer"

    target: Literal["state"] = "state"
    features: int = Field(24, ge=1, description="of the state")

    def cost(self, unit: Any, length: int) -> Cost:
        """That of the window beside the state."""
        size = 4 * self.features * (unit.head_dim + 1)
        flops = 4 * unit.query_heads * self.features * unit.head_dim * length
        window = WindowGroup(sink=0, alpha=64, beta=0.0).cost(unit, length)
        return window + Cost(held_bytes=size, read_bytes=size, flops=flops)

    def words(self, native: int | None = None) -> str:
        """For notes."""
        return f"state {self.features}"


class Option:
    """A prepared target as a search sees it, with errors that are drawn."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target = target
        self.errors = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
        self.retention = None


class Effects:
    """What prepared targets cost the loss: their errors, at every length alike."""

    def __init__(self, *options: Option) -> None:
        self.options = {option.target: option for option in options}
        self.priced, self.priced_layers, self.lengths, self.grid = tuple(self.options), (), (320, 512), None

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        return self.options[target].errors

    def find(self, key: Any) -> None:
        """Nothing else."""

    def tensor(self, key: Any) -> Any:
        raise KeyError(key)


SMALL, LARGE = Option(StateGroup(), 1), Option(StateGroup(features=48), 2)
LARGE.errors = SMALL.errors / 4


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    targets.register("state")(StateGroup)
    yield
    targets._methods.pop("state")


def problem(solver: Any, budget: Budget, *options: Option, windows: tuple[int | None, ...] = (None,) * 4) -> Any:
    shape = make_shape(4, 2, windows)
    profile = random_profile(shape, (320, 512))
    return make_problem(dense_of(shape), profile, budget, solver, prepared=options, effects=Effects(*options))


def full_places(layers: Any) -> list[tuple[int, int]]:
    return [(n, g) for n, layer in enumerate(layers) for g, group in enumerate(layer.groups) if group.target == "full"]


def held(task: Problem, layers: Any, length: int) -> int:
    return Candidate(layers).to_plan(task, {}).cost(length, ITEMSIZE).held_bytes


def test_a_state_is_counted_to_the_byte() -> None:
    task = problem(Priced(part="error"), Budget(kv=0.6, bytes_read=0.6), SMALL)
    layers = task.uniform(StateGroup())
    for row, steps in zip(task.rows, task.total(layers), strict=True):
        assert row.amount(int(steps)) == 8 * (4096 + STATE) == held(task, layers, row.length) <= row.limit
        assert row.limit - row.amount(row.most) < row.step < 4096 and 4096 % row.step == STATE % row.step == 0
    written = Candidate(layers).to_plan(task, {})
    assert {amount.plan for amount in written.predicted.amounts} == {8 * (4096 + STATE)}


def test_flops_of_a_state_count() -> None:
    model = tiny_model("llama-gqa")
    dense, option = Dense(shape_of(model), 4, model), Option(StateGroup(), 1)
    option.errors = option.errors[:3]
    task = make_problem(
        dense, random_profile(dense.shape, (320, 512)), Budget(flops={512: 0.99}), Keep(share=0.0), prepared=[option]
    )
    (row,), (plan,) = task.rows, Keep(share=0.0).solve(task)
    unit = task.unit(0)
    assert row.amount(int(task.total(plan.layers)[0])) - row.fixed == 6 * StateGroup().cost(unit, 512).flops
    assert StateGroup().cost(unit, 512).flops > 4 * unit.query_heads * 24 * unit.head_dim * 512


@pytest.mark.parametrize(("part", "share"), [("error", 0.3), ("error", 0.6), ("absolute", 0.5)])
def test_of_prepared_targets_the_least_loss_is_chosen(part: Any, share: float) -> None:
    """Beside all plans there are, at a length alone, so that there is one objective."""
    options = (SMALL, LARGE)
    solver = Priced(part=part, gap=0.0)
    task = problem(solver, Budget(kv={512: share}), *options)
    plan = min(solver.solve(task), key=lambda candidate: list(candidate.losses.values())[-1])
    effect = {option.target: option.errors for option in options} | {FULL_GROUP: torch.zeros(4, 2)}
    lost = {target: [float(errors[place]) for place in task.free] for target, errors in effect.items()}
    cost = {target: int(task.costs(0, [target])[0, 0]) for target in effect}
    best = min(
        sum(lost[target][number] for number, target in enumerate(row))
        for row in itertools.product(effect, repeat=8)
        if sum(cost[target] for target in row) <= task.limits[0]
    )
    if part == "error":
        assert plan.losses == {"error": pytest.approx(best, abs=1e-5)}
    else:  # the profile's windows may do better still
        assert list(plan.losses.values())[-1] <= best + 1e-5
    assert task.fits(plan.layers)


def test_what_is_kept_are_the_highest_of_a_statistic() -> None:
    solver = Keep(statistic="retrieval", share=0.25)
    task = problem(solver, Budget(kv=0.9), SMALL)
    (plan,) = solver.solve(task)
    score = torch.stack([task.profile.tensors[f"retrieval.{length}"] for length in (320, 512)]).mean(0)
    ranked = sorted(task.free, key=lambda place: -float(score[place]))
    assert full_places(plan.layers) == sorted(ranked[:2])
    assert all(group in (FULL_GROUP, StateGroup()) for layer in plan.layers for group in layer.groups)
    assert plan.note.startswith("2 of 8 groups full by retrieval, the others state 24; at the cut ")
    (errors,) = Keep(statistic="error", share=0.25).solve(task)
    assert full_places(errors.layers) == sorted(sorted(task.free, key=lambda place: -float(SMALL.errors[place]))[:2])
    (effects,) = Keep(statistic="effect.absolute", share=0.25).solve(task)
    assert effects.layers == errors.layers  # the errors are the effects here
    (layers,) = Keep(statistic="error", share=0.5, level="layer").solve(task)
    worst = SMALL.errors.mean(1).topk(2).indices.tolist()
    assert full_places(layers.layers) == [(layer, group) for layer in sorted(worst) for group in range(2)]


def test_without_a_share_the_budget_is_filled() -> None:
    solver = Keep()
    for share in (0.35, 0.6, 1.0):
        task = problem(solver, Budget(kv={512: share}), SMALL)
        (plan,) = solver.solve(task)
        kept = len(full_places(plan.layers))
        more = (8 * (4096 + STATE) + (kept + 1) * (8 * 4096 - 4096 - STATE)) if kept < 8 else None
        assert task.fits(plan.layers) and (more is None or more > task.rows[0].limit)
    assert kept == 8


def test_several_targets_are_several_plans_and_what_does_not_fit_is_told() -> None:
    plans = Keep(share=0.25).solve(problem(Keep(share=0.25), Budget(kv=0.9), SMALL, LARGE))
    assert [{group.words() for layer in plan.layers for group in layer.groups} for plan in plans] == [
        {FULL_GROUP.words(), "state 24"},
        {FULL_GROUP.words(), "state 48"},
    ]
    named = Keep(share=0.0, target=StateGroup(features=48))
    (plan,) = named.solve(problem(named, Budget(kv=0.9), SMALL))
    assert not full_places(plan.layers)
    solver = Keep(share=0.9)
    with pytest.raises(UserError, match="no plan meets the budget at length 320") as error:
        problem(solver, Budget(kv=0.5), SMALL)
    assert "beside 90% of them full (`share`)" in str(error.value) and "or lower `share`" in str(error.value)
    with pytest.raises(UserError, match="nothing says what head groups become"):
        make_problem(dense_of(make_shape()), Effects(), Budget(kv=0.5), Keep())
    with pytest.raises(UserError, match="it was not prepared"):
        Keep(statistic="error", target=StateGroup(features=9)).solve(problem(Keep(), Budget(kv=0.9), SMALL))


def test_layers_that_slide_by_themselves_stay() -> None:
    for solver in (Keep(share=0.5), Priced(part="error"), Priced(part="error", level="layer")):
        task = problem(solver, Budget(kv=0.8), SMALL, windows=(100, None, 100, None))
        for plan in solver.solve(task):
            assert {layer for layer, _ in full_places(plan.layers)} >= {0, 2}


def test_one_target_for_whole_layers_and_for_the_model() -> None:
    solver = Priced(part="error", level="layer", gap=0.0)
    task = problem(solver, Budget(kv={512: 0.5}), SMALL, LARGE)
    (plan,) = solver.solve(task)
    assert all(len(set(layer.groups)) == 1 for layer in plan.layers)
    losses = {option.target: option.errors.sum(1) for option in (SMALL, LARGE)} | {FULL_GROUP: torch.zeros(4)}
    best = min(
        sum(float(losses[target][layer]) for layer, target in enumerate(row))
        for row in itertools.product(losses, repeat=4)
        if sum(2 * int(task.costs(0, [target])[0, 0]) for target in row) <= task.limits[0]
    )
    assert plan.losses["error"] == pytest.approx(best, abs=1e-5)
    whole = Priced(part="error", level="model").solve(task)
    assert [plan.note for plan in whole] == ["state 24 everywhere", "state 48 everywhere"]
    assert [plan.losses["error"] for plan in whole] == pytest.approx([float(o.errors.sum()) for o in (SMALL, LARGE)])
    with pytest.raises(ValidationError, match="`removal` decides head group by head group"):
        Priced(level="layer", removal={})


def test_baselines_are_as_large_as_the_plan() -> None:
    solver = Keep(share=0.5)
    task = problem(solver, Budget(kv=0.9), SMALL)
    (plan,) = solver.solve(task)
    drawn = drawn_places(task, plan, seed=0)
    assert len(full_places(drawn.layers)) == 4 and drawn.layers != plan.layers
    assert drawn == drawn_places(task, plan, seed=0)
    hybrid = interleaved(task, plan)
    assert hybrid is not None and full_places(hybrid.layers) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for baseline in (drawn, hybrid):
        assert all(held(task, baseline.layers, length) == held(task, plan.layers, length) for length in (320, 512))
    (few,) = Keep(share=0.2).solve(task)  # 2 of 8 groups are one layer of four
    one = interleaved(task, few)
    assert one is not None and full_places(one.layers) == [(3, 0), (3, 1)]
    assert interleaved(task, Candidate(task.start)) is None


def test_a_refinement_thinks_of_prepared_targets_and_leaves_them_as_they_were_trained() -> None:
    task = problem(Keep(share=0.5), Budget(kv=0.9), SMALL)
    layers = (LayerPlan(groups=(StateGroup(), FULL_GROUP)),) * 4
    for rules in rules_of(task, layers):
        assert [StateGroup()] * 2 in rules and rules[-1] == [StateGroup(), FULL_GROUP]
        assert {target.words() for row in rules for target in row if target.objective} == {"state 24"}
