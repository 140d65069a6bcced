"""A planned model whose heads are split over processes (tensor parallel) computes what it does in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from compress.models.planned import planned_model
from compress.plan import uniform_plan
from compress.runtime import modeling_compress
from compress.runtime.mixer import Kinds
from compress.runtime.modeling_compress import CACHE
from compress.runtime.ranks import Part, part_of
from compress.targets.linear import LinearGroup
from tests.processes import spawn
from tests.profile.common import join
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

FAMILIES = ("llama-gqa", "phi3")  # projections of their own, and a fused one whose outputs are gathered


def planned(family: str) -> Any:
    dense = tiny_model(family)
    return planned_model(dense, mixed_plan(shape_of(dense)))


def split_in_process(rank: int, folder: str) -> None:
    """One of two processes, which compares the split model with the whole one, and one whose weights are spread."""
    join(rank, 2, f"{folder}/store")
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    ids, wanted = random_ids(2, 150), {"max_new_tokens": 6, "do_sample": False}
    for family in FAMILIES:
        whole = planned(family)
        model_class = getattr(modeling_compress, type(whole).__name__)
        split = model_class.from_pretrained(Path(folder, family), distributed_config=DistributedConfig(tp_size=2))
        with torch.no_grad():
            expected, found = whole(ids), split(ids)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(split.generate(ids, **wanted), whole.generate(ids, **wanted))
        held = torch.tensor(getattr(found, CACHE).held_bytes())
        own = int(held)
        distributed.all_reduce(held)
        gathered = family == "phi3"  # each process has all heads
        assert int(held) == getattr(expected, CACHE).held_bytes() * (2 if gathered else 1)
        heads = 1 if gathered else 2
        assert all(
            kinds.count * heads == len(row["groups"])
            for kinds, row in zip(split.base_model.compress_kinds, split.config.compress_plan["layers"], strict=True)
        )
        plan = split.config.compress_plan
        split.set_plan({**plan, "layers": [{"groups": row["groups"][::-1]} for row in plan["layers"]]})
        cache = split.new_cache()
        with torch.no_grad():
            split(ids, **{CACHE: cache})
        assert gathered or cache.held_bytes() + own == getattr(expected, CACHE).held_bytes()  # the other rank's groups
    bare = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Shard(0)])
    assert part_of(bare, True, asked=2) == Part(rank, 2)  # transformers 5.17 gives its mesh no names
    assert part_of(bare, True).whole  # as FSDP leaves weights
    spread = planned("llama-gqa")
    for layer in spread.model.layers:
        fully_shard(layer)
    fully_shard(spread)
    whole, cache = planned("llama-gqa"), spread.new_cache()  # while weights are in parts
    assert isinstance(spread.model.layers[0].self_attn.k_proj.weight, DTensor)
    with torch.no_grad():
        assert torch.equal(spread(ids, **{CACHE: cache}).logits, whole(ids).logits)
    assert torch.equal(spread.generate(ids, **wanted), whole.generate(ids, **wanted))
    assert spread.base_model.compress_split is False
    distributed.destroy_process_group()


def test_two_processes_share_the_heads(tmp_path: Path) -> None:
    for family in FAMILIES:
        planned(family).save_pretrained(tmp_path / family)
    spawn(split_in_process, (str(tmp_path),), nprocs=2)


def test_what_cannot_be_split_is_refused_by_name() -> None:
    kinds = planned("llama-gqa").base_model.compress_kinds[0]
    assert [len(kinds.part(Part(rank, 2)).mixers[0].groups) for rank in (0, 1)] == [1, 1]
    with pytest.raises(ValueError, match="layer 0 has 2 head groups, which do not divide among 3 processes"):
        kinds.part(Part(0, 3))
    dense = tiny_model("llama-gqa")
    linear = planned_model(dense, uniform_plan(shape_of(dense), LinearGroup()), untrained=True)
    with pytest.raises(ValueError, match="layer 1 has heads with the target 'linear', which cannot be split"):
        linear.base_model.compress_kinds[1].part(Part(0, 2))


def test_whole_weights_have_all_groups() -> None:
    model = planned("llama-gqa")
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert part_of(weight, by_rows=True).whole
    before: list[Kinds] = model.base_model.compress_kinds
    model.base_model.split()
    assert model.base_model.compress_kinds is before and model.base_model.compress_split is False
    assert [*Part(1, 2).of(6)] == [3, 4, 5]
