"""Options of whole layers in a search: routed heads beside windows, what they save, and which of them are refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.shape import shape_of, shape_without_weights
from compress.plan import LayerPlan, make_plan
from compress.profile.key import Key
from compress.registry import layer_options
from compress.runtime.step import Record
from compress.search.budget.budget import Budget
from compress.search.choice.saving import savings
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Problem
from compress.search.run import make_problem
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
    assert not said
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
