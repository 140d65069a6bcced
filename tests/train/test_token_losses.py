"""Kernels of losses over a vocabulary against float64: odd vocabularies, strides, poisoned memory, and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from compress.train import token_losses, triton_losses
from compress.train.triton_losses import Divergence, Surprise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of gradients, which are in that dtype


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_losses, "BLOCK", 64)


def logits(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that lie apart, with NaN between them."""
    memory = torch.full((rows, size + 9), float("nan"), device=DEVICE, dtype=dtype)
    memory[:, :size] = 3 * torch.randn(rows, size, device=DEVICE)
    return memory[:, :size]


def close(loss: torch.Tensor, leaf: torch.Tensor, exact: torch.Tensor, wide: torch.Tensor) -> None:
    """A loss and its gradient against their float64 twins; both are in float32 and in the logits' dtype."""
    grad, expected = (torch.autograd.grad(0.3 * total, own)[0] for total, own in ((loss, leaf), (exact, wide)))
    assert loss.dtype == torch.float32 and grad.dtype == leaf.dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=TOLERANCE[leaf.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("size", "temperature"), [(131, 1.0), (131, 2.5), (64, 0.5), (1, 1.0)])
def test_divergence_is_that_of_float64(dtype: torch.dtype, size: int, temperature: float) -> None:
    leaf, teacher = logits(4, size, dtype).requires_grad_(), logits(4, size, dtype)
    wide = leaf.detach().double().requires_grad_()
    own, other = ((x / temperature).log_softmax(-1) for x in (wide, teacher.double()))
    exact = kl_div(own, other, reduction="sum", log_target=True)
    close(Divergence.apply(leaf, teacher, temperature), leaf, exact, wide)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [131, 64])
def test_surprise_is_that_of_float64(dtype: torch.dtype, size: int) -> None:
    leaf = logits(5, size, dtype).requires_grad_()
    targets = torch.tensor([3, -1, size - 1, 0, 17], device=DEVICE)
    wide = leaf.detach().double().requires_grad_()
    close(Surprise.apply(leaf, targets), leaf, cross_entropy(wide, targets, ignore_index=-1, reduction="sum"), wide)


def test_gradients_of_memory_that_was_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, float("nan")))
    leaf, targets = logits(3, 70, torch.float32).requires_grad_(), torch.tensor([1, -1, 69], device=DEVICE)
    (Divergence.apply(leaf, logits(3, 70, torch.float32), 1.0) + Surprise.apply(leaf, targets)).backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_kernels_that_compute_something_else_are_refused_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_losses, "BLOCK", 8192)
    token_losses.refusal.cache_clear()
    device = torch.device(DEVICE)
    assert token_losses.refusal(device, torch.float32) is None

    def wrong(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return logits.float().mean()

    told: list[str] = []
    monkeypatch.setattr(token_losses.logger, "warning", told.append)
    monkeypatch.setattr(Surprise, "apply", wrong)
    token_losses.refusal.cache_clear()
    assert token_losses.refusal(device, torch.float32) is not None
    assert token_losses.refusal(device, torch.float32) is not None
    assert len(told) == 1 and "plain PyTorch" in told[0]
    token_losses.refusal.cache_clear()


def test_a_gpu_takes_the_kernels_and_a_cpu_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = (
        logits(6, 11, torch.float32).unflatten(0, (2, 3)),
        logits(6, 11, torch.float32).unflatten(0, (2, 3)),
    )
    tokens = torch.randint(0, 11, (2, 3), device=DEVICE)
    assert token_losses.by_kernels(model) is (DEVICE == "cuda")
    expected = token_losses.distill_loss(model, teacher, 2.0), token_losses.text_loss(model, tokens)
    monkeypatch.setattr(token_losses, "by_kernels", lambda _: True)
    found = token_losses.distill_loss(model, teacher, 2.0), token_losses.text_loss(model, tokens)
    torch.testing.assert_close(found, expected)
