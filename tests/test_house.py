"""One door for every question: no code outside of targets/ and runtime/ asks which target it has before it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress.targets
from compress import registry
from compress.registry import Method
from compress.runtime.mixer import MIXERS

PACKAGE = Path(str(compress.__file__)).parent
DOORS = (PACKAGE / "targets", PACKAGE / "runtime")
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if not any(door in path.parents for door in DOORS)]


def shipped(table: registry.Registry[Method]) -> dict[str, type[Method]]:
    """What the package itself registers; tests register more."""
    return {name: method for name, method in table.items() if method.__module__.partition(".")[0] == "compress"}


def kinds() -> set[str]:
    """Names of the classes of targets, mixers and spans, with their bases."""
    classes = [*shipped(registry.targets).values(), *MIXERS.values()]
    bases = {base for kind in classes for base in inspect.getmro(kind) if base.__module__.startswith("compress.")}
    return {base.__name__ for base in bases if base is not Method} | {"Span", "LengthSpan", "AnySpan"}


def questions(tree: ast.AST, names: set[str], classes: set[str]) -> Iterator[tuple[int, str]]:
    """Lines that ask for a class of `classes`, or compare the name of a target."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass", "type"):
            asked = {part.id for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Name)}
            asked |= {
                part.attr for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Attribute)
            }
            if asked & classes:
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Compare):
            texts = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
            if texts and "target" in ast.unparse(node):
                yield node.lineno, ast.unparse(node)
        if isinstance(node, ast.Match) and "target" in ast.unparse(node.subject):
            yield node.lineno, f"match {ast.unparse(node.subject)}"
        if isinstance(node, ast.MatchClass) and getattr(node.cls, "id", "") in classes:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(group, WindowGroup)",
        "isinstance(group, (int, targets.full.FullGroup))",
        "group.target == 'window'",
        "entry['target'] not in ('full', 'pruned')",
        "match group.target:\n    case 'full': pass",
        "match group:\n    case FullGroup(): pass",
    ],
)
def test_the_question_is_found(code: str) -> None:
    assert list(questions(ast.parse(code), set(shipped(registry.targets)), kinds()))


def test_no_code_asks_which_target_it_has_before_it() -> None:
    names, classes = set(shipped(registry.targets)), kinds()
    assert {"full", "window", "pruned"} <= names and {"Target", "SpanTarget", "SpanMixer", "State"} - classes == {
        "State"
    }
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {text}"
        for path in FILES
        for line, text in questions(ast.parse(path.read_text(encoding="utf-8")), names, classes)
    ]
    assert not found, "\n".join(found)
