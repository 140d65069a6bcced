"""Every objective: parts of a batch add up to the whole, whatever their sizes; and recovery with objectives by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.registry import objectives
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Keeping, Record, Routing
from compress.train.settings import RecoverSettings
from tests.train.common import model_of, settings, trained
from tests.train.hybrid import Hybrid, of_rows

Outputs = Callable[[slice], dict[str, Any]]


def logits(seed: int) -> Outputs:
    torch.manual_seed(seed)
    values = torch.randn(6, 5, 11)
    return lambda rows: {"logits": values[rows]}


def layer(seed: int) -> Outputs:
    torch.manual_seed(seed)
    values = torch.randn(6, 5, 4, 8)
    return lambda rows: {"outputs": values[rows]}


def scores(seed: int) -> Outputs:
    """Of two head groups."""
    torch.manual_seed(seed)
    values = torch.randn(2, 6)
    return lambda rows: {"scores": values[:, rows]}


def balanced(rows: slice) -> dict[str, Any]:
    record = Record()
    for value in (0.25, 0.5):  # as two layers report it
        record.add_loss("balance", torch.tensor(value))
    return {"record": record}


def states(seed: int) -> Outputs:
    """Of one document, which is never split."""
    torch.manual_seed(seed)
    values = torch.randn(4, 8)
    return lambda rows: {"states": values, "gates": torch.full((3,), 0.5)}


def chosen(rows: slice) -> dict[str, Any]:
    """What the tokens of some sequences choose in two layers, of which one is the layer at hand."""
    generator, record = torch.Generator().manual_seed(3), Record()
    for layer in (0, 1):
        logits = torch.randn(6, 5, 4, generator=generator)[rows]
        on = logits > logits.median(-1, keepdim=True).values
        flat, units = logits.flatten(0, 1), tuple((unit,) for unit in range(4))
        record.add_routing(layer, Routing(flat, flat.softmax(-1), on.flatten(0, 1), units, (), (5,) * len(logits)))
    return {"record": record, "layer": 1}


def keeping(rows: slice) -> dict[str, Any]:
    """What two head groups of a layer keep of some sequences: more than they should of each."""
    kept, record = torch.tensor([[1.0, 1, 0, 1, 0], [0, 1, 1, 0, 1]]).repeat(6, 1, 1)[rows], Record()
    gone, span = torch.ones_like(kept, dtype=torch.bool), Span(0, 64, 0.25, granule=PAGE)
    record.add_keeping(0, Keeping((0, 1), kept, kept, gone, (0.5, 0.5), (0.25, 0.5), (span, span)))
    return {"record": record}


def projected(rows: slice) -> dict[str, Any]:
    """Outputs of a layer's heads, and what reads them."""
    generator = torch.Generator().manual_seed(4)
    outputs, weight = torch.randn(6, 5, 4, 8, generator=generator), torch.randn(12, 32, generator=generator)
    return {"outputs": outputs[rows], "projection": weight}


def hybrid(part: str) -> Outputs:
    """Of a layer of hybrid heads, or of full attention in their place."""
    given = getattr(Hybrid(), part)
    return lambda rows: of_rows(given, rows)


# What the trained and the dense model give; every registered objective has a line.
CASES: dict[str, tuple[Outputs, Outputs]] = {
    "text": (logits(0), logits(1)),
    "distill": (logits(0), logits(1)),
    "transfer": (layer(0), layer(1)),
    "parts": (hybrid("student"), hybrid("teacher")),
    "weights": (hybrid("student"), hybrid("teacher")),
    "side": (balanced, balanced),
    "balance": (chosen, chosen),
    "router_z": (chosen, chosen),
    "kept": (keeping, keeping),
    "routing": (chosen, projected),
    "gates": (states(0), states(1)),
    "reconstruction": (scores(0), scores(1)),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_parts_of_a_batch_add_up(name: str) -> None:
    objective, (student, teacher) = (
        objectives[name](**({"loss_name": "balance"} if name == "side" else {})),
        CASES[name],
    )
    ids = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(2))

    def terms(*parts: slice) -> tuple[int, torch.Tensor]:
        counts, losses = [], []
        for rows in parts:
            inputs = {"input_ids": ids[rows]}
            counts.append(objective.count(inputs))
            losses.append(objective.loss(student(rows), teacher(rows), inputs))
        return sum(counts), torch.stack(losses).sum()

    whole = terms(slice(0, 6))
    assert whole[0] > 0 and whole[1] > 0
    if name != "gates":
        for parts in ((slice(0, 3), slice(3, 6)), (slice(0, 1), slice(1, 6))):
            count, loss = terms(*parts)
            assert count == whole[0]
            torch.testing.assert_close(loss, whole[1])


def test_gates_stay_between_streaming_and_full() -> None:
    gates = nn.Parameter(torch.tensor([-0.5, 0.25, 1.5]))
    objectives["gates"]().constrain({"gates": gates})
    assert gates.tolist() == [0.0, 0.25, 1.0]


def test_a_side_loss_that_nobody_reports_is_refused() -> None:
    with pytest.raises(ValueError, match="no mixer reports a loss 'balance'; reported: none"):
        objectives["side"](loss_name="balance").loss({"record": Record()}, None, {"input_ids": torch.zeros(1, 2)})


def test_recovery_takes_objectives_by_name(tmp_path: Path) -> None:
    both = [{"name": "text", "weight": 0.25}, {"name": "distill", "weight": 0.75, "temperature": 2.0}]
    words = trained(tmp_path / "a", loss="both", distill_weight=0.75, temperature=2.0, teacher=model_of())[1]
    named = trained(tmp_path / "b", objectives=both, teacher=model_of())[1]
    assert named.sha256 == words.sha256 and named.settings["objectives"] == both
    with pytest.raises(ValueError, match="each objective once"):
        settings(objectives=[both[0], both[0]])


def test_objectives_by_name_change_no_key_of_a_training_without_them() -> None:
    facts = settings().facts()
    assert "objectives" not in facts and facts.keys() < RecoverSettings.model_fields.keys()
    assert "objectives" in settings(objectives=[{"name": "text"}]).facts()
