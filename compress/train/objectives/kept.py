"""Holds what heads that keep tokens keep at what the plan expects: the loss of DMS, on one side only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from compress.limits import FACTOR, LONGEST
from compress.registry import objectives
from compress.runtime.span import Span
from compress.runtime.step import Keeping, Record
from compress.train.objectives.objective import Inputs, Objective, tokens_of

LEAST = 1e-3  # share below which the excess is not measured in shares of the plan's


def share_that_leaves(span: Span, length: int | None) -> float:
    """Of `length` tokens, those behind the sink that have left the window, as a share; None takes very many tokens."""
    if length is None:
        return 1 - span.beta
    return max(0, int(span.boundary(length - 1)) - span.sink) / length


@objectives.register("kept")
class Kept(Objective):
    """How much more is kept than the plan expects, as a share of that: max(0, kept / expected - 1) a token.

    Dynamic memory sparsification (DMS, arXiv 2506.05345) has the same loss of one side. What counts is what the rule
    keeps, also in passes that keep tokens softly; so a training that starts with the thresholds of a preparation starts
    with no excess to speak of. Both are means over the tokens of a pass that have left their windows, padding left out,
    and over head groups by the bytes that they hold of long texts, so that groups are free to keep more where others
    keep less. Head groups without a threshold are left out.
    """

    weight: float = Field(0.3, ge=0, le=FACTOR, description="weight in the sum of losses; 0 only records it")

    by: Literal["plan", "group"] = Field(
        "plan", description="what is held: the bytes of the whole plan, or the share of every head group by itself"
    )
    at: int | None = Field(
        None,
        ge=1,
        le=LONGEST,
        description="length in tokens at which bytes are counted; null takes texts that are long beside all windows",
    )

    of_keeping: ClassVar[bool] = True
    unit: ClassVar[str] = "share of what the plan expects to be kept"

    def count(self, inputs: Inputs) -> int:
        """Tokens that are no padding."""
        return tokens_of(inputs)

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """The excess in a pass times its tokens.

        Args:
            student: `record` of the pass.

        Raises:
            ValueError: no layer keeps tokens.
        """
        record: Record = student["record"]
        if not record.keeping:
            raise ValueError(f"`{self.registered}` is a loss of heads that keep tokens, and no layer of the model has")
        kept, expected = self.shares(each for layer in record.keeping.values() for each in layer)
        if self.by == "plan":
            kept, expected = kept.sum(0, keepdim=True), expected.sum(0, keepdim=True)
        excess = (kept / expected.clamp(min=LEAST) - 1).clamp(min=0)
        total: torch.Tensor = self.count(inputs) * (excess.mean() if len(excess) else excess.sum())
        return total

    def shares(self, keepings: Iterable[Keeping]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept and what is expected of each head group that has a threshold and tokens that left its window,
        `[groups]`, times the share of tokens that leave it."""
        kept, expected = [], []
        for each in keepings:
            count = each.gone.sum((0, 2))
            free = torch.tensor([threshold is not None for threshold in each.thresholds], device=count.device)
            leave = count.new_tensor([share_that_leaves(span, self.at) for span in each.spans], dtype=torch.float32)
            weight = leave * (free & (count > 0))
            mean = (each.kept * each.gone).sum((0, 2)) / count.clamp(min=1)
            kept.append((weight * mean)[weight > 0])
            expected.append((weight * weight.new_tensor(each.shares))[weight > 0])
        device = kept[0].device
        return tuple(torch.cat([part.to(device) for part in parts]) for parts in (kept, expected))  # type: ignore[return-value]
