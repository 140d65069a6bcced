"""Decode time: curves, the roofline, tables of `compress bench`, and the KV bytes that follow from a share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.cli.app import app
from compress.errors import UserError
from compress.registry import solvers
from compress.search.budget.budget import Budget
from compress.search.budget.decode_time import step_time
from compress.search.budget.step_time import Curve, roofline
from compress.search.dense import Dense
from compress.search.problem import Candidate, Problem
from compress.search.solvers.frontier import UnitRemoval
from compress.targets.window import WindowGroup
from tests.search.synthetic import budget_problem, dense_of, held_bytes, limits_of, make_shape, random_profile
from tests.tiny import shape_of, tiny_model

SHAPE = make_shape()  # 384 bytes a token, see test_budget
TOKEN = 384
REST, DENSE, PLAN = 1.0, 1e-5, 2e-5  # ms; then ms a byte for the dense model and, slower, for plans


def bench_row(length: int, batch: int, kept: float, **changed: Any) -> dict[str, Any]:
    """A whole-model row as the bench writes it; a plan that keeps a share of the bytes."""
    held = (length + 1) * TOKEN * batch
    sides = {
        name: {"cache_bytes": size, "decode": {"median": REST + rate * size}}
        for name, size, rate in (("dense", held, DENSE), ("plan", int(kept * held), PLAN))
    }
    return {"shape": "m", "length": length, "batch": batch, "without_attention": {"median": REST}, **sides, **changed}


def write_table(path: Path, rows: list[dict[str, Any]], **changed: Any) -> str:
    gpus = [{"name": "a GPU"}]
    path.write_text(
        json.dumps({"dtype": "bfloat16", "environment": {"gpus": gpus}, "model_rows": rows, **changed}), "utf-8"
    )
    return str(path)


def rows_of(batch: int) -> list[dict[str, Any]]:
    return [bench_row(length, batch, kept) for length in (256, 1024) for kept in (0.1, 1.0)]


def test_a_curve_never_falls_and_is_inverted_exactly() -> None:
    curve = Curve([(300, 5.0), (100, 2.0), (200, 1.0), (400, 9.0)])
    assert [curve.time(size) for size in (0, 100, 150, 200, 250, 400, 800)] == [2, 2, 2, 2, 3.5, 9, 18]
    assert [curve.most_bytes(time) for time in (1.9, 2, 3.5, 5, 9, 18)] == [0, 200, 250, 300, 400, 800]
    assert Curve([(100, -1.0)]).most_bytes(0.0) == 100


def test_the_roofline_is_bytes_over_bandwidth() -> None:
    step = roofline(1_000_000, 2e9, (1, 8), "test")
    assert step.as_is(500_000, 8) * step.unit_ms == pytest.approx((1_000_000 + 8 * 500_000) / 2e9 * 1e3)
    assert step.planned(0, 1) * step.unit_ms == pytest.approx(0.5)
    # (1e6 + 8 x) = 0.6 (1e6 + 8 * 5e5)
    assert step.most_bytes(0.6, 500_000, 8) == 250_000
    assert "2 GB/s (test)" in step.source


def allowed_bytes(budget: Budget, **given: Any) -> dict[int, int]:
    return limits_of(budget_problem(budget, **given), "decode_time")


def test_the_share_holds_at_the_tightest_batch_size_and_does_not_depend_on_the_bandwidth() -> None:
    budget = Budget(decode_time=0.8, batch_sizes=(1, 4), lengths=(512,))
    problem = budget_problem(budget, weights=100_000)
    dense = 512 * TOKEN
    allowed = {batch: (0.8 * (100_000 + batch * dense) - 100_000) / batch for batch in (1, 4)}
    assert limits_of(problem, "decode_time") == {512: int(min(allowed.values()))} == {512: int(allowed[1])}
    slower = Problem(problem.dense, problem.profile, budget.rows(dense_of(SHAPE, 100_000, 3.7e6), ()))
    assert limits_of(slower, "decode_time") == limits_of(problem, "decode_time")
    both = budget_problem(Budget(decode_time=0.8, kv=0.5, lengths=(512,)))
    assert limits_of(both) == {512: dense // 2} and budget_problem(budget).only([1]).rows == ()
    with pytest.raises(UserError, match="no bandwidth is known"):
        budget.rows(replace(dense_of(SHAPE), bandwidth=None), ())


def test_the_roofline_counts_the_weights_that_a_plan_removes() -> None:
    model = tiny_model("llama-gqa")
    dense = Dense(shape_of(model), 4, model, removes=True, bandwidth=lambda: 1e9)
    rows: Any = Budget(decode_time=0.9, batch_sizes=(1, 4), lengths=(320,)).rows(dense, ())
    problem = Problem(dense, random_profile(dense.shape, (320,)), rows)
    read = dense.cost(320).read_bytes
    least = UnitRemoval().least(problem, problem.uniform(WindowGroup(sink=64, alpha=64, beta=0.0)))
    for batch, row, amount in zip((1, 4), rows, problem.total(least), strict=True):
        assert row.limit == int(0.9 * (dense.step_weights + batch * read) - dense.step_weights) + row.weights
        plan = Candidate(least).to_plan(problem, {})
        cost = plan.cost(320, 4, sizes=dense.sizes)
        (times,) = [each for each in plan.provenance["decode_time"]["rows"] if each["batch"] == batch]
        lighter = 4 * (dense.parameters - cost.parameters)
        expected = (dense.step_weights - lighter + batch * cost.read_bytes) / (dense.step_weights + batch * read)
        assert times["share"] == pytest.approx(expected) == pytest.approx(row.time_share(int(amount)))


def test_weights_count_once_and_a_table_that_is_looked_up_counts_nothing() -> None:
    for family in ("llama-gqa", "qwen2-part-sliding"):
        model: Any = tiny_model(family)
        embedding = model.get_input_embeddings().weight
        own = [weight for name, weight in model.named_parameters() if "embed_tokens" not in name]
        expected = 4 * sum(weight.numel() for weight in own)
        if model.get_output_embeddings().weight is embedding:
            expected += 4 * embedding.numel()
        assert Dense(shape_of(model), 4, model).step_weights == expected


def test_a_table_gives_the_bytes_whose_time_is_the_share(tmp_path: Path) -> None:
    tables = tuple(write_table(tmp_path / f"{batch}.json", rows_of(batch)) for batch in (1, 4))
    budget = Budget(decode_time=0.9, batch_sizes=(1, 4), cost_table=tables, lengths=(512,))
    problem = budget_problem(budget)
    dense = 512 * TOKEN
    allowed = {batch: (0.9 * (REST + DENSE * batch * dense) - REST) / PLAN / batch for batch in (1, 4)}
    assert limits_of(problem, "decode_time")[512] == pytest.approx(min(allowed.values()), abs=1)
    plans = solvers.parse({"name": "moa"}).solve(problem)
    for plan in plans:
        told = plan.to_plan(problem, {}).provenance["decode_time"]
        assert "8 measured rows" in told["source"] and "bfloat16 on a GPU" in told["source"]
        size = held_bytes(problem, plan.layers, 512)
        for row in told["rows"]:
            assert row["dense_ms"] == pytest.approx(REST + DENSE * row["batch"] * dense)
            assert row["ms"] == pytest.approx(REST + PLAN * row["batch"] * size)
            assert row["ms"] <= 0.9 * row["dense_ms"] + 1e-12
    one = Budget(decode_time=0.9, cost_table=tables[0], lengths=(512,))
    assert allowed_bytes(one)[512] == pytest.approx(allowed[1], abs=1)


def test_a_table_in_another_dtype_counts_in_the_searched_one(tmp_path: Path) -> None:
    """The same times for caches of twice the bytes."""
    double = []
    for row in rows_of(1):
        sides = {side: {**row[side], "cache_bytes": 2 * row[side]["cache_bytes"]} for side in ("dense", "plan")}
        double.append({**row, **sides})
    table = write_table(tmp_path / "32.json", double, dtype="float32")
    same = write_table(tmp_path / "16.json", rows_of(1))
    limits = [allowed_bytes(Budget(decode_time=0.9, cost_table=name, lengths=(512,))) for name in (table, same)]
    assert limits[0] == limits[1]


def test_where_plans_are_slower_than_the_dense_model_only_a_share_of_one_passes(tmp_path: Path) -> None:
    slow = [bench_row(n, 1, 0.3, plan={"cache_bytes": n * 100, "decode": {"median": 9.0}}) for n in (256, 1024)]
    table = write_table(tmp_path / "slow.json", slow)
    with pytest.raises(UserError, match="nothing measured is faster than the dense model"):
        budget_problem(Budget(decode_time=0.99, cost_table=table, lengths=(512,)))
    assert allowed_bytes(Budget(decode_time=1.0, cost_table=table, lengths=(512,))) == {512: 512 * TOKEN}


@pytest.mark.parametrize(
    ("rows", "changed", "says"),
    [
        (rows_of(2), {}, "batch size 1"),
        ([bench_row(256, 1, 1, shape="m, one layer")], {}, "no whole-model rows of this model"),
        ([{**bench_row(256, 1, 1), "length": 300}], {}, "no whole-model rows of this model"),
        ([], {"model_rows": None}, "the cost table: Input should be a valid array"),
        ([{"dense": {}}], {}, r"model_rows\.0\.dense\.cache_bytes"),
        ([bench_row(256, 1, 1, plan={"cache_bytes": 1, "decode": {"median": 1e308}})], {}, r"plan\.decode\.median"),
        ([bench_row(256, 1, 1, plan={"cache_bytes": 1 << 61, "decode": {"median": 1.0}})], {}, r"plan\.cache_bytes"),
        (rows_of(1), {"dtype": "bfloat17"}, "the cost table: Input should be 'bfloat16'"),
        ([bench_row(600, 1, 1), bench_row(1024, 1, 1)], {}, "not measured around the length 512"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(
    tmp_path: Path, rows: list[dict[str, Any]], changed: dict[str, Any], says: str
) -> None:
    table = write_table(tmp_path / "table.json", rows, **changed)
    with pytest.raises(UserError, match=says) as error:
        budget_problem(Budget(decode_time=0.9, cost_table=table, lengths=(512,)))
    assert table in str(error.value) and "compress bench" in str(error.value)


def test_files_that_are_not_there_no_json_or_do_not_go_together(tmp_path: Path) -> None:
    def asked(*tables: str) -> None:
        budget_problem(Budget(decode_time=0.9, batch_sizes=(1, 4), cost_table=tables, lengths=(512,)))

    first = write_table(tmp_path / "1.json", rows_of(1))
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UserError, match="the cost table is missing"):
        asked(first, str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="the cost table is damaged"):
        asked(first, str(tmp_path / "torn.json"))
    other = write_table(tmp_path / "4.json", rows_of(4), environment={"gpus": []})
    with pytest.raises(UserError, match="different dtypes or devices"):
        asked(first, other)


def test_the_file_that_the_bench_writes_is_a_table(tmp_path: Path) -> None:
    words = ["bench", "tiny", "--mix", "A", "--lengths", "64,160", "--dtype", "float32", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--what", "model", "--batch", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    shape = make_shape(2, 4, head_dim=8)
    budget = Budget(decode_time=0.5, batch_sizes=(2,), cost_table=str(tmp_path / "bench.json"), lengths=(100,))
    step = step_time(budget, Dense(shape, torch.float32.itemsize), (100,))
    rows = json.loads((tmp_path / "bench.json").read_text())["model_rows"]
    assert len(rows) == 2 and step.rest[2] in [row["without_attention"]["median"] for row in rows]
    assert step.plan[2].bytes.tolist() == sorted(row["plan"]["cache_bytes"] for row in rows)
    assert "2 measured rows" in step.source and "float32 on a CPU" in step.source
