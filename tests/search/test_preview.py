"""What a search, and a preparation, refuse of head groups before anything is measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.errors import UserError
from compress.profile.heads.hidden_mass import HiddenMass
from compress.recipe.load import load_recipe
from compress.search.budget.budget import Budget
from compress.search.preview import check_prepare, check_search, untaught, untrainable
from compress.search.serve import Serve
from compress.search.solvers.keep import Keep
from compress.search.solvers.uniform import Uniform
from compress.stages.check import check_run
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGrid, RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.window import SpanGrid
from compress.train.settings import PrepareSettings
from tests.cli.recipes import make_recipe
from tests.tiny import tiny_model


def section(target: RoutedGroup) -> Any:
    """A search that gives every layer one target."""
    solver = Keep(share=0.0, level="layer", statistic="retrieval", target=target)
    return SimpleNamespace(solver=solver, budget=Budget(kv=1.0, lengths=(128,)), refine=None, serve=None)


def test_norms_that_are_all_alike_choose_nothing() -> None:
    config = tiny_model("qwen3").config
    check_search(config, "float32", section(RoutedGroup(active=1, of=2)), [], {128})
    with pytest.raises(UserError, match="normalises every query head") as refused:
        check_search(config, "float32", section(RoutedGroup(router="norm", active=1, of=2)), [], {128})
    assert len(refused.value.problems) == 1
    plain = tiny_model("llama-gqa").config
    check_search(plain, "float32", section(RoutedGroup(router="norm", active=1, of=2)), [], {128})
    with pytest.raises(UserError, match="how many routed units") as refused:
        check_search(plain, "float32", section(RoutedGroup(active=1, of=5)), [], {128})
    assert len(refused.value.problems) == 1


def test_slots_that_do_not_divide_the_heads_are_refused_beforehand() -> None:
    config = tiny_model("llama-gqa").config
    influence = HiddenMass(grid=SpanGrid(sinks=(0,)))

    def asked(ranks: int) -> Any:
        serve = Serve(slot=2, ranks=ranks)
        return SimpleNamespace(solver=Uniform(), budget=Budget(kv=0.9, lengths=(256,)), refine=None, serve=serve)

    check_search(config, "float32", asked(1), [influence], {256})
    with pytest.raises(UserError, match="do not divide into slots") as refused:
        check_search(config, "float32", asked(2), [influence], {256})
    (problem,) = refused.value.problems
    assert (problem.where, problem.found) == ("search.serve", "2 times 2")


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-sliding"])
def test_counts_of_another_model_are_told_once(family: str) -> None:
    config = tiny_model(family).config
    check_prepare(config, PrepareSettings(targets=(RoutedGroup(active=1, of=2),), length=64, steps=1))
    with pytest.raises(UserError, match="how many routed units") as refused:
        check_prepare(config, PrepareSettings(targets=(RoutedGroup(active=1, of=5),), length=64, steps=1))
    (problem,) = refused.value.problems
    assert (problem.where, problem.found) == ("prepare.targets[0]", "5")


def test_trainings_too_short_for_what_heads_keep_are_told_beforehand() -> None:
    config, ridge = tiny_model("llama-gqa").config, RetainGroup(scorer="ridge")
    options: Any = {"retain": RetainGrid(alphas=(64, 200), shares=(0.5,)).model_dump(mode="json")}
    offers = PrepareSettings(targets=(ridge,), effect=True, options=options, length=64, steps=1)
    # The sink's page, and two that the smaller window can lie on.
    told = untrainable(config, 192, offers, {320})
    assert told is not None and "sequences of 192 tokens" in told and untrainable(config, 193, offers, {320}) is None
    fixed = RetainGroup(sink=0, alpha=1, scorer="key_norm", threshold=0.0)
    named = PrepareSettings(targets=(fixed,), length=64, steps=1)
    assert untrainable(config, 64, named, set()) is not None and untrainable(config, 65, named, set()) is None
    for settings in (PrepareSettings(targets=(LinearGroup(),), length=64, steps=1), None):
        assert untrainable(config, 64, settings, set()) is None


def test_what_no_preparation_serves_is_refused_before_it_is_priced(tmp_path: Path) -> None:
    """A scorer that is priced has to be among those that are prepared; in a profile nothing is prepared."""
    recipe = make_recipe(tmp_path)
    prepare = "prepare.effect=true", "prepare.steps=1", "prepare.targets=[{target: retain, scorer: ridge}]"
    options = "prepare.options={{retain: {{scorers: [{}], shares: [0.5]}}}}"
    listed = "profile.statistics=[{{name: influence, grid: {{sinks: [4]}}}}, {{name: attention}}, {{name: effect, {}}}]"
    solver = "search.solver={name: priced}", "search.budget={kv: 1.0, lengths: [1024]}", "calibration.held_out=[]"
    check_run(load_recipe(recipe, [*prepare, *solver, options.format("ridge")]))
    for settings, where, told in (
        ([*prepare, *solver, options.format("ridge, mlp")], "prepare", "by mlp: it has to be trained"),
        ([*prepare, *solver, options.format("key_norm")], "prepare", "which threshold keeps its share"),
        ([listed.format("targets: [{target: linear}, {target: linear, sink: 4}]")], "profile", "has to be trained"),
        ([listed.format("layers: [{option: routed, shared: 0, active: 1, router: two_stage}]")], "profile", "are zero"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            check_run(load_recipe(recipe, settings))
        (problem,) = caught.value.problems
        assert str(problem.where).startswith(f"{recipe}: {where}")
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [*prepare, *solver, "prepare.options={retain: {shares: [25, 50], caps: []}}"])
    assert [problem.what.partition("retain.")[2] for problem in caught.value.problems] == [
        "shares[0]`",
        "shares[1]`",
        "caps`",
    ]
    assert caught.value.problems[2].expected == "at least one entry"


@pytest.mark.parametrize(
    ("target", "least"),
    [
        (LinearGroup(sink=4, alpha=64), 193),  # the sink's page, and two that the window can lie on
        (LinearGroup(alone=True), 2),
        (RoutedGroup(active=1, of=2), 2),
        (RetainGroup(scorer="ridge"), 2),
    ],
)
def test_preparations_too_short_for_a_target_are_told_beforehand(target: Any, least: int) -> None:
    config = tiny_model("llama-gqa").config
    told = {
        length: untaught(config, PrepareSettings(targets=(target,), length=length, steps=1)) for length in (2, 192, 193)
    }
    assert [length for length, line in told.items() if line is None] == [length for length in told if length >= least]
