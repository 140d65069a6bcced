"""Training text with facts that are stated and asked for later (scripts/facts.py)."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from scripts import facts

GAPS = (200.0, 4_000.0)
PARAGRAPH = "x" * 100


def test_facts_are_asked_for_later_and_never_with_an_old_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()

    def drawn(_: random.Random) -> tuple[str, str, str]:
        number = next(numbers)
        return f"S{number}", f"Q{number % 7}", f"A{number}"

    monkeypatch.setattr(facts, "drawn_fact", drawn)
    text = list(facts.with_facts([PARAGRAPH] * 2_000, random.Random(0), 300, GAPS))
    place, stated, latest, distances = 0, {}, {}, []
    for part in text:
        if part == PARAGRAPH:
            place += len(part)
        elif part.startswith("S"):
            number = int(part[1:])
            stated[number] = place
            latest[number % 7] = number
        else:
            found = re.fullmatch(r"Q(\d+) A(\d+)\.", part)
            assert found is not None
            question, number = map(int, found.groups())
            assert latest[question] == number
            distances.append(place - stated[number])
    assert len(stated) == 2_000 * len(PARAGRAPH) // 300
    assert GAPS[0] <= min(distances) and max(distances) <= GAPS[1] + len(PARAGRAPH)
    assert min(distances) < 400 and max(distances) > 1_500


def test_facts_have_the_wordings_for_calibration() -> None:
    rng = random.Random(1)
    for _ in range(50):
        statement, question, answer = facts.drawn_fact(rng)
        assert answer in statement and question
