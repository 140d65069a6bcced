"""The share of attention that a linear head takes for its state, by position, beside what softmax gives to those keys.

python scripts/hidden_share.py PREPARED TEXT [--model demo/smollm2-135m] [--length 8192]

PREPARED is a run's folder `options`, whose first target is measured; TEXT a file of plain text. Heads run on the dense
model's own queries and keys. For blocks of positions: the mean share of softmax attention that hidden keys have, the
share that the prepared state takes, and the mean absolute difference of the two over heads and queries.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface

from compress.data.text import tokenise
from compress.models.load import load_model
from compress.models.prepared import read_prepared
from compress.runtime.merge import log_mass
from compress.runtime.mixer import Kinds, LayerFacts
from compress.train.objectives.weights import hidden_keys

EVERY = 8  # queries between two that are measured
NAME = "sdpa_measured"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prepared", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="demo/smollm2-135m")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--block", type=int, default=1024, help="positions of a line")
    asked = parser.parse_args()
    loaded = load_model(asked.model)
    option = read_prepared(asked.prepared)[0]
    ids = torch.tensor(tokenise(loaded.tokenizer, asked.text.read_text(encoding="utf-8"))[: asked.length])[None]
    rows = torch.arange(0, ids.shape[1], EVERY)
    shares: list[torch.Tensor] = []

    def measured(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *given: Any, **rest: Any
    ) -> Any:
        shares.append(hidden_shares(option, module, query, key, rows))
        return inner(module, query, key, value, *given, **rest)

    inner = AttentionInterface()["sdpa"]
    AttentionInterface.register(NAME, measured)
    loaded.model.set_attn_implementation(NAME)
    with torch.inference_mode():
        loaded.model(ids, logits_to_keep=1)
    found = torch.stack(shares)  # [layers, heads, rows, 2]
    print("positions         softmax   state   difference")
    for start in range(0, ids.shape[1], asked.block):
        block = found[:, :, (rows >= start) & (rows < start + asked.block)]
        softmax, state = block.unbind(-1)
        print(
            f"{start:>6} to {start + asked.block:<6}  {float(softmax.mean()):>7.3f} {float(state.mean()):>7.3f} "
            f"{float((softmax - state).abs().mean()):>12.3f}"
        )


def hidden_shares(option: Any, module: Any, query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Shares of the softmax and of the state for the queries at `rows` of one layer, `[heads, rows, 2]`."""
    layer, (groups, length, dim) = module.layer_idx, key.shape[1:]
    size = query.shape[1] // groups
    entry = option.target.model_dump(mode="json")
    facts = LayerFacts(layer, dim, module.config.hidden_size, size, None)
    (mixer,) = Kinds([entry] * groups, facts).mixers
    mixer.load_state_dict({name: option.tensors[f"{layer}.{name}"] for name in mixer.state_dict()})
    made: Any = mixer
    scale, positions = dim**-0.5, torch.arange(length)
    phi_query, phi_key = made.map.of_query(query, scale, positions)[0], made.map.of_key(key, scale, positions)[0]
    hidden = hidden_keys(made.fixed[:1], rows, length)[0]
    visible = (positions <= rows[:, None]) & ~hidden
    edge = hidden.sum(-1) + made.fixed[0].sink
    shares = []
    for head in range(query.shape[1]):
        group, own = divmod(head, size)
        q = query[0, head, rows]
        scores = q @ key[0, group].T * scale
        far, near = (scores.masked_fill(~keys, -torch.inf).logsumexp(-1) for keys in (hidden, visible))
        sums = torch.nn.functional.pad(phi_key[group].cumsum(0), (0, 0, 1, 0))
        weights = (phi_query[head, rows] * (sums[edge] - sums[made.fixed[0].sink])).sum(-1)
        gain = made.gain[group, own] + q @ made.gain_query[group, own]
        shares.append(torch.stack([torch.sigmoid(far - near), torch.sigmoid(log_mass(weights) + gain - near)], dim=-1))
    return torch.stack(shares).nan_to_num(0)


if __name__ == "__main__":
    main()
