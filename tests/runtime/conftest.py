"""Where tests of kernels have their tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def on_the_gpu_where_there_is_one() -> Iterator[None]:
    """Tensors lie on the GPU, or on the CPU where there is none."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(None)
