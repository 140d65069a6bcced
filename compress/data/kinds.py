"""Kinds of facts that a long text can hold, and the wordings that state one and ask for it.

Plans that are calibrated on digits alone keep digits: at an eighth of the cache of SmolLM2-135M-Instruct such a plan
found telephone numbers nearly as often as the dense model, and words almost never. So the documents ask for many kinds
of things. Kinds, wordings and vocabulary are split in two: one part for calibration, one for evaluation, so that an
evaluation asks for what no calibration has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from compress.data.prompt import random_number

if TYPE_CHECKING:
    import random

Wordings = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Value:
    """What is asked for.

    Attributes:
        text: the answer.
        given: what the question has of the statement already, where the answer goes on with it.
        fields: other blanks of the wordings that belong to this value.
    """

    text: str
    given: str = ""
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Vocabulary:
    """Words that values and subjects are made of; the two parts share none."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    syllables: tuple[str, ...]
    first_names: tuple[str, ...]

    def thing(self, rng: random.Random) -> str:
        """An adjective and a noun."""
        return f"{rng.choice(self.adjectives)} {rng.choice(self.nouns)}"

    def name(self, rng: random.Random, syllables: int = 2) -> str:
        """A made-up name of a family or a place."""
        return "".join(rng.choices(self.syllables, k=syllables)).capitalize()


@dataclass(frozen=True)
class Kind:
    """One kind of fact.

    Attributes:
        value: draws one from a vocabulary.
        forms: by part, pairs of a statement and the question that the answer follows. The statement has the blank
            `{value}`; both may have `{thing}`, `{town}` and `{given}`. A part without forms does not have the kind.
    """

    value: Callable[[random.Random, Vocabulary], Value]
    forms: dict[Wordings, tuple[tuple[str, str], ...]]

    def stated(self, wordings: Wordings, rng: random.Random) -> tuple[str, str, str]:
        """A statement, the question for it, and the answer, drawn from the words and wordings of a part."""
        words = VOCABULARIES[wordings]
        statement, question = rng.choice(self.forms[wordings])
        value = self.value(rng, words)
        blanks = {"thing": words.thing(rng), "town": words.name(rng), "given": value.given, **value.fields}
        return statement.format(value=value.text, **blanks), question.format(**blanks), value.text


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


VOCABULARIES: dict[Wordings, Vocabulary] = {
    "calibration": Vocabulary(
        _words(
            "amber brave calm dusty eager faint gentle happy icy jolly kind lucky merry noble odd proud quiet "
            "rapid shy tall vivid warm young bitter clever distant early frozen golden hollow"
        ),
        _words(
            "anchor basket candle drum engine feather garden hammer island jacket kettle ladder mirror needle "
            "orchard pencil river saddle temple window apple bridge carpet desert eagle forest glove harbor"
        ),
        _words("bar cor del fen gal hol jun kel lom mer nor pel quin ros sel tam"),
        _words(
            "Alice Bernard Clara Daniel Edith Frank Grace Hugo Irene Jacob Laura Martin Nora Oscar Paula "
            "Robert Susan Thomas"
        ),
    ),
    "evaluation": Vocabulary(
        _words(
            "urban zesty idle jagged loyal mellow narrow orange pale rusty silent tender broad crimson damp "
            "fierce humble ivory lonely modest plain royal steep tidy"
        ),
        _words(
            "insect jungle kitten lantern meadow napkin otter planet quilt rocket spider tunnel barrel castle "
            "dolphin fiddle goblet helmet magnet parrot ribbon statue tractor violin"
        ),
        _words("ash bel cran dor eld fair grim hart ing ket lang mos oak pen rud ster"),
        _words(
            "Agnes Conrad Doris Edgar Flora Gilbert Helen Ivan Judith Karl Lydia Milton Olive Philip Rosa "
            "Stephen Ursula Walter"
        ),
    ),
}

MONTHS = _words("January February March April May June July August September October November December")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
LIST_LINES = 5


def _number(rng: random.Random, _: Vocabulary) -> Value:
    return Value(random_number(rng, rng.randint(4, 6)))


def _telephone(rng: random.Random, _: Vocabulary) -> Value:
    return Value(f"{random_number(rng, 3)}-{random_number(rng, 3)}-{random_number(rng, 4)}")


def _word(rng: random.Random, words: Vocabulary) -> Value:
    return Value(rng.choice(words.nouns))


def _person(rng: random.Random, words: Vocabulary) -> Value:
    return Value(f"{rng.choice(words.first_names)} {words.name(rng)}")


def _date(rng: random.Random, _: Vocabulary) -> Value:
    return Value(f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1700, 1999)}")


def _identifier(rng: random.Random, _: Vocabulary) -> Value:
    return Value(f"{''.join(rng.choices(LETTERS, k=3))}-{random_number(rng, 3)}{rng.choice(LETTERS)}")


def _line(rng: random.Random, words: Vocabulary) -> Value:
    items = [words.thing(rng) for _ in range(LIST_LINES)]
    place = rng.randrange(1, LIST_LINES)
    lines = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    return Value(items[place], f"\n{place}. {items[place - 1]}\n{place + 1}.", {"lines": f"\n{lines}"})


def _passage(rng: random.Random, words: Vocabulary) -> Value:
    things = [words.thing(rng) for _ in range(4)]
    text = f"the {things[0]} was carried past the {things[1]} and left beside the {things[2]} under a {things[3]}"
    cut = text.index(things[1])
    return Value(text[cut:], text[:cut].rstrip())


def _price(rng: random.Random, _: Vocabulary) -> Value:
    return Value(f"{rng.randint(11, 98)}.{rng.randint(11, 98)} pounds")


def _time(rng: random.Random, _: Vocabulary) -> Value:
    return Value(f"{rng.randint(1, 12)}:{rng.randint(10, 59)} {rng.choice(['am', 'pm'])}")


def _place(rng: random.Random, words: Vocabulary) -> Value:
    return Value(words.name(rng, 3))


def _email(rng: random.Random, words: Vocabulary) -> Value:
    return Value(f"{rng.choice(words.first_names).lower()}.{words.name(rng).lower()}@{rng.choice(words.nouns)}.org")


KINDS: dict[str, Kind] = {
    "number": Kind(
        _number,
        {
            "calibration": (
                ("The number of the {thing} is {value}.", "The number of the {thing} is"),
                ("In the register the {thing} has the entry {value}.", "In the register the {thing} has the entry"),
            ),
            "evaluation": (("They counted {value} steps to the {thing}.", "To the {thing} they counted"),),
        },
    ),
    "telephone": Kind(
        _telephone,
        {
            "calibration": (
                (
                    "The telephone number of the {thing} office is {value}.",
                    "The telephone number of the {thing} office is",
                ),
                ("Whoever finds the {thing} should call {value}.", "Whoever finds the {thing} should call"),
            ),
            "evaluation": (
                ("You can reach {town} station by phone at {value}.", "You can reach {town} station by phone at"),
            ),
        },
    ),
    "word": Kind(
        _word,
        {
            "calibration": (
                ("The secret word of {town} is {value}. Remember it.", "The secret word of {town} is"),
                (
                    "The box from {town} was marked with a picture: a {value}.",
                    "The box from {town} was marked with a picture: a",
                ),
            ),
            "evaluation": (
                (
                    "The people of {town} chose as their sign the {value}.",
                    "The people of {town} chose as their sign the",
                ),
            ),
        },
    ),
    "name": Kind(
        _person,
        {
            "calibration": (
                ("The owner of the {thing} is {value}.", "The owner of the {thing} is"),
                ("The letter about the {thing} was signed by {value}.", "The letter about the {thing} was signed by"),
            ),
            "evaluation": (("The mayor of {town} at that time was {value}.", "The mayor of {town} at that time was"),),
        },
    ),
    "date": Kind(
        _date,
        {
            "calibration": (
                ("The {thing} was sold on {value}.", "The {thing} was sold on"),
                ("The bridge at {town} was opened on {value}.", "The bridge at {town} was opened on"),
            ),
            "evaluation": (("The storm reached {town} on {value}.", "The storm reached {town} on"),),
        },
    ),
    "identifier": Kind(
        _identifier,
        {
            "calibration": (
                ("The parcel with the {thing} has the code {value}.", "The parcel with the {thing} has the code"),
                ("The file about {town} is kept as {value}.", "The file about {town} is kept as"),
            ),
            "evaluation": (
                ("The licence plate of the {thing} reads {value}.", "The licence plate of the {thing} reads"),
            ),
        },
    ),
    "line": Kind(
        _line,
        {
            "calibration": (("Things to bring to {town}:{lines}", "Things to bring to {town}:{given}"),),
            "evaluation": (("Prizes of the {town} fair:{lines}", "Prizes of the {town} fair:{given}"),),
        },
    ),
    "passage": Kind(
        _passage,
        {
            "calibration": (
                (
                    "It was written over the door of {town} hall: {given} {value}.",
                    "It was written over the door of {town} hall: {given}",
                ),
            ),
            "evaluation": (
                ("An old song of {town} begins: {given} {value}.", "An old song of {town} begins: {given}"),
            ),
        },
    ),
    "price": Kind(_price, {"evaluation": (("For the {thing} she paid {value}.", "For the {thing} she paid"),)}),
    "time": Kind(_time, {"evaluation": (("The coach to {town} leaves at {value}.", "The coach to {town} leaves at"),)}),
    "place": Kind(_place, {"evaluation": (("The {thing} was found in {value}.", "The {thing} was found in"),)}),
    "email": Kind(
        _email, {"evaluation": (("Questions about the {thing} go to {value}.", "Questions about the {thing} go to"),)}
    ),
}


# What no calibration asks for in any wording, and what it asks for in other words and wordings.
NEW_KINDS = tuple(name for name, kind in KINDS.items() if "calibration" not in kind.forms)
REWORDED = tuple(name for name, kind in KINDS.items() if {"calibration", "evaluation"} <= kind.forms.keys())
