"""Micro-benchmarks of a device, a third of a second in all: what an estimate of a run's time is based on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SECONDS = 0.1  # for each measurement
ROWS = {"cpu": 512, "cuda": 8192}  # of a product, as many as the most operations allow
OPERATIONS = {"cpu": 2e9, "cuda": 4e12}  # of a product, at most
BYTES = {"cpu": 2**27, "cuda": 2**30}  # of a matrix that no cache holds


@dataclass(frozen=True)
class Speeds:
    """Speeds of one device.

    Attributes:
        products: floating-point operations per second in a product of matrices of the model's own sizes.
        elements: exponentials of float32 numbers per second.
        bandwidth: bytes per second at which a product with one vector reads a matrix.
        dispatch: seconds that the smallest operation takes in Python and PyTorch.
    """

    products: float
    elements: float
    bandwidth: float
    dispatch: float

    def words(self) -> str:
        """The speeds in units that hardware is described in."""
        return (
            f"{self.products / 1e9:,.0f} GFLOP/s in products of this model's sizes, {self.bandwidth / 1e9:.3g} GB/s of "
            f"memory, {self.elements / 1e9:.3g} billion exponentials/s, {self.dispatch * 1e6:.2g} us an operation"
        )


def measure_speeds(device: str, dtype: torch.dtype, hidden: int, intermediate: int) -> Speeds:
    """The speeds of a device, each the best of as many calls as fit into a tenth of a second.

    Args:
        dtype: of weights and activations.
        hidden, intermediate: width of the model's hidden states and of its MLPs.
    """
    kind = device.partition(":")[0]
    rows = ROWS.get(kind, ROWS["cpu"])
    rows = max(16, min(rows, int(OPERATIONS.get(kind, OPERATIONS["cpu"]) / (2 * hidden * intermediate))))
    left = torch.ones(rows, hidden, device=device, dtype=dtype)
    right = torch.ones(hidden, intermediate, device=device, dtype=dtype)
    product = _fastest(lambda: left @ right, device)
    wide = torch.ones(BYTES.get(kind, BYTES["cpu"]) // (hidden * dtype.itemsize), hidden, device=device, dtype=dtype)
    vector = torch.ones(hidden, device=device, dtype=dtype)
    read = _fastest(lambda: wide @ vector, device)
    numbers = torch.ones(BYTES.get(kind, BYTES["cpu"]) // 32, device=device)
    result = torch.empty_like(numbers)  # without it every call would have to get fresh memory from the system
    exponentials = _fastest(lambda: torch.exp(numbers, out=result), device)
    one = torch.ones(1, device=device)

    def many() -> torch.Tensor:
        for _ in range(100):
            result = one + one
        return result

    return Speeds(
        products=2 * rows * hidden * intermediate / product,
        elements=numbers.numel() / exponentials,
        bandwidth=wide.numel() * dtype.itemsize / read,
        dispatch=_fastest(many, device) / 100,
    )


def _fastest(call: Callable[[], torch.Tensor], device: str) -> float:
    """Seconds of the fastest call, the first left out; one call where even that takes too long."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    fastest, started = timed(), time.perf_counter()
    while time.perf_counter() - started < SECONDS:
        fastest = min(fastest, timed())
    return fastest
