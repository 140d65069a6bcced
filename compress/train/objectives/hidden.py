"""What softmax attention gives to the keys that a head does not see any more, and how far a state is from that.

The attention of a query over all keys and that over the keys in sight, each a mean with its log-sum-exp, say all about
the rest: no weight of a single key is needed. With the share p of the attention that hidden keys have, the divergence
of a hybrid head's weights from the softmax is KL(p || share of its state) + p KL(weights of the hidden keys), by the
chain rule. The objectives of linear heads are forms of these two terms; the window can make neither of them smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from compress.errors import UserError

Mass = Literal["divergence", "log"]
SMALLEST = 1e-6  # share of the attention below which its logarithm is rounding


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Hidden:
    """The hidden keys' part of softmax attention, `[B, H, T]` each in float32, and that of a state.

    Attributes:
        some: whether anything is hidden from the query.
        share: p, of the attention; 0 where nothing is hidden.
        sums: p times the mean of the hidden values, `[B, H, T, Dv]`.
        log_mass: logarithm of the sum of exp(score) over hidden keys; 0 where nothing is hidden.
        window_lse: logarithm of the same over the keys in sight; -inf where there are none.
        state_mean: mean of the hidden values by the state's weights, `[B, H, T, Dv]`; 0 where nothing is hidden.
        state_log_mass: logarithm of the state's sum of weights, its gain included; 0 where nothing is hidden.
    """

    some: torch.Tensor
    share: torch.Tensor
    sums: torch.Tensor
    log_mass: torch.Tensor
    window_lse: torch.Tensor
    state_mean: torch.Tensor
    state_log_mass: torch.Tensor

    @classmethod
    def of(cls, parts: Any, teacher: Mapping[str, Any]) -> Hidden:
        """From the parts of hybrid heads and what full attention gives on the same queries, keys and values.

        Args:
            parts: `out` and `lse` of the softmax over the keys in sight, None for heads without one; `num`, `log_den`
                and `log_gain` of the state; as `runtime.merge.merge` takes them.
            teacher: `outputs` `[B, T, H, Dv]` and `lse` `[B, H, T]`, over all keys.

        Raises:
            UserError: the state is added to the softmax, so it has no mass of its own.
        """
        if parts.log_den is None:
            raise UserError(
                "the objective matches the mass of a state, and the target's state has none: it is added",
                where="prepare.objectives",
                expected="`transfer` for this target",
            )
        some = parts.log_den != float("-inf")
        full, lse = wide(teacher["outputs"]).transpose(1, 2), wide(teacher["lse"])
        if parts.out is None:
            window, window_lse = torch.zeros_like(full), torch.full_like(lse, float("-inf"))
        else:
            window, window_lse = wide(parts.out.detach()), wide(parts.lse.detach())
        seen = (window_lse - lse).clamp(max=0)  # logarithm of the share of the keys in sight
        share = (-torch.expm1(seen)).masked_fill(~some, 0)
        sums = full - torch.exp(seen)[..., None] * window
        log_mass = lse + share.clamp(min=SMALLEST).log()
        log_den = wide(parts.log_den).masked_fill(~some, 0)
        mean = wide(parts.num) * torch.exp(-log_den)[..., None]
        return cls(
            some,
            share,
            sums.masked_fill(~some[..., None], 0),
            log_mass.masked_fill(~some, 0),
            window_lse,
            mean.masked_fill(~some[..., None], 0),
            (log_den + parts.log_gain).masked_fill(~some, 0),
        )

    def mass_error(self, form: Mass) -> torch.Tensor:
        """How far the state's share of the attention is from p, `[B, H, T]`; 0 where nothing is hidden.

        `divergence` is KL(p || share of the state) in nats; `log` is the squared difference of the two log masses,
        which is felt where p is small as well, and is all there is where no key is in sight.
        """
        if form == "log":
            return (self.state_log_mass - self.log_mass).square().masked_fill(~self.some, 0)
        both = self.some & (self.window_lse != float("-inf"))
        logit = (self.state_log_mass - self.window_lse).masked_fill(~both, 0)
        p = self.share.masked_fill(~both, 0)
        cross = p * functional.softplus(-logit) + (1 - p) * functional.softplus(logit)
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        return (cross - entropy).masked_fill(~both, 0)

    def mean_error(self, least: float) -> torch.Tensor:
        """p times the squared error of the state's mean of the hidden values, `[B, H, T]`, the mean over their numbers.

        Args:
            least: below this share the error weighs p squared / `least`, since the mean of what has hardly any
                attention is known no better than outputs are rounded.
        """
        error = (self.share[..., None] * self.state_mean - self.sums).square().mean(-1)
        return error / self.share.clamp(min=least)
