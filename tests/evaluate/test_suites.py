"""Every suite: the same items for the same seed, within the length, answerable from the prompt, scored exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compress.data.key_value import ADJECTIVES, NOUNS
from compress.errors import UserError
from compress.evaluate.suites import SUITES
from compress.evaluate.suites.needles import TASKS
from tests.data.language import byte_tokenizer, story

FOLDER = Path(__file__).parents[2] / "compress" / "evaluate" / "lm_eval_tasks"
RULER = Path(__file__).parents[3] / "shared" / "data" / "ruler" / "niah_multikey_3_4096.jsonl"
TEXT = story(4000)
LENGTH = 6000


def word_tokenizer() -> Any:
    """Every word a token, for the suite that needs such words."""
    words = ["<unk>", *(f"{first}{second}" for first in ADJECTIVES.split() for second in NOUNS.split())]
    tokenizer = Tokenizer(models.WordLevel({f" {word}": i for i, word in enumerate(words)}, unk_token=" <unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def tokenizer_for(name: str) -> Any:
    return word_tokenizer() if name == "mqar" else byte_tokenizer()


@pytest.mark.parametrize("name", SUITES)
def test_items(name: str) -> None:
    suite, tokenizer = SUITES[name], tokenizer_for(name)
    length = 300 if name == "mqar" else 20_000 if name == "cwe" else LENGTH
    items = suite.items(tokenizer, length, 2, 7, TEXT)
    assert items == suite.items(tokenizer, length, 2, 7, TEXT)
    assert items[:1] != suite.items(tokenizer, length, 1, 8, TEXT)
    assert len({item.prompt for item in items}) == 2
    for item in items:
        used = len(tokenizer(item.prompt)["input_ids"]) + suite.answer_tokens
        assert 0.8 * length <= used <= length
        assert all(answer in item.prompt for answer in item.answers)
        right = " ".join(item.answers)
        assert suite.score(f" {right}", item.answers) == 1
        assert suite.score(" nothing of the kind", item.answers) == 0
        assert item.depth is None or 0 <= item.depth <= 1


def test_too_short_a_length_says_so() -> None:
    with pytest.raises(UserError, match="no room"):
        SUITES["vt"].items(byte_tokenizer(), 100, 1, 0, TEXT)


def test_too_little_text_says_so() -> None:
    with pytest.raises(UserError, match="too short to fill"):
        SUITES["niah_single_2"].items(byte_tokenizer(), LENGTH, 1, 0, story(20))


def test_needles_have_the_published_counts() -> None:
    """RULER's table of retrieval tasks: keys, values and queries, and how many needles lie in the prompt."""
    needles = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    answers = {"niah_multivalue": 4, "niah_multiquery": 4}
    for name, task in TASKS.items():
        (item,) = SUITES[name].items(byte_tokenizer(), LENGTH, 1, 0, TEXT)
        assert len(item.answers) == answers.get(name, 1)
        found = item.prompt.count("One of the special magic")
        assert found > 20 if task.haystack == "needles" else found == needles.get(name, 1)


def test_variable_tracking_is_one_chain_of_four_hops() -> None:
    (item,) = SUITES["vt"].items(byte_tokenizer(), LENGTH, 1, 0, TEXT)
    assert len(item.answers) == 5
    question = item.prompt.rindex("Memorize and track")
    text = item.prompt[question:]
    assert text.count("VAR ") == 5 + 4
    for earlier, later in zip(item.answers, item.answers[1:], strict=False):
        assert f"VAR {later} = VAR {earlier}" in text
        assert text.index(f"VAR {earlier} = ") < text.index(f"VAR {later} = ")


def test_common_words_come_thirty_times_and_others_three() -> None:
    (item,) = SUITES["cwe"].items(byte_tokenizer(), 20_000, 1, 0, TEXT)
    listed = item.prompt[item.prompt.rindex("Below is a numbered list") :].split("\nQuestion")[0].split("\n")[1].split()
    words = [word for word in listed if not word.rstrip(".").isdigit()]
    counts = {word: words.count(word) for word in set(words)}
    assert {counts[word] for word in item.answers} == {30}
    assert {count for word, count in counts.items() if word not in item.answers} == {3}


def test_frequent_words_are_the_next_three_behind_the_dots() -> None:
    (item,) = SUITES["fwe"].items(byte_tokenizer(), LENGTH, 1, 0, TEXT)
    coded = item.prompt.split("coded words. ")[1].split("\nQuestion")[0].split()
    ranked = sorted(set(coded), key=lambda word: -coded.count(word))
    assert ranked[0] == "...." and ranked[1] == item.answers[0]
    assert [coded.count(word) for word in ranked[:4]] == sorted(
        (coded.count(word) for word in ranked[:4]), reverse=True
    )
    # Counts fall with the square of the rank.
    assert coded.count("....") / coded.count(item.answers[0]) == pytest.approx(4, rel=0.05)


def test_recall_after_a_gap() -> None:
    tokenizer = word_tokenizer()
    for item in SUITES["mqar"].items(tokenizer, 200, 5, 0, TEXT):
        words = item.prompt.split(" ")
        key, value = words[-1], item.answers[0]
        assert words[words.index(key) + 1] == value and words.count(value) == 1
        assert item.gap == len(words) - 1 - words.index(key)


@pytest.mark.skipif(not RULER.is_file(), reason="needs the offline task data")
def test_multikey_3_has_the_form_of_rulers_own_sample() -> None:
    """The wording of a published sample, its needle and its question, with keys and values taken out."""
    theirs = json.loads(RULER.read_text(encoding="utf-8").splitlines()[0])
    (ours,) = SUITES["niah_multikey_3"].items(byte_tokenizer(), LENGTH, 1, 0, TEXT)
    key = theirs["input"].split("magic uuid for ")[1].split(" ")[0]
    assert f"One of the special magic uuids for {key} is: {theirs['outputs'][0]}." in theirs["input"]
    own_key = ours.prompt.split("What is the special magic uuid for ")[1].split(" ")[0]
    assert f"One of the special magic uuids for {own_key} is: {ours.answers[0]}." in ours.prompt
    first = "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about"
    assert first in theirs["input"] and first in ours.prompt
    ask = "What is the special magic uuid for {} mentioned in the provided text?"
    assert ask.format(key) in theirs["input"] and ask.format(own_key) in ours.prompt


def test_every_suite_is_a_task_file() -> None:
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.yaml")}
    assert set(files) == {f"compress_{name}" for name in SUITES}
    for name, suite in SUITES.items():
        file = files[f"compress_{name}"]
        assert file["dataset_kwargs"] == {"suite": name}
        assert file["generation_kwargs"]["max_gen_toks"] == suite.answer_tokens
