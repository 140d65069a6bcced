"""What a `linear` head keeps: the pages of the keys in sight, and a state of constant size for those before them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .linear_layout import waiting
from .mixer import State
from .pages import PagedState
from .reference import Rows
from .span import PAGE, AnySpan


class LinearState(PagedState):
    """The pages of the keys in sight, and for those before them a state in `tensors["state"]`, `[B, G, E, F]` float32.

    The features of a column follow each other in memory, so that rows are whole multiples of what a GPU loads at once,
    which rows of DV + 1 numbers are not. Everything works on `matrix`, the same numbers as `[B, G, F, E]`.

    Args:
        shape: F and E.
        gates: numbers that every token has beside its key until it goes into the state: `gates` `[pages, 64, n]`
            float32, a logarithm of a decay first where tokens have their own, then a write strength.
    """

    gates: torch.Tensor | None = None
    one_way = State.one_way

    def __init__(
        self, rules: Sequence[AnySpan], max_length: int | None, shape: tuple[int, int], gates: int = 0
    ) -> None:
        self.shape, self.width = shape, gates
        if gates:
            self.pooled = ("keys", "values", "gates")
        super().__init__(rules, max_length)

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Empty pools and states; a cache in float64 has its states in float64, too."""
        super().begin(key, value)
        dtype = torch.promote_types(value.dtype, torch.float32)
        self.tensors["state"] = value.new_zeros(key.shape[0], len(self.rules), *reversed(self.shape), dtype=dtype)
        if self.width:
            assert self.keys is not None
            self.gates = value.new_zeros(self.keys.shape[0], PAGE, self.width, dtype=dtype)

    @property
    def matrix(self) -> torch.Tensor:
        """The states as `[B, G, F, E]`: a view, which writes go through."""
        return self.tensors["state"].mT

    def store_gates(self, gates: torch.Tensor | None, rows: Rows) -> None:
        """Keep the gates `[B, G, T, n]` of the new tokens whose pages are held, once `advance` has counted them."""
        if gates is None:
            return
        assert self.gates is not None
        row, group, column, position = waiting(rows, self.spans, gates.device).unbind(1)
        place = self.pages().table[row, group, position // PAGE].long()
        new = gates[row, group, column].detach().to(self.gates.dtype)
        self.gates.view(-1, self.width)[place * PAGE + position % PAGE] = new

    def store_one_gate(self, gates: torch.Tensor | None, lengths: torch.Tensor) -> None:
        """The same for one token a sequence, `[B, G, 1, n]`, as in `reference.store_one`; waits for no device."""
        if gates is None:
            return
        assert self.gates is not None
        self.store_last(self.gates, gates[:, :, 0], self.pages().table, lengths)
