"""Tokens that a tokenizer has and a model has no embedding for: found before they end a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.errors import UserError


def check_vocabulary(tokenizer: Any, config: Any, where: str) -> list[str]:
    """A line for special tokens of the tokenizer that the model has no embedding for.

    Some models have them: Gemma 3's tokenizer has one for images, the text models do not.

    Raises:
        UserError: tokens of ordinary text are among them.
    """
    size = int(config.vocab_size)
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    if not beyond:
        return []
    special = set(tokenizer.all_special_tokens) | {
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    plain = sorted(set(beyond) - special, key=lambda token: beyond[token])
    if plain:
        raise UserError(
            f"the tokenizer has {len(beyond):,} tokens that the model has no embedding for",
            where=where,
            expected=f"token numbers below {size:,}, the vocab_size of config.json",
            found=", ".join(f"{token!r}: {beyond[token]:,}" for token in plain[:3]),
            fix="take the tokenizer of this model, or enlarge the model once: "
            "model.resize_token_embeddings(len(tokenizer)), and train the new rows",
        )
    names = ", ".join(sorted(beyond)[:3])
    return [f"special tokens of the tokenizer have no embedding in the model and must not occur in a text: {names}"]


def check_tokens(tokens: Sequence[int], config: Any, where: str) -> None:
    """Raise UserError where a text has tokens that the model has no embedding for; `where` names the text."""
    largest = max(tokens, default=0)
    if largest >= int(config.vocab_size):
        raise UserError(
            "the text has a token that the model has no embedding for",
            where=where,
            expected=f"token numbers below {config.vocab_size:,}, the vocab_size of config.json",
            found=f"{largest:,}, at token {list(tokens).index(largest):,} of the text",
            fix="take special tokens such as those for images out of the text",
        )
