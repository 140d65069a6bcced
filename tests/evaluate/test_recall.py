"""Recall by generation: scoring, padding, the cache that was used, and Wilson's interval."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.data.continuation import Continuation
from compress.data.facts import Facts
from compress.data.passkey import PassKey
from compress.data.prompt import Prompt
from compress.data.text import tokenise
from compress.errors import UserError
from compress.evaluate.earlier import from_schema_1
from compress.evaluate.labels import distinct_labels
from compress.evaluate.measures.recall import Recall, RecallItem, RecallResult, is_right, recall
from compress.evaluate.paired import wilson
from compress.models.cache_bytes import cache_bytes
from compress.models.planned import planned_model
from compress.runtime.modeling_compress import CACHE
from tests.data.language import byte_model, byte_tokenizer, story
from tests.tiny import mixed_plan, shape_of

TEXT = tokenise(byte_tokenizer(), story())
TASK = PassKey(length=300, count=6)
PROMPTS = TASK.make(byte_tokenizer(), TEXT, 0)


class Rigged(torch.nn.Module):
    """Generates what it is told for each prompt, and records what it was asked."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers = answers
        self.batches: list[int] = []
        self.pads = set[int]()

    def get_input_embeddings(self) -> Rigged:
        return self

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> Any:
        assert options["use_cache"] and not options["do_sample"]
        self.batches.append(len(input_ids))
        self.pads.add(options["pad_token_id"])
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            written = self.answers[tuple(row[mask.bool()].tolist())]
            rows.append(torch.cat([row, torch.tensor(written + [0] * (options["max_new_tokens"] - len(written)))]))
        return SimpleNamespace(sequences=torch.stack(rows), logits=(torch.zeros(1),), **{CACHE: None})


def told(prompts: list[Prompt], change: int = 0) -> Rigged:
    """A model that answers with the number that is asked for, plus `change`."""
    return Rigged(
        {p.tokens: tokenise(byte_tokenizer(), f" {int(str(p.expected)) + change}") for p in prompts},
    )


def test_a_model_that_knows_gets_one_and_one_that_errs_gets_zero() -> None:
    right = recall(told(PROMPTS), byte_tokenizer(), TASK, PROMPTS)
    assert right.accuracy == 1.0
    assert [item.expected for item in right.items] == [prompt.expected for prompt in PROMPTS]
    assert [item.depth for item in right.items] == [prompt.depth for prompt in PROMPTS]
    wrong = recall(told(PROMPTS, change=1), byte_tokenizer(), TASK, PROMPTS)
    assert wrong.accuracy == 0.0
    assert all(str(int(item.expected) + 1) in item.answer for item in wrong.items)


def test_what_is_put_behind_an_answer_is_no_text() -> None:
    tokenizer = byte_tokenizer()
    for pad, eos, expected in (("<pad>", "</s>", 0), (None, "</s>", 2), (None, None, 0)):
        tokenizer.pad_token, tokenizer.eos_token = pad, eos
        model = told(PROMPTS)
        recall(model, tokenizer, TASK, PROMPTS)
        assert model.pads == {expected}


def test_batches_and_progress() -> None:
    model, steps = told(PROMPTS), []
    result = recall(model, byte_tokenizer(), TASK, PROMPTS, batch_size=4, progress=lambda *step: steps.append(step))
    assert (model.batches, steps, result.accuracy) == ([4, 2], [(4, 6), (6, 6)], 1.0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345", True),
        ("12345.\n", True),
        (" the number 12345!", True),
        (" 123456", False),
        (" 1234", False),
        (" 54321 12345", False),
        (" 012345", False),
        ("", False),
        (" none", False),
    ],
)
def test_only_the_first_whole_number_counts(answer: str, right: bool) -> None:
    assert is_right(answer, "12345") is right


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" Clara Norpel.\n\nThe", "Clara Norpel", True),
        (" clara  norpel", "Clara Norpel", True),
        (" Clara Norpels", "Clara Norpel", False),
        (" the otter. It", "otter", False),
        (" otters", "otter", False),
        (" 471-905-3382, and", "471-905-3382", True),
        (" 471-905-338", "471-905-3382", False),
        ("\n3. quiet lantern", "quiet lantern", False),
        ("", "otter", False),
    ],
)
def test_other_answers_stand_at_the_start(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right


@pytest.mark.parametrize("planned", [False, True])
def test_answers_are_those_of_generate_alone_and_in_left_padded_batches(planned: bool) -> None:
    model: Any = byte_model()
    if planned:
        model = planned_model(model, mixed_plan(shape_of(model)))
    uneven = [*PROMPTS[:2], *PassKey(length=271, count=1).make(byte_tokenizer(), TEXT, 0)]
    alone = recall(model, byte_tokenizer(), TASK, uneven)
    assert recall(model, byte_tokenizer(), TASK, uneven, batch_size=3).items == alone.items
    tokens = torch.tensor([uneven[0].tokens])
    written = model.generate(tokens, do_sample=False, max_new_tokens=uneven[0].budget)[0, tokens.shape[1] :]
    assert alone.items[0].answer == byte_tokenizer().decode(written, skip_special_tokens=True)


def test_cache_bytes_are_those_that_the_cache_holds() -> None:
    model: Any = byte_model()
    # No token may end the answer early: the last one that is written has not been cached.
    model.generation_config.eos_token_id = None
    dense = recall(model, byte_tokenizer(), TASK, PROMPTS[:2], batch_size=2)
    assert dense.cache_bytes == shape_of(model).dense_cost(299, 4).held_bytes
    plan = mixed_plan(shape_of(model))
    planned = planned_model(model, plan)
    planned.generation_config.eos_token_id = None
    held = recall(planned, byte_tokenizer(), TASK, PROMPTS[:1]).cache_bytes
    expected = plan.cost(299, 4).held_bytes
    # A window that does not start on a page boundary takes one page more; there are four groups.
    assert held is not None
    assert expected <= held <= expected + 4 * 64 * 2 * 8 * 4


def test_cache_without_tensors_has_no_bytes() -> None:
    assert cache_bytes(None) is None
    assert cache_bytes(SimpleNamespace(allocated_bytes=lambda: 640)) == 640


def test_a_task_without_a_right_answer_is_refused() -> None:
    task = Continuation(length=100, count=1, answer_tokens=4)
    with pytest.raises(UserError, match="no right answer"):
        recall(byte_model(), byte_tokenizer(), task, task.make(byte_tokenizer(), TEXT, 0))


def test_nan_is_an_error() -> None:
    model: Any = byte_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError):
        recall(model, byte_tokenizer(), TASK, PROMPTS[:1])


def test_wilson_interval() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson(45, 50) == pytest.approx((0.78640, 0.95652), abs=1e-5)
    with pytest.raises(ValueError):
        wilson(1, 0)
    with pytest.raises(ValueError):
        wilson(3, 2)


def test_by_depth() -> None:
    items = [
        RecallItem(depth=depth, expected="1", answer="1", correct=correct)
        for depth, correct in ((0.0, True), (0.1, False), (0.5, True), (1.0, True))
    ]
    result = RecallResult(task="passkey", length=100, items=items)
    parts = [(part.part.low, part.count, part.value) for part in result.cells() if part.part is not None]
    assert parts == [(0.0, 2, 0.5), (0.4, 1, 1.0), (0.8, 1, 1.0)]


def test_tasks_that_differ_only_in_a_setting_have_labels_of_their_own() -> None:
    natural = PassKey(length=256, count=2)
    tasks: list[Any] = [
        natural,
        natural.model_copy(update={"haystack": "filler"}),
        natural.model_copy(update={"digits": 7, "haystack": "filler"}),
        natural.model_copy(update={"length": 512}),
        Facts(length=900, count=2, kinds=("word",)),
        Facts(length=900, count=2, kinds=("word",), wordings="evaluation"),
    ]
    labels = distinct_labels([task.label for task in tasks], [task.model_dump() for task in tasks])
    assert labels == [
        *("passkey", "passkey, filler", "passkey, filler, digits 7", "passkey"),
        *("facts word", "facts word, evaluation"),
    ]
    assert "2 x passkey, filler of 256 tokens" in Recall(tasks=tuple(tasks)).words()


def test_an_evaluation_of_the_first_form_tells_two_tasks_of_one_name_apart() -> None:
    request = {"task": "passkey", "length": 256, "count": 1, "haystack": "natural"}
    result = {"task": "passkey", "length": 256, "items": []}
    value = {
        "schema": 1,
        "batch_size": 1,
        "recall": [request, request | {"haystack": "filler"}],
        "variants": [{"name": "dense", "recall": [result, result]}],
    }
    (row,) = from_schema_1(value)["variants"]
    assert [part["task"] for part in row["results"][1:]] == ["passkey", "passkey, filler"]
