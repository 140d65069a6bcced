"""LongEval's two tasks: a register among thousands of lines, and the first of many topics (LMSYS, 2023)."""

from __future__ import annotations

import random

from compress.data.key_value import NAMES, NOUNS
from compress.evaluate.suites.suite import Item, Room, any_of, last_number, register

LINES = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n{record}\n\nNow the record is over. "
    "Tell me what is the <REGISTER_CONTENT> in line {asked}? I need the number. The <REGISTER_CONTENT> in line "
    "{asked} is"
)
TOPICS = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am "
    "the USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. "
    "Memorize each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic. Now the record "
    "start. {record} Now the record ends. What is the first topic we discussed? Only give me the topic name. The "
    "first topic is"
)
FIELDS = ["history", "future", "economics", "craft", "science", "beauty", "safety", "language", "music", "teaching"]


@register("longeval_lines", 32, last_number, "LongEval lines, LMSYS 2023; as used by MoA, arXiv 2406.14909")
def lines(room: Room, rng: random.Random) -> Item:
    """Lines with a name and a number up to 50,000 each; the number of one line is asked for."""
    names = rng.sample(NAMES, len(NAMES))
    numbers = [rng.randint(1, 50_000) for _ in names]
    depth = rng.random()

    def build(n: int) -> str:
        place = round(depth * n)
        order = [*range(1, place + 1), 0, *range(place + 1, n + 1)]
        record = "\n".join(f"line {names[i]}: REGISTER_CONTENT is <{numbers[i]}>" for i in order)
        return LINES.format(record=record, asked=names[0])

    return Item(build(room.largest(build, len(names) - 1)), (str(numbers[0]),), depth)


@register("longeval_topics", 32, any_of, "LongEval topics, LMSYS 2023")
def topics(room: Room, rng: random.Random) -> Item:
    """Conversations about one topic each, the assistant's answers natural text; the first topic is asked for."""
    known = [f"the {field} of the {noun}" for field in FIELDS for noun in NOUNS.split()]
    rng.shuffle(known)
    offset = rng.randrange(len(room.sentences))
    talk = room.sentences[offset:] + room.sentences[:offset]
    sentences = 8  # sentences of an answer

    def build(n: int) -> str:
        record = " ".join(
            f"USER: I would like to discuss the topic of {known[i]}. ASSISTANT: Sure! "
            + " ".join(talk[(i * sentences + k) % len(talk)] for k in range(sentences))
            for i in range(n + 1)
        )
        return TOPICS.format(count=n + 1, record=record)

    return Item(build(room.largest(build, len(known) - 1)), (known[0],), 0.0)
