"""Keys of a profile's tensors: one text form, and back."""

import pytest

from compress.errors import UserError
from compress.profile.key import Key, target_form
from compress.registry import targets
from compress.targets.window import WindowGroup

WINDOW = target_form(WindowGroup(sink=64, alpha=-64, beta=0.125))
KEYS = {
    "influence.absolute.2048": Key("influence", "absolute", 2048),
    "retrieval.512": Key("retrieval", length=512),
    "retrieval.lost.512": Key("retrieval", "lost", 512),
    "entropy.70": Key("attention", "entropy", 70),
    "wanda_sp.heads": Key("wanda_sp", "heads"),
    "amp.neurons.first": Key("amp", "neurons", corpus="first"),
    f"effect.signed[{WINDOW}].8192": Key("effect", "signed", 8192, target=WINDOW),
    "effect[recent tokens=[3.5]].8192": Key("effect", length=8192, target="recent tokens=[3.5]"),
}


@pytest.mark.parametrize("text", KEYS)
def test_a_key_has_one_text(text: str) -> None:
    assert str(KEYS[text]) == text and Key.parse(text) == KEYS[text]


def test_the_form_of_a_target_does_not_depend_on_how_it_was_written() -> None:
    assert WINDOW == "window alpha=-64 beta=0.125 sink=64"
    assert target_form(targets.parse({"beta": 0, "alpha": 64, "sink": 0, "target": "window"})) == target_form(
        WindowGroup(sink=0, alpha=64, beta=0.0, rule="position")
    )
    assert target_form(WindowGroup(sink=0, alpha=64, beta=0.0, rule="length")).endswith('rule="length" sink=0')


@pytest.mark.parametrize("text", ["", "70", "a..b", "a.70.71", "two words"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"statistic\.part\.length"):
        Key.parse(text)


def test_names_are_what_recipes_write() -> None:
    assert [Key.parse(text).name for text in ("mass.64", "retrieval.lost.64", "gates.64")] == [
        "mass",
        "retrieval.lost",
        "gates",
    ]
    assert Key.parse("influence.joint").at(64) == Key("influence", "joint", 64)
