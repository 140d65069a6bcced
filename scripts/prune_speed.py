#!/usr/bin/env python3
"""Prefill and decode time of a model without a share of its parameters, over the dense model's, in one process.

    python -m scripts.prune_speed --model llama-3-8b --keep 0.7 --batch 8 --length 2048

Widths are those of solver `amp`; which units go is drawn, since times do not depend on it. Both sides run PyTorch's
fastest dense attention, decode steps in a CUDA graph on a GPU (`compress.bench.model`). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
import transformers

from compress.bench.model import model_row
from compress.models.load import DTYPES
from compress.models.planned import planned_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of
from compress.models.source import ModelSource
from compress.profile.key import Key
from compress.search.budget.budget import Budget
from compress.search.choice.removal import drawn
from compress.search.dense import Dense
from compress.search.problem import Candidate
from compress.search.run import make_problem
from compress.search.solvers.amp import Amp
from compress.targets.target import Target


class Nothing:
    """A profile without scores: only widths matter here."""

    lengths = ()
    grid = None
    priced = priced_layers = ()

    def find(self, key: Key) -> None:
        """There is none."""

    def tensor(self, key: Key) -> torch.Tensor:
        """There is none."""
        raise KeyError(key)

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """There is none."""
        raise KeyError(target)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/smollm2-135m", help="as of `compress bench`: a shape or a model")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the decoder layers' parameters that stays")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64, help="decode steps at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    source = ModelSource(options.model)
    dense = source.dense(torch.device(options.device), DTYPES[options.dtype])
    sizes = Dense(shape_of(dense), dense.dtype.itemsize, dense)
    problem = make_problem(sizes, Nothing(), Budget(parameters=options.keep), Amp())
    groups = problem.shape.kv_heads
    widths = Amp().widths(problem, min(round((1 - options.keep) * groups), groups - 1))
    if widths is None:
        raise SystemExit(f"no equal widths of all layers keep {options.keep:.0%} of the parameters")
    layers = drawn(problem, [widths] * problem.shape.layers, 0)
    pruned = planned_model(dense, Candidate(layers).to_plan(problem, {}))
    name = f"{widths.groups} of {groups} groups, {widths.neurons} of {problem.sizes[0].neurons} neurons"
    row = model_row(dense, pruned, source.name, name, options.batch, options.length, options.steps)
    on_gpu = options.device.startswith("cuda")
    facts = {
        "block_parameter_share": block_parameters(pruned) / block_parameters(dense),
        "prefill_share_of_dense": row.plan.prefill / row.dense.prefill,
        "dtype": options.dtype,
        "machine": torch.cuda.get_device_name()
        if on_gpu
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(row.values() | facts))


if __name__ == "__main__":
    main()
