"""Feature maps in Triton: projection and activation in one launch, rounded to the dtype of the products with them.

In plain PyTorch the features of a layer pass through memory some ten times in float32, which takes longer than all that
is done with them.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels need Triton; without it attention runs in plain PyTorch") from error

from .triton_linear_layout import begin, dot_wide, limits, load_part, overlapped, store_part
from .tuned_linear import linear_features_config

# Maps that kernels compute, by their names in `maps.MAPS`; those below TWO_SIDED have features of x and of -x.
KINDS = {"hedgehog": 0, "hedgehog_exp": 1, "elu": 2, "relu": 3}
TWO_SIDED = 2


def sides(kind: str) -> int:
    """How many features a projected number has."""
    return 2 if KINDS[kind] < TWO_SIDED else 1


def root(kind: str, scale: float) -> float:
    """What projected numbers are multiplied with, for a softmax whose scores are multiplied with `scale`."""
    return scale**0.5 if kind == "hedgehog_exp" else 1.0


@triton.jit
def activate(x, side, m_width, KIND: tl.constexpr, AXIS: tl.constexpr):
    """One side of the features of projected numbers along AXIS, as `maps` defines them; zero where there is none."""
    mask = tl.expand_dims(m_width, 1 - AXIS)
    if KIND == 0:
        x = tl.where(mask, x * (1.0 - 2.0 * side), float("-inf"))
        x = tl.exp(x - tl.expand_dims(tl.max(x, AXIS), AXIS))
        return x * tl.expand_dims(1.0 / tl.sum(x, AXIS), AXIS)
    if KIND == 1:
        x = tl.exp(tl.minimum(tl.maximum(x, -30.0), 30.0) * (1.0 - 2.0 * side))
    elif KIND == 2:
        x = tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(mask, x, 0.0)


@triton.jit
def slope(x, feature, grad, side, KIND: tl.constexpr):
    """The gradient of projected rows from that of one side of their features."""
    if KIND == 0:
        return (1.0 - 2.0 * side) * feature * (grad - tl.sum(feature * grad, 1)[:, None])
    if KIND == 1:
        return tl.where((x >= -30.0) & (x <= 30.0), (1.0 - 2.0 * side) * feature * grad, 0.0)
    if KIND == 2:
        return tl.where(x > 0, grad, feature * grad)
    return tl.where(x > 0, grad, 0.0)


@triton.jit
def _block(
    p_rows, p_map, p_bias, p_gain, p_turn, p_grad, p_to, p_gains, bh, columns, heads, root,
    rows_b, rows_h, rows_t, grad_b, grad_h, grad_t,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SIDES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BIASED: tl.constexpr, BACKWARD: tl.constexpr, GAIN: tl.constexpr,
    NARROW: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head, `bh` of all of its batch; arguments as of `_features`."""
    b = bh // heads
    h = bh % heads
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = t < columns
    t = t.to(tl.int64)
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < WIDTH
    # [BLOCK, BLOCK_W], [BLOCK]
    x = tl.zeros([BLOCK, BLOCK_W], tl.float32)
    gain = tl.zeros([BLOCK], tl.float32)
    for at in tl.static_range(0, DIM, BLOCK_D):
        b_row = load_part(p_rows + b * rows_b + h * rows_h, t * rows_t, m_t, at, DIM, BLOCK_D)
        o_d = at + tl.arange(0, BLOCK_D)
        if GAIN:
            b_turn = tl.load(p_turn + h * DIM + o_d, mask=o_d < DIM, other=0.0).to(tl.float32)
            gain += tl.sum(b_row.to(tl.float32) * b_turn[None, :], 1)
        b_map = load_part(p_map + h * DIM * WIDTH, o_d * WIDTH, o_d < DIM, 0, WIDTH, BLOCK_W)
        if NARROW:
            x = tl.dot(b_row, b_map, x)
        else:
            x = dot_wide(b_row, b_map.to(tl.float32), x, SPLIT, PRECISION)
    if BIASED:
        x += tl.load(p_bias + h * WIDTH + o_w, mask=m_w, other=0.0).to(tl.float32)[None, :]
    x = x * root
    o_to = bh * columns + t
    if BACKWARD:
        grad = tl.zeros([BLOCK, BLOCK_W], tl.float32)
        for side in tl.static_range(SIDES):
            p_side = p_grad + b * grad_b + h * grad_h + side * WIDTH
            b_grad = load_part(p_side, t * grad_t, m_t, 0, WIDTH, BLOCK_W).to(tl.float32)
            grad += slope(x, activate(x, side, m_w, KIND, 1), b_grad, side, KIND)
        store_part(p_to, o_to * WIDTH, grad * root, m_t, 0, WIDTH, BLOCK_W)
    else:
        for side in tl.static_range(SIDES):
            store_part(
                p_to + side * WIDTH, o_to * SIDES * WIDTH, activate(x, side, m_w, KIND, 1), m_t, 0, WIDTH, BLOCK_W
            )
    if GAIN:
        tl.store(p_gains + o_to, gain + tl.load(p_gain + h).to(tl.float32), mask=m_t)


@triton.jit
def _features(
    p_rows,  # [B, heads, T, D]
    p_map,  # [heads, D, WIDTH]
    p_bias,  # [heads, WIDTH], where BIASED
    p_gain,  # [heads], where GAIN
    p_turn,  # [heads, D], where GAIN
    p_grad,  # [B, heads, T, SIDES * WIDTH] where BACKWARD
    p_to,  # [B, heads, T, SIDES * WIDTH] the features, or with BACKWARD [B, heads, T, WIDTH] the projection's gradient
    p_gains,  # [B, heads, T] float32, where GAIN
    columns,
    heads,
    root,
    rows_b,
    rows_h,
    rows_t,
    grad_b,
    grad_h,
    grad_t,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BIASED: tl.constexpr,
    BACKWARD: tl.constexpr,
    GAIN: tl.constexpr,
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK tokens of one head; with GAIN also the product of each with a vector, plus a number.

    NARROW: the map is in the dtype of the rows, so that their product is exact but for its sum.
    """
    begin(OVERLAP)
    _block(
        p_rows, p_map, p_bias, p_gain, p_turn, p_grad, p_to, p_gains, tl.program_id(1).to(tl.int64), columns, heads,
        root, rows_b, rows_h, rows_t, grad_b, grad_h, grad_t,
        DIM, WIDTH, SIDES, KIND, BLOCK, BLOCK_D, BLOCK_W, BIASED, BACKWARD, GAIN, NARROW, SPLIT, PRECISION,
    )  # fmt: skip


@triton.jit
def _features_of_both(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, M, D]
    p_query_map,  # [H, D, WIDTH]
    p_key_map,  # [G, D, WIDTH]
    p_query_bias,  # [H, WIDTH], where BIASED
    p_key_bias,  # [G, WIDTH], where BIASED
    p_gain,  # [H], where GAIN
    p_turn,  # [H, D], where GAIN
    p_to_query,  # [B, H, T, SIDES * WIDTH]
    p_to_key,  # [B, G, M, SIDES * WIDTH]
    p_gains,  # [B, H, T] float32, where GAIN
    columns,
    stream,
    heads,
    groups,
    rows,
    root,
    query_b,
    query_h,
    query_t,
    key_b,
    key_g,
    key_t,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDES: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BIASED: tl.constexpr,
    GAIN: tl.constexpr,
    NARROW: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK tokens of one query head, of which there are `rows` in the batch, or of one group's keys behind those."""
    begin(OVERLAP)
    bh = tl.program_id(1).to(tl.int64)
    if bh < rows:
        _block(
            p_query, p_query_map, p_query_bias, p_gain, p_turn, p_query, p_to_query, p_gains, bh, columns, heads, root,
            query_b, query_h, query_t, query_b, query_h, query_t,
            DIM, WIDTH, SIDES, KIND, BLOCK, BLOCK_D, BLOCK_W, BIASED, False, GAIN, NARROW, SPLIT, PRECISION,
        )  # fmt: skip
    else:
        _block(
            p_key, p_key_map, p_key_bias, p_gain, p_turn, p_key, p_to_key, p_gains, bh - rows, stream, groups, root,
            key_b, key_g, key_t, key_b, key_g, key_t,
            DIM, WIDTH, SIDES, KIND, BLOCK, BLOCK_D, BLOCK_W, BIASED, False, False, NARROW, SPLIT, PRECISION,
        )  # fmt: skip


def _launch(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    turn: torch.Tensor | None,
    kind: str,
    scale: float,
    grad: torch.Tensor | None,
    to: torch.Tensor,
    gains: torch.Tensor | None,
) -> None:
    batch, heads, columns, _ = rows.shape
    over = to if grad is None else grad
    options = _options(rows, weight, kind)
    _features[(triton.cdiv(columns, options["BLOCK"]), batch * heads)](
        rows,
        weight,
        weight if bias is None else bias,
        weight if gain is None else gain,
        weight if turn is None else turn,
        over,
        to,
        to if gains is None else gains,
        columns,
        heads,
        root(kind, scale),
        *rows.stride()[:3],
        *over.stride()[:3],
        BIASED=bias is not None,
        BACKWARD=grad is not None,
        GAIN=gains is not None,
        **options,
    )


def _options(rows: torch.Tensor, weight: torch.Tensor, kind: str, both: bool = False) -> dict[str, Any]:
    """Block sizes of a launch for such rows and such a map, and what else they decide."""
    dim, width = weight.shape[-2:]
    block_w = max(16, triton.next_power_of_2(width))
    config = linear_features_config(block_w, rows.device, both)
    return {
        "DIM": dim,
        "WIDTH": width,
        "SIDES": sides(kind),
        "KIND": KINDS[kind],
        "BLOCK": config["tokens"],
        "BLOCK_D": max(16, min(64, triton.next_power_of_2(dim))),
        "BLOCK_W": block_w,
        "NARROW": rows.dtype == weight.dtype == torch.bfloat16,
        "SPLIT": rows.dtype == torch.bfloat16,
        "PRECISION": "tf32x3",
        "num_warps": config["warps"],
        **limits(config),
        **overlapped(rows.device),
    }


class _Features(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        gain: torch.Tensor | None,
        turn: torch.Tensor | None,
        kind: str,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(rows, weight, bias, gain, turn)
        ctx.kind, ctx.scale = kind, scale
        ctx.set_materialize_grads(False)
        to = rows.new_empty(*rows.shape[:3], sides(kind) * weight.shape[-1])
        gains = None if gain is None else rows.new_empty(rows.shape[:3], dtype=torch.float32)
        _launch(rows, weight, bias, gain, turn, kind, scale, None, to, gains)
        return to, gains

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        rows, weight, bias, gain, turn = ctx.saved_tensors
        grad, of_gains = grads
        of_rows = of_weight = of_bias = of_gain = of_turn = None
        by_head = rows.transpose(0, 1).flatten(1, 2)  # [heads, B * T, D]
        if grad is not None:
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            projected = rows.new_empty(*rows.shape[:3], weight.shape[-1])
            _launch(rows, weight, bias, None, None, ctx.kind, ctx.scale, grad, projected, None)
            if ctx.needs_input_grad[0]:
                of_rows = projected @ weight.to(projected.dtype).transpose(-1, -2)
            if ctx.needs_input_grad[1]:
                of_weight = torch.bmm(by_head.transpose(-1, -2), projected.transpose(0, 1).flatten(1, 2))
                of_weight = of_weight.to(weight.dtype)
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = projected.float().sum((0, 2)).to(bias.dtype)
        if of_gains is not None and gain is not None and turn is not None:
            of_gain = of_gains.sum((0, 2)).to(gain.dtype)
            flat = of_gains.transpose(0, 1).flatten(1, 2)[:, None].to(rows.dtype)
            of_turn = torch.bmm(flat, by_head)[:, 0].to(turn.dtype)
            if ctx.needs_input_grad[0]:
                through = (of_gains[..., None] * turn[:, None].float()).to(rows.dtype)
                of_rows = through if of_rows is None else of_rows + through
        return of_rows, of_weight, of_bias, of_gain, of_turn, None, None


def features(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    scale: float,
    gain: torch.Tensor | None = None,
    turn: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features `[B, heads, T, F]` of queries or keys `[B, heads, T, D]` in their dtype, differentiable.

    Args:
        weight, bias: the map's projection, `[heads, D, width]` and `[heads, width]`.
        kind: name of the map, one of `KINDS`.
        scale: the factor on the scores of a softmax.
        gain, turn: `[heads]` and `[heads, D]`, where the second result is asked for.

    Returns:
        The features, and gain + turn . row of every row, `[B, heads, T]` float32, or None.
    """
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    turn = None if turn is None else turn.contiguous()
    found: tuple[torch.Tensor, torch.Tensor | None] = _Features.apply(
        rows, weight.contiguous(), bias, gain, turn, kind, scale
    )
    return found


def features_of_both(
    query: torch.Tensor,
    key: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor] | None,
    kind: str,
    scale: float,
    gain: torch.Tensor | None = None,
    turn: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`features` of queries `[B, H, T, D]` and of keys `[B, G, M, D]`, M <= T, of one dtype, in one launch; it has no
    gradients.

    Two launches leave a part of the GPU idle twice while their last programs run.

    Args:
        weights, biases: of queries and of keys.
        kind, scale, gain, turn: see there.

    Returns:
        Features of queries, their numbers that `gain` and `turn` ask for or None, and features of keys.
    """
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    of_query, of_key = (weight.contiguous() for weight in weights)
    options, width = _options(query, of_query, kind, both=True), sides(kind) * of_query.shape[-1]
    to_query, to_key = (x.new_empty(*x.shape[:3], width) for x in (query, key))
    gains = None if gain is None else query.new_empty(query.shape[:3], dtype=torch.float32)
    (batch, heads, columns, _), groups, stream = query.shape, key.shape[1], key.shape[2]
    assert stream <= columns
    _features_of_both[(triton.cdiv(columns, options["BLOCK"]), batch * (heads + groups))](
        query,
        key,
        of_query,
        of_key,
        *((of_query, of_key) if biases is None else biases),
        of_query if gain is None else gain,
        of_query if turn is None else turn.contiguous(),
        to_query,
        to_key,
        to_query if gains is None else gains,
        columns,
        stream,
        heads,
        groups,
        batch * heads,
        root(kind, scale),
        *query.stride()[:3],
        *key.stride()[:3],
        BIASED=biases is not None,
        GAIN=gains is not None,
        **options,
    )
    return to_query, gains, to_key
