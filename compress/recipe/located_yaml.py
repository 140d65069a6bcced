"""Reads YAML so that every key and value keeps its line and column, and duplicated keys are noticed."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from compress.errors import Problem, nearest

KeyPath = tuple[str | int, ...]
Mark = TypeVar("Mark")

# A few bytes of YAML can ask for any amount of memory: by aliases of aliases, by depth, by digits.
MOST_CHARACTERS = 200_000  # of the file, and of its values with every alias written out
MOST_VALUES = 20_000  # with every alias written out
MOST_LEVELS = 50
MOST_DIGITS = 18  # of a whole number, so that it fits in 64 bits

# YAML 1.1, which PyYAML reads, takes `1e-4` for a text because it has no dot; everybody else takes it for a number.
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
# Neither paths nor names have these, and half a surrogate pair cannot even be printed.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("int", "float", "bool", "null")}
_KNOWN = _PLAIN | {f"{_TAG}{name}" for name in ("str", "timestamp", "merge", "value", "seq", "map")}


@dataclass
class LocatedYaml:
    """Plain data of a YAML text, the places of its parts, and what is wrong with the text itself.

    Attributes:
        name: what places start with, usually the path of the file.
        data: mappings, lists, text, numbers, booleans and None; None when the text is not YAML.
        problems: syntax errors, duplicated keys, keys that are no text or number, tags, numbers that are not finite or
            have too many digits, characters that no text has, and more than the limits above.
    """

    name: str
    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    _keys: dict[KeyPath, yaml.Mark] = field(default_factory=dict)
    _values: dict[KeyPath, yaml.Mark] = field(default_factory=dict)
    _given: dict[KeyPath, str] = field(default_factory=dict)  # values that are not the file's, and where they are from

    def where(self, path: KeyPath, *, key: bool = False) -> str:
        """`file:line:column` of a value, or of its key; the nearest enclosing part where there is none."""
        for end in range(len(path), -1, -1):
            if path[:end] in self._given:
                return self._given[path[:end]]
            marks = self._keys if key and end == len(path) else self._values
            if path[:end] in marks:
                return self.at(marks[path[:end]])
        return f"{self.name}:1:1"

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set a value, with the mappings that lead to it where they are missing.

        Args:
            origin: what `where` says of the value from now on.

        Raises:
            LookupError: the path leads through something that has no such part; the message says what.
        """
        parent = self.data
        real: list[str | int] = []
        for number, part in enumerate(path):
            here, last = path[: number + 1], number + 1 == len(path)
            if isinstance(parent, list) and isinstance(part, str) and part.isdecimal():
                part = int(part)  # `documents.0.count` is `documents[0].count`
            real.append(part)
            if isinstance(part, int):
                if not isinstance(parent, list) or part >= len(parent):
                    entries = shown(parent) if isinstance(parent, list) else "not a list"
                    raise LookupError(f"`{key_path(path[:number])}` is {entries}")
            elif not isinstance(parent, dict):
                raise LookupError(f"`{key_path(path[:number])}` is not a mapping")
            elif not last and parent.get(part) is None:
                parent[part] = {}
                self._given[here] = origin
            if last:
                parent[part] = value
            parent = parent[part]
        # What the file had there, and where, is gone.
        path = tuple(real)

        def left(known: dict[KeyPath, Mark]) -> dict[KeyPath, Mark]:
            return {place: mark for place, mark in known.items() if place[: len(path)] != path}

        self._given, self._values, self._keys = left(self._given), left(self._values), left(self._keys)
        self._given[path] = origin

    def at(self, mark: yaml.Mark) -> str:
        """`file:line:column` of a place that PyYAML marked."""
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"


def key_path(path: KeyPath) -> str:
    """A path as people write it: `calibration.documents[0].count`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


class _TooMuch(Exception):
    """A limit of this module is exceeded."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class _Loader(yaml.SafeLoader):
    """Stops at a depth at which PyYAML, which calls itself for every level, is still far from Python's own limit."""

    levels = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node, unless it lies too deep or is one too many."""
        self.levels += 1
        self.nodes += 1
        if self.nodes > MOST_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_VALUES:,} values", self.peek_event().start_mark
            )
        if self.levels > MOST_LEVELS:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_LEVELS} levels inside one another", self.peek_event().start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.levels -= 1
        return node


def read_located(text: str, name: str) -> LocatedYaml:
    """Parse one YAML document. Never raises for what the text holds: see `problems`."""
    result = LocatedYaml(name)
    if len(text) > MOST_CHARACTERS:
        actual = f"{len(text):,} characters"
        result.problems.append(
            Problem("the file is too large for a settings file", name, f"at most {MOST_CHARACTERS:,}", actual)
        )
        return result
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            result.data = _Reader(loader, result).plain(node, (), frozenset())
    except _TooMuch as error:
        result.problems.append(error.problem)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        where = result.at(mark) if mark else name
        result.problems.append(Problem(f"this is not YAML: {error.problem}{context}", where))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        where = f"{name}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        character = error.character if isinstance(error.character, int) else ord(error.character)
        actual = f"the character U+{character:04X}"
        result.problems.append(Problem("this is not YAML: a character that text cannot contain", where, found=actual))
    except (yaml.YAMLError, ValueError) as error:
        result.problems.append(Problem(f"this is not YAML: {str(error).splitlines()[0]}", name))
    if result.problems and result.data is None:
        result._keys, result._values = {}, {}
    return result


class _Reader:
    """Plain data of nodes; places and problems go into a `LocatedYaml`."""

    def __init__(self, loader: yaml.SafeLoader, result: LocatedYaml) -> None:
        self.loader, self.result = loader, result
        self.values, self.characters = 0, 0

    def plain(self, node: yaml.Node, path: KeyPath, inside: frozenset[int]) -> Any:
        """The data of one node."""
        result = self.result
        result._values[path] = node.start_mark
        self._count(node)
        if id(node) in inside:
            self._problem(f"`{key_path(path)}` contains itself", node)
            return None
        inside |= {id(node)}
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _KNOWN:
            self._tag(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, i), inside) for i, item in enumerate(node.value)]
        data: dict[Any, Any] = {}
        marks: dict[Any, yaml.Mark] = {}
        for key_node, value_node in node.value:
            self._count(key_node)
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str | int | float) or isinstance(key, bool):
                actual = str(key_node.value)[:60] if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
                self._problem("a key must be text or a number", key_node, found=actual)
                continue
            here = (*path, str(key))
            # `1`, `1.0` and `"1"` are one key to everything that reads numbers as keys.
            first = marks.get(key, marks.get(str(key)))
            if first is not None:
                self._problem(
                    f"key `{key_path(here)}` is given twice",
                    key_node,
                    found=f"first in line {first.line + 1}",
                    fix="remove one of the two",
                )
                continue
            result._keys[here] = marks[key] = marks[str(key)] = key_node.start_mark
            data[key] = self.plain(value_node, here, inside)
        return data

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        """Text, number, boolean or None; dates and the like stay the text that they are."""
        text = str(node.value)
        wrong = _NO_TEXT.search(text)
        if wrong is not None:
            self._problem("a character that text cannot contain", node, found=f"U+{ord(wrong.group()):04X}")
            return ""
        quoted = node.style in ("'", '"', "|", ">")
        if node.tag in _PLAIN:
            return self._number(node, text)
        if node.tag not in _KNOWN:
            self._tag(node)
        if not quoted and _FLOAT.fullmatch(text):
            return self._finite(node, float(text))
        return text

    def _number(self, node: yaml.ScalarNode, text: str) -> Any:
        """What PyYAML makes of a number, a boolean or nothing, within the limits."""
        if len(text) > 10 * MOST_DIGITS:
            self._problem("a number with too many digits", node, f"at most {MOST_DIGITS}", f"{len(text):,} characters")
            return 0
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            self._problem(f"not a valid {node.tag.removeprefix(_TAG)}", node, found=text[:60])
            return 0
        return self._finite(node, value)

    def _finite(self, node: yaml.ScalarNode, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            self._problem("a number that is not finite", node, "a finite number", str(node.value)[:60])
            return 0
        if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
            self._problem("a number with too many digits", node, f"at most {MOST_DIGITS}", str(node.value)[:60])
            return 0
        return value

    def _count(self, node: yaml.Node) -> None:
        """Stop where aliases make more of the file than it may be."""
        self.values += 1
        self.characters += len(node.value)
        if self.values > MOST_VALUES or self.characters > MOST_CHARACTERS:
            raise _TooMuch(
                Problem(
                    "the file is too large for a settings file",
                    self.result.at(node.start_mark),
                    expected=f"at most {MOST_VALUES:,} values and {MOST_CHARACTERS:,} characters, aliases written out",
                    found="more than that",
                    fix="write out what the aliases stand for, or make the lists shorter",
                )
            )

    def _tag(self, node: yaml.Node) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self._problem("tags are not supported", node, "a plain value", f"`{tag[:60]}`", "remove the tag")

    def _problem(
        self, what: str, node: yaml.Node, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> None:
        self.result.problems.append(Problem(what, self.result.at(node.start_mark), expected, found, fix))


def unknown_key(path: KeyPath, known: list[str], located: LocatedYaml) -> Problem:
    """The problem of a key that a mapping does not have."""
    known = list(dict.fromkeys(known))
    return Problem(
        f"unknown key `{key_path(path)}`",
        located.where(path, key=True),
        expected=f"one of {', '.join(known)}" if known else "no keys here",
        found=f"`{path[-1]}`",
        fix=nearest(str(path[-1]), known),
    )


def shown(value: Any) -> str:
    """How a value reads in a message: as in YAML, cut short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict | list | tuple):
        number = "1 entry" if len(value) == 1 else f"{len(value):,} entries"
        return f"a {'mapping' if isinstance(value, dict) else 'list'} with {number}"
    text = str(value).lower() if isinstance(value, bool) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
