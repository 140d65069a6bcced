"""Reads YAML so that every key and value keeps its line and column, and duplicated keys are noticed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from compress.errors import Problem, nearest

KeyPath = tuple[str | int, ...]

# YAML 1.1, which PyYAML reads, takes `1e-4` for a text because it has no dot; everybody else takes it for a number.
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_PLAIN = {
    "tag:yaml.org,2002:int": int,
    "tag:yaml.org,2002:float": float,
    "tag:yaml.org,2002:bool": bool,
    "tag:yaml.org,2002:null": type(None),
}


@dataclass
class LocatedYaml:
    """Plain data of a YAML text, the places of its parts, and what is wrong with the text itself.

    Attributes:
        name: what places start with, usually the path of the file.
        data: mappings, lists, text, numbers, booleans and None; None when the text is not YAML.
        problems: syntax errors, duplicated keys and keys that are no text or number.
    """

    name: str
    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    _keys: dict[KeyPath, yaml.Mark] = field(default_factory=dict)
    _values: dict[KeyPath, yaml.Mark] = field(default_factory=dict)

    def where(self, path: KeyPath, *, key: bool = False) -> str:
        """`file:line:column` of a value, or of its key; the nearest enclosing part where there is none."""
        for end in range(len(path), -1, -1):
            marks = self._keys if key and end == len(path) else self._values
            if path[:end] in marks:
                mark = marks[path[:end]]
                return f"{self.name}:{mark.line + 1}:{mark.column + 1}"
        return f"{self.name}:1:1"


def key_path(path: KeyPath) -> str:
    """A path as people write it: `calibration.documents[0].count`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def read_located(text: str, name: str) -> LocatedYaml:
    """Parse one YAML document. Never raises for what the text holds: see `problems`."""
    result = LocatedYaml(name)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            result.data = _plain(loader, node, (), result, frozenset())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        context = f" ({error.context})" if error.context else ""
        result.problems.append(Problem(f"this is not YAML: {error.problem}{context}", where))
    except (yaml.YAMLError, ValueError) as error:
        result.problems.append(Problem(f"this is not YAML: {str(error).splitlines()[0]}", name))
    return result


def _plain(loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath, result: LocatedYaml, inside: frozenset[int]) -> Any:
    """The data of one node; its place and its problems go into `result`."""
    result._values[path] = node.start_mark
    if id(node) in inside:
        result.problems.append(Problem(f"`{key_path(path)}` contains itself", result.where(path)))
        return None
    inside |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, (*path, i), result, inside) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node)
    data: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node) if isinstance(key_node, yaml.ScalarNode) else None
        mark = key_node.start_mark
        where = f"{result.name}:{mark.line + 1}:{mark.column + 1}"
        if not isinstance(key, str | int | float) or isinstance(key, bool):
            result.problems.append(
                Problem("a key has to be a text or a number", where, found=str(getattr(key_node, "value", ""))[:60])
            )
            continue
        here = (*path, key if isinstance(key, str) else str(key))
        if key in data:
            first = result._keys[here]
            result.problems.append(
                Problem(
                    f"key `{key_path(here)}` is given twice",
                    where,
                    found=f"first in line {first.line + 1}",
                    fix="remove one of the two",
                )
            )
            continue
        result._keys[here] = mark
        data[key] = _plain(loader, value_node, here, result, inside)
    return data


def _scalar(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Text, number, boolean or None; dates and the like stay the text that they are."""
    kind = _PLAIN.get(node.tag)
    if kind is not None:
        return loader.construct_object(node)
    text = str(node.value)
    quoted = getattr(node, "style", None) in ("'", '"', "|", ">")
    return float(text) if not quoted and _FLOAT.fullmatch(text) else text


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
