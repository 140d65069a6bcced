"""How much every token of a text is looked at where the model repeats the text: the scores of KVzip and KVzip+.

KVzip (arXiv 2505.23416) asks the model to repeat its context, gives it the context's own tokens as the answer, and
scores a key by the largest weight that any query of the repetition has on it, over the query heads that share the key.
A text is repeated chunk by chunk, and the softmax of a score is over the sinks, the chunk and the repetition so far.
KVzip+ multiplies a weight by the size of what the value adds to the hidden state, |W_o v_j| of the query head, and
divides it by the size of the querying token's input.

Here the text and all repetitions are one input: every repetition sees the text and itself, and its positions follow the
text. So the text is read once and no cache is needed. Rows are taken in strips, so that no N x N matrix exists, and
layers are handed on one by one, so that the activations of one layer are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from compress.data.text import leading_tokens, tokenise
from compress.errors import UserError
from compress.models.families import layers_of
from compress.models.placement import input_device
from compress.models.pruning import output_projections
from compress.models.replaced import AttentionCall, causal_attention, replaced_attention

NAME = "compress_reconstruction"
CHUNK = 2048  # tokens that are repeated at once, as published
SINKS = 4  # tokens at the start that are always kept, and are in every softmax
LEAST = 1e-10  # score below which logarithms do not go on falling
OVERLAP = 8  # tokens of the chunk before, which tell a repetition where to start
FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
MARK = "the text"
Score = Literal["KVzip+", "KVzip"]
STRIP_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # of the float32 scores of one strip of rows


@dataclass(frozen=True)
class Chunk:
    """A part of the text, and the rows in which it is repeated.

    Attributes:
        keys: half-open range of its tokens in the input.
        rows: half-open range of the request and the repetition in the input.
    """

    keys: tuple[int, int]
    rows: tuple[int, int]


@dataclass(frozen=True)
class Repetition:
    """The input in which a text is repeated.

    Attributes:
        tokens: of what stands before the text, the text, and all requests with their repetitions.
        start: tokens before the text, those of a chat template or the tokenizer's own.
        end: where the text ends; every repetition has the positions from here on.
        chunks: of the text.
    """

    tokens: tuple[int, ...]
    start: int
    end: int
    chunks: tuple[Chunk, ...]

    @property
    def first(self) -> int:
        """The first token that is scored: neither a sink nor before the text."""
        return max(self.start, SINKS)

    def positions(self) -> torch.Tensor:
        """`[tokens]` int64."""
        parts = [torch.arange(self.end)]
        parts += [self.end + torch.arange(chunk.rows[1] - chunk.rows[0]) for chunk in self.chunks]
        return torch.cat(parts)


@dataclass(frozen=True)
class TokenScores:
    """The n scored tokens of a text in one layer. They are those of the text without the sinks.

    Attributes:
        layer: index of the layer.
        hidden: `[n, hidden size]`, the attention's input.
        key: `[G, n, D]` after RoPE, value: `[G, n, DV]`.
        positions: `[n]` int64, in the input.
        weight: `[G, n]` float32, KVzip's score: the largest weight that a query of the repetition has on the token.
        moved: `[G, n]` float32, KVzip+'s: the same of weights times |W_o v| over the norm of the query's input.
    """

    layer: int
    hidden: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    weight: torch.Tensor
    moved: torch.Tensor

    def on(self, device: torch.device) -> TokenScores:
        """The same on a device."""
        values: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: value.to(device) for name, value in values.items()})

    def without_last(self, count: int) -> TokenScores:
        """Without so many tokens at the end, but with half of them at least."""
        kept = len(self.hidden) - min(count, len(self.hidden) // 2)
        by_group = {name: getattr(self, name)[:, :kept] for name in ("key", "value", "weight", "moved")}
        return replace(self, hidden=self.hidden[:kept], positions=self.positions[:kept], **by_group)

    def wanted(self, score: Score = "KVzip+") -> torch.Tensor:
        """`[G, n]` float32, what a scorer is to give: the logarithm of a score, at least that of `LEAST`."""
        return {"KVzip+": self.moved, "KVzip": self.weight}[score].clamp(min=LEAST).log()


Consume = Callable[[TokenScores], None]


class Reconstruct(Protocol):
    """Has the model repeat a text, and hands on the scores layer by layer."""

    def __call__(self, tokens: Sequence[int], consume: Consume, *, repeated: bool = True) -> None:
        """Read the tokens of a text.

        Args:
            consume: called with the scores of one layer after the other.
            repeated: False reads the text alone, whose scores are then 0.
        """


class Request:
    """What asks a model to repeat a text, in the words of its chat template where it has one.

    Args:
        tokenizer: of the model.
        chunk: tokens that are repeated at once.

    Raises:
        UserError: the chat template cannot be used, or the tokenizer fails.
    """

    def __init__(self, tokenizer: Any, chunk: int = CHUNK) -> None:
        before, behind = _frame(tokenizer)
        self.chunk = chunk
        self._leading = tuple(leading_tokens(tokenizer))
        self._before = tuple(tokenise(tokenizer, before)) if before else ()
        self._behind = tuple(tokenise(tokenizer, behind))
        self._first, self._later = tuple(tokenise(tokenizer, FIRST)), tuple(tokenise(tokenizer, LATER))

    def of(self, tokens: Sequence[int], *, repeated: bool = True) -> Repetition:
        """The input that repeats a text.

        Args:
            tokens: of the text; what the tokenizer itself or the chat template puts before a text may be among them.
            repeated: False for the text alone, as it stands there.
        """
        text, leading = tuple(tokens), self._leading
        before = self._before
        if before and text[: len(before)] == before:
            text = text[len(before) :]
        elif leading and text[: len(leading)] == leading:
            text, before = text[len(leading) :], before or leading
        start, end = len(before), len(before) + len(text)
        whole, chunks = list(before + text), []
        for low in range(0, len(text), self.chunk) if repeated else ():
            part = text[low : low + self.chunk]
            asked = self._later + text[max(0, low - OVERLAP) : low] if low else self._first
            row = len(whole)
            whole += asked + self._behind + part
            chunks.append(Chunk((start + low, start + low + len(part)), (row, len(whole))))
        return Repetition(tuple(whole), start, end, tuple(chunks))


def _frame(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes before and behind what a user says, up to where the answer starts."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    said = [{"role": "user", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    except Exception as error:  # a template is a program of the model's publisher, and may raise anything
        text, found = "", (str(error).strip() or type(error).__name__).splitlines()[0]
    else:
        found = f"what a user says stands {text.count(MARK)} times in what it writes"
    if text.count(MARK) != 1:
        raise UserError(
            "the model's chat template cannot ask for a text to be repeated",
            where="tokenizer.chat_template",
            expected="a template that writes the message of one user once",
            found=found,
            fix="correct the template, or remove it: without one the text is repeated behind a line break",
        )
    before, behind = text.split(MARK)
    return before, behind


@contextmanager
def reconstructing(model: Any, tokenizer: Any, chunk: int = CHUNK) -> Iterator[Reconstruct]:
    """While it is open, the function it gives has the model repeat a text and hands on the scores, layer by layer.

    Layers that slide by themselves are left out: what they keep is decided. The model is in eval mode meanwhile; on
    leaving all is as it was.

    Args:
        model: of a supported family, dense.
        chunk: tokens that are repeated at once; scores depend on it, since a softmax is over a chunk.

    Raises:
        UserError: a chat template that cannot be used; positions beyond those that the model has.
    """
    scorer = _Reconstruction(model, Request(tokenizer, chunk))
    with replaced_attention(model, NAME, scorer.attend, inputs=True):
        yield scorer.run


class _Reconstruction:
    def __init__(self, model: Any, request: Request) -> None:
        self.model, self.request = model, request

    @torch.no_grad()
    def run(self, tokens: Sequence[int], consume: Consume, *, repeated: bool = True) -> None:
        """See `Reconstruct`."""
        self._repetition, self._consume = self.request.of(tokens, repeated=repeated), consume
        device = input_device(self.model)
        ids = torch.tensor([self._repetition.tokens], device=device)
        positions = self._repetition.positions()[None].to(device)
        self._check_positions(int(positions.max()) + 1)
        self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False)

    def _check_positions(self, needed: int) -> None:
        """Refuse positions that a model with a table of them does not have."""
        most = getattr(self.model.config, "n_positions", None)
        if most is not None and needed > most:
            raise UserError(
                "the text and its repetition have more positions than the model",
                where="model",
                expected=f"at most {most:,}",
                found=f"{needed:,}",
                fix="take shorter documents, or a smaller `chunk`",
            )

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """The layer's outputs `[1, H, N, D]`; the text sees itself, a repetition sees the text and itself."""
        # Scores are float32 and outputs as a planned model's, whatever autocast and RoPE made of queries and keys.
        dtype = call.value.dtype
        call = replace(call, query=call.query.to(dtype), key=call.key.to(dtype))
        with torch.autocast(call.query.device.type, enabled=False):
            return self._attend(call)

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        plan = self._repetition
        query, key, value = (tensor[:, :, : plan.end] for tensor in (call.query, call.key, call.value))
        outputs = [causal_attention(query, key, value, call.scaling, call.window, call.scores)]
        scored = call.window is None
        groups = call.key.shape[1]
        size = (groups, call.query.shape[1] // groups, plan.end)
        weight, moved = (torch.zeros(size, device=call.query.device) for _ in range(2))
        for chunk in plan.chunks:
            low, high = chunk.keys
            for output, weights, norms in self._strips(call, chunk, scored):
                outputs.append(output)
                if scored:
                    best = weights.amax(2)
                    weight[..., low:high] = torch.maximum(weight[..., low:high], best)
                    best = weights.div_(norms[:, None]).amax(2)
                    moved[..., low:high] = torch.maximum(moved[..., low:high], best)
        if scored:
            moved *= self._value_norms(call)[..., : plan.end]
            taken = slice(plan.first, plan.end)
            assert call.hidden is not None
            self._consume(
                TokenScores(
                    call.layer,
                    call.hidden[0, taken],
                    call.key[0, :, taken],
                    call.value[0, :, taken],
                    torch.arange(plan.first, plan.end, device=call.query.device),
                    weight[..., taken].amax(1),
                    moved[..., taken].amax(1),
                )
            )
        return torch.cat(outputs, 2)

    def _strips(
        self, call: AttentionCall, chunk: Chunk, scored: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Strips of the rows that repeat a chunk: outputs `[1, H, rows, D]`, their weights on the chunk
        `[G, Q, rows, keys]`, and the norms of their inputs `[rows]`; the last two only where they are `scored`."""
        assert call.hidden is not None
        query, key, value = call.query[0], call.key[0], call.value[0]
        heads, _, size = query.shape
        groups, end = key.shape[0], self._repetition.end
        first, last = chunk.rows
        most = STRIP_BYTES["cpu" if query.device.type == "cpu" else "cuda"]
        rows = max(1, most // (4 * heads * (end + last - first)))
        sinks = torch.arange(min(SINKS, chunk.keys[0]), device=query.device)
        for low in range(first, last, rows):
            high = min(low + rows, last)
            keys, values = (torch.cat([tensor[:, :end], tensor[:, first:high]], 1).float() for tensor in (key, value))
            part = query[:, low:high].float().mul(call.scaling).reshape(groups, -1, size)
            logits = (part @ keys.mT).view(groups, heads // groups, high - low, -1)
            if call.scores is not None:
                logits = call.scores.capped(logits)
            # Key columns have the positions 0 to end + high - first, and row i has end + i - first.
            at = torch.arange(end + low - first, end + high - first, device=query.device)
            distance = at[:, None] - torch.arange(logits.shape[-1], device=query.device)
            hidden = distance < 0 if call.window is None else (distance < 0) | (distance >= call.window)
            logits.masked_fill_(hidden, -torch.inf)
            weights = _softmax(logits, call)
            output = weights.flatten(1, 2) @ values
            output = output.view(1, heads, high - low, -1).to(call.value.dtype)
            norms = call.hidden[0, low:high].float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            if scored:
                chosen = torch.cat(
                    [
                        sinks,
                        torch.arange(*chunk.keys, device=query.device),
                        torch.arange(end, logits.shape[-1], device=query.device),
                    ]
                )
                weights = _softmax(logits[..., chosen], call)
                weights = weights[..., len(sinks) : len(sinks) + chunk.keys[1] - chunk.keys[0]]
            yield output, weights, norms

    def _value_norms(self, call: AttentionCall) -> torch.Tensor:
        """|W_o v_j| of every query head, `[G, Q, keys]` float32."""
        layer = layers_of(self.model)[call.layer]
        weight = output_projections(layer, self.model.config)[0].weight.float()
        value = call.value[0, :, : self._repetition.end].float()
        heads = weight.view(weight.shape[0], value.shape[0], -1, value.shape[-1])
        reach = torch.einsum("ogqd,ogqe->gqde", heads, heads)  # W_o^T W_o, so that no value is spread to hidden size
        return torch.einsum("gtd,gqde,gte->gqt", value, reach, value).clamp(min=0).sqrt()


def _softmax(logits: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Weights of the keys from scores within their cap, `[G, Q, rows, keys]`."""
    if call.scores is None:
        return torch.softmax(logits, -1)
    return call.scores.softmax(logits.flatten(0, 1)).view(logits.shape)
