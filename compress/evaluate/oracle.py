"""KVzip and KVzip+ as an evaluation: scores from two further passes over a text, and answers under the mask they give.

Such a compression takes place behind the prompt (arXiv 2505.23416): the text is read dense, every head group keeps the
tokens that the repetition of the text looks at most, with one threshold over all layers and groups, and what is asked
afterwards sees those and itself. So the text has one pass, and the questions of every mask are rows of the same pass.

The same scores can be given to the heads of a `retain` plan, which then keep what the repetition looks at while the
text is read: what these heads lose is what the rule costs, and what trained scorers lose beyond that is their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch.nn import functional

from compress.evaluate.logits import logits_of_output
from compress.models.families import attentions_of, layers_of
from compress.models.placement import input_device
from compress.models.reconstruction import SINKS, Consume, Reconstruct, TokenScores
from compress.models.replaced import AttentionCall, causal_attention, replaced_attention
from compress.runtime.reference import masked
from compress.runtime.scorers import Scorer

NAME = "compress_oracle"


@dataclass(frozen=True)
class OracleScores:
    """What the repetition of a text looks at, `[layers, groups, tokens]` float32 on the model's device.

    Infinite are sinks, what the tokenizer puts before the text, and layers that slide by themselves.

    Attributes:
        weight: scores of KVzip; moved: of KVzip+.
    """

    weight: torch.Tensor
    moved: torch.Tensor


def oracle_scores(
    model: Any, repeat: Reconstruct, tokens: Sequence[int], groups: int, beside: Consume = lambda scores: None
) -> OracleScores:
    """Have the model repeat a text, and collect the scores of its tokens.

    Args:
        repeat: of `models.reconstruction.reconstructing`.
        groups: head groups of a layer.
        beside: is handed every layer's scores, too.
    """
    device = input_device(model)
    found = torch.full((2, len(layers_of(model)), groups, len(tokens)), torch.inf, device=device)

    def take(scores: TokenScores) -> None:
        count = scores.weight.shape[1]  # of the text's last tokens, where something stands before them
        for place, values in enumerate((scores.weight, scores.moved)):
            found[place, scores.layer, :, len(tokens) - count :] = values
        beside(scores)

    repeat(tokens, take)
    found[..., :SINKS] = torch.inf
    return OracleScores(found[0], found[1])


def kept_at(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Which tokens one threshold over all layers and groups keeps, bool as `scores`: so many as the share says."""
    flat = scores.flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(round(share * flat.numel())).indices] = True
    return kept.view(scores.shape)


@torch.inference_mode()
def likely_behind(
    model: Any, text: Sequence[int], pieces: Sequence[Sequence[int]], kept: Sequence[torch.Tensor | None]
) -> list[list[list[int]]]:
    """For every mask and piece, the most likely tokens behind each of the piece's tokens; arguments as of `_behind`."""
    found = []
    for logits in _behind(model, text, pieces, kept):
        rows = [token for part in logits for token in part.argmax(-1).tolist()]
        ends = [*accumulate(map(len, pieces))]
        found.append([rows[end - len(piece) : end] for end, piece in zip(ends, pieces, strict=True)])
    return found


@torch.inference_mode()
def losses_behind(
    model: Any, text: Sequence[int], piece: Sequence[int], kept: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """For every mask -ln p of the piece's tokens but the first, float64 on the CPU; arguments as of `_behind`."""
    found = []
    targets = torch.tensor(list(piece), device=input_device(model))
    for logits in _behind(model, text, [piece], kept):
        losses, start = [], 1
        for part in logits:
            right = targets[start : start + len(part)]
            losses.append(functional.cross_entropy(part[: len(right)].float(), right, reduction="none").double().cpu())
            start += len(part)
        found.append(torch.cat(losses))
    return found


def _behind(
    model: Any, text: Sequence[int], pieces: Sequence[Sequence[int]], kept: Sequence[torch.Tensor | None]
) -> Iterator[Iterator[torch.Tensor]]:
    """Logits of pieces, each of which stands directly behind `text` and sees what is kept of it, and itself.

    Args:
        model: dense, of a supported family.
        text: token ids; every head group sees all of it while it is read.
        pieces: token ids of each.
        kept: for every mask `[layers, groups, len(text)]` bool; None keeps all.

    Yields:
        For every mask the logits of all pieces' tokens, `[rows, vocabulary]` for some rows after the other.
    """
    device = input_device(model)
    row = [token for piece in pieces for token in piece]
    tokens = torch.tensor([*text, *row * len(kept)], device=device)
    own = torch.cat([torch.arange(len(piece)) for piece in pieces]) + len(text)
    positions = torch.cat([torch.arange(len(text)), own.repeat(len(kept))]).to(device)
    attention = _Behind(len(text), [len(piece) for piece in pieces], kept, positions)
    with replaced_attention(model, NAME, attention.attend):
        output = model.get_decoder()(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
    for mask in range(len(kept)):
        start = len(text) + mask * len(row)
        parts = logits_of_output(model, output, tokens, range(start, start + len(row)))
        yield (logits for _, logits in parts)


class _Behind:
    """Attention of a text, and of rows behind it by mask."""

    def __init__(
        self, length: int, sizes: Sequence[int], kept: Sequence[torch.Tensor | None], positions: torch.Tensor
    ) -> None:
        self.length, self.rows, self.kept, self.positions = length, sum(sizes), kept, positions
        piece = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(positions.device)
        order = torch.arange(self.rows, device=positions.device)
        self.own = (piece[:, None] == piece) & (order[:, None] >= order)

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The layer's outputs `[1, H, N, D]`."""
        dtype, end = call.value.dtype, self.length
        call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
        query, key, value = (tensor[:, :, :end] for tensor in (call.query, call.key, call.value))
        outputs = [causal_attention(query, key, value, call.scaling, call.window, call.scores)]
        groups, size = call.key.shape[1], call.query.shape[1] // call.key.shape[1]
        for mask, kept in enumerate(self.kept):
            low = end + mask * self.rows
            here = slice(low, low + self.rows)
            key, value = (torch.cat([x[:, :, :end], x[:, :, here]], 2) for x in (call.key, call.value))
            old = (
                torch.ones(groups, end, dtype=torch.bool, device=self.own.device) if kept is None else kept[call.layer]
            )
            seen = torch.cat(
                [old[:, None].expand(-1, self.rows, -1), self.own.expand(groups, -1, -1)], dim=2
            )  # [G, rows, keys]
            if call.window is not None:
                at = torch.cat([self.positions[:end], self.positions[here]])
                seen = seen & (self.positions[here][:, None] - at < call.window)
            by_head = seen.repeat_interleave(size, dim=0)[None].to(key.device)
            outputs.append(masked(call.query[:, :, here], key, value, by_head, call.scaling, 0.0, call.scores)[0])
        return torch.cat(outputs, 2)


class Given(Scorer):
    """Scores that are given for the tokens of one text; what comes behind it is always kept.

    Args:
        scores: `[G, tokens]`.
    """

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__(len(scores), 0, 0)
        self.scores = scores

    def forward(
        self, hidden: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `Scorer.forward`."""
        length = self.scores.shape[1]
        found = self.scores[:, positions.clamp(max=length - 1)].transpose(0, 1)  # [B, G, T]
        return found.masked_fill(positions[:, None] >= length, torch.inf).float()


def give_scores(planned: Any, scores: torch.Tensor) -> None:
    """Let the heads of a plan with `retain` in every group judge tokens by given scores, `[layers, groups, tokens]`."""
    for attention, rows in zip(attentions_of(planned), scores, strict=True):
        for mixer, members in zip(attention.compress_kinds.mixers, attention.compress_kinds.members, strict=True):
            mixer.scorer, mixer.needs_inputs = Given(rows[list(members)]), False
