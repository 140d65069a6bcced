"""What does not fit into a device's memory is left out of a measurement, said, and the rest is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from compress.bench import kernel, memory
from compress.bench.kernel import Shape
from compress.bench.measure import Time
from compress.cli.app import app
from compress.models.source import ModelSource
from compress.runtime.span import Span
from scripts import gpu_check, gpu_kernels

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 4, 2, 16)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script on a CPU; the lines that it says."""
    monkeypatch.setattr(gpu_kernels, "DEVICE", CPU)
    monkeypatch.setattr(gpu_kernels, "DTYPE", torch.float32)
    monkeypatch.setattr(gpu_check, "LINES", [])
    return gpu_check.LINES


def holding(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Say that so many bytes are free."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)


def test_rows_that_do_not_fit_are_not_begun(script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    holding(monkeypatch, 1000)
    assert gpu_kernels.decode_rows(SHAPE, 1.0) == gpu_kernels.short_rows(SHAPE) == []
    assert gpu_kernels.prefill_rows(SHAPE) == gpu_kernels.influence_rows() == []
    assert list(gpu_kernels.model_rows("tiny", 64)) == []
    assert len(script) == 12 + 6 + 3 + 6 + 1
    skipped = "skipped, it needs about 0.2 GiB, and 0.0 GiB are free on this device"
    assert f"tiny decode A batch 16 32768: {skipped}" in script
    assert script[-1].startswith("tiny, its weights: skipped")


def test_the_batch_that_fits_is_measured(script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dense = ModelSource("tiny").dense(CPU, torch.float32)
    holding(monkeypatch, memory.model_need(dense, 15, 64))
    found = dict(gpu_kernels.model_rows("tiny", 64))
    assert list(found) == ["model batch 1"] and found["model batch 1"]["decode_tokens_per_s"] > 0
    assert script[0].startswith("tiny, plan A, batch 16, 64 tokens: skipped, it needs about 0.0 GiB")


def test_memory_that_runs_out_all_the_same_ends_only_that_row(
    script: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(shape: Any, name: str, batch: int, length: int, *rest: Any) -> Any:
        if batch == 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has 79.11 GiB\nmore")
        return kernel.Row("decode", shape.name, name, batch, length, "triton", TIME, {"flash": TIME}, 0.5, 1000)

    monkeypatch.setattr(kernel, "decode_row", short)
    rows = gpu_kernels.decode_rows(SHAPE, 1.0)
    assert len(rows) == 10 and all(row.batch < 16 for row in rows)
    reason = "it ran out of memory (CUDA out of memory. Tried to allocate 64.00 GiB)"
    told = [line for line in script if "skipped" in line]
    assert told == [f"tiny decode A batch 16 {length}: skipped, {reason}" for length in (32768, 2048)]


TIME = Time(1.0, 1.0, 1.0, 5)


def test_an_estimate_is_what_the_tensors_take() -> None:
    qkv = kernel.random_qkv(SHAPE, 3, 50, CPU, torch.bfloat16)
    outputs = 2 * qkv[0].nbytes
    assert memory.prefill_need(SHAPE, 3, 50, torch.bfloat16) == sum(tensor.nbytes for tensor in qkv) + outputs
    pages = kernel.random_pages([Span()] * 2, 3, 128, 16, CPU, torch.bfloat16)
    kept = pages.keys.nbytes + pages.values.nbytes
    assert memory.decode_need(SHAPE, 3, 128, torch.bfloat16) == 2 * kept


def test_the_card_of_80_gb_holds_one_long_prompt_and_not_sixteen() -> None:
    """As measured: 86.78 GiB with the weights, 14.96 GiB, of which a card of 80 GB has 79.1."""
    dense = ModelSource("llama-3-8b").dense(torch.device("meta"), torch.bfloat16)
    weights = sum(weight.nbytes for weight in dense.parameters())
    sixteen, one = (weights + memory.model_need(dense, batch, 32768) for batch in (16, 1))
    assert sixteen / memory.GIB == pytest.approx(86.78, rel=0.02) and one / memory.GIB < 30


def test_the_command_skips_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holding(monkeypatch, 200_000)
    arguments = ["bench", "tiny", "--mix", "A", "--lengths", "64,4096", "--dtype", "float32", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--what", "kernel", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "bench.json").read_text())
    assert {row["length"] for row in values["kernel"]} == {64}
    assert len(values["skipped"]) == 2 and "prefill A batch 1, 4096 tokens: skipped, it needs" in result.stderr
