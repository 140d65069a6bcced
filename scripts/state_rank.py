"""Does `state_rank` say which head groups a linear head can stand in for? Rank correlations on the demo model.

Every head group gets the linear head of the target `linear` behind a window of 64, trained for a few steps on the dense
model's activations (`prepare`). Beside the statistic, on the same texts, stand what the outputs of each group are still
wrong by, and, for some groups that are drawn, the divergence of the whole model's predictions where that group alone is
linear: KL(dense || planned), the mean over tokens.

    python scripts/state_rank.py [--length 320] [--texts 1] [--groups 30] [--steps 12]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr

from compress.data.sample import TextSample
from compress.data.text import EmbeddedText, Part, tokenise
from compress.models.load import LoadedModel, load_model
from compress.models.prepared import attach, read_prepared
from compress.plan import make_plan
from compress.profile.heads.state_rank import StateRank
from compress.profile.key import Key
from compress.profile.run import run_profile
from compress.search.measure import Planned
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.target import Target
from compress.train.prepare import prepare
from compress.train.settings import PrepareSettings

WINDOW = 64


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser()
    for name, default in (("length", 320), ("texts", 1), ("groups", 30), ("steps", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    started = time.monotonic()
    loaded = load_model("demo/smollm2-135m", dtype="float32", device="cpu")
    source = EmbeddedText()
    parts: tuple[Part, ...] = ("calibration", "held_out")
    ids = {part: tokenise(loaded.tokenizer, source.part(source.excerpt().text, part)) for part in parts}
    texts = [ids["held_out"][number * asked.length :][: asked.length] for number in range(asked.texts)]
    with tempfile.TemporaryDirectory() as folder:
        target = LinearGroup(alpha=WINDOW)
        settings = PrepareSettings(targets=(target,), length=asked.length, batch_size=1, steps=asked.steps)
        (record,) = prepare(
            loaded.model, loaded.shape, settings, ids["calibration"], Path(folder) / "options", seed=asked.seed
        ).values()
        attach(loaded.model, read_prepared(Path(folder) / "options"))
        errors = torch.tensor(record.errors)
        print(f"prepared in {time.monotonic() - started:.0f} s: loss {record.first_loss:.4g} to {record.last_loss:.4g}")
        rank = ranks(loaded, texts, Path(folder) / "profile")
    print(f"ranks {rank.min():.0f} to {rank.max():.0f}, median {rank.median():.0f}")
    print(line("relative error of the outputs", rank.flatten(), errors.flatten()))
    places = random.Random(asked.seed).sample(
        [(layer, group) for layer in range(rank.shape[0]) for group in range(rank.shape[1])], asked.groups
    )
    lost = torch.tensor(divergences(loaded, texts, target, places))
    at = torch.tensor(places).unbind(1)
    print(line("KL(dense || planned) of the model", rank[at], lost))
    print(line("the same against the relative error", errors[at], lost))
    print(f"{time.monotonic() - started:.0f} s")


def ranks(loaded: LoadedModel, texts: list[list[int]], folder: Path) -> torch.Tensor:
    """`state_rank` of all head groups `[layers, groups]`, the mean over texts."""
    length = len(texts[0])
    samples = [TextSample(tokens=tuple(text), answer=(length - 1, length)) for text in texts]
    profile = run_profile(loaded, {length: samples}, [StateRank(window=WINDOW)], folder, seed=0)
    return profile.tensor(Key("state_rank", length=length))


@torch.inference_mode()
def divergences(
    loaded: LoadedModel, texts: list[list[int]], target: Target, places: list[tuple[int, int]]
) -> list[float]:
    """KL(dense || planned) in nats a token, where one head group alone has the target."""
    shape, planned = loaded.shape, Planned(loaded.model)
    inputs = torch.tensor(texts)
    dense = loaded.model(inputs, use_cache=False).logits.log_softmax(-1)
    found = []
    for layer, group in places:
        groups: list[list[Target]] = [[FullGroup()] * shape.kv_heads for _ in range(shape.layers)]
        groups[layer][group] = target
        logits = planned.of(make_plan(shape, groups))(inputs, use_cache=False).logits.log_softmax(-1)
        found.append(float((dense.exp() * (dense - logits)).sum(-1).mean()))
    return found


def line(what: str, score: torch.Tensor, lost: torch.Tensor) -> str:
    """A rank correlation with its number of groups."""
    result = spearmanr(score.numpy(), lost.numpy())
    return f"Spearman {result.statistic:+.2f} (p {result.pvalue:.2g}, {len(score)} groups): {what}"


if __name__ == "__main__":
    main()
