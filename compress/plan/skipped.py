"""What a plan skips token by token: attention of the heads that a token does not choose, and their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from compress.plan.schema import Form, Plan
from compress.targets.target import layer_cost

NOTHING = 0.01  # share below which nothing worth its name is saved


@dataclass(frozen=True)
class Skipped:
    """What is skipped at one length, if all units that tokens choose from are chosen equally often.

    Attributes:
        flops: of the attention of a prefill that are skipped.
        attention_flops: those with every unit always on.
        bytes: of the cache that a decode step at the end of the sequence does not read.
        cache_bytes: those that it reads with every unit always on.
        length: tokens of the sequence.
        itemsize: bytes of a weight, and of a cached number.
        weights: parameters of the decoder layers, two operations each for every token; 0 where they are not counted.
    """

    flops: int
    attention_flops: int
    bytes: int
    cache_bytes: int
    length: int
    itemsize: int = 2
    weights: int = 0

    @property
    def of_attention(self) -> float:
        """Share of the attention's operations that a prefill skips."""
        return self.flops / self.attention_flops if self.attention_flops else 0.0

    @property
    def of_prefill(self) -> float:
        """Share of all operations of the layers that a prefill skips; projections, MLPs and routers skip nothing."""
        flops = self.attention_flops + 2 * self.length * self.weights
        return self.flops / flops if flops else 0.0

    @property
    def of_cache(self) -> float:
        """Share of the cache that a decode step does not read."""
        return self.bytes / self.cache_bytes if self.cache_bytes else 0.0

    def of_step(self, batch: int = 1) -> float:
        """Share of what a decode step of `batch` sequences reads that it does not, the layers' weights included."""
        read = batch * self.cache_bytes + self.itemsize * self.weights
        return batch * self.bytes / read if read else 0.0

    @staticmethod
    def total(layers: Sequence[Skipped], weights: int = 0) -> Skipped:
        """Of all layers, which are of one length and have so many parameters together."""
        sums = [sum(column) for column in zip(*(astuple(layer)[:4] for layer in layers), strict=True)]
        flops, attention_flops, unread, cache_bytes = sums
        return Skipped(flops, attention_flops, unread, cache_bytes, layers[0].length, layers[0].itemsize, weights)

    def words(self, batch: int = 1) -> str:
        """In a sentence, without its end; plain where next to nothing is saved."""
        prefill = f"a prefill skips {self.of_attention:.1%} of the attention's FLOPs"
        decode = f"a decode step leaves {self.of_cache:.1%} of the cache bytes unread"
        if self.weights:
            prefill += f", {self.of_prefill:.1%} of all FLOPs of the layers"
            decode += f", {self.of_step(batch):.1%} of all that it reads with the weights of the layers"
        saved = (
            self.of_prefill if self.weights else self.of_attention,
            self.of_step(batch) if self.weights else self.of_cache,
        )
        parts = [
            text + ("" if share >= NOTHING else ": next to nothing")
            for text, share in zip((prefill, decode), saved, strict=True)
        ]
        return f"at {self.length:,} tokens {parts[0]}; {parts[1]}"


STORED = (
    "Keys and values of every token are stored in every head group, since later tokens may choose what this one did "
    "not; projections, MLPs and routers are computed in full. So routing saves no bytes held"
)


def chooses(plan: Plan) -> bool:
    """Whether some head groups of a plan are used by some tokens only."""
    return any(group.all_on != group for row in plan.groups_that_stay() for group, _ in row)


def skipped(plan: Plan, length: int, itemsize: int = 2, form: Form | None = None) -> list[Skipped]:
    """What every layer of a plan skips for one sequence of `length` tokens; `itemsize` and `form` as of `Plan.cost`."""
    rows = []
    for number, layer in enumerate(plan.layers):
        unit = plan.unit(number, itemsize, form or plan.form)
        used = layer_cost(layer.groups, unit, length)
        whole = layer_cost([group.all_on for group in layer.groups], unit, length)
        flops, read = whole.flops - used.flops, whole.read_bytes - used.read_bytes
        rows.append(Skipped(flops, whole.flops, read, whole.read_bytes, length, itemsize))
    return rows
