"""Losses over the vocabulary at every token: in plain PyTorch, which is the specification, and by kernels on a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn import functional
from transformers.utils import logging

from compress.runtime.impl import current

try:
    from compress.train.triton_losses import Divergence, Surprise
except ImportError:  # no Triton here
    Divergence, Surprise = None, None  # type: ignore[assignment, misc]

logger = logging.get_logger(__name__)

NO_TOKEN = -1  # where nothing follows
PROBE = (3, 9001)  # logits on which kernels are tried: more than a program holds at once, and an odd number


def distill_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum of KL(teacher || model) over all tokens, nats, both softened by the temperature and scaled by its square.

    The square keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    Args:
        logits, teacher: `[B, T, V]`; computed in float32. Only the model's get a gradient by kernels.
    """
    alike = logits.shape == teacher.shape and logits.device == teacher.device and not teacher.requires_grad
    if alike and by_kernels(logits) and by_kernels(teacher):
        with current(logits.device):
            return temperature**2 * Divergence.apply(_rows(logits), _rows(teacher), temperature)
    return _distill_loss(logits, teacher, temperature)


def text_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sum of -ln p over the tokens behind the first of each sequence, nats.

    Args:
        logits: `[B, T, V]`; computed in float32.
        tokens: `[B, T]`.
    """
    return following_loss(logits, next_tokens(tokens))


def next_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """What follows each token `[B, T]`; `NO_TOKEN` behind the last of a sequence."""
    return functional.pad(tokens[:, 1:], (0, 1), value=NO_TOKEN)


def following_loss(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Sum of -ln p over what follows some tokens, nats.

    Args:
        logits: `[B, T, V]`; computed in float32.
        following: `[B, T]`, the token behind each, as `next_tokens` has it.
    """
    if by_kernels(logits):
        with current(logits.device):
            loss: torch.Tensor = Surprise.apply(_rows(logits), following.flatten())
        return loss
    return _following_loss(logits, following)


def _distill_loss(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    wide, wide_teacher = logits.float(), teacher.float()
    if temperature != 1:
        wide, wide_teacher = wide / temperature, wide_teacher / temperature
    student_logs = functional.log_softmax(wide, -1)
    teacher_logs = functional.log_softmax(wide_teacher, -1)
    return temperature**2 * functional.kl_div(student_logs, teacher_logs, reduction="sum", log_target=True)


def _following_loss(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten(0, 1).float()
    return functional.cross_entropy(flat, following.flatten(), ignore_index=NO_TOKEN, reduction="sum")


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """`[B * T, V]` with a contiguous last axis."""
    rows = logits.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def by_kernels(logits: torch.Tensor) -> bool:
    """Whether kernels take logits like these: on a GPU where they compute what they should."""
    known = logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return logits.is_cuda and known and type(logits) is torch.Tensor and refusal(logits.device, logits.dtype) is None


@lru_cache(maxsize=64)
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels do not take logits of this dtype there, which is told once; None where they do.

    Tried on a few logits: losses and gradients have to be those of plain PyTorch.
    """
    if Divergence is None:
        return "Triton cannot be imported"
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(PROBE, generator=generator).to(device, dtype) for _ in range(2))
    following = next_tokens(torch.tensor([[5, 9000, 0]], device=device))
    leaves = [logits.clone().requires_grad_() for _ in range(4)]
    try:
        with current(device), torch.enable_grad():
            found = [4 * Divergence.apply(leaves[0], teacher, 2.0), Surprise.apply(leaves[1], following[0])]
            plain = [_distill_loss(leaves[2][None], teacher[None], 2.0), _following_loss(leaves[3][None], following)]
            (sum(found) + sum(plain)).backward()
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
        for own, expected in ((0, 2), (1, 3)):
            torch.testing.assert_close(leaves[own].grad, leaves[expected].grad, rtol=2e-2, atol=1e-4)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler has many ways to fail
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(f"losses run in plain PyTorch: their kernels do not run on {device} in {dtype} ({reason})")
        return reason
    return None
