"""Score functions other than the softmax inside the kernels: `score_functions.py`, in base 2.

SCORE says which: 0 the softmax, 1 a sigmoid with a bias a head, 2 the same less the logarithm of the keys that a row
sees, 3 LSSA. Their partial results add up as they are, so that the running maximum stays 0; a sigmoid has no total
either, and counts 1 for a row.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

_LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(0.00390625)  # below it a series is closer to log2(1 + x) than log2 is


@triton.jit
def row_shift(p_bias, head, m_row, t, first, sink, SCORE: tl.constexpr):
    """What is added to the scores of rows at t `[M]` of query heads `[M]` in base 2; zero without a bias."""
    shift = tl.zeros_like(head).to(tl.float32)
    if (SCORE == 1) | (SCORE == 2):
        shift += tl.load(p_bias + head, mask=m_row, other=0.0).to(tl.float32) * _LOG2E
    if SCORE == 2:
        count = t + 1 - first + tl.minimum(sink, first)
        shift -= tl.log2(tl.maximum(count, 1).to(tl.float32))
    return shift


@triton.jit
def sigmoid(score):
    """1 / (1 + 2^-score); an exponential that overflows makes it 0."""
    return 1.0 / (1.0 + tl.exp2(-score))


@triton.jit
def unnormed(score, SCORE: tl.constexpr):
    """Weights from scores in base 2 with their shift: a sigmoid, or log2(1 + 2^score)."""
    if SCORE == 3:
        small = tl.exp2(-tl.abs(score))
        series = small * (1.0 - small * (0.5 - small * 0.3333333333333333)) * _LOG2E
        weight = tl.maximum(score, 0.0) + tl.where(small < _TINY, series, tl.log2(1.0 + small))
    else:
        weight = sigmoid(score)
    return weight
