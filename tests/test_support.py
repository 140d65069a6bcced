"""The table of docs/support.md has the rows of its script, and says what those that take no time still do."""

from __future__ import annotations

import importlib
import re

import pytest
import transformers

from compress.models.families import REFUSED
from compress.registry import targets
from compress.runtime.families import FAMILIES
from scripts.support_rows import ROWS, Row, Subject, Wrong
from scripts.support_table import KINDS, MADE, checkpoints, families_table, outcome, table, written


def cells() -> dict[str, dict[str, str]]:
    """What the document says of each row, and how it was checked."""
    found = {}
    for line in written().splitlines():
        if line.startswith("| ") and not line.startswith(("| what |", "| --- |", "| **")):
            name, patched, native, checked = line.strip("| \n").split(" | ")
            found[name] = {"patched": patched, "native": native, "checked": checked}
    return found


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return checkpoints(tmp_path_factory.mktemp("support"))


def test_the_document_has_the_rows_of_the_script() -> None:
    assert list(cells()) == [row.name for row in ROWS] and len(cells()) == len(ROWS)
    assert [each["checked"] for each in cells().values()] == [row.checked for row in ROWS]
    assert re.match(r"On a CPU, with transformers \d", written())
    told = {(row.group, row.name): cells()[row.name] for row in ROWS}
    assert table(told).partition("\n")[2] == written().partition("\n")[2]


def test_the_document_has_the_families_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [name for name, target in targets.items() if not target.__module__.startswith("compress.")]
    for name in examples:
        monkeypatch.delitem(targets._methods, name)
    assert written(*MADE) == families_table()
    assert all(f"`{name}`" in written(*MADE) for name in (*FAMILIES, *REFUSED))


def test_nothing_is_wrong_in_it() -> None:
    """A patched checkpoint computes the right thing or refuses; only stock libraries stop in another way."""
    for name, each in cells().items():
        assert each["patched"].startswith(("works", "refused: ")), name
        assert "**wrong**" not in each["native"], name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.cheap], ids=lambda row: row.name.replace("`", ""))
def test_it_is_still_so(row: Row, kind: str, subjects: dict[str, Subject]) -> None:
    if row.needs is not None:
        pytest.importorskip(row.needs.replace("-", "."))
    found, said = outcome(row, subjects[kind]), cells()[row.name][kind]
    if f"with transformers {transformers.__version__}," in written():
        assert found == said
    else:  # another version has other words
        assert found.partition(":")[0] == said.partition(":")[0]


def test_the_class_that_a_configuration_names_is_found_in_transformers(subjects: dict[str, Subject]) -> None:
    """As `transformers serve` looks for it, and with the arguments that it gives."""
    patched = subjects["patched"]
    config = transformers.AutoConfig.from_pretrained(patched.folder, trust_remote_code=True, attn_implementation=None)
    kind = getattr(importlib.import_module("transformers"), config.architectures[0])
    model = kind.from_pretrained(patched.folder, trust_remote_code=True, attn_implementation=None).eval()
    patched.same(model)


def test_the_script_tells_wrong_from_refused() -> None:
    def fail(error: Exception) -> str:
        def run(subject: Subject) -> None:
            raise error

        return outcome(Row("", "", "", run, True), None)  # type: ignore[arg-type]

    assert fail(Wrong("other tokens")) == "**wrong**: other tokens"
    assert fail(ValueError("cache: not this one. Take that")) == "refused: *cache: not this one*"
    assert fail(KeyError("x")) == "fails: *KeyError, 'x'*"
