#!/usr/bin/env python3
"""How long the search takes for a large model: made-up rule tables in the shape of Llama-3-70B, no weights.

    scripts/search_speed.py --layers 80 --groups 8 --lengths 2048 4096 8192 16384

Losses fall with the window, steeply in some groups and slowly in others, and groups differ by orders of magnitude.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch

from compress.plan import ModelShape
from compress.profile.key import Key
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.run import make_problem
from compress.search.solvers.moa import Moa
from compress.targets.layer_option import LayerOption
from compress.targets.target import Target
from compress.targets.window import SpanGrid


@dataclass(frozen=True)
class Tables:
    """A profile of made-up tables."""

    lengths: tuple[int, ...]
    grid: SpanGrid
    tensors: dict[str, torch.Tensor]
    priced: tuple[Target, ...] = ()
    priced_layers: tuple[LayerOption, ...] = ()

    def find(self, key: Key) -> torch.Tensor | None:
        """The table of a key; None where there is none."""
        return self.tensors.get(str(key))

    def tensor(self, key: Key) -> torch.Tensor:
        """The table of a key."""
        return self.tensors[str(key)]

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """There is none."""
        raise KeyError(target)


def main() -> None:
    """Make tables, solve, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--step", type=int, default=1024, help="tokens between alphas")
    parser.add_argument("--kv", type=float, default=0.5)
    parser.add_argument("--points", type=int, default=4)
    options = parser.parse_args()
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        layers=options.layers,
        query_heads=8 * options.groups,
        kv_heads=options.groups,
        head_dim=128,
        native_windows=(None,) * options.layers,
        fingerprint="sha256:" + "0" * 64,
    )
    grid = SpanGrid(alpha_min=64, alpha_step=options.step)
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, 2, (options.layers, options.groups, 1, 1, 1))
    fall = rng.lognormal(0.5, 1, size.shape)
    tensors = {}
    for length in options.lengths:
        betas, alphas = np.array(grid.betas)[:, None], np.array(grid.alphas(length))
        hidden = 1 - np.minimum(1, (alphas + betas * length) / length)
        noise = rng.lognormal(0, 0.2, size.shape)
        tensors[f"influence.absolute.{length}"] = torch.from_numpy(size * noise * hidden[None, None, None] ** fall)
    lengths = tuple(options.lengths)
    solver = Moa(points=options.points)
    problem = make_problem(Dense(shape, 2), Tables(lengths, grid, tensors), Budget(kv=options.kv), solver)
    started = time.monotonic()
    plans = solver.solve(problem)
    spent = time.monotonic() - started
    rules = len(grid.rules(max(lengths)))
    gap = max(plan.gap or 0 for plan in plans)
    print(f"{options.layers} layers x {options.groups} groups, {rules} rules, {len(lengths)} lengths")
    print(f"{len(plans)} plans in {spent:.1f} s, largest gap {gap:.2%}")


if __name__ == "__main__":
    main()
