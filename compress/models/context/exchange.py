"""What processes exchange of a sequence that they share: keys and values that are seen, and states; with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import distributed

from compress.models.context.layout import Exchange, Layout, exchange_of
from compress.runtime.shard import View
from compress.runtime.span import Span


class Part:
    """This process's part of a sequence over the processes of a group: the `Shard` that mixers ask.

    Args:
        layout: of the sequence.
        rank: of this process in the group.
        group: of `torch.distributed`; None for all processes.
    """

    def __init__(self, layout: Layout, rank: int, group: Any = None) -> None:
        self.layout, self.rank, self.group = layout, rank, group

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.layout.length

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which of the sequence's segments are here."""
        return self.layout.numbers(self.rank)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Start and stop of each."""
        return tuple(self.layout.segment(number) for number in self.numbers)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position in the sequence of every column, `[T]`."""
        return _positions(self.layout, self.rank, device)

    def split(self, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The columns of each segment, on the axis `dim`."""
        return x.split(self.layout.size, dim)

    def views(self, x: torch.Tensor, spans: tuple[Span, ...]) -> list[tuple[View, torch.Tensor]]:
        """See `Shard.views`: every process gets just the rows that its queries see, of each group by its own span."""
        batch, groups, columns, size = x.shape
        table = exchange_of(self.layout, self.rank, spans, x.device)
        rows = x.permute(1, 2, 0, 3).reshape(groups * columns, batch * size)
        found = _Seen.apply(rows, table, self.group)
        return [
            (view, made.view(groups, view.columns, batch, size).permute(2, 0, 1, 3))
            for (view, _), made in zip(table.views, found, strict=True)
        ]

    def everywhere(self, x: torch.Tensor) -> torch.Tensor:
        """See `Shard.everywhere`: one message that does not grow with the sequence."""
        gathered = _Everywhere.apply(x, self.layout.world, self.group)  # [world, segments here, ...]
        order = [number for rank in range(self.layout.world) for number in self.layout.numbers(rank)]
        back = sorted(range(len(order)), key=order.__getitem__)
        found: torch.Tensor = gathered.flatten(0, 1)[torch.tensor(back, device=x.device)]
        return found


@lru_cache(maxsize=64)
def _positions(layout: Layout, rank: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return layout.positions(rank).to(device)


class _Seen(torch.autograd.Function):
    """Rows `[R, C]` of this process to those of each of its views, `[G * columns, C]`.

    The gradients of a row come from all views that it is in, here and elsewhere, and are added up in float32, in an
    order that is always the same.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, table: Exchange, group: Any) -> tuple[torch.Tensor, ...]:
        ctx.table, ctx.group, ctx.rows = table, group, len(rows)
        got = _swap([rows[sent] for sent in table.sent], table.got, rows, group)
        pool = torch.cat([rows, got, rows.new_zeros(1, rows.shape[1])])
        return tuple(pool[index] for _, index in table.views)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        table: Exchange = ctx.table
        like = grads[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        pool = like.new_zeros(ctx.rows + sum(table.got) + 1, like.shape[1], dtype=wide)
        for (_, index), grad in zip(table.views, grads, strict=True):
            pool[index] += grad  # no row is twice in a view, but for the zeros, whose gradient nobody wants
        total, away = pool[: ctx.rows], pool[ctx.rows : -1]
        back = _swap(list(away.split(table.got)), [len(sent) for sent in table.sent], away, ctx.group)
        for sent, part in zip(table.sent, back.split([len(sent) for sent in table.sent]), strict=True):
            total[sent] += part
        return total.to(like.dtype), None, None


def _swap(parts: list[torch.Tensor], sizes: Sequence[int], like: torch.Tensor, group: Any) -> torch.Tensor:
    """Send a part to every process, and get one of so many rows from each, one behind the other."""
    found = like.new_empty(sum(sizes), like.shape[1])
    distributed.all_to_all_single(found, torch.cat(parts), list(sizes), [len(part) for part in parts], group=group)
    return found


class _Everywhere(torch.autograd.Function):
    """A tensor of every process, `[...]` to `[world, ...]`; its gradients in all processes are added up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, world: int, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
        distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        distributed.all_to_all_single(parts, grad.contiguous(), group=ctx.group)
        return parts.sum(0), None, None
