"""Offline, seeded and quiet, before anything imports transformers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pytest
import torch

from tests import processes

# Kernels run in Triton's interpreter where there is no GPU. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, on one thread: tiny tensors lose by more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forked_verification(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports verify themselves in a fork that has torch imported; with the marker `fresh_process` as for users."""
    if request.node.get_closest_marker("fresh_process") is None:
        monkeypatch.setattr("compress.export.verify.run_fresh", processes.run_fresh)
