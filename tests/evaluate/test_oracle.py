"""Answers behind a text under masks and through caches, against whole attention matrices and greedy decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from compress.data.questions import Question, QuestionedText
from compress.evaluate.asked import ask, asked_tokens, is_answered
from compress.evaluate.oracle import give_scores, kept_at, likely_behind, losses_behind, oracle_scores
from compress.models.planned import planned_model
from compress.models.reconstruction import SINKS, reconstructing
from compress.models.shape import shape_of
from compress.plan import uniform_plan
from compress.targets.retain import RetainGroup
from compress.targets.window import WindowGroup
from tests.tiny import random_ids, tiny_model, tiny_tokenizer

TEXT = random_ids(1, 211, 3)[0].tolist()
PIECES = [random_ids(1, size, size)[0].tolist() for size in (5, 9, 1)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("qwen2")


@torch.no_grad()
def naive(model: Any, piece: list[int], kept: torch.Tensor) -> torch.Tensor:
    """Logits of a piece behind the text, with whole matrices."""

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **others: Any) -> Any:
        groups, length = key.shape[1], key.shape[2]
        seen = torch.ones(length, length).tril().bool().repeat(groups, 1, 1)
        seen[:, len(TEXT) :, : len(TEXT)] &= kept[module.layer_idx][:, None]
        size = query.shape[1] // groups
        keys, values = (tensor.repeat_interleave(size, 1) for tensor in (key, value))
        logits = query.double() @ keys.double().mT * others["scaling"]
        logits = logits.masked_fill(~seen.repeat_interleave(size, 0), -torch.inf)
        return (logits.softmax(-1) @ values.double()).float().transpose(1, 2), None

    AttentionInterface.register("naive_behind", attention)
    model.set_attn_implementation("naive_behind")
    try:
        return model(torch.tensor([[*TEXT, *piece]]), use_cache=False).logits[0, len(TEXT) :]
    finally:
        model.set_attn_implementation("sdpa")


def test_what_stands_behind_a_text_sees_what_each_mask_keeps_of_it_and_itself(model: Any) -> None:
    layers, groups = model.config.num_hidden_layers, model.config.num_key_value_heads
    masks = torch.rand(2, layers, groups, len(TEXT), generator=torch.Generator().manual_seed(0)) < 0.2
    everything = torch.ones_like(masks[0])
    likely = likely_behind(model, TEXT, PIECES, [masks[0], None, masks[1]])
    losses = losses_behind(model, TEXT, PIECES[1], [masks[0], None, masks[1]])
    for number, kept in enumerate((masks[0], everything, masks[1])):
        expected = [naive(model, piece, kept) for piece in PIECES]
        assert likely[number] == [logits.argmax(-1).tolist() for logits in expected]
        own = torch.nn.functional.cross_entropy(expected[1][:-1], torch.tensor(PIECES[1][1:]), reduction="none")
        torch.testing.assert_close(losses[number], own.double(), rtol=1e-4, atol=1e-5)
    assert likely[0] != likely[1]


def test_layers_that_slide_by_themselves_keep_their_window() -> None:
    sliding = tiny_model("gemma2")
    text = random_ids(1, 150, 4)[0].tolist()
    with torch.no_grad():
        logits = sliding(torch.tensor([[*text, *PIECES[1]]]), use_cache=False).logits[0, len(text) :]
    assert likely_behind(sliding, text, [PIECES[1]], [None]) == [[logits.argmax(-1).tolist()]]
    own = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(PIECES[1][1:]), reduction="none")
    torch.testing.assert_close(losses_behind(sliding, text, PIECES[1], [None])[0], own.double(), rtol=1e-4, atol=1e-5)


def test_one_threshold_keeps_the_best_of_all_layers_and_groups_and_the_sinks(model: Any) -> None:
    with reconstructing(model, tiny_tokenizer(), 64) as repeat:
        found = oracle_scores(model, repeat, TEXT, model.config.num_key_value_heads)
    for scores in (found.weight, found.moved):
        assert scores.shape == (3, model.config.num_key_value_heads, len(TEXT))
        assert scores[..., :SINKS].isinf().all() and scores[..., SINKS:].isfinite().all()
        kept = kept_at(scores, 0.25)
        assert int(kept.sum()) == round(0.25 * scores.numel())
        assert kept[..., :SINKS].all() and scores[kept].min() >= scores[~kept].max()
    assert (kept_at(found.weight, 0.25) != kept_at(found.moved, 0.25)).any()


def test_sinks_are_those_of_the_text_where_a_chat_template_stands_before_it(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w40 w41 w42 w43 w44 {{ messages[0]['content'] }} w50 w51"
    with reconstructing(model, tokenizer, 64) as repeat:
        found = oracle_scores(model, repeat, TEXT, model.config.num_key_value_heads)
    for scores in (found.weight, found.moved):
        assert scores[..., :SINKS].isinf().all() and scores[..., SINKS:].isfinite().all()


def test_given_scores_decide_what_a_retain_plan_keeps(model: Any) -> None:
    shape = shape_of(model)
    group = RetainGroup(scorer="key_norm", sink=4, alpha=64, threshold=0.5)
    ids = torch.tensor([TEXT])
    kept = torch.zeros(shape.layers, shape.kv_heads, len(TEXT) - 20)
    with torch.no_grad():
        planned = planned_model(model, uniform_plan(shape, group))
        give_scores(planned, kept)
        window = planned_model(model, uniform_plan(shape, group.model_copy(update={"threshold": 1e9})))
        assert torch.equal(planned(ids).logits, window(ids).logits)  # what is behind the scores is in the window
        give_scores(planned, kept + 1)
        torch.testing.assert_close(planned(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        kept[1, 0, 70:80] = 1
        give_scores(planned, kept)
        assert not torch.equal(planned(ids).logits, window(ids).logits)


@pytest.mark.parametrize("planned", [False, True])
def test_an_answer_is_right_when_greedy_decoding_writes_it(model: Any, planned: bool) -> None:
    shape = shape_of(model)
    asked = planned_model(model, uniform_plan(shape, WindowGroup(sink=4, alpha=64, beta=0.0))) if planned else model
    questions = []
    for number, piece in enumerate(PIECES):
        prompt = torch.tensor([[*TEXT, *piece]])
        with torch.no_grad():
            written = asked.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = written[0, prompt.shape[1] :].tolist()
        if number == 1:
            answer[1] = (answer[1] + 1) % 50
        questions.append(Question("word", tuple(piece), tuple(answer), "", (0, 1)))
    text = QuestionedText(tuple(TEXT), tuple(questions))
    found = ask(asked, text)
    assert found.right == (True, False, True) and found.held > 0
    if not planned:
        likely = likely_behind(model, TEXT, [asked_tokens(question) for question in questions], [None])[0]
        assert [is_answered(question, row) for question, row in zip(questions, likely, strict=True)] == [*found.right]
