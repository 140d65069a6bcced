"""One of two processes that share the tokens of each sequence: gradients of a pass, then whole trainings.

Usage: python -m tests.train.context FOLDER
"""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import compress.train.recovery as stage
from compress.models.context.processes import part_of_sequence
from compress.models.load import LoadedModel
from compress.models.planned import planned_model
from compress.plan import make_plan
from compress.profile.heads.attention import Attention
from compress.profile.heads.hidden_mass import HiddenMass
from compress.profile.heads.influence import Influence
from compress.profile.heads.lse_spread import LseSpread
from compress.profile.heads.output_error import OutputError
from compress.profile.heads.retrieval import Retrieval
from compress.profile.run import run_profile
from compress.profile.units.amp import Amp
from compress.profile.units.flap import Flap
from compress.profile.units.taylor import Taylor
from compress.profile.units.wanda_sp import WandaSp
from compress.runtime.shard import Shard
from compress.targets.aaren import AarenGroup
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.score import ScoreGroup
from compress.targets.window import WindowGroup
from compress.train.recovery import recover
from compress.train.token_losses import following_loss, next_tokens
from tests.profile.common import document
from tests.tiny import random_ids, shape_of, tiny_model
from tests.train.common import model_of, settings, text
from tests.train.spread import spread_accelerator

LENGTH = 512
KINDS = (
    FullGroup(),
    LinearGroup(sink=64, alpha=64),
    WindowGroup(sink=4, alpha=40, beta=0.125),
    LinearGroup(alone=True),
    LinearGroup(decay="fixed", slope=0.01),
    WindowGroup(sink=0, alpha=100, beta=0.0),
    LinearGroup(rule="delta", decay="token"),
    LinearGroup(map="cosine", reach=LENGTH),
    AarenGroup(),
    ScoreGroup(score="ssmax", reference=64, sink=4, alpha=70, beta=0.0),
)
STATISTICS = (
    *(Influence(), Attention(sink=4), HiddenMass(), OutputError(sink=4, window=64), LseSpread(), Retrieval()),
    *(Amp(), Flap(), Taylor(), WandaSp()),
)
TRAININGS: dict[str, dict[str, Any]] = {
    "planned": {"train": "full", "loss": "both", "batch_size": 2, "micro_batch": 1, "window_dropout": [0.5]},
    "stock": {"train": "lora", "batch_size": 1, "checkpointing": True},
    "spread": {"train": "full", "batch_size": 1},
}


def planned() -> Any:
    """A model with every kind of group, two in each layer, whose mixers are not as they start."""
    dense = model_of(max_position_embeddings=1024, num_hidden_layers=5)
    shape, turn = shape_of(dense), cycle(KINDS)
    groups = [[next(turn) for _ in range(shape.kv_heads)] for _ in range(shape.layers)]
    model = planned_model(dense, make_plan(shape, groups), untrained=True)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        weight.data += 0.1 * torch.randn_like(weight) if ".mixers." in name else 0
    return model


def gradients(shard: Shard | None) -> dict[str, torch.Tensor]:
    """The loss of two sequences, or of the parts of them that are here, and its gradients by name."""
    ids, model = random_ids(2, LENGTH), planned()
    following = next_tokens(ids)
    here: dict[str, Any] = {} if shard is None else {"compress_shard": shard}
    columns = torch.arange(LENGTH) if shard is None else shard.positions(ids.device)
    logits = model(ids[:, columns], use_cache=False, **here).logits
    loss = following_loss(logits, following[:, columns])
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), **found}


def training(folder: Path, name: str, context: int) -> None:
    """One of `TRAININGS`."""
    model = planned() if name == "planned" else model_of(max_position_embeddings=1024)
    shard = name == "spread" and context > 1
    given = settings(length=LENGTH, steps=2, context=context, shard=shard, **TRAININGS[name])
    recover(model, given, text(4096), folder / f"{name}-{context}", teacher=model_of(max_position_embeddings=1024))


def profile(folder: Path, context: int) -> None:
    """Statistics of documents of two lengths, one of which does not divide among the processes."""
    loaded: Any = LoadedModel(tiny_model("gemma3"), None, "random")  # with layers that slide by themselves
    documents = {400: [document(400, 20, evidence=((50, 60), (300, 310)))], 256: [document(250, 3)]}
    run_profile(loaded, documents, STATISTICS, folder / f"profile-{context}", seed=0, context=context)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    part = part_of_sequence(LENGTH, 2)
    sums = gradients(part)
    for tensor in sums.values():
        torch.distributed.all_reduce(tensor)
    if part.rank == 0:
        torch.save(sums, Path(sys.argv[1]) / "gradients.pt")
    for wanted in ("planned", "stock"):
        training(Path(sys.argv[1]), wanted, 2)
    profile(Path(sys.argv[1]), 2)
    vars(stage)["_accelerator"] = spread_accelerator  # from here on weights are spread, too
    training(Path(sys.argv[1]), "spread", 2)
    torch.distributed.destroy_process_group()
