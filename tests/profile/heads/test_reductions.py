"""Statistics without gradient against reductions of the probabilities that eager attention returns."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models.shape import shape_of
from compress.profile.heads.attention import BIN, Attention
from compress.profile.heads.influence import Influence
from compress.profile.heads.retrieval import Retrieval
from compress.profile.run import run_profile
from compress.runtime.span import Span
from tests.profile.common import GRID, document, documents, measure
from tests.tiny import tiny_loaded, tiny_model

DOC = document(151, answer=6, evidence=((9, 13), (70, 71)))


def eager(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    """`[L, G, Q, T, T]` float64 probabilities of transformers' own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(torch.tensor([tokens]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    weights = torch.stack([layer[0] for layer in layers]).double()
    groups = shape_of(model).kv_heads
    return weights.view(len(weights), groups, -1, *weights.shape[-2:])


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize(
    "family", ["gemma3", "llama-gqa", "llama-mha", "mistral-sliding", "qwen2-part-sliding", "qwen3"]
)
def test_equal_reductions_of_eager_attention(family: str, with_gradient: bool) -> None:
    model = tiny_model(family)
    weights = eager(model, DOC.tokens)
    size = DOC.length
    # Bins reach to the nominal length; the document is shorter.
    extra = [Influence(grid=GRID)] if with_gradient else []
    found = measure(model, [*extra, Attention(sink=10), Retrieval()], DOC, length=192, strip_bytes=30_000)

    distance = torch.arange(size)[:, None] - torch.arange(size)
    mass = torch.stack([(weights * (distance // BIN == number)).sum(-1).mean((2, 3)) for number in range(3)], -1)
    sink = weights[..., 10:, :10].sum(-1).mean((2, 3))
    entropy = torch.special.entr(weights).sum(-1).mean((2, 3))
    rows = weights[..., DOC.answer[0] - 1 : DOC.answer[1] - 1, :]
    evidence = (rows[..., 9:13].sum(-1) + rows[..., 70]).mean((2, 3))
    # Probabilities of two float32 implementations of the same model.
    for key, expected in {"mass": mass, "sink_mass": sink, "entropy": entropy, "retrieval": evidence}.items():
        torch.testing.assert_close(found[f"{key}.192"].double(), expected, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(found["mass.192"].sum(-1), torch.ones(mass.shape[:2]), rtol=0, atol=1e-5)


def test_each_rule_loses_the_share_of_keys_that_it_hides() -> None:
    model = tiny_model("llama-gqa")
    weights = eager(model, DOC.tokens)
    found = measure(model, [Retrieval(grid=GRID)], DOC, strip_bytes=30_000)["retrieval.lost.151"]
    positions = torch.arange(DOC.length)
    rows = slice(DOC.answer[0] - 1, DOC.answer[1] - 1)
    mass = weights[..., rows, 9:13].sum(-1) + weights[..., rows, 70]
    for sink_index, sink in enumerate(GRID.sinks):
        for beta_index, beta in enumerate(GRID.betas):
            for alpha_index, alpha in enumerate(GRID.alphas(DOC.length)):
                seen = Span(sink, alpha, beta).visible(positions[rows, None], positions).sum(-1)
                expected = (mass * (1 - seen / (positions[rows] + 1))).mean((2, 3))
                torch.testing.assert_close(
                    found[:, :, sink_index, beta_index, alpha_index].double(), expected, rtol=2e-4, atol=2e-5
                )
    assert float(found.max()) > 0.01


def test_statistics_with_different_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the statistics price different span grids"):
        run_profile(
            tiny_loaded("llama-gqa"), documents(), [Influence(grid=GRID), Retrieval()], tmp_path / "run", seed=0
        )


def test_without_evidence_there_is_no_retrieval() -> None:
    assert not measure(tiny_model("llama-gqa"), [Retrieval()], document(40))


def test_a_document_within_the_sink_has_no_sink_mass() -> None:
    found = measure(tiny_model("llama-gqa"), [Attention(sink=64)], document(40))
    assert set(found) == {"mass.40", "entropy.40"}
