"""Variable tracking: a chain of assignments in noise, all its names asked for (RULER, arXiv 2404.06654, appendix B)."""

from __future__ import annotations

import random
import string
from itertools import pairwise

from compress.data.haystack import FILLER
from compress.evaluate.suites.suite import Item, Room, register, share_of_all, spread

HOPS = 4
PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are: "
)
EXAMPLE = 5  # noise sentences of the solved example in front


def chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Value, variables and assignments of a chain of `HOPS` hops."""
    value = str(rng.randint(10**4, 10**5 - 1))
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
    return value, names, steps


def filled(value: str, steps: list[str], depths: list[float], noise: int) -> str:
    """A prompt whose assignments lie in order among `noise` repetitions of five sentences."""
    context = spread([FILLER.strip()] * noise, list(zip(depths, steps, strict=True)), "\n")
    return PROMPT.format(context=context, value=value, count=HOPS + 1)


@register("vt", 30, share_of_all, "RULER, arXiv 2404.06654")
def variable_tracking(room: Room, rng: random.Random) -> Item:
    """One chain of four assignments, after one solved example."""
    shown, shown_names, shown_steps = chain(rng)
    shown_depths = sorted(rng.random() for _ in shown_steps)
    example = filled(shown, shown_steps, shown_depths, EXAMPLE) + " ".join(shown_names) + "\n\n"
    value, names, steps = chain(rng)
    depths = sorted(rng.random() for _ in steps)

    def build(n: int) -> str:
        return example + filled(value, steps, depths, n)

    return Item(build(room.largest(build, room.tokens)), tuple(names))
