"""The mixer of `strided` groups, in plain PyTorch: a ring of the last tokens, and every so many tokens for good."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from compress.runtime.mixer import Mixer, State, register
from compress.runtime.step import Step


class StridedState(State):
    """Of every group g `near_g`, where the token at position p lies in slot p % window, and `far_g`, in p // stride.

    Both hold keys and values, `[B, 2, slots, D]`.

    Args:
        rules: window and stride of every group.
    """

    def __init__(self, rules: Sequence[tuple[int, int]], max_length: int | None) -> None:
        self.rules = rules
        super().__init__(max_length)

    def begin(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Empty rings; what is kept for good has its room reserved, or grows."""
        super().begin(key, value)
        for group, (window, stride) in enumerate(self.rules):
            kept = -(-(self.max_length or 0) // stride)
            for name, slots in ((f"near_{group}", window), (f"far_{group}", kept)):
                self.tensors[name] = value.new_zeros(key.shape[0], 2, slots, key.shape[-1])

    def advance(self, gains: Sequence[int]) -> None:
        """Count the tokens, and make room for those that stay."""
        super().advance(gains)
        for group, (_, stride) in enumerate(self.rules):
            kept = self.tensors[f"far_{group}"]
            more = -(-max(self.lengths) // stride) - kept.shape[2]
            if more > 0:
                room = kept.new_zeros(kept.shape[0], 2, more, kept.shape[3])
                self.tensors[f"far_{group}"] = torch.cat([kept, room], dim=2)

    def positions(self, group: int, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of what the slots of a group hold of sequences `[B]`, `[B, slots]` twice; below 0 for nothing."""
        window, stride = self.rules[group]
        slots = torch.arange(window, device=lengths.device)
        near = slots + torch.div(lengths[:, None] - 1 - slots, window, rounding_mode="floor") * window
        far = torch.arange(self.tensors[f"far_{group}"].shape[2], device=lengths.device) * stride
        return near, torch.where(far < lengths[:, None], far, -1)

    def store(self, group: int, tokens: torch.Tensor, t: torch.Tensor) -> None:
        """Keep what has to be kept of new tokens `[B, 2, T, D]` at positions t `[B, T]`, below 0 for padding."""
        window, stride = self.rules[group]
        last = t > t.amax(dim=1, keepdim=True) - window
        for name, kept, slot in (("near", last, t % window), ("far", t % stride == 0, t // stride)):
            row, column = (kept & (t >= 0)).nonzero(as_tuple=True)
            self.tensors[f"{name}_{group}"][row, :, slot[row, column]] = tokens[row, :, column]


@register("strided")
class StridedMixer(Mixer):
    """Softmax attention over the last tokens and over every so many of those before them."""

    def state(self, max_length: int | None) -> StridedState:
        """Rings and what is kept for good."""
        return StridedState([(group["window"], group["stride"]) for group in self.groups], max_length)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: StridedState | None,
        step: Step,
        *,
        scale: float | None,
        dropout: float,
    ) -> torch.Tensor:
        """As `Mixer.prefill`."""
        t = step.positions(query.device)
        past = None if step.rows is None else step.rows.tensor(query.device)[:, 0].long()
        padding = (t < 0)[:, None, :, None]
        query, key, value = (tensor.masked_fill(padding, 0) for tensor in (query, key, value))
        if past is None:  # a step of one token
            past = t[:, 0].clamp(min=0)
        if state is not None and step.gains is not None:
            state.advance(step.gains)
        size, outputs = self.facts.group_size, []
        for number, group in enumerate(self.groups):
            window, stride = group["window"], group["stride"]
            tokens = torch.stack([key[:, number], value[:, number]], dim=1)  # [B, 2, T, D]
            at, of = t[:, :, None], t[:, None, :]
            seen = (of >= 0) & (of <= at) & ((at - of < window) | (of % stride == 0))
            held = tokens
            if state is not None:
                near, far = (positions[:, None] for positions in state.positions(number, past))
                seen_near = (near >= 0) & (at - near < window)
                seen_far = (far >= 0) & (at - far >= window)
                seen = torch.cat([seen_near & (at >= 0), seen_far, seen], dim=2)
                held = torch.cat([state.tensors[f"near_{number}"], state.tensors[f"far_{number}"], tokens], dim=2)
                state.store(number, tokens.detach(), t)
            out = scaled_dot_product_attention(
                query[:, number * size : (number + 1) * size],
                held[:, :1],
                held[:, 1:],
                attn_mask=seen[:, None],
                dropout_p=dropout,
                scale=scale,
                enable_gqa=True,
            )
            outputs.append(out.masked_fill(~seen[:, None].any(-1, keepdim=True), 0))
        return torch.cat(outputs, dim=1).transpose(1, 2)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: StridedState,
        step: Step,
        *,
        scale: float | None,
    ) -> torch.Tensor:
        """As `Mixer.decode`."""
        return self.prefill(query, key, value, state, step, scale=scale, dropout=0.0)
