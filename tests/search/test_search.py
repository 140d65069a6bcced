"""A whole search on a tiny model: the files of the run folder, the choice and its reasons, and resuming."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import compress.search.run as search
from compress.data.sample import TextSample
from compress.errors import UserError
from compress.plan import Plan, read_plan
from compress.search.baselines import uniform_baselines
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import Candidate
from compress.search.run import explain, make_problem, run_search
from compress.search.solvers.moa import Moa
from tests.search.synthetic import FakeProfile, dense_of, make_shape, problem_of, random_problem, random_profile
from tests.tiny import random_ids, shape_of, tiny_loaded

LENGTHS = (320, 448)


@dataclass(frozen=True)
class Section:
    """The recipe's search section."""

    solver: Any
    budget: Budget
    refine: Any = None
    serve: Any = None


SECTION = Section(Moa(points=2), Budget(kv=0.5))
HELD_OUT = {512: [TextSample(tuple(random_ids(1, 512, seed)[0].tolist()), (490, 512)) for seed in (1, 2)]}


def profile_of(loaded: Any) -> FakeProfile:
    return random_profile(shape_of(loaded.model), LENGTHS)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-part-sliding"])
def test_a_search_writes_plan_baselines_and_reasons(family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    section = Section(Moa(points=2), Budget(kv=0.5 if family == "llama-gqa" else 0.9))
    seen: list[tuple[int, int, str]] = []
    result = run_search(loaded, profile_of(loaded), HELD_OUT, section, tmp_path, lambda *step: seen.append(step))

    assert read_plan(tmp_path / "plan.json", shape) == result.plan
    assert set(result.baselines) == {"uniform", "uniform-at-longest", "streaming"}
    for name, baseline in result.baselines.items():
        assert read_plan(tmp_path / "search" / f"{name}.json", shape) == baseline
    report = json.loads((tmp_path / "search" / "pareto.json").read_text())
    assert report == result.report
    rows = {row["name"]: row for row in report["plans"]}
    chosen = rows[report["chosen"]]
    assert chosen["response_loss"] == min(row["response_loss"] for row in rows.values())
    assert report["chosen"] in report["why"] and f"{chosen['response_loss']:.4f}" in report["why"]
    assert report["held_out"] == {
        "documents": 2,
        "lengths": [512],
        "longer_than_profiled": True,
        "dense_response_loss": result.plan.provenance["dense_response_loss"],
    }
    assert result.plan.provenance["response_loss"] == chosen["response_loss"]
    for name, row in rows.items():
        plan = read_plan(tmp_path / "search" / "plans" / f"{name}.json", shape)
        for limit in report["limits"]:
            size = plan.cost(limit["length"], 4).held_bytes
            (amount,) = [each for each in row["amounts"] if each["length"] == limit["length"]]
            assert amount["plan"] == size <= limit["limit"] and amount["kind"] == limit["kind"] == "kv"
            assert limit["smallest"] <= size
    assert seen[-1][0] == seen[-1][1] == 2 * (1 + len(rows) + 3)


def test_predicted_times_stand_in_plan_and_report(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    section = Section(Moa(points=0), Budget(decode_time=0.95, density=0.6, lengths=(448,)))
    result = run_search(loaded, profile_of(loaded), [], section, tmp_path, bandwidth=lambda: 5e9)
    told = result.plan.provenance["decode_time"]
    assert "at 5 GB/s (a copy on this device)" in told["source"]
    (row,) = told["rows"]
    size = result.plan.predicted.of("kv")[448].plan
    assert row["ms"] == pytest.approx((Dense(loaded.shape, 4, loaded.model).step_weights + size) / 5e9 * 1e3)
    assert row["share"] == pytest.approx(row["ms"] / row["dense_ms"]) and row["share"] <= 0.95
    assert all("decode_time" in each for each in [*result.report["plans"], *result.report["baselines"]])
    time, density = result.report["limits"]
    assert (time["kind"], density["kind"]) == ("decode_time", "density")
    assert time["limit_time_share"] == 0.95 > time["smallest_time_share"] > 0
    assert density["limit"] / density["dense"] <= 0.6 and density["smallest"] / density["dense"] == 128 / 448
    assert any("keys at 448 tokens" in line for line in result.lines)
    assert any("decode step at 448 tokens" in line for line in result.lines)
    named = Section(SECTION.solver, Budget(decode_time=0.95, bandwidth=7.0))
    found = run_search(loaded, profile_of(loaded), [], named, tmp_path, bandwidth=lambda: pytest.fail("measured"))
    assert "at 7 GB/s (as the recipe says)" in found.plan.provenance["decode_time"]["source"]


def test_a_second_search_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama-gqa")
    first = run_search(loaded, profile_of(loaded), HELD_OUT[512], SECTION, tmp_path)
    stale = tmp_path / "search" / "plans" / "pareto-99.json"
    stale.write_text("{}")
    monkeypatch.setattr(search, "response_loss", lambda *_: pytest.fail("measured again"))
    assert run_search(loaded, profile_of(loaded), HELD_OUT[512], SECTION, tmp_path) == first
    assert not stale.exists()


def test_without_held_out_documents_the_predicted_loss_decides(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    result = run_search(loaded, profile_of(loaded), [], SECTION, tmp_path)
    assert "no held-out documents" in result.report["why"]
    assert not (tmp_path / "search" / "response.jsonl").exists()
    least = min(row["predicted_losses"]["absolute.448"] for row in result.report["plans"])
    assert result.plan.predicted.loss == least


def test_an_interrupted_search_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama-gqa")
    run_search(loaded, profile_of(loaded), [], SECTION, tmp_path)
    before = (tmp_path / "plan.json").read_bytes()

    def interrupt(path: Path, data: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_search(loaded, profile_of(loaded), [], Section(SECTION.solver, Budget(kv=0.9)), tmp_path)
    assert (tmp_path / "plan.json").read_bytes() == before


def test_a_profile_without_influence_is_an_error() -> None:
    with pytest.raises(UserError, match="no statistic of the profile prices rules"):
        make_problem(dense_of(make_shape()), FakeProfile((320,), None, {}), Budget(kv=0.5), Moa())


def test_a_baseline_that_nothing_fits_is_left_out() -> None:
    problem = random_problem(0.5)
    assert set(uniform_baselines(problem.only([512]))) == {"uniform", "uniform-at-longest", "streaming"}
    tight = problem_of(problem.shape, problem.grid, problem.lengths, problem.profile.tensors, {512: 10})
    assert uniform_baselines(tight) == {}


def test_the_reasons_admit_a_better_baseline() -> None:
    losses = {"dense": 1, "pareto-0": 3, "pareto-1": 2, "uniform": 1.5}
    plans = {name: Candidate((), note="least") for name in ("pareto-0", "pareto-1")}
    why = explain("pareto-1", plans, losses, ["uniform"])
    assert "the uniform plan has 1.5000" in why and "the next of 2 has 3.0000" in why
    assert why.endswith("Measured better than every searched plan: uniform")


def test_a_plan_says_where_it_comes_from(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    plan: Plan = run_search(loaded, profile_of(loaded), [], SECTION, tmp_path).plan
    assert plan.provenance["solver"]["name"] == "moa"
    assert plan.provenance["budget"]["kv"] == 0.5
    assert 0 <= plan.provenance["gap"] <= 0.01
