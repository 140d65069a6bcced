"""The bench on a CPU: what it measures is what it says, and the figures follow from each other."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.bench.check import check_kernels
from compress.bench.file import read_bench
from compress.bench.kernel import (
    Row,
    Shape,
    decode_row,
    mix,
    prefill_row,
    routed_decode_rows,
    routed_prefill_rows,
    spans_of,
    visible_share,
    with_mix,
)
from compress.bench.measure import Time, times
from compress.bench.model import model_row, side
from compress.bench.report import break_even, choosing_lines, model_lines, routed_line
from compress.cli.app import app
from compress.errors import UserError
from compress.models.pruning import Kept, prune
from compress.models.shape import shape_of
from compress.models.source import ModelSource
from compress.plan import uniform_plan
from compress.plan.states import states_of
from compress.runtime.span import Span
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.window import WindowGroup
from tests.tiny import tiny_model

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 4, 2, 16)


def test_density_is_the_share_of_visible_pairs() -> None:
    groups = [
        WindowGroup(sink=4, alpha=20, beta=0.25),
        FullGroup(),
        WindowGroup(sink=70, alpha=-3, beta=0.5),
    ]
    t = torch.arange(130)
    pairs = sum(int(rule.visible(t[:, None], t[None, :]).sum()) for rule in spans_of(groups, 130))
    assert visible_share(groups, 130) == pytest.approx(pairs / (3 * 130 * 131 / 2))


def test_mixes_are_those_that_are_said() -> None:
    assert spans_of(mix("A", 4, 4096), 4096) == [Span(64, 256, 0.0)] * 2 + [Span()] * 2
    assert [span.alpha for span in spans_of(mix("B", 8, 4096), 4096)] == [512, 512, 2048, 2048, 1024, 1024, 2048, 2048]
    halves: Any = mix("R50", 8, 4096, 32)
    assert [group.shared for group in halves] == ["all"] * 2 + [()] * 6 and halves[0].active == 2
    heads: Any = mix("R75h", 8, 4096, 32)
    assert sum(len(group.shared) for group in heads) == 16 and (heads[0].active, heads[0].of) == (8, 16)
    with pytest.raises(ValueError, match="expected A, B, full, R75, R50, R75h, R50h, got 'C'"):
        mix("C", 4, 4096)


def test_kernel_rows_name_their_baseline_and_count_the_pages() -> None:
    row = prefill_row(SHAPE, "A", 1, 200, "reference", CPU, torch.float32)
    assert row.fastest in row.dense and row.speedup == row.dense[row.fastest].median / row.plan.median
    row = decode_row(SHAPE, "A", 2, 1000, "reference", CPU, torch.float32)
    pages = 16 + Span(64, 256, 0.0).page_count(1000)
    assert row.kept_bytes == 2 * pages * 64 * 2 * 16 * 4
    assert row.fraction == pytest.approx(pages * 64 / 2000)


def test_rows_of_routed_heads_count_what_real_choices_skip() -> None:
    torch.manual_seed(0)
    shape = Shape("tiny", 8, 4, 16)
    groups, heads = routed_prefill_rows(shape, ["R50", "R50h"], 1, 100, "reference", CPU, torch.float32)
    assert groups.fraction == heads.fraction == 0.5 and groups.dense is heads.dense
    groups, heads = routed_decode_rows(shape, ["R50", "R50h"], 3, 100, "reference", CPU, torch.float32, copies=2)
    assert groups.fraction == 0.5 < heads.fraction < 1  # a group is left alone only when all of its heads are
    assert groups.kept_bytes == 3 * 100 * 2 * 2 * 16 * 4
    assert "50.0% is not read; with all heads on" in routed_line(groups)
    assert routed_line(decode_row(SHAPE, "A", 1, 64, "reference", CPU, torch.float32)) == ""


def test_untrained_routers_are_measured_with_random_choices() -> None:
    torch.manual_seed(0)
    dense = ModelSource("tiny").layer(CPU, torch.float32)
    planned = with_mix(dense, "R50h", 64)
    row = model_row(dense, planned, "tiny", "R50h", 2, 64, steps=9)
    assert row.random_routers and "random weights choose" in "\n".join(model_lines(row))
    assert not model_row(dense, planned, "tiny", "R50h", 1, 8, steps=9).random_routers


def test_break_even_is_the_length_from_which_on_it_never_loses() -> None:
    def row(length: int, plan: float) -> Row:
        spent = {"flash": Time(1.0, 1.0, 1.0, 5), "cudnn": Time(2.0, 2.0, 2.0, 5)}
        return Row("decode", "s", "A", 1, length, "triton", Time(plan, plan, plan, 5), spent, 0.5)

    assert break_even([row(1024, 0.9), row(2048, 1.1), row(4096, 0.8), row(8192, 0.5)], "decode") == 4096
    assert break_even([row(1024, 1.2)], "decode") is None


def test_times_are_medians_between_their_quartiles() -> None:
    found = times(lambda: None, CPU, seconds=0.01)
    assert found.lower <= found.median <= found.upper and found.repeats >= 5


def test_both_models_compute_and_the_cache_is_what_the_plan_says() -> None:
    torch.manual_seed(0)
    source = ModelSource("tiny")
    dense = source.dense(CPU, torch.float32)
    planned, label = with_mix(dense, "A", 700), "A"
    row = model_row(dense, planned, source.name, label, 2, 700, steps=16)
    assert row.all_on is None and not choosing_lines(row) and "skipped" not in str(row.values().keys())
    spans = spans_of(mix("A", 4, 700), 700)
    pages = sum(sum(span.reserved_pages(716)) for span in spans)
    assert row.plan.cache_bytes == 2 * 2 * pages * 64 * 2 * 8 * 4  # layers, sequences, keys and values, D, float32
    assert row.dense.cache_bytes == 2 * 2 * 4 * 701 * 2 * 8 * 4
    assert row.ratios()["most_any_plan_gains"] == row.dense.decode.median / row.without_attention.median
    less = replace(row, without_attention=replace(row.without_attention, median=2 * row.dense.decode.median))
    assert "attention and cache take too little of a dense step to be measured" in "\n".join(model_lines(less))


def test_a_pruned_model_is_timed_on_its_own_heads_and_all_is_put_back() -> None:
    torch.manual_seed(0)
    dense = ModelSource("tiny").dense(CPU, torch.float32)
    pruned = copy.deepcopy(dense)
    prune(pruned, [Kept((0, 2), tuple(range(0, 128, 2)))] * 2)
    before = dense.config.to_dict(), dense.config._attn_implementation
    row = model_row(dense, pruned, "tiny", "half", 2, 100, steps=16)
    assert (dense.config.to_dict(), dense.config._attn_implementation) == before
    assert pruned.config._attn_implementation == before[1] and not hasattr(pruned.config, "bench_backend")
    assert row.plan.cache_bytes * 2 == row.dense.cache_bytes == 2 * 2 * 4 * 101 * 2 * 8 * 4
    assert row.parameters == sum(weight.numel() for weight in pruned.parameters()) < row.dense_parameters
    assert row.ratios()["most_any_plan_gains"] is None and set(row.plan.backend) == {"prefill", "decode"}
    assert f"parameters: {row.parameters:,} of {row.dense_parameters:,}" in "\n".join(model_lines(row))


def test_dense_time_is_not_told_of_layers_that_slide() -> None:
    model = tiny_model("mistral-sliding")
    assert side(model, torch.zeros(1, 50, dtype=torch.long), 16).prefill > 0
    with pytest.raises(UserError, match="no longer than the sliding window"):
        side(model, torch.zeros(1, 51, dtype=torch.long), 16)


def test_a_plan_of_full_groups_is_the_dense_model() -> None:
    torch.manual_seed(0)
    source = ModelSource("tiny")
    dense = source.dense(CPU, torch.float32)
    planned = with_mix(dense, "full", 100)
    ids = torch.randint(256, (1, 100))
    with torch.inference_mode():
        torch.testing.assert_close(planned(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_command_writes_json_and_refuses_what_it_does_not_know(tmp_path) -> None:
    run = CliRunner()
    arguments = ["bench", "tiny", "--mix", "A", "--lengths", "64,128", "--dtype", "float32", "--device", "cpu"]
    result = run.invoke(app, [*arguments, "--what", "kernel,layer", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "bench.json").read_text())
    assert {row["what"] for row in values["kernel"]} == {"prefill", "decode"} and values["random_weights"]
    assert [row["shape"] for row in values["model_rows"]] == ["tiny, one layer"] * 2
    assert "break-even, prefill, plan A" in result.output
    for wrong in (["--mix", "C"], ["--lengths", "x"], ["--device", "tpu"], ["--what", "all"]):
        assert run.invoke(app, [*arguments, *wrong]).exit_code == 2


def test_the_command_tells_from_where_states_pay(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    dense = ModelSource("tiny").dense(CPU, torch.float32)
    plan = uniform_plan(shape_of(dense), LinearGroup(sink=0, alpha=64))
    (tmp_path / "plan.json").write_text(plan.to_json())
    lengths = ["--lengths", "64", "--dtype", "float32", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", "tiny", "--plan", str(tmp_path / "plan.json"), *lengths, "--out", "."])
    assert result.exit_code == 0, result.output
    states = states_of(plan, 4)
    assert states is not None and states.pays_from is not None
    assert f"break-even, bytes of states and cache: {states.pays_from:,} tokens" in result.output
    assert read_bench(Path("bench.json")).break_even == {"bytes of states and cache": states.pays_from}


def test_every_kernel_is_right_here() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {check.name: check for check in check_kernels(device, torch.float32)}
    compiled = [name for name in found if "FlashAttention-4" not in name]
    assert {"prefill", "gradients of prefill", "decode", "store"} < set(compiled)
    for name in compiled:
        assert found[name].ok, found[name]
    assert "FlashAttention-4" in str(found["FlashAttention-4 for prefill"].refused)  # it has no float32
