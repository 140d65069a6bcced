"""What names one tensor of a profile, and its text form in files, recipes and messages."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compress.errors import UserError

if TYPE_CHECKING:
    from compress.registry import Method

CORPORA = ("first", "second")

# Parts that files and recipes name without their statistic.
_ALONE = {"mass": "attention", "sink_mass": "attention", "entropy": "attention"}
_TEXT = re.compile(
    r"(?P<name>[a-z]\w*(?:\.[a-z]\w*)*?)(?:\[(?P<target>.*)\])?(?:\.(?P<length>\d+))?(?:\.(?P<corpus>first|second))?"
)


@dataclass(frozen=True)
class Key:
    """The name of one tensor.

    Its text form is `statistic.part[target].length.corpus` without what is empty: `influence.absolute.2048`,
    `retrieval.512`, `amp.heads.first`, `effect.signed[window alpha=256 beta=0.0 sink=64].8192`.

    Attributes:
        statistic: registered name of the statistic.
        part: which of the statistic's tensors, empty where it has only one.
        length: profiled length in tokens; None where the tensor is over all lengths.
        corpus: one of `CORPORA`; None where the tensor is over all of them.
        target: `target_form` of the target, or of the option of a layer, that is priced; None where none is.
    """

    statistic: str
    part: str = ""
    length: int | None = None
    corpus: str | None = None
    target: str | None = None

    @classmethod
    def parse(cls, text: str) -> Key:
        """The key of a text form.

        Raises:
            UserError: the text is no key.
        """
        parts = _TEXT.fullmatch(text)
        if parts is None:
            raise UserError("this is not the name of a profile tensor", expected="statistic.part.length", found=text)
        statistic, _, part = parts["name"].partition(".")
        if statistic in _ALONE:
            statistic, part = _ALONE[statistic], parts["name"]
        length = None if parts["length"] is None else int(parts["length"])
        return cls(statistic, part, length, parts["corpus"], parts["target"])

    @property
    def name(self) -> str:
        """What recipes call it: statistic and part, for instance `influence.absolute` or `entropy`."""
        return ".".join(word for word in (None if self.part in _ALONE else self.statistic, self.part) if word)

    def __str__(self) -> str:
        target = "" if self.target is None else f"[{self.target}]"
        return ".".join(str(word) for word in (self.name + target, self.length, self.corpus) if word is not None)

    def at(self, length: int) -> Key:
        """The key of this measurement at a length in tokens."""
        return replace(self, length=length)

    def of(self, corpus: str) -> Key:
        """The key of this measurement on one corpus of `CORPORA`."""
        return replace(self, corpus=corpus)

    def to(self, target: Method) -> Key:
        """The key of this measurement for a target, or for an option of a layer."""
        return replace(self, target=target_form(target))


def target_form(target: Method) -> str:
    """The one text of a target, or of an option of a layer: its registered name, then its parameters as JSON."""
    fields = target.model_dump(mode="json")
    parameters = (f"{name}={json.dumps(fields[name])}" for name in sorted(fields) if name != "target")
    return " ".join([target.registered, *parameters])
