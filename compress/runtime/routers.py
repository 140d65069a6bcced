"""Which units of a layer a token uses, and what their outputs are multiplied by: the routers of Mixture-of-Head.

A unit is a head group or a query head. Of the units of a layer some are shared, which is always on; of the others, the
routed ones, every token chooses `active`. What a router decides depends on the token alone, and all of it is computed
in float32 at least. Where scores are equal the lower unit comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .mixer import LayerFacts
from .span import cached_table

ALIKE = ("router", "unit", "active", "of", "always", "gates")  # fields on which a layer's entries agree
RADIANS = 4.0  # by which the random router turns for a product of 1: enough that all units come up


@dataclass(frozen=True)
class Choice:
    """What a router made of tokens, `[..., units]` in the order of the heads.

    Attributes:
        gates: factors on the outputs of units in float32 at least, 0 where a unit is off; with gradients.
        on: whether a unit is on.
        logits: `[..., routed units]`, what the choice is made by.
        probs: `[..., routed units]`, their softmax.
        chosen: `[..., routed units]`, which of them are on.
    """

    gates: torch.Tensor
    on: torch.Tensor
    logits: torch.Tensor
    probs: torch.Tensor
    chosen: torch.Tensor


def shared_units(groups: Sequence[Mapping[str, Any]], group_size: int) -> list[bool]:
    """Whether each unit of a layer is always on, from the plan's entries of its routed groups, in their order."""
    if groups[0]["unit"] == "head":
        return [group["shared"] == "all" or head in group["shared"] for group in groups for head in range(group_size)]
    return [group["shared"] == "all" for group in groups]


def disagreement(groups: Sequence[Mapping[str, Any]], group_size: int) -> tuple[str, str, str] | None:
    """What is wrong with the routed entries of one layer: a sentence, what is expected and what was found.

    Args:
        groups: the plan's entries of all routed groups of the layer that stay, in their order.
        group_size: query heads that stay of each.
    """
    first = groups[0]
    for name in ALIKE:
        found = list(dict.fromkeys(str(group[name]) for group in groups))
        if len(found) > 1:
            what = f"the routed groups of a layer share one router, and differ in `{name}`"
            return what, f"the same in all of them, such as {found[0]}", ", ".join(found)
    for group in groups:
        if group["shared"] != "all" and any(head >= group_size for head in group["shared"]):
            heads = ", ".join(map(str, group["shared"]))
            return "a shared head that the group does not have", f"numbers below {group_size}", heads
    shared = shared_units(groups, group_size)
    counts = {"of": len(shared) - sum(shared), "always": sum(shared)}
    for name, count in counts.items():
        if first[name] != count:
            words = {"of": "routed units that are not shared", "always": "shared units"}[name]
            return f"`{name}` is not how many {words} the layer has", str(count), str(first[name])
    return None


def highest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` largest of the last axis are, as booleans; of equal ones those with lower numbers."""
    order = logits.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, True)


def shares(logits: torch.Tensor, chosen: torch.Tensor | None = None, count: int | None = None) -> torch.Tensor:
    """The softmax over the chosen entries of the last axis times how many they are, 0 elsewhere.

    It is exactly 1 where they are all equal.

    Args:
        chosen: which; the largest is among them. None for all.
        count: how many in every row.
    """
    if not logits.shape[-1]:
        return logits
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    if chosen is not None:
        weights = weights.masked_fill(~chosen, 0)
    return (logits.shape[-1] if count is None else count) * weights / weights.sum(-1, keepdim=True)


def norms(query: torch.Tensor, units: int) -> torch.Tensor:
    """Norms of the units' queries `[B, H, T, D]`, as `[B, T, units]`: of all numbers of all heads of a unit."""
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return torch.linalg.vector_norm(wide.unflatten(1, (units, -1)), dim=(2, 4)).transpose(1, 2)


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores over their standard deviation in the last axis; unchanged where they are all equal, or one alone."""
    if scores.shape[-1] == 1:
        return scores
    variance = scores.var(-1, keepdim=True)
    return scores / torch.where(variance > 0, variance, 1).sqrt()


class Router(nn.Module):
    """The router of the routed groups of one layer.

    `two_stage` (Mixture-of-Head, arXiv 2410.11842, as released): logits of units are W x, x the layer's input. A chosen
    unit's gate is K softmax over the chosen, of K; a shared one's is the softmax over the S shared times S; and where a
    layer has both, the two parts are weighted by 2 softmax(W_h x). With zero weights every unit that is on has gate 1.
    `norm` (the same paper's form for LLaMA) has no parameters: the logits are norms of the units' queries over their
    standard deviation. `random` has fixed weights, a control for what choosing well is worth.

    Parameters: `route` `[G, hidden]`, with units that are heads `[G, R, hidden]`: the rows of the routed units are W_r
    of the paper, those of the shared ones W_s. `halves` `[G, 2, hidden]` of `two_stage`: W_h is their mean, so that
    each group brings what goes with it. `phase` `[G]` or `[G, R]` of `random`. Those of `random` take no gradients.

    Args:
        groups: the plan's entries of the routed groups.
        facts: about the layer.

    Attributes:
        units: how many there are.
        heads: query heads of one unit.
        shared, routed: numbers of the units that are always on, and of those that are chosen from.
        reads_inputs: whether it reads the layer's input; else it reads queries.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], facts: LayerFacts) -> None:
        super().__init__()
        first, share = groups[0], facts.group_size
        self.kind: str = first["router"]
        self.active: int = first["active"]
        self.quantised = first["gates"] == "one"
        self.layer = facts.index
        always = shared_units(groups, share)
        self.units, self.heads = len(always), len(groups) * share // len(always)
        self.shared = tuple(unit for unit, on in enumerate(always) if on)
        self.routed = tuple(unit for unit, on in enumerate(always) if not on)
        self.reads_inputs = self.kind != "norm"
        rows = (len(groups), share) if first["unit"] == "head" else (len(groups),)
        if self.reads_inputs:
            self.route = nn.Parameter(torch.empty(*rows, facts.hidden_size))
        if self.kind == "two_stage":
            self.halves = nn.Parameter(torch.empty(len(groups), 2, facts.hidden_size))
        if self.kind == "random":
            self.phase = nn.Parameter(torch.empty(rows))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero, so that gates start at 1; random weights from a seed of the layer."""
        if self.kind == "two_stage":
            self.route.zero_()
            self.halves.zero_()
        elif self.kind == "random":
            generator = torch.Generator().manual_seed(self.layer)
            for weight, scale in ((self.route, self.route.shape[-1] ** -0.5), (self.phase, torch.pi)):
                weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * scale)

    def forward(self, query: torch.Tensor, hidden: torch.Tensor | None) -> Choice:
        """What tokens choose.

        Args:
            query: `[B, H, T, D]` of the routed groups. RoPE, which only turns them, leaves their norms as they were; a
                factor that a model puts on all queries of a token, such as YaRN's, drops out with the deviation.
            hidden: `[B, T, hidden size]`, the layer's input; None where it is not read.

        Returns:
            `[B, T, units]`.
        """
        if self.kind == "norm":
            scores = norms(query, self.units)
            logits = standardised(_entries(scores, self.routed))
            return self._choice(logits, None, None)
        assert hidden is not None
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        rows = self.route.to(x.dtype).view(self.units, -1)
        if self.kind == "random":
            x = functional.rms_norm(x.detach(), x.shape[-1:])
            phase = self.phase.detach().to(x.dtype).flatten()
            scores = (RADIANS * functional.linear(x, rows.detach()) + phase).cos()
            return self._choice(_entries(scores, self.routed), None, None)
        scores = functional.linear(x, rows)
        halves = None
        if self.shared and self.routed:
            halves = shares(functional.linear(x, self.halves.to(x.dtype).mean(0)))
        return self._choice(_entries(scores, self.routed), _entries(scores, self.shared), halves)

    def _choice(self, logits: torch.Tensor, shared: torch.Tensor | None, halves: torch.Tensor | None) -> Choice:
        """From the logits of routed and of shared units, and the weights `[..., 2]` of the shared and the routed part.

        None stands for shared gates of 1, and for parts that are not weighted.
        """
        chosen, probs = highest(logits, self.active), logits.softmax(-1)
        weighted = None if self.quantised else shares(logits, chosen, self.active)
        always = logits.new_ones(*logits.shape[:-1], len(self.shared)) if shared is None else shares(shared)
        real = probs.masked_fill(~chosen, 0) if weighted is None else weighted
        if halves is not None:
            always, real = always * halves[..., :1], real * halves[..., 1:]
        on = self._ordered(torch.ones_like(always, dtype=torch.bool), chosen)
        gates = self._ordered(always, real)
        if self.quantised:  # 1 where it is on, with the gradient of the real gate
            gates = on.to(gates.dtype) + (gates - gates.detach())
        return Choice(gates, on, logits, probs, chosen)

    def _ordered(self, shared: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        """Entries of the shared and of the routed units, in the order of the units."""
        order = self.shared + self.routed
        return _entries(torch.cat([shared, routed], dim=-1), sorted(range(self.units), key=order.__getitem__))


def _entries(scores: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """Those entries of the last axis; as it is where they are all, in order."""
    if list(numbers) == list(range(scores.shape[-1])):
        return scores
    return scores.index_select(-1, cached_table(tuple(numbers), scores.device))
