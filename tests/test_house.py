"""One door for every question: no code asks which target or method it has before it, and each of them is tested."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import compress.recipe.schema
from compress import registry
from compress.registry import Method
from compress.runtime.mixer import MIXERS

PACKAGE = Path(str(compress.__file__)).parent
DOORS = (PACKAGE / "targets", PACKAGE / "runtime")
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if not any(door in path.parents for door in DOORS)]


def shipped(table: registry.Registry[Method]) -> dict[str, type[Method]]:
    """What the package itself registers; tests register more."""
    return {name: method for name, method in table.items() if method.__module__.partition(".")[0] == "compress"}


def tables() -> dict[str, registry.Registry[Method]]:
    """Every registry, by what it has."""
    return {table.kind: table for table in vars(registry).values() if isinstance(table, registry.Registry)}


def kinds() -> set[str]:
    """Names of the classes of all that is registered, of mixers and of spans, with their bases."""
    classes: list[type] = [method for table in tables().values() for method in shipped(table).values()]
    bases = {base for kind in [*classes, *MIXERS.values()] for base in inspect.getmro(kind)}
    names = {base.__name__ for base in bases if base.__module__.startswith("compress.") and base is not Method}
    return names | {"Span", "LengthSpan", "AnySpan"}


def fields() -> set[str]:
    """Names of the fields of all that is registered."""
    return {name for table in tables().values() for method in shipped(table).values() for name in method.model_fields}


# What code calls something that is registered, and whose base answers what may be asked of any of its kind.
CALLED = r"\b(target|statistic|solver|task|source|measure|objective|budget|option|each|one)\b"


def questions(tree: ast.AST, names: set[str], classes: set[str]) -> Iterator[tuple[int, str]]:
    """Lines that ask for a class of `classes`, compare the name of a target, one of `names`, or look whether something
    that is registered has a field that only some of its kind have."""
    known = fields()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            of, name, *_ = node.args
            if getattr(name, "value", None) in known and re.search(CALLED, ast.unparse(of)):
                yield node.lineno, ast.unparse(node)
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
        "getattr(recipe.search.solver, 'sink', None)",
        "hasattr(statistic, 'grid')",
    ],
)
def test_the_question_is_found(code: str) -> None:
    assert list(questions(ast.parse(code), set(shipped(registry.targets)), kinds()))


def test_no_code_asks_which_target_or_method_it_has_before_it() -> None:
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


# What is registered -> the table of the tests that has an entry for each, on which its whole contract is tried.
MATRICES = {
    "target": ("tests.test_conformance", "TARGETS"),
    "statistic": ("tests.profile.test_matrix", "STATISTICS"),
    "measure": ("tests.evaluate.test_measures", "MATRIX"),
    "objective": ("tests.train.test_objectives", "CASES"),
}
# Or the tests of each, which name it.
TESTS = {
    "kind of budget": {
        "active": "search/test_routed.py",
        "bytes_read": "search/test_budget.py",
        "decode_time": "search/test_decode_time.py",
        "density": "search/test_budget.py",
        "flops": "search/test_budget.py",
        "kv": "search/test_budget.py",
        "kv_bound": "search/test_retain.py",
        "parameters": "search/test_pruning.py",
    },
    "layer option": {"routed": "search/test_routed.py"},
    "solver": {
        "allocated": "search/test_pruning.py",
        "amp": "search/test_pruning.py",
        "even": "search/test_routed.py",
        "heads": "search/test_solvers.py",
        "keep": "search/test_prepared.py",
        "layers": "search/test_solvers.py",
        "moa": "search/test_search.py",
        "priced": "test_docs.py",
        "shares": "search/test_retain.py",
        "streaming": "search/test_solvers.py",
        "uniform": "search/test_solvers.py",
    },
    "task": dict.fromkeys(("continuation", "facts", "key_value", "passkey", "passkeys"), "data/test_tasks.py"),
    "text source": dict.fromkeys(("dataset", "embedded", "file", "undivided"), "data/test_text.py")
    | {"generated": "data/test_generated.py"},
}


def test_every_registered_method_is_in_its_matrix() -> None:
    """A family that is registered and not in its matrix fails `test_every_family_has_a_tiny_model`."""
    registered = {kind: set(shipped(table)) for kind, table in tables().items()}
    listed = {kind: set(getattr(import_module(module), name)) for kind, (module, name) in MATRICES.items()}
    listed["target"] &= registered["target"]  # and an example that only tests register
    assert registered == listed | {kind: set(files) for kind, files in TESTS.items()}
    for files in TESTS.values():
        for name, file in files.items():
            text = (Path(__file__).parent / file).read_text(encoding="utf-8")
            word = name.replace("_", "_?")
            assert re.search(rf"\b{word}\b", text, flags=re.IGNORECASE), f"{file} does not try {name}"


def test_a_registry_is_whole_from_the_first_look_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks need not have imported the methods: `compress eval` once knew two of five tasks."""
    (tmp_path / "home_of_methods.py").write_text(
        "from compress.registry import Method\n"
        "from tests.test_house import TABLE\n"
        "assert not list(TABLE)\n"
        "TABLE.register('first')(type('First', (Method,), {}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table: registry.Registry[Method] = registry.Registry("thing", "home_of_methods")
    monkeypatch.setattr("tests.test_house.TABLE", table, raising=False)
    assert "home_of_methods" not in sys.modules
    assert "first" in table and table.parse({"name": "first"}).registered == "first"
    assert all(map(list, tables().values()))


def test_a_file_of_a_package_is_registered_whoever_looks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file may read the others of its package while it is imported, as the budget does the kinds of budget."""
    code = "from compress.registry import Method\nfrom tests.test_house import TABLE\n"
    (tmp_path / "folder_of_methods").mkdir()
    for name in ("__init__", "first", "all_of_them", "last"):
        made = f"TABLE.register('{name}')(type('{name}', (Method,), {{}}))\n"
        found = "assert {'first', 'last'} <= set(TABLE)\n"
        text = "" if name == "__init__" else code + (found if name == "all_of_them" else made)
        (tmp_path / "folder_of_methods" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    table: registry.Registry[Method] = registry.Registry("thing", "folder_of_methods")
    monkeypatch.setattr("tests.test_house.TABLE", table, raising=False)
    assert list(table) == ["first", "last"]
