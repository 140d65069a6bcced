"""Options of whole layers in a search: routed heads beside windows, what they save, and which of them are refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of, shape_without_weights
from compress.plan import LayerPlan, make_plan
from compress.profile.key import Key
from compress.registry import layer_options
from compress.runtime.step import Record
from compress.search.baselines import chance_routed, drawn_places, even_layers, pruned_alike, removing
from compress.search.budget.budget import Budget
from compress.search.checks import section_problems
from compress.search.choice.options import layers_of
from compress.search.choice.saving import savings
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Candidate, Problem
from compress.search.refine.moves import Moves
from compress.search.run import make_problem
from compress.search.solvers.even import Even
from compress.search.solvers.frontier import UnitRemoval
from compress.search.solvers.keep import Keep
from compress.search.solvers.moa import Moa
from compress.search.solvers.priced import Priced
from compress.targets.layer_option import LayerOption
from compress.targets.routed import RoutedGroup
from compress.targets.routed_options import RoutedGrid, RoutedOption
from compress.targets.target import Target
from compress.targets.window import WindowGroup
from tests.search.synthetic import ITEMSIZE, SMALL, FakeProfile, dense_of, make_shape, random_profile
from tests.tiny import random_ids, tiny_model


class Sized(Dense):
    """A model that does not exist, with parameters."""

    parameters = 10_000


OPTIONS = tuple(RoutedOption(shared=shared, active=active) for shared, active in ((0, 1), (0, 2), (1, 1)))


def profile_with(
    options: Sequence[LayerOption], shape: Any, lengths: tuple[int, ...], scale: float = 1.0
) -> FakeProfile:
    """Random windows, and options of whole layers that lose about what the windows do."""
    windows = random_profile(shape, lengths)
    generator = torch.Generator().manual_seed(4)
    tensors = dict(windows.tensors)
    for length in lengths:
        size = float(windows.tensors[f"influence.absolute.{length}"][:, :, 0, 0, 0].mean()) * scale
        for number, option in enumerate(options):
            lost = torch.rand(shape.layers, shape.kv_heads, generator=generator) * size / (1 + number)
            tensors[str(Key("effect", "absolute", length).to(option))] = lost
    return FakeProfile(lengths, SMALL, tensors, tuple(options))


def every_plan(problem: Problem, solver: Priced) -> list[tuple[Any, np.ndarray]]:
    """All plans of windows and of options of whole layers, with their losses."""
    shape, lengths = problem.shape, problem.lengths
    targets = [FULL_GROUP, *problem.priced]
    of_layer: list[list[tuple[tuple[Target, ...], np.ndarray]]] = []
    for layer in range(shape.layers):
        found = []
        for groups in itertools.product(targets, repeat=shape.kv_heads):
            lost = [
                sum(float(problem.effect(target, length)[layer, g]) for g, target in enumerate(groups))
                for length in lengths
            ]
            found.append((groups, np.array(lost)))
        for option in problem.priced_layers:
            lost = [float(problem.layer_effect(option, length)[layer].sum()) for length in lengths]
            found.append((option.entries(shape.kv_heads, shape.group_size), np.array(lost)))
        of_layer.append(found)
    return [
        (tuple(LayerPlan(groups=groups) for groups, _ in plan), np.sum([lost for _, lost in plan], axis=0))
        for plan in itertools.product(*of_layer)
    ]


@pytest.mark.parametrize(
    ("budget", "scale"),
    [({"bytes_read": 0.55}, 0.6), ({"bytes_read": 0.6, "kv": 0.85}, 0.1), ({"active": 0.75}, 1.0)],
    ids=["reads", "both", "active"],
)
def test_windows_and_routed_layers_are_chosen_together_to_the_optimum(budget: Any, scale: float) -> None:
    shape = make_shape(layers=2, kv_heads=3)
    solver = Priced(points=0, gap=0.0, force="active" in budget)
    dense = Sized(shape, ITEMSIZE, dense_of(shape).model)
    task = make_problem(dense, profile_with(OPTIONS, shape, (320,), scale), Budget(**budget, lengths=(320,)), solver)
    (chosen,) = solver.solve(task)
    plans = every_plan(task, solver)
    best = min(float(lost[0]) for layers, lost in plans if task.fits(layers))
    assert task.fits(chosen.layers)
    assert chosen.losses["effect.absolute.320"] == pytest.approx(best, rel=1e-6)
    kinds = [{group.target for group in layer.groups} for layer in chosen.layers]
    assert any(targets == {"routed"} for targets in kinds)
    plan = chosen.to_plan(task, {})
    for row in task.rows:
        amount = plan.predicted.of(row.kind)[row.length]
        assert amount.plan == row.amount(int(task.total(chosen.layers)[task.rows.index(row)])) <= row.limit
        assert amount.plan == row.exact(plan.cost(row.length or 320, task.dense.itemsize)) + row.fixed
    if "active" in budget:
        assert plan.predicted.of("active")[None].dense == shape.layers * shape.query_heads
        assert plan.predicted.of("bytes_read")[320].fraction == pytest.approx(
            plan.cost(320).read_bytes / shape.dense_cost(320).read_bytes
        )


@pytest.mark.parametrize("level", ["group", "layer", "model"])
def test_rows_that_can_only_be_met_one_by_one_are_refused(level: Any) -> None:
    """Windows hold least, and routed heads read least; no layer does both."""
    shape = make_shape(layers=2, kv_heads=3)
    solver, budget = Priced(points=0, level=level), Budget(bytes_read=0.36, kv=0.45, lengths=(320,))
    task = make_problem(dense_of(shape), profile_with(OPTIONS, shape, (320,)), budget, solver)
    with pytest.raises(UserError, match="no plan meets all of the budget at once"):
        solver.solve(task)


def measured(plan: Any, model: Any, length: int) -> dict[str, int]:
    """What a pass of a planned model computes and reads, by what its tokens chose: pairs of queries and keys in FLOPs,
    query heads of the last token, and bytes of the pages that it reads."""
    record = Record()
    with torch.no_grad():
        planned_model(model, plan)(random_ids(1, length), compress_record=record)
    shape, itemsize = plan.model, 4
    flops = heads = read = 0
    for number, layer in enumerate(plan.layers):
        unit = plan.unit(number, itemsize, "patched")
        on = torch.zeros(length, shape.query_heads, dtype=torch.bool)
        if number in record.routing:
            routing = record.routing[number]
            for unit_heads in routing.shared:
                on[:, list(unit_heads)] = True
            for column, unit_heads in enumerate(routing.units):
                on[:, list(unit_heads)] = routing.chosen[:, column, None]
        routed = [group for group, target in enumerate(layer.groups) if target.by_layer]
        for group, target in enumerate(layer.groups):
            own = slice(group * shape.group_size, (group + 1) * shape.group_size)
            if group not in routed:
                on[:, own] = True
            seen = torch.arange(1, length + 1)
            span = target.span().at_length(length)
            pairs = torch.stack([span.visible(t, seen - 1).sum() for t in seen - 1])
            flops += 4 * shape.head_dim * int((pairs[:, None] * on[:, own]).sum())
            heads += int(on[-1, own].sum())
            read += bool(on[-1, own].any()) * replace_full(target).cost(unit, length).read_bytes
    return {"flops": flops, "heads": heads, "read_bytes": read}


def replace_full(target: Target) -> Target:
    """What a group is while it is on."""
    return FULL_GROUP if target.by_layer else target


@pytest.mark.parametrize("unit", ["group", "head"])
def test_rows_of_a_budget_are_what_a_model_does(unit: Any) -> None:
    model = tiny_model("llama-gqa")
    shape = shape_of(model)
    window = WindowGroup(sink=4, alpha=64, beta=0.0)
    routed: list[Any] = RoutedGroup.layer(2, 1, router="norm", unit=unit, group_size=2)
    for groups in ([routed, [window, FULL_GROUP], routed], [routed, routed, [FULL_GROUP] * 2]):
        plan = make_plan(shape, groups)
        found, cost = measured(plan, model, 200), plan.cost(200, 4)
        assert (found["flops"], found["heads"]) == (cost.flops, cost.heads)
        if unit == "group":
            assert found["read_bytes"] == cost.read_bytes
        else:  # of 4 query heads 1 is on: the other group is never read
            assert found["read_bytes"] == cost.read_bytes


def llama8b() -> Dense:
    """Sizes of Llama-3-8B in two layers, without weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
        max_position_embeddings=131072,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Dense(shape_without_weights(model), 2, model)


@pytest.fixture(scope="module")
def dense() -> Dense:
    return llama8b()


class WholeAlone(FakeProfile):
    """A profile that priced options of whole layers, and nothing else."""

    priced = ()

    def effect(self, target: Any, length: int, part: str = "absolute") -> torch.Tensor:
        return torch.zeros(2, 8)


PAPER = RoutedOption(unit="head", shared=0.5, active=8)  # 24 of 32 query heads


def searched(dense: Dense, budget: Budget, options: Sequence[LayerOption], said: list[str], **fields: Any) -> Problem:
    tensors = {
        str(Key("effect", "absolute", 512).to(option)): torch.ones(dense.shape.layers, dense.shape.kv_heads)
        for option in options
    }
    profile = WholeAlone((512,), None, tensors, tuple(options))
    return make_problem(dense, profile, budget, Priced(points=0, **fields), said.append)


@pytest.mark.parametrize(("length", "share"), [(2048, 0.009), (8192, 0.033), (32768, 0.095), (131072, 0.178)])
def test_what_query_heads_save_of_the_flops_of_a_layer(dense: Dense, length: int, share: float) -> None:
    """The published form under grouped queries, by hand: a quarter of the attention, and nothing of the rest."""
    said: list[str] = []
    searched(dense, Budget(flops=0.999, lengths=(length,)), [PAPER], said, force=True)
    whole = 2 * length * dense.parameters / 2 + dense.cost(length).flops / 2
    saved = 0.25 * dense.cost(length).flops / 2
    assert saved / whole == pytest.approx(share, abs=6e-4)
    (saving,) = savings(searched(dense, Budget(flops=0.999, lengths=(length,)), [PAPER], said, force=True), 0, ENTRIES)
    assert saving.share == pytest.approx(saved / whole, rel=1e-9) and f"{share:.1%}" in saving.words
    # A search that may remove heads and neurons counts the parameters of a layer by what they go with: the same share.
    budget, removing = Budget(flops=0.999, lengths=(length,)), dataclasses.replace(dense, removes=True)
    problem = dataclasses.replace(
        searched(dense, budget, [PAPER], said, force=True), dense=removing, rows=budget.rows(removing, ())
    )
    (again,) = savings(problem, 0, ENTRIES)
    assert again.share == pytest.approx(saving.share, rel=1e-6)


ENTRIES = PAPER.entries(8, 4)


def test_an_option_that_saves_too_little_is_refused_with_its_figure(dense: Dense) -> None:
    groups = RoutedOption(shared=4, active=2)
    said: list[str] = []
    problem = searched(dense, Budget(bytes_read=0.9, lengths=(8192,)), [PAPER, groups], said)
    (line,) = said
    assert "saves 1.9% of a layer's `bytes_read` at 8,192 tokens, less than the 0.02" in line
    assert "its 4 query heads is on, and none is for 3.8% of the tokens" in line
    (plan,) = Priced(points=0).solve(problem)
    chosen: Any = [group for layer in plan.layers for group in layer.groups if group.by_layer]
    assert {group.of for group in chosen} == {4}
    with pytest.raises(UserError, match="saves too little") as caught:
        searched(dense, Budget(bytes_read=0.9, lengths=(8192,)), [PAPER], said)
    assert "3.8%" in str(caught.value) and "force: true" in str(caught.value)
    said.clear()
    forced = searched(dense, Budget(bytes_read=0.99, lengths=(8192,)), [PAPER], said, force=True)
    assert said == [line.removeprefix("not chosen from: ")]
    said.clear()
    (plan,) = Priced(points=0, force=True).solve(forced)
    assert any(group.by_layer for layer in plan.layers for group in layer.groups)
    # The same share of heads is worth it where attention is a larger part, and where more of it is on one scale.
    searched(dense, Budget(flops=0.999, lengths=(2048, 32768)), [PAPER], said)
    assert not said
    # A share of active heads is no saving: what it saves is looked up in FLOPs and in bytes.
    searched(dense, Budget(active=0.9, lengths=(1024,)), [PAPER, groups], said)
    assert len(said) == 1 and "`flops` at 1,024 tokens" in said[0] and "3.8%" in said[0]
    said.clear()
    with pytest.raises(UserError, match="saves too little"):  # routed heads hold what all heads hold
        searched(dense, Budget(kv=0.9, lengths=(8192,)), [groups], said)
    searched(dense, Budget(kv=1.0, lengths=(8192,)), [groups], said)  # which limits nothing, so the others count
    assert not said
    target = RoutedGroup(unit="head", router="norm", active=24, of=32)
    keep = Keep(statistic="retrieval", share=0.5, target=target, level="layer")
    profile = WholeAlone((512,), None, {"retrieval.512": torch.rand(2, 8)})
    problem = make_problem(dense, profile, Budget(kv=1.0, lengths=(2048,)), keep, said.append)
    assert len(said) == 1 and "`flops` at 2,048 tokens" in said[0] and "none is for 0.2% of the tokens" in said[0]
    (plan,) = keep.solve(problem)
    assert [{group.target for group in layer.groups} for layer in plan.layers] in (
        [{"full"}, {"routed"}],
        [{"routed"}, {"full"}],
    )
    with pytest.raises(UserError, match="together, so single ones cannot stay full"):
        make_problem(dense, profile, Budget(kv=1.0), keep.model_copy(update={"level": "group"}), said.append)


def test_a_share_of_active_heads_is_for_solvers_of_whole_layers() -> None:
    budget = Budget(active=0.5)
    assert not section_problems(Priced(), budget, None) and not section_problems(Even(option=PAPER), budget, None)
    ((place, problem),) = section_problems(Moa(), budget, None)
    assert place == ("search", "budget", "active") and "routed heads" in str(problem.fix)


def test_options_of_a_grid_and_what_is_shared() -> None:
    found: Any = RoutedOption.options(3, 3)
    assert [(option.shared, option.active) for option in found] == [(0, 1), (0, 2), (1, 1)]
    found = RoutedOption.options(3, 3, RoutedGrid(units=("head",), active=(0.75,), shared=(0.5,), shared_by="taylor"))
    assert [(option.unit, option.shared, option.active, option.ranked_by) for option in found] == [
        ("head", 5, 2, "taylor")
    ]
    worth = [[1.0, 5.0], [3.0, 3.0], [0.0, 9.0]]
    by_group: Any = RoutedOption(shared=1, active=1, shared_by="taylor").entries(3, 2, worth)
    assert [group.shared for group in by_group] == [(), (), "all"]  # 9 beats 6 and, of equal ones, the first
    by_head: Any = RoutedOption(unit="head", shared=2, active=1, shared_by="taylor").entries(3, 2, worth)
    assert [group.shared for group in by_head] == [(1,), (), (1,)] and by_head[0].of == 4
    paper: Any = PAPER.entries(8, 4)
    assert [group.shared for group in paper] == [(0, 1, 2, 3)] * 4 + [()] * 4
    assert [option.active for option in RoutedOption(shared=1).ladder(4, 1)] == [2, 1]
    with pytest.raises(ValueError, match="leaves none that is ever off"):
        RoutedOption(shared=1, active=2).entries(3, 1, worth)
    with pytest.raises(ValueError, match="one number for every head group"):
        RoutedOption(unit="head", shared=1, active=1, shared_by="retrieval").entries(3, 2, [[1.0], [2.0], [0.0]])
    assert {"routed"} == set(layer_options)


@pytest.mark.parametrize(
    ("active", "unit", "shared", "counts"),
    [
        (0.75, "group", 0, [2, 2, 2, 0]),
        (0.4, "group", 1, []),
        (0.34, "group", 0, [1] * 4),
        (0.8, "head", 2, [3, 3, 2, 3]),
    ],
)
def test_one_option_in_every_layer_as_the_heads_allow(
    dense: Dense, active: float, unit: Any, shared: int, counts: list[int]
) -> None:
    shape = make_shape(layers=4, kv_heads=3)
    solver = Even(option=RoutedOption(unit=unit, shared=shared), force=True)
    profile = FakeProfile((320,), None, {})
    sized = Sized(shape, ITEMSIZE, dense_of(shape).model)
    if not counts:  # one group is shared and one chosen at least
        with pytest.raises(UserError, match="no plan meets the budget"):
            make_problem(sized, profile, Budget(active=active), solver)
        return
    task = make_problem(sized, profile, Budget(active=active), solver)
    (plan,) = solver.solve(task)
    found = [layer.groups[0].model_dump().get("active", 0) for layer in plan.layers]
    assert found == counts and task.fits(plan.layers)
    assert not task.fits(task.start)
    assert f"{counts.count(2)} of 4 layers" in plan.note or len(set(counts)) == 1


def test_what_stands_beside_a_routed_plan(dense: Dense) -> None:
    model = tiny_model("llama-gqa")
    shape, options = shape_of(model), [RoutedOption(active=1), RoutedOption(unit="head", shared=2, active=1)]
    tensors = {"removal.heads.320": torch.tensor([[[1.0, 4.0], [3.0, 3.0]]] * 3)}
    for option in options:
        tensors[str(Key("effect", "absolute", 320).to(option))] = torch.ones(3, 2)
    profile = FakeProfile((320,), SMALL, tensors, tuple(options))
    budget = Budget(bytes_read=1.0, lengths=(320,))
    task = make_problem(Dense(shape, 4, model), profile, budget, Priced(force=True))
    by_group, by_head = ([RoutedOption(**fields).entries(2, 2)] for fields in ({}, {"unit": "head", "shared": 2}))
    mixed = task.with_layers({0: by_group[0], 1: by_head[0]})
    # One of two groups, then three of four heads, of which one whole group stays and one head is carried on.
    removing_task = removing(task, budget)
    assert removing_task is not None
    static = pruned_alike(removing_task, Candidate(mixed))
    assert static is not None and static.importance == "removal"
    assert [layer.kept_groups for layer in static.layers] == [(1,), (1,), (0, 1)]
    assert static.to_plan(removing_task, {}).kept_queries == [2, 2, 4]
    twice = task.with_layers({0: by_head[0], 1: by_head[0]})  # what is carried on makes the second one whole
    static = pruned_alike(removing_task, Candidate(twice))
    assert static is not None and static.to_plan(removing_task, {}).kept_queries == [2, 4, 4]
    even = even_layers(task, Candidate(task.with_layers({0: by_group[0], 2: by_group[0]})))
    assert even is not None and even.note.endswith("in 2 of 3 layers, full in the rest")
    assert chance_routed(Candidate(task.start)) is None and even_layers(task, Candidate(task.start)) is None
    chance: Any = chance_routed(Candidate(mixed))
    assert {group.router for group in (*chance.layers[0].groups, *chance.layers[1].groups)} == {"random"}
    for seed in range(6):
        drawn = drawn_places(task, Candidate(mixed), seed)
        assert sorted(str(layer.groups) for layer in drawn.layers) == sorted(str(layer.groups) for layer in mixed)


def test_a_refinement_exchanges_whole_routed_layers() -> None:
    shape = make_shape(layers=3, kv_heads=3)
    profile = profile_with(OPTIONS, shape, (320,))
    task = make_problem(dense_of(shape), profile, Budget(bytes_read=0.9, lengths=(320,)), Priced())
    plan = task.with_layers({1: OPTIONS[0].entries(3, 2)})
    moves = Moves.of(task, plan)
    places = [unit.unit.place for unit in moves.units]
    assert places == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert len({len(rows) for rows in moves.rules}) == 1
    whole = moves.units[3]
    assert whole.choices[0] == (FULL_GROUP,) * 3 and set(whole.choices[1:]) == {
        option.entries(3, 2) for option in OPTIONS
    }
    for unit in (*moves.units[:3], *moves.units[4:]):
        assert not any(target.by_layer for target in unit.choices)
    now = moves.options_of(plan)
    assert layers_of(moves.problem, moves.units, now) == plan
    other = list(now)
    other[3] = whole.choices.index(OPTIONS[2].entries(3, 2))
    moved = layers_of(moves.problem, moves.units, other)
    assert moved[1].groups == OPTIONS[2].entries(3, 2) and moved[0] == plan[0]
    costs = np.sum([unit.costs[index] for unit, index in zip(moves.units, other, strict=True)], axis=0)
    assert (costs == task.total(moved)).all()
    effects = torch.randn(2, 1, 3, 3, len(moves.rules[0]))
    columns = moves.columns(effects, torch.zeros(2, 1, 3, 0))
    start = sum(len(unit.choices) for unit in moves.units[:3])
    for place, row in enumerate(moves.picked[3]):
        assert torch.allclose(columns[..., start + place], effects[:, :, 1, :, row].sum(-1))


def test_routed_layers_stand_beside_what_is_removed() -> None:
    model = tiny_model("llama-mha")
    shape, options = shape_of(model), [RoutedOption(active=2), RoutedOption(shared=1, active=1)]
    generator = torch.Generator().manual_seed(1)
    tensors = {"taylor.heads": torch.rand(3, 4, 1, generator=generator)}
    tensors["taylor.neurons"] = torch.rand(3, 64, generator=generator) / 8
    for option in options:
        tensors[str(Key("effect", "absolute", 320).to(option))] = torch.rand(3, 4, generator=generator) / 4
    profile = dataclasses.replace(profile_with([], shape, (320,)), priced_layers=tuple(options))
    profile.tensors.update(tensors)
    solver = Priced(points=0, gap=0.0, removal=UnitRemoval(weights=(1.0,), multiple=2))
    budget = Budget(bytes_read=0.6, kv=0.95, flops=0.8, parameters=0.85, lengths=(320,))
    task = make_problem(Dense(shape, 4, model), profile, budget, solver)
    plans = [candidate.to_plan(task, {}) for candidate in solver.solve(task)]
    kinds = [{group.target for layer in plan.layers for group in layer.groups} for plan in plans]
    assert any(
        {"routed", "pruned"} <= found or (plan.prunes and "routed" in found)
        for plan, found in zip(plans, kinds, strict=True)
    )
    for plan in plans:
        for row in task.rows:
            assert plan.predicted.of(row.kind)[row.length].plan <= row.limit
        other = planned_model(model, plan)
        assert plan.predicted.of("parameters")[None].plan == block_parameters(other)
        flops = plan.cost(320, 4).flops + 2 * 320 * block_parameters(other)
        assert plan.predicted.of("flops")[320].plan == flops
