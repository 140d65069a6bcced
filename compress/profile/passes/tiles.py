"""Attention of one layer as strips of rows, recomputed from Q and K, so that no N x N matrix ever exists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from compress.runtime.scores import Scores

# Bytes of one float32 strip. About ten strips live at a time; a CPU strip should stay in its cache, a GPU strip
# should be large enough to hide the launches.
STRIP_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
MAX_ROWS = 128  # taller strips waste work above the diagonal
MIN_ROWS = 4

# Least weight of the diagonal, which no rule masks. Where everything that stays visible underflows in float32,
# the renormalised attention is then that of the diagonal instead of 0/0; elsewhere 1e-30 is below rounding.
DIAGONAL_FLOOR = 1e-30


class Workspace:
    """Named scratch buffers that are allocated once and handed out as views of the wanted shape."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor with undefined contents; the next call with this name and dtype reuses its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self.device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)


@dataclass
class LayerTensors:
    """What one layer's attention read and wrote for one sequence without padding.

    Attributes:
        layer: index of the layer.
        query: `[H, T, D]` after rotary embedding (and QK-norm where the model has one).
        key: `[G, T, D]`, likewise; query head h reads key/value head h // (H // G).
        value: `[G, T, D]`.
        scaling: factor on the logits.
        window: sliding window of the architecture (query t sees key j when t - j < window), None without one.
        output_gradient: `[H, T, D]` dLoss/dO, before the output projection; None without a backward pass.
        scores: what else the layer does to its scores; None for a plain softmax.
        hidden: `[T, hidden size]` input of the attention module, where a statistic reads it (`Capture.inputs`).
        rotary: cosines and sines `[T, D]`, likewise; None in a layer without them.
        row_start, key_start: positions of the first query and of the first key, where this is a part of a sequence: its
            queries and `[G, M, D]` keys and values up to the last of them, those before from the first that is seen.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    window: int | None = None
    output_gradient: torch.Tensor | None = None
    scores: Scores | None = None
    hidden: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    row_start: int = 0
    key_start: int = 0

    def on(self, device: torch.device) -> LayerTensors:
        """The same on a device; itself where it lies there."""
        if self.query.device == device:
            return self

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return replace(
            self,
            query=self.query.to(device),
            key=self.key.to(device),
            value=self.value.to(device),
            output_gradient=moved(self.output_gradient),
            scores=None if self.scores is None else Scores(self.scores.cap, moved(self.scores.extra)),
            hidden=moved(self.hidden),
            rotary=None if self.rotary is None else (self.rotary[0].to(device), self.rotary[1].to(device)),
        )


@dataclass
class Tile:
    """A strip of consecutive query rows of one layer with all keys up to its last row.

    Attributes:
        layer: index of the layer.
        row_start: position of the first row.
        key_start: position of the first key column (above 0 only where the architecture has a sliding window).
        attention: `[G, Q, R, K]` float32 probabilities, G groups of Q query heads, 0 where a key is not visible.
        gradient: `[G, Q, R, K]` float32 g = dO V^T = dLoss/dA, None without a backward pass. Where a key is not
            visible its value means nothing (and the attention there is 0).
        value: `[G, K, D]` float32 values of the keys.
        workspace: scratch for statistics; names starting with `tile.` are taken.
        window: sliding window of the architecture in tokens; None without one.
        lse: `[G, Q, R]` float32 log-sum-exp of the scores of every row, in nats; None where nobody asked for it.
    """

    layer: int
    row_start: int
    key_start: int
    attention: torch.Tensor
    gradient: torch.Tensor | None
    value: torch.Tensor
    workspace: Workspace
    window: int | None = None
    lse: torch.Tensor | None = None
    _prefix: torch.Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return self.attention.shape[2]

    @property
    def row_end(self) -> int:
        """Position after the last row; also the position after the last key."""
        return self.row_start + self.rows

    @property
    def positions(self) -> torch.Tensor:
        """`[R]` int64 positions of the rows."""
        return torch.arange(self.row_start, self.row_end, device=self.attention.device)

    @property
    def seen(self) -> torch.Tensor:
        """`[R]` int64, how many keys each row sees."""
        before = self.positions + 1
        return before if self.window is None else before.clamp(max=self.window)

    def column(self, key: int | torch.Tensor) -> torch.Tensor:
        """Index into prefix sums `[..., K + 1]` at which exactly the keys before position `key` are summed."""
        keys = torch.as_tensor(key, device=self.attention.device)
        return (keys - self.key_start).clamp(0, self.attention.shape[3])

    def prefix(self) -> torch.Tensor:
        """`[G, Q, R, K + 1]` float64 attention mass before each key column; shared by the statistics of a tile."""
        if self._prefix is None:
            self._prefix = prefix_sums(self.attention, self.workspace, "tile.prefix")
        return self._prefix


def prefix_sums(values: torch.Tensor, workspace: Workspace, name: str) -> torch.Tensor:
    """Exclusive prefix sums along the last axis, `[..., K]` -> float64 `[..., K + 1]`, in the named buffer.

    float64 because differences of two sums over tens of thousands of keys price windows that lose almost nothing.
    """
    sums = workspace.take(name, (*values.shape[:-1], values.shape[-1] + 1), torch.float64)
    sums[..., 0] = 0
    torch.cumsum(values, -1, dtype=torch.float64, out=sums[..., 1:])
    return sums


def strips(length: int, heads: int, window: int | None, budget: int, start: int = 0) -> Iterator[tuple[int, int, int]]:
    """(row_start, row_end, key_start) of strips that cover all rows from `start` on, each at most about `budget` bytes.

    A strip never has fewer than 4 rows (fewer only at the end), so at extreme lengths it may exceed the budget.
    """
    while start < length:
        key_start = 0 if window is None else max(0, start - window + 1)
        rows = MAX_ROWS
        while rows > MIN_ROWS and 4 * heads * rows * (start + rows - key_start) > budget:
            rows -= 1
        end = min(length, start + rows)
        yield start, end, key_start
        start = end


def tiles(
    layer: LayerTensors, workspace: Workspace, strip_bytes: int | None = None, *, keep_lse: bool = False
) -> Iterator[Tile]:
    """The tiles of one layer in row order. A tile's tensors live until the next one is asked for.

    A strip holds all keys of its rows, so its softmax is complete: subtracting the row's maximum and dividing by
    the row's sum is exp(logit - log-sum-exp). All arithmetic is float32, whatever the dtype of the model.

    Args:
        layer: tensors of one sequence without padding.
        workspace: scratch buffers, reused from tile to tile and layer to layer.
        strip_bytes: bytes of one float32 strip; default by device (`STRIP_BYTES`).
        keep_lse: give `Tile.lse`, too.
    """
    heads, length, size = layer.query.shape
    groups = layer.key.shape[0]
    device = layer.query.device
    first, before = layer.row_start, layer.key_start
    budget = strip_bytes or STRIP_BYTES.get(device.type, STRIP_BYTES["cuda"])
    query = layer.query.float().mul(layer.scaling).view(groups, heads // groups, length, size)
    keys = layer.key.float().transpose(1, 2).contiguous()
    value = layer.value.float()
    slope = values = None
    if layer.output_gradient is not None:
        slope = layer.output_gradient.float().reshape(groups, heads // groups, length, size)
        values = value.transpose(1, 2).contiguous()
    for start, end, key_start in strips(first + length, heads, layer.window, budget, first):
        rows, columns = end - start, end - key_start
        of_rows, of_keys = slice(start - first, end - first), slice(key_start - before, end - before)
        flat = (groups, heads // groups * rows, columns)
        shape = (groups, heads // groups, rows, columns)
        logits = workspace.take("tile.logits", flat)
        torch.bmm(query[:, :, of_rows].reshape(groups, -1, size), keys[:, :, of_keys], out=logits)
        logits = logits.view(shape)
        if layer.scores is not None:
            logits = layer.scores.capped(logits)
        above = torch.ones(rows, rows, dtype=torch.bool, device=device).triu(1)
        logits[..., columns - rows :].masked_fill_(above, -math.inf)
        if layer.window is not None:
            distance = torch.arange(start, end, device=device)[:, None] - torch.arange(key_start, end, device=device)
            logits.masked_fill_(distance >= layer.window, -math.inf)
        attention, lse = workspace.take("tile.attention", shape), None
        if keep_lse:
            lse = _log_total(layer, logits)
        if layer.scores is None:
            torch.softmax(logits, -1, out=attention)
        else:
            attention.copy_(layer.scores.softmax(logits.flatten(0, 1)).view(shape))
        attention.diagonal(start - key_start, -2, -1).clamp_(min=DIAGONAL_FLOOR)
        gradient = None
        if slope is not None and values is not None:
            gradient = workspace.take("tile.logits", flat)
            torch.bmm(slope[:, :, of_rows].reshape(groups, -1, size), values[:, :, of_keys], out=gradient)
            gradient = gradient.view(shape)
        seen = value[:, of_keys]
        yield Tile(layer.layer, start, key_start, attention, gradient, seen, workspace, layer.window, lse)


def _log_total(layer: LayerTensors, logits: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of every row of `[G, Q, R, K]` scores, with what else takes part in the softmax."""
    if layer.scores is None:
        return torch.logsumexp(logits, -1)
    return layer.scores.log_total(logits.flatten(0, 1)).view(logits.shape[:-1])


def attention_rows(layer: LayerTensors, positions: torch.Tensor) -> torch.Tensor:
    """The attention of some rows to all keys, `[G, Q, rows, T]` float32; 0 where a key is not visible.

    Args:
        positions: `[rows]` of the queries.
    """
    heads, length, size = layer.query.shape
    groups = layer.key.shape[0]
    query = layer.query[:, positions].float().mul(layer.scaling)
    logits = query.view(groups, -1, size) @ layer.key.float().transpose(1, 2)
    logits = logits.view(groups, heads // groups, len(positions), length)
    if layer.scores is not None:
        logits = layer.scores.capped(logits)
    distance = positions[:, None] - torch.arange(length, device=positions.device)
    hidden = distance < 0 if layer.window is None else (distance < 0) | (distance >= layer.window)
    logits.masked_fill_(hidden, -math.inf)
    if layer.scores is None:
        return torch.softmax(logits, -1)
    return layer.scores.softmax(logits.flatten(0, 1)).view(logits.shape)
