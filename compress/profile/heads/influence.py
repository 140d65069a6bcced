"""Attention influence: what the loss loses, to first order, when a span rule masks keys of a head group.

For the row of query i, with A the attention, g_ij = dLoss/dA_ij = dO_i . V_j and delta_i = sum_n A_in g_in (which is
rowsum(dO * O)), masking the single key j and renormalising the softmax over the others changes the loss by

    E_ij = -A_ij / (1 - A_ij) * (g_ij - delta_i)                   (MoA, arXiv 2406.14909, eq. 3, 13, 14).

Tables. A rule (sink, alpha, beta) masks, in row t, the keys sink <= j < first(t). Per row this is one range of keys,
so a prefix sum of E along the keys prices it with two look-ups, at token granularity, for every rule of the grid.
Summed over rows and the query heads of a group this gives [groups, sinks, betas, alphas]: exactly the sum over
`~Span.visible`.

Why not a histogram over (query block, distance block)? Rules with beta = 0 mask all keys beyond a fixed distance, and
for them a histogram by distance is exact. For 0 < beta < 1 the boundary S(t) = alpha + floor(beta (t + 1)) moves
inside a block of rows: by up to 64 beta tokens from its first to its last row. The cells that the boundary crosses
are partly masked, and no cell knows which part; the error is of the order of the boundary cells themselves, which
for narrow windows is a large share of the loss. A table indexed by the rule has no such cells, and is smaller.

Joint effect. Summing E over the masked keys counts the renormalisation once per key, as if each were masked alone.
Masking the set M at once gives

    O' = sum_{n not in M} A_n V_n / (1 - a),  a = sum_{j in M} A_j
    O' - O = (O - sum_M A_j V_j - (1 - a) O) / (1 - a) = -sum_M A_j (V_j - O) / (1 - a)
    dO . (O' - O) = -sum_M A_j (g_j - delta) / (1 - a),

which is exact for the change of the output of this head and row, and first order in the loss. `influence.joint` is
the sum over rows and query heads of its absolute value: two prefix sums, of A and of A (g - delta). With one masked
key it is |E|.

Numerics. 1 - A_ij and g_ij - delta_i both vanish as A_ij -> 1. At most one key of a row has A > 1/2; for it they are
computed from the other keys: with r = sum_{n != j} A_n and w = sum_{n != j} A_n g_n, 1 - A_j = r and
g_j - delta = r g_j - w, without cancellation. delta is summed from the recomputed strip, not taken from dO * O: O
carries the rounding of the model's dtype, which 1 / (1 - A) would amplify. In `joint`, A (g - delta) sums to zero over
a row; the smaller of the masked and the visible part is used, and where next to nothing stays visible that is summed
by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from compress.profile.heads.base import Table
from compress.profile.heads.rule_table import MaskedKeys, RuleStatistic, masked_keys
from compress.profile.passes.tiles import Tile, prefix_sums
from compress.profile.statistic import Item, Sums
from compress.registry import statistics

if TYPE_CHECKING:
    from compress.plan import ModelShape

# Below this visible mass the float64 difference 1 - a has fewer digits than float32.
LEAST_VISIBLE = 1e-9

KINDS = ("absolute", "signed", "joint")


@statistics.register("influence")
class Influence(RuleStatistic):
    """Loss that each rule of a span grid costs each head group, to first order (needs a backward pass)."""

    needs_gradient: ClassVar[bool] = True
    unit: ClassVar[str] = "change of the mean answer cross-entropy, nats"
    gives: ClassVar[Mapping[str, str]] = {f"influence.{kind}": "rules" for kind in ("absolute", "signed", "joint")}

    def tables(self, shape: ModelShape, length: int) -> dict[str, Table]:
        """`absolute`, `signed` and `joint`, axes (layer, group, sink, beta, alpha)."""
        return {kind: self.rule_table(length) for kind in KINDS}

    def add(self, sums: Sums, tile: Tile, item: Item) -> None:
        """Price all rules on the rows of a tile; rules that mask nothing there cost nothing."""
        masked = list(masked_keys(self.grid, tile, tile.positions, item.length))
        if not masked:
            return
        influence, shift = row_influence(tile)
        groups, _, rows, columns = influence.shape
        heads_sum = tile.workspace.take("influence.heads", (groups, rows, columns))
        torch.sum(influence, 1, out=heads_sum)
        signed = prefix_sums(heads_sum, tile.workspace, "influence.signed")
        torch.sum(influence.abs_(), 1, out=heads_sum)
        absolute = prefix_sums(heads_sum, tile.workspace, "influence.absolute")
        shifts = prefix_sums(shift, tile.workspace, "influence.shift")
        mass = tile.prefix()
        for keys in masked:
            keys.add_to(sums["absolute"][tile.layer], keys.sums(absolute).sum(1))
            keys.add_to(sums["signed"][tile.layer], keys.sums(signed).sum(1))
            effect = joint_effect(tile.attention, shift, mass, shifts, keys)
            keys.add_to(sums["joint"][tile.layer], effect.sum((1, 2)))


def joint_effect(
    attention: torch.Tensor,
    shift: torch.Tensor,
    mass: torch.Tensor,
    shifts: torch.Tensor,
    keys: MaskedKeys,
) -> torch.Tensor:
    """|sum_M A (g - delta)| / (1 - sum_M A) for the masked columns M of every rule.

    Args:
        attention: `[G, Q, R, K]` float32.
        shift: `[G, Q, R, K]` float32 A (g - delta).
        mass: `[G, Q, R, K + 1]` prefix sums of `attention`, float64.
        shifts: `[G, Q, R, K + 1]` prefix sums of `shift`, float64.
        keys: what P rules mask in the R rows.

    Returns:
        `[G, Q, R, P]` float64.
    """
    masked = keys.sums(mass)
    moved = keys.sums(shifts)
    visible = mass[..., -1:] - masked
    # Rows in which nothing is masked keep moved = 0.
    effect = torch.where(masked < 0.5, moved, shifts[..., -1:] - moved).div_(visible).abs_()
    group, query, row = (visible < LEAST_VISIBLE).any(-1).nonzero(as_tuple=True)
    if len(row):
        # Differences of sums near 1 no longer hold what is visible: sum it alone, from the diagonal and the sinks.
        visible, moved = (
            prefix[group, query, row, keys.low][:, None]
            + _suffix_sums(values[group, query, row]).gather(1, keys.high[row])
            for prefix, values in ((mass, attention), (shifts, shift))
        )
        effect[group, query, row] = torch.where(keys.high[row] > keys.low, moved / visible, 0).abs()
    return effect


def _suffix_sums(values: torch.Tensor) -> torch.Tensor:
    """`[N, K]` -> float64 `[N, K + 1]`, the sum of the columns from each one on."""
    sums = values.flip(-1).cumsum(-1, dtype=torch.float64).flip(-1)
    return torch.nn.functional.pad(sums, (0, 1))


def row_influence(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """E and A (g - delta) of a tile, each `[G, Q, R, K]` float32 in the tile's scratch memory (0 where not visible).

    Where no other key is visible E is 0: such a key is the diagonal, which no rule masks.

    Raises:
        ValueError: the tile has no gradient.
    """
    if tile.gradient is None:
        raise ValueError("influence needs tiles with a gradient")
    attention, gradient = tile.attention, tile.gradient
    shift = tile.workspace.take("influence.values", tuple(attention.shape))
    ratio = tile.workspace.take("influence.ratio", tuple(attention.shape))
    flat_attention, flat_gradient = attention.view(-1), gradient.view(-1)

    large = (flat_attention > 0.5).nonzero().flatten()
    large_row = large // attention.shape[-1]
    large_attention, large_gradient = flat_attention[large], flat_gradient[large]
    flat_attention[large] = 0
    torch.mul(attention, gradient, out=shift)
    rest_gradient = shift.sum(-1)
    rest = attention.sum(-1).view(-1)[large_row]
    flat_attention[large] = large_attention

    delta = rest_gradient.clone()
    delta.view(-1)[large_row] += large_attention * large_gradient
    torch.sub(gradient, delta[..., None], out=ratio)
    torch.mul(attention, ratio, out=shift)
    shift.view(-1)[large] = large_attention * (rest * large_gradient - rest_gradient.view(-1)[large_row])
    torch.sub(1, attention, out=ratio)
    ratio.view(-1)[large] = rest.clamp(min=torch.finfo(torch.float32).tiny)
    torch.div(shift, ratio, out=ratio).neg_()
    return ratio, shift
