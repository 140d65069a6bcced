"""When tokens of an engine count as those of transformers (scripts/vllm_check.py)."""

from __future__ import annotations

import torch

from scripts import vllm_check
from scripts.vllm_check import Text, greedy
from tests.tiny import tiny_model


def test_tokens_are_the_same_up_to_one_that_is_as_good() -> None:
    text = Text([1, 2, 3])
    text.rivals = [None, 5, None]
    assert text.is_that_of([1, 2, 3]) and text.is_that_of([1, 5, 9])
    assert not text.is_that_of([1, 4, 3]) and not text.is_that_of([5, 2, 3]) and not text.is_that_of([1, 2, 4])
    assert not Text([1, 2]).is_that_of([1, 3]) and text == [1, 2, 3]


def test_a_rival_is_the_second_best_token_within_rounding() -> None:
    model = tiny_model("llama-gqa").eval()
    with torch.no_grad():  # a word that is as good as another one wherever that is best
        (plain,) = greedy(model, [[5, 6, 7]], 4)
        head = model.get_output_embeddings().weight
        twin = (plain[0] + 1) % head.shape[0]
        head[twin] = head[plain[0]]
    (text,) = greedy(model, [[5, 6, 7]], 4)
    assert not any(rival is not None for rival in plain.rivals)
    assert {text[0], text.rivals[0]} == {plain[0], twin} and vllm_check.ROUNDING < 1e-5
