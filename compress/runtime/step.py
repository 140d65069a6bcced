"""What the layers of one forward pass share, and what their mixers report of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .reference import Rows
from .scores import Scores
from .span import Span

if TYPE_CHECKING:
    from .paged_cache import PagedCache
    from .shard import Shard


@dataclass(frozen=True)
class Routing:
    """What the tokens of one pass chose in one layer. Padding is not among the N tokens.

    Attributes:
        logits: `[N, E]` of the E units that are chosen from, with gradients where the router has any.
        probs: `[N, E]` in float32 at least, their softmax.
        chosen: `[N, E]`, which of them a token uses; the same number for every token.
        units: for each of the E units, the query heads of the layer that it is, of those that stay.
        shared: the same for the units that are always on.
        tokens: of each sequence, whose rows follow each other; N together.
        mixed: whether every token uses all of them, times their probabilities, so that nothing is chosen.
    """

    logits: torch.Tensor
    probs: torch.Tensor
    chosen: torch.Tensor
    units: tuple[tuple[int, ...], ...]
    shared: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    mixed: bool = False


@dataclass(frozen=True)
class Keeping:
    """What heads that keep tokens decided about those of one pass without a cache, in one layer.

    Attributes:
        groups: their numbers among the head groups of the layer that stay.
        scores: `[B, G, T]` float32, what the scorer says.
        kept: `[B, G, T]`, 1 where the rule keeps a token and 0 elsewhere, with gradients where decisions are trained.
        gone: bool `[B, G, T]`, tokens behind the sink that are in no later window, so that the decision matters.
        thresholds: of the groups; None where only a cap decides.
        shares: of those tokens, that the plan expects to be kept.
        spans: of the groups, with their sinks.
    """

    groups: tuple[int, ...]
    scores: torch.Tensor
    kept: torch.Tensor
    gone: torch.Tensor
    thresholds: tuple[float | None, ...]
    shares: tuple[float, ...]
    spans: tuple[Span, ...]


@dataclass
class Record:
    """What mixers report of one forward pass; a caller passes one as `compress_record`, and reads it afterwards.

    Layers that are computed again in the backward pass, as under gradient checkpointing, report nothing more.

    Attributes:
        losses: by name, a scalar of every layer that has one; they take gradients.
        gates: by number of the layer, what its mixers multiplied the outputs of heads with, `[B, T, heads]` each.
        routing: by number of the layer, what tokens chose where it has routed heads.
        mlp_routing: by number of the layer, which MLPs tokens chose where it has several; their units are no heads.
        expert_gates: by number of the layer, the gates of experts' attentions, `[N, experts]` of its N tokens.
        keeping: by number of the layer, what its heads that keep tokens decided.
        closed: whether the pass is over.
    """

    losses: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    gates: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    routing: dict[int, Routing] = field(default_factory=dict)
    mlp_routing: dict[int, Routing] = field(default_factory=dict)
    expert_gates: dict[int, torch.Tensor] = field(default_factory=dict)
    keeping: dict[int, list[Keeping]] = field(default_factory=dict)
    closed: bool = False

    def add_loss(self, name: str, loss: torch.Tensor) -> None:
        """Add the side loss of a layer."""
        if self.closed:
            return
        self.losses.setdefault(name, []).append(loss)

    def add_gate(self, layer: int, gate: torch.Tensor) -> None:
        """Add the gates of a mixer of a layer."""
        if self.closed:
            return
        self.gates.setdefault(layer, []).append(gate)

    def add_routing(self, layer: int, routing: Routing) -> None:
        """Add what tokens chose in a layer."""
        if not self.closed:
            self.routing[layer] = routing

    def add_mlp_routing(self, layer: int, routing: Routing) -> None:
        """Add which MLPs tokens chose in a layer."""
        if not self.closed:
            self.mlp_routing[layer] = routing

    def add_expert_gates(self, layer: int, gates: torch.Tensor) -> None:
        """Add the gates of experts' attentions in a layer, those of its tokens alone."""
        if not self.closed:
            self.expert_gates[layer] = gates

    def add_keeping(self, layer: int, keeping: Keeping) -> None:
        """Add what a mixer of a layer decided about its tokens."""
        if not self.closed:
            self.keeping.setdefault(layer, []).append(keeping)


@dataclass
class Step:
    """What the layers of one forward pass share.

    Attributes:
        cache: the paged cache, None when nothing is cached.
        rows: which columns are tokens; None in a step of one token a sequence through a cache, until a layer that
            takes gradients asks for them.
        pick: `[B, T]` columns that bring every sequence's tokens together at the front, where they are no run
            already; None where they are.
        lengths: `[B]` int32, in a step of one token: tokens of each sequence with it, 0 where it is padding.
        gains: tokens that each sequence gains, None where only the device knows.
        columns: T.
        impl: which implementation was asked for, the configuration's `compress_impl`.
        input_length: tokens of the input, where the plan has rules that depend on it; None elsewhere.
        seen: `[B, columns]`, which columns so far were tokens, these included; None where the cache's own holds.
        autocast: whether torch casts the inputs of matrix products meanwhile.
        stored: layers whose tokens are in the cache.
        hidden: `[B, T, hidden size]`, the attention's input in the layer that runs now, where a mixer asks for it.
        rotary: cos and sin `[B or 1, T, rotated size]` in the layer that runs now, where a mixer asks for them and
            the layer has any.
        scores: what the layer that runs now does to its scores; None for a plain softmax.
        record: where mixers report side losses and gates; None where nobody asked.
        shard: the part of its sequences that this process has, where others have the rest; None elsewhere.
        copies: of the tensors here, by name and device (see `on`).
    """

    cache: PagedCache | None
    rows: Rows | None
    pick: torch.Tensor | None
    lengths: torch.Tensor | None
    gains: list[int] | None
    columns: int
    impl: str = "auto"
    input_length: int | None = None
    seen: torch.Tensor | None = None
    autocast: bool = False
    stored: set[int] = field(default_factory=set)
    hidden: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    scores: Scores | None = None
    record: Record | None = None
    shard: Shard | None = None
    copies: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict)

    def on(self, name: str, device: torch.device) -> torch.Tensor:
        """The tensor `lengths` or `pick` where a layer lies: itself on the device of the input, and on each other
        device that layers of the model lie on one copy a pass, made by the first layer there that asks."""
        tensor: torch.Tensor = getattr(self, name)
        if tensor.device == device:
            return tensor
        if (name, device) not in self.copies:
            self.copies[name, device] = tensor.to(device)
        return self.copies[name, device]

    @staticmethod
    def begin(cache: PagedCache | None, valid: torch.Tensor | None, batch: int, count: int, device: Any) -> Step:
        """The step of `count` new columns `[B, T]`; `valid` says which are tokens, None when all are.

        Raises:
            ValueError: more tokens than were reserved.
        """
        step = Step._begin(cache, valid, batch, count, device)
        step.autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        if cache is not None:
            cache.check_room(step.gains)
        return step

    @staticmethod
    def _begin(cache: PagedCache | None, valid: torch.Tensor | None, batch: int, count: int, device: Any) -> Step:
        if cache is None:
            runs = Rows.whole(batch, count) if valid is None else None
            return _step_of_runs(None, runs, valid, [0] * batch)
        before = cache.begin(batch, device)
        differentiable = torch.is_grad_enabled()
        if cache.max_length is not None and (count > 1 or differentiable):
            cache.synchronize()
        if count == 1:
            gains = None
            if valid is None:
                gains = [1] * batch
                lengths = before + 1
            else:
                lengths = torch.where(valid[:, 0], before + 1, 0)
                if cache.max_length is None or differentiable:  # pages, and rows of a gradient, are found on the host
                    gains = valid[:, 0].long().tolist()
            return Step(cache, None, None, lengths, gains, 1)
        past = cache.paged[0].lengths or [0] * batch
        runs = Rows(tuple(past), (0,) * batch, (count,) * batch) if valid is None else None
        return _step_of_runs(cache, runs, valid, past)

    @property
    def is_whole(self) -> bool:
        """Whether the host knows that every column is a token."""
        return self.rows is not None and self.rows.is_whole(self.columns)

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position of every column among its sequence's tokens, from 0, `[B, T]`; -1 where it is no token."""
        if self.rows is None:
            assert self.lengths is not None
            return (self.on("lengths", device).long() - 1)[:, None]
        if ("positions", device) not in self.copies:  # once for all layers there
            if self.shard is None:
                found = self.rows.positions(self.columns, device)
            else:
                found = self.shard.positions(device).expand(len(self.rows.past), -1)
            self.copies["positions", device] = found
        return self.copies["positions", device]

    def real(self, device: torch.device) -> torch.Tensor:
        """Which columns are tokens, `[B, T]`, in the order in which the model has them."""
        real = self.positions(device) >= 0
        if self.pick is None:
            return real
        return torch.zeros_like(real).scatter(1, self.on("pick", device), real)

    def end(self) -> None:
        """Count the new tokens on the device, in place, and the new columns; the record of the pass is whole."""
        if self.record is not None:
            self.record.closed = True
        if self.cache is None or self.cache.lengths is None or self.cache.width is None:
            return
        if self.seen is not None:
            self.cache.seen = self.seen
        for layer in self.cache.paged:
            layer.columns += self.columns
        self.cache.width += self.columns
        if self.lengths is not None:
            torch.maximum(self.cache.lengths, self.lengths, out=self.cache.lengths)
        elif self.gains is not None:
            self.cache.lengths += torch.tensor(self.gains, dtype=torch.int32, device=self.cache.lengths.device)

    def fail(self) -> None:
        """Mark the cache where an error came after the first layer had stored its tokens."""
        if self.cache is not None and self.stored:
            self.cache.interrupted = True


def _step_of_runs(cache: PagedCache | None, runs: Rows | None, valid: torch.Tensor | None, past: list[int]) -> Step:
    """A step of several columns; tokens that are no run of columns are picked together."""
    if runs is not None or valid is None:
        assert runs is not None
        return Step(cache, runs, None, None, list(runs.count), max(runs.count))
    count = valid.sum(dim=1).tolist()
    start = valid.long().argmax(dim=1)
    last = valid.shape[1] - valid.flip(1).long().argmax(dim=1)
    pick = None
    if bool(((last - start != valid.sum(dim=1)) & valid.any(dim=1)).any()):
        pick = (~valid).long().argsort(dim=1, stable=True)
        start = torch.zeros_like(start)
    rows = Rows(tuple(past), tuple(start.tolist()), tuple(count))
    return Step(cache, rows, pick, None, count, valid.shape[1])
