"""Questions over distractors: one passage of many holds the answer (the form of RULER's QA tasks, arXiv 2404.06654).

RULER takes SQuAD and HotpotQA. These passages are made up here, so that nothing has to be downloaded and no model
knows the answers by heart.
"""

from __future__ import annotations

import random

from compress.data.key_value import ADJECTIVES, NOUNS
from compress.evaluate.suites.suite import Item, Room, any_of, register

ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
PROMPT = ASK + "\n\nThe following are given documents.\n\n{context}\n\n" + ASK + "\n\nQuestion: {question} Answer:"
SYLLABLES = [
    "bar",
    "cor",
    "del",
    "fen",
    "gal",
    "hol",
    "jun",
    "kel",
    "lom",
    "mer",
    "nor",
    "pel",
    "quin",
    "ros",
    "sel",
    "tam",
    "ul",
    "ver",
    "wyn",
    "zor",
]
TRADES = ["baker", "weaver", "miller", "printer", "gardener", "sailor", "teacher", "mason", "painter", "clockmaker"]


def _name(rng: random.Random, parts: int = 2) -> str:
    return "".join(rng.choices(SYLLABLES, k=parts)).capitalize()


def passage(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """A made-up town with the questions that its passage answers."""
    town, founder, river = f"{_name(rng)} {_name(rng)}", f"{_name(rng)} {_name(rng, 3)}", _name(rng, 3)
    year, trade = str(rng.randint(1100, 1899)), rng.choice(TRADES)
    thing = f"{rng.choice(ADJECTIVES.split())} {rng.choice(NOUNS.split())}"
    text = (
        f"{town} is a town on the river {river}. It was founded in {year} by {founder}, a {trade} from "
        f"far away. Its coat of arms shows a {thing}. Most people there live from the market by the old bridge, held "
        "twice a week, and from the workshops behind it."
    )
    return text, [
        (f"Who founded the town of {town}?", founder),
        (f"In which year was the town of {town} founded?", year),
        (f"On which river does the town of {town} lie?", river),
        (f"What does the coat of arms of {town} show?", thing),
    ]


@register("qa", 32, any_of, "after RULER, arXiv 2404.06654; made-up passages")
def questions(room: Room, rng: random.Random) -> Item:
    """One question about one passage among as many others as fit."""
    text, asked = passage(rng)
    question, answer = rng.choice(asked)
    depth = rng.random()
    others: list[str] = []

    def build(n: int) -> str:
        while len(others) < n:
            others.append(passage(rng)[0])
        place = round(depth * n)
        documents = [*others[:place], text, *others[place:n]]
        context = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
        return PROMPT.format(context=context, question=question)

    return Item(build(room.largest(build, room.tokens)), (answer,), depth)
