"""Prompts: exact lengths, evidence where it is said to be, seeds, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.data.continuation import Continuation
from compress.data.facts import Facts
from compress.data.key_value import KeyValue
from compress.data.kinds import KINDS, NEW_KINDS, REWORDED, VOCABULARIES
from compress.data.passkey import PassKey
from compress.data.passkeys import ASK, ORDINALS, PassKeys
from compress.data.questions import TASKS, questioned_texts
from compress.data.text import tokenise
from compress.errors import UserError
from compress.recipe.defaults import Defaults, Situation
from compress.registry import tasks
from tests.data.language import byte_tokenizer, story

ROOT = Path(__file__).parents[2]
TEXT = tokenise(byte_tokenizer(), story())
MADE: list[Any] = [
    PassKey(length=300, count=5),
    PassKey(length=301, count=3, haystack="filler", digits=7, answer_tokens=20),
    PassKey(length=257, count=2, answer="text"),
    KeyValue(length=500, count=4),
    KeyValue(length=500, count=2, lines=1),
    KeyValue(length=400, count=2, lines=2, form="register", haystack="filler"),
    KeyValue(length=600, count=3, lines=None, form="register"),
    Facts(length=700, count=9),
    Facts(length=640, count=3, kinds=("passage",), facts=1, answer="text"),
    Facts(length=900, count=12, wordings="evaluation", haystack="filler"),
    Continuation(length=200, count=4),
    Continuation(length=129, count=1, answer_tokens=100),
]
PASS_KEYS = PassKeys(length=900, count=3, keys=3, words=2)


def test_every_task_is_registered_under_its_name() -> None:
    for name, task in tasks.items():
        assert task.model_fields["task"].default == name
        assert all(field.description for field in task.model_fields.values())


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("task", MADE, ids=lambda task: task.model_dump_json(exclude_defaults=True))
def test_length_is_exact_and_evidence_is_the_needle(task: Any, begin: bool) -> None:
    tokenizer = byte_tokenizer(begin)
    prompts = task.make(tokenizer, TEXT, 0, context=2048)
    assert len(prompts) == task.count
    for prompt in prompts:
        assert prompt.length == task.length
        assert prompt.task == task.task
        assert (prompt.tokens[0] == 1) == begin
        document = prompt.answered(range(prompt.budget))
        assert document.length == task.length
        assert document.answer == (task.length - prompt.budget, task.length)
        if prompt.expected is None:
            assert not prompt.evidence
            continue
        ((start, end),) = prompt.evidence
        needle = tokenizer.decode(prompt.tokens[start:end])
        assert prompt.expected in needle
        text = tokenizer.decode(prompt.tokens)
        assert text.count(needle) == 1
        if task.task != "facts":
            assert needle.startswith(("The pass key is", "The number of the", "line "))
            assert "\n" not in needle
            assert text.rsplit("\n", 1)[1].endswith(" is")
        assert tokenizer.decode(prompt.reference).strip() == prompt.expected
        assert task.budget(prompt.reference) == prompt.budget


def test_all_keys_are_asked_for_in_their_order() -> None:
    tokenizer = byte_tokenizer()
    for prompt in PASS_KEYS.make(tokenizer, TEXT, 0, context=2048):
        document = prompt.answered(prompt.reference)
        assert document.length == PASS_KEYS.length and document.task == "passkeys" and prompt.expected is None
        text = tokenizer.decode(document.tokens)
        needles = [tokenizer.decode(document.tokens[start:end]) for start, end in document.evidence]
        keys = []
        for ordinal, needle in zip(ORDINALS[: PASS_KEYS.keys], needles, strict=True):
            found = re.fullmatch(rf"Here is the {ordinal} pass key to the vault: (\w+ \w+)\. Keep it\.", needle)
            assert found is not None and text.count(needle) == 1
            keys.append(found[1])
        asked = "\n".join(
            ASK.format(ordinal=ordinal).strip() + f" {key}." for ordinal, key in zip(ORDINALS, keys, strict=False)
        )
        assert text.endswith(asked) and tokenizer.decode(prompt.tokens).endswith(ASK.format(ordinal="first").strip())


def test_same_seed_same_prompts_other_seed_other_prompts() -> None:
    for task in (*MADE, PASS_KEYS):
        first = task.make(byte_tokenizer(), TEXT, 0)
        assert task.make(byte_tokenizer(), TEXT, 0) == first
        assert task.make(byte_tokenizer(), TEXT, "0/held_out") != first
        assert task.make(byte_tokenizer(), TEXT, 1) != first


def test_depths_are_spread_evenly_and_the_needle_lies_there() -> None:
    task = PassKey(length=1000, count=8, depth=(0.2, 0.6))
    prompts = task.make(byte_tokenizer(), TEXT, 3)
    depths = [prompt.depth or 0.0 for prompt in prompts]
    assert sorted(depths) == pytest.approx([0.2 + 0.4 * (i + 0.5) / 8 for i in range(8)])
    assert depths != sorted(depths)
    for prompt in prompts:
        room = 1000 - prompt.budget - (prompt.evidence[0][1] - prompt.evidence[0][0])
        assert prompt.evidence[0][0] / room == pytest.approx(prompt.depth, abs=0.04)


def test_depth_zero_and_one_are_the_ends() -> None:
    for depth in (0.0, 1.0):
        (prompt,) = PassKey(length=400, count=1, depth=(depth, depth)).make(byte_tokenizer(True), TEXT, 0)
        text = byte_tokenizer().decode(prompt.tokens)
        place = text.index("The pass key is")
        assert place < 10 if depth == 0 else "pass key.\n\n\n\nRemember" in text[place:]


def test_numbers_of_lines_differ_and_each_name_is_there_once() -> None:
    (prompt,) = KeyValue(length=900, count=1, lines=6).make(byte_tokenizer(), TEXT, 0)
    text = byte_tokenizer().decode(prompt.tokens)
    lines = [line for line in text.split("\n") if line.startswith("The number of the") and line.endswith(".")]
    assert len(lines) == 6
    assert len({line.split()[4] for line in lines}) == 6
    assert len({line.split()[6] for line in lines}) == 6


def test_lines_alone_fill_the_length() -> None:
    (prompt,) = KeyValue(length=1000, count=1, lines=None, form="register").make(byte_tokenizer(), TEXT, 0)
    text = byte_tokenizer().decode(prompt.tokens)
    registers = "".join(line for line in text.split("\n") if line.startswith("line "))
    assert len(registers) > 0.8 * len(text)


@pytest.mark.parametrize(("wordings", "name"), [(part, name) for part in VOCABULARIES for name in KINDS])
def test_every_kind_of_fact_is_stated_once_and_its_question_can_be_answered_from_it(wordings: Any, name: str) -> None:
    if wordings not in KINDS[name].forms:
        with pytest.raises(ValidationError, match=f"got '{name}'"):
            Facts(length=900, count=1, wordings=wordings, kinds=(name,))
        return
    task = Facts(length=900, count=8, wordings=wordings, kinds=(name,), facts=2)
    assert task.name == f"facts {name} 900"
    prompts = task.make(byte_tokenizer(), TEXT, 0)
    assert len({prompt.expected for prompt in prompts}) > 4
    for prompt in prompts:
        text = byte_tokenizer().decode(prompt.tokens)
        hay, question = text.rsplit("\n\n", 1)
        assert str(prompt.expected) in hay
        assert str(prompt.expected) not in question
        assert "{" not in text


def test_evaluation_asks_in_words_and_of_kinds_that_calibration_never_has() -> None:
    calibrated, evaluated = VOCABULARIES["calibration"], VOCABULARIES["evaluation"]
    for part in ("adjectives", "nouns", "syllables", "first_names"):
        assert not set(getattr(calibrated, part)) & set(getattr(evaluated, part))
    forms = [kind.forms for kind in KINDS.values()]
    assert sum("calibration" not in form for form in forms) >= 4
    assert not {f for form in forms for f in form.get("calibration", ())} & {
        f for form in forms for f in form["evaluation"]
    }


def test_no_recipe_and_no_default_calibrates_on_what_is_kept_for_evaluation() -> None:
    for path in [*ROOT.glob("recipes/*.yaml"), *ROOT.glob("profiles/**/*.yaml")]:
        sections = yaml.safe_load(path.read_text())
        assert "evaluation" not in str({name: part for name, part in sections.items() if name != "evaluate"}), path
    for situation in (Situation(gpu=True, cores=16), Situation(cores=2)):
        data: dict[str, Any] = {"search": {"budget": {"kv": 0.5}}}
        Defaults(data, situation).fill()
        assert "'facts'" in str(data["calibration"])
        assert "evaluation" not in str({name: part for name, part in data.items() if name != "evaluate"})


def test_a_text_is_asked_for_every_kind_that_calibration_does_not_have() -> None:
    assert set(NEW_KINDS) | set(REWORDED) == set(KINDS) and len(NEW_KINDS) >= 4
    made = questioned_texts(byte_tokenizer(True), TEXT, 2900, 3, 0)
    assert (
        made
        == questioned_texts(byte_tokenizer(True), TEXT, 2900, 3, 0)
        != questioned_texts(byte_tokenizer(True), TEXT, 2900, 3, 1)
    )
    calibrated = {form for kind in KINDS.values() for form in kind.forms.get("calibration", ())}
    for text in made:
        assert len(text.tokens) == 2900
        assert [question.kind for question in text.questions] == [*TASKS, *REWORDED, *NEW_KINDS]
        whole = byte_tokenizer().decode(text.tokens)
        for question in text.questions:
            stated = byte_tokenizer().decode(text.tokens[slice(*question.evidence)])
            asked = byte_tokenizer().decode(question.tokens)
            assert question.expected in stated and stated in whole and whole.count(question.expected) >= 1
            assert byte_tokenizer().decode(question.answer).strip() == question.expected
            assert not any(asked == form[1] for form in calibrated)
    starts = sorted(question.evidence[0] for text in made for question in text.questions)
    assert starts[0] < 600 and starts[-1] > 2300  # they lie everywhere in the text


def test_kinds_take_turns_over_the_documents() -> None:
    task = Facts(length=900, count=16)
    first = task.make(byte_tokenizer(), TEXT, 0)
    assert sum(str(prompt.expected).isdecimal() for prompt in first) == 2


def test_several_facts_are_asked_for_behind_one_text() -> None:
    task = Facts(length=1500, count=3, facts=4, asked=3, answer="text")
    once = Facts(length=1500, count=3, facts=4, answer="text")
    assert "asked" not in once.model_dump() and task.model_dump()["asked"] == 3
    decode = byte_tokenizer().decode
    for prompt, alone in zip(task.make(byte_tokenizer(), TEXT, 0), once.make(byte_tokenizer(), TEXT, 0), strict=True):
        first, *others = decode(prompt.reference).split("\n\n")
        assert first == decode(alone.reference) and first.strip() == prompt.expected and len(others) == 2
        assert prompt.length == 1500 and len(prompt.evidence) == 3
        stated = [decode(prompt.tokens[start:end]) for start, end in prompt.evidence]
        assert prompt.expected in stated[0]
        for statement, other in zip(stated[1:], others, strict=True):  # the value ends its question's line
            assert other.split()[-1].strip(".") in statement
    for wrong, changes in (("the number of `facts`", {"asked": 4}), ("answer: text", {"asked": 2, "answer": "model"})):
        with pytest.raises(ValueError, match=wrong):
            Facts.model_validate({"length": 900, "count": 1, "answer": "text", **changes})


def test_continuation_is_a_window_of_the_text() -> None:
    for prompt in Continuation(length=150, count=3, answer_tokens=30).make(byte_tokenizer(), TEXT, 5):
        window = [*prompt.tokens, *prompt.reference]
        assert any(TEXT[i : i + 150] == window for i in range(len(TEXT) - 149))


@settings(max_examples=40, deadline=None)
@given(st.integers(150, 700), st.integers(1, 4), st.integers(0, 5), st.sampled_from(["natural", "filler"]))
def test_any_length_is_exact(length: int, count: int, seed: int, haystack: Any) -> None:
    for task in (
        PassKey(length=length, count=count, haystack=haystack),
        KeyValue(length=length, count=count, lines=1, haystack=haystack),
    ):
        for prompt in task.make(byte_tokenizer(), TEXT, seed):
            assert prompt.length == length


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (PassKey(length=4096, count=1), TEXT, "longer than the model's context"),
        (PassKey(length=40, count=1), TEXT, "no room for a haystack"),
        (PassKey(length=1500, count=1), TEXT[:100], "the text is too short"),
        (PassKey(length=500, count=1, answer_tokens=1), TEXT, "`answer_tokens` is too small"),
        (KeyValue(length=300, count=1, lines=50), TEXT, "no room for a haystack"),
        (KeyValue(length=40, count=1, lines=None), TEXT, "no room for a line"),
        (Continuation(length=64, count=1), TEXT, "no room for a prompt"),
        (PassKeys(length=400, count=1, keys=3), TEXT, "leave no room for a text"),
        (Continuation(length=300, count=1), TEXT[:299], "at least 300 tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(task: Any, text: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task.make(byte_tokenizer(), text, 0, context=2048)


def test_a_short_text_says_how_many_tokens_there_are_and_are_needed() -> None:
    with pytest.raises(UserError) as error:
        Continuation(length=300, count=1).make(byte_tokenizer(), TEXT[:120], 0)
    assert "300 tokens" in str(error.value)
    assert "120 tokens" in str(error.value)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"depth": (0.9, 0.1)}, {"depth": (0, 2)}, {"digit": 3}, {"digits": 0}])
def test_impossible_parameters_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as error:
        PassKey(**{"length": 300, "count": 1} | wrong)
    assert error.value.errors()[0]["loc"] == (next(iter(wrong)),)


def test_an_answer_of_another_length_is_refused() -> None:
    (prompt,) = PassKey(length=300, count=1).make(byte_tokenizer(), TEXT, 0)
    with pytest.raises(ValueError, match="an answer of"):
        prompt.answered([1])


def test_what_surrounds_an_answer_is_what_is_there() -> None:
    """A length that is full of lines has no text around them, whatever `haystack` says."""
    assert [KeyValue(length=400, count=1, lines=lines).around for lines in (2, None)] == ["natural", "filler"]
    assert PassKey(length=400, count=1, haystack="filler").around == "filler"
    assert Continuation(length=400, count=1).around == ""
