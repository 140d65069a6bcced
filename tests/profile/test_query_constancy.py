"""Constancy of queries against the projections themselves, and RoPE taken back as each family applies it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.profile.heads.query_constancy import QueryConstancy, turned_back
from compress.profile.run import run_profile
from tests.profile.common import documents
from tests.tiny import tiny_loaded


def constancies(family: str, folder: Path, change: Any = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model, and what the statistic finds of it."""
    loaded = tiny_loaded(family)
    if change is not None:
        with torch.no_grad():
            change(loaded.model)
    profile = run_profile(loaded, documents(), [QueryConstancy()], folder, seed=0)
    return loaded, {str(key): values for key, values in profile.tensors.items()}


def test_it_is_that_of_what_the_projections_give(tmp_path: Path) -> None:
    loaded, found = constancies("qwen2", tmp_path)
    (length,) = {sample.length for sample in documents()[70]}
    sums = torch.zeros(4, 12, dtype=torch.double), torch.zeros(4, dtype=torch.double)
    with torch.no_grad():
        for sample in documents()[70]:
            kept: list[torch.Tensor] = []
            hook = loaded.model.model.layers[2].self_attn.q_proj.register_forward_hook(
                lambda module, given, out, kept=kept: kept.append(out)
            )
            loaded.model.model(**sample.body(torch.device("cpu")))
            hook.remove()
            query = kept[0][0].double().view(length, 4, 12)
            sums[0].add_(query.mean(0))
            sums[1].add_(query.square().sum(-1).mean(0))
    count = len(documents()[70])
    expected = (sums[0] / count).square().sum(-1) / (sums[1] / count)
    torch.testing.assert_close(
        found["query_constancy.before_rope.70"][2].double(), expected.view(2, 2).mean(1), rtol=1e-4, atol=1e-5
    )
    assert bool((found["query_constancy.70"] < 1).all())


def test_a_head_with_one_query_has_one(tmp_path: Path) -> None:
    def same(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.normal_()

    _, found = constancies("qwen2", tmp_path, same)
    for length in (70, 133):
        torch.testing.assert_close(found[f"query_constancy.before_rope.{length}"], torch.ones(3, 2))
        assert bool((found[f"query_constancy.{length}"] < 0.95).all())  # RoPE turns it


@pytest.mark.parametrize(("family", "size"), [("llama", 12), ("phi3", 8), ("cohere", 12), ("glm", 8), ("gpt_oss", 12)])
def test_rope_is_taken_back(family: str, size: int) -> None:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    angles = torch.arange(9)[:, None] * torch.rand(size // 2)
    if family == "cohere":
        angles = angles.repeat_interleave(2, dim=-1)
    elif family != "gpt_oss":
        angles = torch.cat([angles, angles], dim=-1)
    cosine, sine = 1.3 * angles.cos(), 1.3 * angles.sin()
    query = torch.randn(4, 9, 12)
    turned = module.apply_rotary_pos_emb(query[None], query[None], cosine[None], sine[None])[0][0]
    back = list(turned_back(turned, (cosine, sine)))
    assert min(float((one - query).abs().max()) for one in back) < 1e-5
    assert max(float((one - query).abs().max()) for one in back) > 0.1
