"""The rows of heads that keep tokens: a search among the scorers that were trained, and shares that have no plan."""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from scripts import retain_runs
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

SMALL: dict[str, Any] = {
    "length": 1536,
    "prepare_lengths": "256",
    "prepare_tokens": 256,
    "long_texts": 1,
    "window": 64,
    "refine_minutes": 0.0,
    "quick": True,
}
SHARES = [50.0, 3.0]  # percent of the bytes; the window alone has more than the second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, and what rows have in common: scorers of one kind alone."""
    folder = tmp_path_factory.mktemp("rows")
    model = tiny_model("llama-gqa")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for name in ("one", "other"):
        words = random.Random(name).choices(range(4, VOCABULARY), k=4000)
        lines = [" ".join(f"w{word}" for word in words[start : start + 40]) for start in range(0, len(words), 40)]
        (folder / "texts" / f"{name}.txt").write_text("\n".join(lines))
    run(folder, "base")
    return folder


def run(folder: Path, row: str) -> list[dict[str, Any]]:
    """The cells of a row, as its process measures them."""
    command = [
        *("retain_runs", "--quick", "--scorers", "ridge", "--device", "cpu", "--child", row),
        *("--texts", folder / "texts", "--out", folder / "out", "--model", folder / "model"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in command])
        patch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        patch.setattr(retain_runs, "shares_of", lambda _: SHARES)
        retain_runs.main()
    found: list[dict[str, Any]] = json.loads((folder / "out" / f"{row}-0.json").read_text())["cells"]
    return found


@pytest.mark.parametrize("row", ["searched", "ridge"])
def test_a_row_has_the_shares_that_have_a_plan(folder: Path, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = run(folder, row)
    assert cell["row"] == row and cell["share"] == 50.0
    assert len(cell["held"]) == 2 and 0 < max(cell["held"]) < 0.75
    assert all(math.isfinite(loss) for loss in cell["whole"])
    said = capsys.readouterr().out
    assert re.search(r"at 3%: search\.budget\.kv: no plan meets the budget at length 1408", said), said


def test_a_search_prices_the_scorers_that_were_trained_with_all_windows_of_the_recipe(folder: Path) -> None:
    def searched(trained: str, share: float = 50.0, **changes: Any) -> dict[str, Any]:
        options = argparse.Namespace(**{**SMALL, **changes}, scorers=trained, out=folder / "out")
        return retain_runs.searched_recipe(options, share)

    def priced(*given: Any, **changes: Any) -> dict[str, Any]:
        found: dict[str, Any] = searched(*given, **changes)["prepare"]["options"]["retain"]
        return found

    assert priced("ridge")["scorers"] == ["ridge"]
    assert priced("ridge,mlp,gate,key_norm")["scorers"] == ["ridge", "mlp"]
    assert priced("value_norm,gate")["scorers"] == ["value_norm", "gate"]
    long: dict[str, Any] = {"quick": False, "window": 128, "length": 8192, "prepare_lengths": "1024,4096"}
    for share, most in ((50.0, 1024), (25.0, 1024), (12.5, 512), (6.25, 256)):  # no window fills the bytes by itself
        assert max(priced("ridge", share, **long)["alphas"]) == most
    found = searched("ridge", **long, refine_minutes=3.0)
    assert found["search"]["refine"] == {"minutes": 3.0, "rounds": 10, "doubt": 0.5, "spare": 0.02}
    (objective,) = found["prepare"]["objectives"]
    assert (objective["margin"], objective["lengths"]) == (512, [2048, 4096])
    shorter = searched("ridge", **(long | {"length": 4096}))["calibration"]
    assert {task["length"] for part in ("documents", "training", "held_out") for task in shorter[part]} == {4096}


@pytest.mark.parametrize("where", ["search.budget.lengths", "search.solver.target", None])
def test_other_errors_end_a_row(where: str | None) -> None:
    with pytest.raises(UserError, match="another"):
        retain_runs.left_out(UserError("another", where=where), "a row")
