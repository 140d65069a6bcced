"""Decoding of so many sequences and groups that pages are counted ahead is decoding in which every program counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.runtime.pages import Pages
from compress.runtime.reference import decode as reference_decode
from compress.runtime.span import PAGE, Span

triton_decode = pytest.importorskip("compress.runtime.triton_decode")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [0, 1, 64, 65, 0, 300, 130, 0]  # the first, the last and some between take no part
RULES = [Span(), Span(sink=4, alpha=100, beta=0.0)]
SHARE, DIM = 2, 16


# Programs that have many segments each, and programs of which several share one; heads, groups and all of them on.
@pytest.mark.parametrize(("programs", "unit"), [(2, 0), (2, 1), (12, 2)])
def test_pages_counted_ahead_change_nothing(monkeypatch: pytest.MonkeyPatch, programs: int, unit: int) -> None:
    batch, groups, numbers = len(LENGTHS), len(RULES), -(-max(LENGTHS) // PAGE)
    table = torch.randperm(batch * groups * numbers, device=DEVICE).view(batch, groups, numbers).int()
    keys, values = torch.randn(2, table.numel(), PAGE, DIM, device=DEVICE)
    pages, lengths = Pages(keys, values, table), torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
    query = torch.randn(batch, groups * SHARE, DIM, device=DEVICE)
    options: dict[str, Any] = {"keep_lse": True}
    if unit:
        active = torch.rand(batch, groups * (SHARE if unit == 2 else 1), device=DEVICE) < 0.6
        active[3:6] = torch.tensor([True, False] * (active.shape[1] // 2))
        options |= {"active": active, "gates": torch.rand(active.shape, device=DEVICE)}
    config, launches = triton_decode.decode_config, list[int]()
    count = triton_decode._count

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(1)
            return count[grid]

    monkeypatch.setattr(triton_decode, "_count", Counted())
    found = []
    for limit in (batch * groups, batch * groups - 1):
        changed = {"found": limit, "programs": programs}
        monkeypatch.setattr(triton_decode, "decode_config", lambda *args, c=changed: config(*args) | c)
        found.append(triton_decode.decode(query, pages, lengths, RULES, **options))
    assert launches == [1]
    (every, every_lse), (ahead, ahead_lse) = found
    torch.testing.assert_close(ahead, every, rtol=1e-6, atol=1e-6)  # a GPU may join pieces in another order
    torch.testing.assert_close(ahead_lse, every_lse, rtol=1e-6, atol=1e-6)
    exact, exact_lse = reference_decode(query, pages, lengths, RULES, **options)
    torch.testing.assert_close(ahead, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ahead_lse, exact_lse, rtol=1e-4, atol=1e-5)


def test_sequences_without_tokens_give_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = triton_decode.decode_config
    monkeypatch.setattr(triton_decode, "decode_config", lambda *args: config(*args) | {"found": 0})
    pool = torch.full((4, PAGE, DIM), torch.nan, device=DEVICE)
    pages = Pages(pool, pool, torch.arange(4, dtype=torch.int32, device=DEVICE).view(2, 2, 1))
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    assert not triton_decode.decode(torch.randn(2, 4, DIM, device=DEVICE), pages, lengths, RULES).any()
