"""A run folder with a plan, an evaluation and a bench, made without a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from compress.bench.kernel import Row
from compress.bench.measure import Time
from compress.evaluate.comparison import Comparison, VariantResult
from compress.evaluate.measures.density import DensityResult, LengthDensity
from compress.evaluate.measures.kv_bytes import KvBytesResult
from compress.evaluate.measures.perplexity import Bucket, PerplexityResult
from compress.evaluate.measures.recall import RecallItem, RecallResult
from compress.evaluate.task_result import Item, TaskResult

PLAN = Path(__file__).parents[2] / "profiles" / "smollm2-135m" / "quickstart.plan.json"


def variant(name: str, share: float, right: int, nll: float) -> VariantResult:
    items = [RecallItem(depth=i / 10, expected="1", answer="1", correct=i < right) for i in range(10)]
    samples = [Item(metrics={"score": float(i < right)}, depth=i / 10, gap=4 + i * 30) for i in range(10)]
    facts: dict[str, Any] = {"version": "1.0", "generates": True, "length": 2048, "samples": samples}
    task = TaskResult(
        task="mqar_2048",
        metrics={"score": right / 10},
        errors={"score": 0.1},
        higher={"score": True},
        **facts,
    )
    buckets = [Bucket(start=0, end=256, tokens=100, nll=nll), Bucket(start=256, end=2048, tokens=100, nll=nll - 5)]
    perplexity = PerplexityResult(
        length=2048, stride=2048, windows=1, tokens=200, nll=2 * nll - 5, window_nll=[2 * nll - 5], buckets=buckets
    )
    return VariantResult(
        name=name,
        results=[
            DensityResult(densities={2048: LengthDensity(prefill=share, decode=share)}),
            KvBytesResult(held={2048: int(share * 2**20)}),
            perplexity,
            RecallResult(task="passkey", length=2048, items=items, haystack="natural", batch_size=1),
            task,
        ],
    )


def make_folder(run: Path) -> Path:
    """Make the folder and fill it."""
    run.mkdir(parents=True)
    shutil.copy(PLAN, run / "plan.json")
    comparison = Comparison(
        model="demo/<b>model</b>",
        fingerprint="sha256:0",
        dtype="float32",
        device="cpu",
        seed=0,
        batch_size=1,
        asked=[{"measure": "perplexity", "length": 2048, "windows": 1}],
        text={"source": "embedded"},
        versions={"torch": "2"},
        variants=[variant("dense", 1, 9, 250), variant("plan", 0.42, 8, 252), variant("uniform", 0.45, 3, 260)],
    )
    comparison.write(run / "evaluation.json")
    rows = [
        Row("decode", "llama", "A", 1, length, "triton", Time(1, 1, 1, 5), {"cudnn": Time(2, 2, 2, 5)}, 0.5, 10)
        for length in (1024, 4096)
    ]
    bench = {
        "kernel": [row.values() for row in rows],
        "model_rows": [],
        "break_even": {"decode, plan A": 1024},
        "copy_bytes_per_s": 4e12,
        "environment": {"gpus": [{"name": "a GPU"}]},
        "random_weights": True,
        "dtype": "bfloat16",
    }
    (run / "bench.json").write_text(json.dumps(bench), encoding="utf-8")
    (run / "recipe.yaml").write_text("model: x # <script>\n", encoding="utf-8")
    return run
