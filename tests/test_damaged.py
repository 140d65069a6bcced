"""Files that once ended a command with a traceback, or were taken for whole: refused with one clear message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli.app import app
from tests.calls import call
from tests.report.common import make_folder

DAMAGED = Path(__file__).parent / "damaged"
# First word of a file's name -> where it is put in a folder with results, and the command that reads it there.
PLACES = {
    "bench": ("bench.json", "report"),
    "plan": ("plan.json", "inspect"),
    "profile": ("profile/profile.json", "report"),
    "prune": ("plan.json", "inspect"),
    "stages": ("stages.json", "report"),
}
FILES = sorted(path for path in DAMAGED.iterdir() if path.name.split("-")[0] in PLACES)


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.exception, result.output)
    assert "Traceback" not in result.output and not result.stdout
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_damaged_file_is_refused(file: Path, tmp_path: Path) -> None:
    place, command = PLACES[file.name.split("-")[0]]
    folder = make_folder(tmp_path / "run")
    (folder / place).parent.mkdir(exist_ok=True)
    shutil.copy(file, folder / place)
    before = contents(folder)
    said = refused(command, folder)
    assert said.startswith(str(folder / place)), said
    assert max(map(len, said.splitlines())) < 400 and contents(folder) == before


def test_a_checksum_of_null_is_no_plan_by_hand(tmp_path: Path) -> None:
    """Without the key a plan is by hand and may be anything; with it, the content has to match."""
    raw = json.loads((DAMAGED / "plan-17.json").read_text())
    path = tmp_path / "plan.json"
    del raw["checksum"]
    path.write_text(json.dumps(raw))
    assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 0
    wrong: tuple[object, ...] = (None, False, "", {}, [])
    for checksum in wrong:
        path.write_text(json.dumps({**raw, "checksum": checksum}))
        assert "does not match its checksum" in refused("inspect", path)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("bench.json", "copy_bytes_per_s", True),
        ("bench.json", "environment", {"gpus": [7]}),
        ("bench.json", "kernel", [{"what": "decode", "mix": "A", "batch": 1, "length": -4, "speedup": 2.0}]),
        ("evaluation.json", "seed", "0"),
        ("evaluation.json", "perplexity", {"length": 2048}),
        ("evaluation.json", "recall", []),
        ("evaluation.json", "variants", [{"name": ["dense"]}]),
        ("plan.json", "layers", []),
        ("plan.json", "predicted", {"kv_bytes": {"-1": 5}}),
        ("stages.json", "stages", {"search": {"seconds": -1}}),
    ],
)
def test_what_is_read_is_checked_by_type_and_range(name: str, key: str, value: object, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    path = folder / name
    raw = json.loads(path.read_text()) if path.exists() else {"schema": 1}
    raw.pop("checksum", None)
    path.write_text(json.dumps({**raw, key: value}))
    assert refused("report", folder).startswith(str(path))


def test_a_changed_result_is_noticed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    path = folder / "evaluation.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    assert "its content does not match its checksum" in refused("report", folder)
