"""lm-eval's model class around ours, that refuses what it would cut. Imports lm-eval, so it is imported late."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from lm_eval.models.huggingface import HFLM

from compress.errors import UserError


class Strict(HFLM):
    """Refuses inputs that are too long; lm-eval would cut them on the left and so remove what a suite has hidden."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # The paged cache and the dense one are compared as they are; a cache of logits by prefix would hide them.
        with contextlib.redirect_stderr(io.StringIO()):
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, logits_cache=False)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for _, context, continuation in requests:
            self._fits(len(context) + len(continuation) - 1)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings: Any, *args: Any, left_truncate_len: Any = None, **kwargs: Any) -> Any:
        encoded = super().tok_batch_encode(strings, *args, **kwargs)
        self._fits(int(encoded[1].sum(dim=1).max()), left_truncate_len)
        return encoded

    def _fits(self, tokens: int, most: int | None = None) -> None:
        most = self.max_length if most is None else most
        if tokens > most:
            raise UserError(
                "an input is longer than the model's context, and inputs are never shortened",
                expected=f"at most {most} tokens before the answer",
                found=f"{tokens} tokens",
                fix="use a shorter task, or a model with a longer context",
            )
