"""A dense model on a part of a sequence: attention over what other processes hold, and what passes through it here."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from compress.errors import UserError
from compress.models.context.exchange import Part
from compress.models.replaced import AttentionCall
from compress.runtime.mixer_span import attend_view
from compress.runtime.shard import View
from compress.runtime.span import own_span


def views_of(part: Part, key: torch.Tensor, value: torch.Tensor, window: int | None) -> list[tuple[View, torch.Tensor]]:
    """What the segments here see of all keys and values `[B, G, T, D]`, side by side, in a layer with that window."""
    return part.views(torch.cat([key, value], dim=-1), (own_span(window),) * key.shape[1])


def shared_attention(call: AttentionCall, part: Part) -> torch.Tensor:
    """`AttentionCall.dense` of the tokens here, `[B, H, T, D]`."""
    views = views_of(part, call.key, call.value, call.window)
    options: dict[str, Any] = {"scale": call.scaling, "scores": call.scores}
    parts = zip(part.split(call.query, 2), views, strict=True)
    return torch.cat([attend_view("auto", query, view, both, **options) for query, (view, both) in parts], dim=2)


class SharedSample:
    """A sample of which this process passes its part through a model: with the face that passes over samples need.

    Behind a sample that does not divide among the processes there is padding, which no token of it sees.

    Args:
        sample: of tokens (`data.sample.TextSample`).
        part: of its tokens and the padding.

    Attributes:
        length: tokens here, padding included.
        whole: tokens of the sample.

    Raises:
        UserError: a sample of something else.
    """

    def __init__(self, sample: Any, part: Part) -> None:
        if sample.unit != "tokens":
            raise UserError(
                "samples that are no text cannot be shared by processes",
                where="profile.context",
                expected="samples of tokens",
                found=f"of {sample.unit}",
                fix="set it to 1",
            )
        self.sample, self.part, self.whole = sample, part, int(sample.length)
        self.length = part.length // part.layout.world

    def real(self, device: torch.device) -> torch.Tensor:
        """Which columns are tokens of the sample, `[T]`."""
        return self.part.positions(device) < self.whole

    def body(self, device: torch.device) -> dict[str, Any]:
        """As `Sample.body`."""
        given = self.sample.body(device)
        here = self.part.positions(device)
        ids = functional.pad(given["input_ids"], (0, self.part.length - self.whole))
        return {**given, "input_ids": ids[:, here], "position_ids": here[None]}

    def _rows(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of the loss are here, and their columns."""
        rows = self.sample.inputs(device)["logits_to_keep"]
        column = torch.full((self.part.length,), -1, device=device)
        column[self.part.positions(device)] = torch.arange(self.length, device=device)
        found = column[rows]
        return found >= 0, found[found >= 0]

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """As `Sample.inputs`."""
        return self.body(device) | {"logits_to_keep": self._rows(device)[1]}

    def loss(self, output: Any) -> tuple[torch.Tensor, int]:
        """The sum over the rows that are here, and the number of all rows."""
        logits = output.logits[0]
        targets = self.sample.targets(logits.device)
        own = targets[self._rows(logits.device)[0]]
        return functional.cross_entropy(logits.float(), own, reduction="sum"), len(targets)
