"""How scores become weights where that is more than a softmax: capped scores (Gemma 2), an extra logit (GPT-OSS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .mixer import take


@dataclass(frozen=True)
class KernelScores:
    """Scores as the kernels take them.

    Attributes:
        cap: of `Scores`.
        by_head: `[H]`, the extra logits, or the biases of a sigmoid.
        score: number of the score function (triton_scores.py), 0 for the softmax.
    """

    cap: float | None = None
    by_head: torch.Tensor | None = None
    score: int = 0


@dataclass(frozen=True)
class Scores:
    """What a layer does with its scores before and in the softmax.

    Attributes:
        cap: a score s, scaled, becomes cap * tanh(s / cap); None leaves it.
        extra: `[H]`, for every query head a learned logit that takes part in each of its softmaxes, and that no value
            belongs to, so that the weights of the keys add up to less than one; None without.
    """

    cap: float | None = None
    extra: torch.Tensor | None = None

    @staticmethod
    def given(cap: float | None, extra: torch.Tensor | None) -> Scores | None:
        """From the arguments that attention is given; None where it is a plain softmax."""
        return None if cap is None and extra is None else Scores(cap, extra)

    def of(self, heads: Sequence[int]) -> Scores:
        """Those of some query heads."""
        return self if self.extra is None else Scores(self.cap, take(self.extra, heads, 0))

    @property
    def for_kernels(self) -> KernelScores | None:
        """For the kernels; None where they do not have it."""
        return KernelScores(self.cap, self.extra)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Scaled scores of any shape, within the cap."""
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The weights of the keys from scores within the cap, `[..., H, T, M]`; -inf for a key that is hidden."""
        if self.extra is None:
            return torch.softmax(logits, dim=-1)
        return torch.softmax(self._with_extra(logits), dim=-1)[..., :-1]

    def log_total(self, logits: torch.Tensor) -> torch.Tensor:
        """The logarithm of what `softmax` divides by, `[..., H, T]`."""
        return torch.logsumexp(logits if self.extra is None else self._with_extra(logits), dim=-1)

    def _with_extra(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., H, T, M + 1]`, the extra logit last."""
        assert self.extra is not None
        extra = self.extra.to(logits.dtype)[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, extra], dim=-1)

    def within(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Scaled scores `[..., H, T, M]` as they are compared: within the cap, and very low where a key is hidden."""
        # Not -inf: a query that sees no key would have NaN for weights and gradients.
        return self.capped(logits).masked_fill(~seen, torch.finfo(logits.dtype).min)

    def weights(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The weights of the keys from what `within` gives, zero where `seen` says that a key is hidden."""
        return self.softmax(logits).masked_fill(~seen, 0)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    scores: Scores,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    keep_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `scaled_dot_product_attention` with a boolean mask and grouped heads, and with these scores.

    Args:
        query: `[B, H, T, D]`.
        key, value: `[B, G, M, D]`.
        seen: broadcasts to `[B, H, T, M]`.
        scale: 1 / sqrt(D) when None.

    Returns:
        `[B, H, T, D]` in the dtype of the values, and if kept the log-sum-exp of every row `[B, H, T]` in float32 at
        least, before dropout and with the extra logit; -inf where nothing is seen.
    """
    group_size = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group_size, dim=1) for x in (key, value))
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = query.to(dtype) @ key.to(dtype).transpose(-1, -2)
    logits = scores.within(products * (query.shape[-1] ** -0.5 if scale is None else scale), seen)
    weights = functional.dropout(scores.weights(logits, seen), dropout)
    lse = scores.log_total(logits).masked_fill(~seen.any(-1), float("-inf")) if keep_lse else None
    return weights.to(value.dtype) @ value, lse
