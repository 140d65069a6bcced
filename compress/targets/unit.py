"""How large what a decision is about is: a head group, and what the parameters of a decoder layer go with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Unit:
    """One head group: a key/value head with the query heads that share it.

    Attributes:
        query_heads: how many of them stay in the group.
        head_dim: numbers of one key, and of one value.
        itemsize: bytes of one cached number.
        native: the sliding window that the architecture itself has in this layer, in tokens; None without one.
        paged: whether the cache holds whole pages, as a patched checkpoint's does; else tokens, as transformers' own.
        parameters: that go with the group and these query heads, biases included; 0 where they are not counted.
    """

    query_heads: int
    head_dim: int
    itemsize: int = 2
    native: int | None = None
    paged: bool = True
    parameters: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return 2 * self.head_dim * self.itemsize

    @property
    def hidden_size(self) -> int:
        """Size of the layer's input, by the group's parameters: 2 x head_dim x hidden a query head and for key and
        value, and fewer biases than that; 0 where they are not counted."""
        return self.parameters // ((2 * self.query_heads + 2) * self.head_dim)


class LayerParameters(NamedTuple):
    """Parameters of one decoder layer, by what they go with; biases included.

    Attributes:
        group: with one head group and all of its query heads.
        neuron: with one neuron of the MLP.
        query: with one query head.
        neurons: of the dense MLP.
        rest: with none of these: norms, and biases of output projections.
    """

    group: int
    neuron: int
    query: int
    neurons: int
    rest: int

    def removed(self, groups: int, queries: int, neurons: int) -> int:
        """Parameters that go with whole groups, with `queries` query heads of groups that stay, and with neurons."""
        return groups * self.group + queries * self.query + neurons * self.neuron
