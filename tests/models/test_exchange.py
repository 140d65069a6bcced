"""What processes that share a sequence send each other, worked out in one process: every view has just what it sees."""

from __future__ import annotations

import random

import pytest
import torch

from compress.models.context.layout import Layout, exchange_of
from compress.runtime.span import PAGE, Span

CPU = torch.device("cpu")


def random_span(draw: random.Random) -> Span:
    """A window, by pages or not; sometimes everything."""
    beta = draw.choice([0.0, 0.0, 0.25, draw.randrange(1024) / 1024])
    span = Span(draw.choice([0, 4, 70, 130]), draw.randrange(1, 200), beta, draw.choice([1, PAGE]))
    return draw.choice([span, span, span, Span()])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_view_has_the_tokens_that_its_queries_see_and_no_others(world: int) -> None:
    draw = random.Random(world)
    for _ in range(6):
        layout = Layout(Layout.multiple(world) * draw.choice([1, 2, 3]), world)
        spans = tuple(random_span(draw) for _ in range(3))
        # Rows say which token of which group they are, from 1.
        number = torch.arange(3)[:, None] * layout.length + torch.arange(layout.length) + 1
        rows = [number[:, layout.positions(rank)].flatten() for rank in range(world)]
        tables = [exchange_of(layout, rank, spans, CPU) for rank in range(world)]
        assert torch.cat([layout.positions(rank) for rank in range(world)]).sort().values.equal(number[0] - 1)
        for rank, table in enumerate(tables):
            sent = [tables[other].sent[rank] for other in range(world)]
            assert [len(part) for part in sent] == list(table.got) and not table.got[rank]
            assert all(len(set(part.tolist())) == len(part) for part in sent)
            came = [rows[other][part] for other, part in enumerate(sent)]
            pool = torch.cat([rows[rank], *came, torch.zeros(1, dtype=torch.long)])
            for segment, (view, index) in zip(layout.numbers(rank), table.views, strict=True):
                start, stop = layout.segment(segment)
                assert (view.start, view.stop, view.columns) == (start, stop, stop - view.shift)
                at = torch.cat([torch.arange(view.sink), torch.arange(view.sink + view.shift, stop)])
                queries, columns = torch.arange(max(start - 1, 0), stop)[:, None], torch.arange(view.columns)
                for group, (span, moved) in enumerate(zip(spans, view.spans, strict=True)):
                    seen = span.visible(queries, torch.arange(stop)).any(0)  # by the query before them, too
                    found = pool[index].view(3, -1)[group]
                    assert found.equal(torch.where(seen[at], number[group, at], 0))
                    assert seen.sum() == seen[at].sum()
                    own = queries[queries[:, 0] >= start]
                    assert moved.visible(own - view.shift, columns).equal(span.visible(own, at))
