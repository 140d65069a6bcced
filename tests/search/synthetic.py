"""Search problems without a model: influence tables of random attention, behind the face of a profile."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compress.plan import ModelShape
from compress.profile.key import Key
from compress.search.budget.budget import Budget
from compress.search.dense import Dense
from compress.search.problem import Candidate, Problem
from compress.search.run import make_problem
from compress.search.solvers.moa import Moa
from compress.targets.layer_option import LayerOption
from compress.targets.window import SpanGrid, WindowGroup

ITEMSIZE = 2
SMALL = SpanGrid(betas=(0.0, 0.25, 0.5, 1.0))


@dataclass(frozen=True)
class FakeProfile:
    """What a search reads of a profile."""

    lengths: tuple[int, ...]
    grid: SpanGrid | None
    tensors: dict[str, torch.Tensor]
    priced_layers: tuple[LayerOption, ...] = ()

    def find(self, key: Key) -> torch.Tensor | None:
        return self.tensors.get(str(key))

    def tensor(self, key: Key) -> torch.Tensor:
        return self.tensors[str(key)]

    @property
    def priced(self) -> tuple[WindowGroup, ...]:
        """Fixed windows of the grid, as `effect` would price them."""
        grid = self.grid or SMALL
        return tuple(WindowGroup(sink=grid.sinks[0], alpha=alpha, beta=0.0) for alpha in (64, 128, 256))

    def effect(self, target: Any, length: int, part: str = "absolute") -> torch.Tensor:
        """What the tables say of such a window."""
        table = self.tensors[f"influence.{part}.{length}"][:, :, 0, 0]
        return table[..., target.alpha // 64 - 1] if target in self.priced else torch.zeros_like(table[..., 0])


def make_shape(
    layers: int = 3, kv_heads: int = 2, native_windows: Sequence[int | None] | None = None, head_dim: int = 16
) -> ModelShape:
    """A shape of a model that does not exist."""
    return ModelShape(
        architecture="LlamaForCausalLM",
        layers=layers,
        query_heads=2 * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        native_windows=tuple(native_windows or (None,) * layers),
        fingerprint="sha256:" + "0" * 64,
    )


def influence_table(influence: np.ndarray, grid: SpanGrid, length: int) -> torch.Tensor:
    """The table `[layers, groups, sinks, betas, alphas]` of influence `[layers, groups, t, j]` by plain masking."""
    t, j = np.arange(length)[:, None], np.arange(length)[None]
    alphas = grid.alphas(length)
    table = np.zeros((*influence.shape[:2], len(grid.sinks), len(grid.betas), len(alphas)))
    for sink_index, sink in enumerate(grid.sinks):
        for beta_index, beta in enumerate(grid.betas):
            for alpha_index, alpha in enumerate(alphas):
                span = np.maximum(1, alpha + np.floor(beta * (t + 1)))
                hidden = (j <= t) & (j >= sink) & (t - j >= span)
                table[:, :, sink_index, beta_index, alpha_index] = influence[:, :, hidden].sum(-1)
    return torch.from_numpy(table).float()


@functools.cache
def random_profile(shape: ModelShape, lengths: tuple[int, ...], grid: SpanGrid = SMALL, seed: int = 0) -> FakeProfile:
    """Heads from local to global: influence that decays with the distance at a random rate, and random signs."""
    rng = np.random.default_rng(seed)
    size = (shape.layers, shape.kv_heads, 1, 1)
    tensors = {}
    for length in lengths:
        reach = np.exp(rng.random(size) * 5 + 2)
        distance = np.maximum(np.arange(length)[:, None] - np.arange(length)[None], 0)
        influence = np.exp(-distance / reach) * rng.random(size)
        sign = rng.random((*size[:2], length, length)) - 0.3
        tensors[f"influence.absolute.{length}"] = influence_table(influence, grid, length)
        tensors[f"retrieval.{length}"] = torch.from_numpy(rng.random(size[:2]) * np.log(reach[..., 0, 0])).float()
        tensors[f"influence.signed.{length}"] = influence_table(influence * sign, grid, length)
    return FakeProfile(lengths, grid, tensors)


class Weights:
    """What a search asks a model for its size: so many bytes that a decode step reads."""

    def __init__(self, size: int) -> None:
        self.weight = torch.empty(size, dtype=torch.int8, device="meta")

    def parameters(self) -> list[torch.Tensor]:
        return [self.weight]

    def get_input_embeddings(self) -> Weights:
        return self

    get_output_embeddings = get_input_embeddings


def dense_of(shape: ModelShape, weights: int = 100_000, bandwidth: float = 1e9) -> Dense:
    """A dense model that does not exist."""
    return Dense(shape, ITEMSIZE, Weights(weights), bandwidth=lambda: bandwidth)


def problem_of(
    shape: ModelShape, grid: SpanGrid, lengths: tuple[int, ...], tensors: Any, limits: Mapping[int, int]
) -> Any:
    """A problem with KV bytes as limits, which need not be possible to meet."""
    dense = dense_of(shape)
    return Problem(dense, FakeProfile(lengths, grid, tensors), Budget(kv=dict(limits)).rows(dense, lengths))


def limits_of(problem: Problem, kind: str = "kv") -> dict[int, int]:
    """What a kind of budget allows, by length."""
    return {row.length: row.limit for row in problem.rows if row.kind == kind and row.length is not None}


def held_bytes(problem: Problem, layers: Any, length: int) -> int:
    """KV bytes of a decision."""
    return Candidate(layers).to_plan(problem, {}).cost(length, problem.dense.itemsize).held_bytes


def random_problem(
    kv: float | dict[int, float] = 0.5,
    *,
    shape: ModelShape | None = None,
    profiled: tuple[int, ...] = (320, 512),
    lengths: tuple[int, ...] | None = None,
    grid: SpanGrid = SMALL,
    seed: int = 0,
) -> Any:
    """A problem over `random_profile`."""
    budget: Any = Budget(kv=kv, lengths=lengths)
    return budget_problem(budget, shape=shape, profiled=profiled, grid=grid, seed=seed)


def budget_problem(
    budget: Budget,
    *,
    shape: ModelShape | None = None,
    profiled: tuple[int, ...] = (320, 512),
    grid: SpanGrid = SMALL,
    seed: int = 0,
    weights: int = 100_000,
) -> Any:
    """A problem over `random_profile` with any kinds of budget.

    Args:
        weights: bytes that a decode step reads besides the cache, for the roofline.
    """
    shape = shape or make_shape()
    return make_problem(dense_of(shape, weights), random_profile(shape, profiled, grid, seed), budget, Moa())
