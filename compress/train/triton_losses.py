"""Losses over a vocabulary in Triton: logits are read once for a loss and once for its gradient, and nothing else is.

In plain PyTorch a divergence passes some ten float32 copies of the logits through memory, which takes longer than the
matrix product that made them. `token_losses.py` is the specification.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it losses run in plain PyTorch") from error

BLOCK = 8192  # logits that a program holds at once
WARPS = 16


@triton.jit
def _online(x, largest, total):
    """Take the numbers `x` into a sum of exponentials, `total` times exp(`largest`)."""
    now = tl.maximum(largest, tl.max(x, 0))
    shrink = tl.exp(largest - now)
    weights = tl.exp(x - now)
    return now, shrink, weights, total * shrink + tl.sum(weights, 0)


@triton.jit
def _divergence(
    p_student,  # [rows, size]
    p_teacher,  # [rows, size]
    p_loss,  # [rows] float32
    p_student_log,  # [rows] float32, log-sum-exp of the softened logits
    p_teacher_log,  # [rows] float32, likewise
    size,
    student_row,
    teacher_row,
    sharpness,  # 1 / temperature
    BLOCK: tl.constexpr,
):
    """KL(teacher || student) of one row, both softened."""
    row = tl.program_id(0).to(tl.int64)
    largest = float("-inf")
    total = 0.0
    largest_teacher = float("-inf")
    total_teacher = 0.0
    gap = 0.0  # of the logits, teacher's less student's, by the teacher's weights so far
    for at in range(0, size, BLOCK):
        o_size = at + tl.arange(0, BLOCK)
        m_size = o_size < size
        # [BLOCK]
        b_student = tl.load(p_student + row * student_row + o_size, mask=m_size, other=float("-inf")).to(tl.float32)
        b_teacher = tl.load(p_teacher + row * teacher_row + o_size, mask=m_size, other=float("-inf")).to(tl.float32)
        b_student = b_student * sharpness
        b_teacher = b_teacher * sharpness
        largest, _, _, total = _online(b_student, largest, total)
        largest_teacher, shrink, weights, total_teacher = _online(b_teacher, largest_teacher, total_teacher)
        apart = tl.where(m_size, b_teacher, 0.0) - tl.where(m_size, b_student, 0.0)
        gap = gap * shrink + tl.sum(weights * apart, 0)
    student_log = largest + tl.log(total)
    teacher_log = largest_teacher + tl.log(total_teacher)
    tl.store(p_loss + row, gap / total_teacher - teacher_log + student_log)
    tl.store(p_student_log + row, student_log)
    tl.store(p_teacher_log + row, teacher_log)


@triton.jit
def _divergence_backward(
    p_student,  # [rows, size]
    p_teacher,  # [rows, size]
    p_student_log,  # [rows] float32
    p_teacher_log,  # [rows] float32
    p_grad,  # [] of the sum of losses
    p_to,  # [rows, size], the gradient of the student's logits
    size,
    student_row,
    teacher_row,
    sharpness,
    BLOCK: tl.constexpr,
):
    """BLOCK logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_size = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_size = o_size < size
    factor = tl.load(p_grad).to(tl.float32) * sharpness
    # [BLOCK]
    b_student = tl.load(p_student + row * student_row + o_size, mask=m_size, other=0.0).to(tl.float32)
    b_teacher = tl.load(p_teacher + row * teacher_row + o_size, mask=m_size, other=0.0).to(tl.float32)
    b_student = tl.exp(b_student * sharpness - tl.load(p_student_log + row))
    b_teacher = tl.exp(b_teacher * sharpness - tl.load(p_teacher_log + row))
    tl.store(p_to + row * size + o_size, factor * (b_student - b_teacher), mask=m_size)


@triton.jit
def _surprise(
    p_logits,  # [rows, size]
    p_target,  # [rows] int64; -1 where there is none
    p_loss,  # [rows] float32
    p_log,  # [rows] float32, log-sum-exp of the logits
    size,
    logits_row,
    BLOCK: tl.constexpr,
):
    """-ln p of one row's target; 0 without one."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + row)
    largest = float("-inf")
    total = 0.0
    for at in range(0, size, BLOCK):
        o_size = at + tl.arange(0, BLOCK)
        # [BLOCK]
        b_logits = tl.load(p_logits + row * logits_row + o_size, mask=o_size < size, other=float("-inf"))
        largest, _, _, total = _online(b_logits.to(tl.float32), largest, total)
    log = largest + tl.log(total)
    there = tl.load(p_logits + row * logits_row + tl.maximum(target, 0)).to(tl.float32)
    tl.store(p_loss + row, tl.where(target >= 0, log - there, 0.0))
    tl.store(p_log + row, log)


@triton.jit
def _surprise_backward(
    p_logits,  # [rows, size]
    p_target,  # [rows] int64; -1 where there is none
    p_log,  # [rows] float32
    p_grad,  # [] of the sum of losses
    p_to,  # [rows, size], the gradient of the logits
    size,
    logits_row,
    BLOCK: tl.constexpr,
):
    """BLOCK logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_size = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_size = o_size < size
    target = tl.load(p_target + row)
    # [BLOCK]
    b_logits = tl.load(p_logits + row * logits_row + o_size, mask=m_size, other=0.0).to(tl.float32)
    b_grad = tl.exp(b_logits - tl.load(p_log + row)) - tl.where(o_size == target, 1.0, 0.0)
    b_grad = tl.where(target >= 0, b_grad, 0.0)
    tl.store(p_to + row * size + o_size, tl.load(p_grad).to(tl.float32) * b_grad, mask=m_size)


def _block(size: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(size)))


class Divergence(torch.autograd.Function):
    """Sum of KL(teacher || student) over all rows, not yet times the square of the temperature.

    `apply(student, teacher, temperature)` with logits `[rows, size]` whose last axis is contiguous; only the student's
    get a gradient, in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        rows, size = student.shape
        loss, student_log, teacher_log = student.new_empty(3, rows, dtype=torch.float32)
        strides = student.stride(0), teacher.stride(0)
        _divergence[(rows,)](
            student,
            teacher,
            loss,
            student_log,
            teacher_log,
            size,
            *strides,
            1 / temperature,
            BLOCK=_block(size),
            num_warps=WARPS,
        )
        ctx.save_for_backward(student, teacher, student_log, teacher_log)
        ctx.temperature = temperature
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        student, teacher, student_log, teacher_log = ctx.saved_tensors
        rows, size = student.shape
        to, block = torch.empty_like(student, memory_format=torch.contiguous_format), _block(size)
        strides = student.stride(0), teacher.stride(0)
        _divergence_backward[(rows, triton.cdiv(size, block))](
            student,
            teacher,
            student_log,
            teacher_log,
            grad,
            to,
            size,
            *strides,
            1 / ctx.temperature,
            BLOCK=block,
            num_warps=WARPS,
        )
        return to, None, None


class Surprise(torch.autograd.Function):
    """Sum of -ln p(target) over all rows that have one.

    `apply(logits, targets)` with logits `[rows, size]` whose last axis is contiguous, and targets `[rows]`, -1 where a
    row has none. The logits get a gradient in their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows, size = logits.shape
        loss, log = logits.new_empty(2, rows, dtype=torch.float32)
        _surprise[(rows,)](logits, targets, loss, log, size, logits.stride(0), BLOCK=_block(size), num_warps=WARPS)
        ctx.save_for_backward(logits, targets, log)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, log = ctx.saved_tensors
        rows, size = logits.shape
        to, block = torch.empty_like(logits, memory_format=torch.contiguous_format), _block(size)
        _surprise_backward[(rows, triton.cdiv(size, block))](
            logits, targets, log, grad, to, size, logits.stride(0), BLOCK=block, num_warps=WARPS
        )
        return to, None
