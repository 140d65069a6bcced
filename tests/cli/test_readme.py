"""Every command of the README runs, on a tiny model in place of the demo."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli.app import app

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
LINES = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith("compress ")
]


@pytest.mark.parametrize("line", LINES)
def test_runs(line: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = line.replace("recipes/smollm2-quickstart.yaml", str(copied))
    own = own.replace("runs/smollm2-quickstart", str(copied.parent / "run")).replace("llama-3-8b", "tiny")
    own = own.replace("runs/smollm2-amp", str(copied.parent / "run"))
    own = own.replace("demo/smollm2-135m", str(copied.parent / "model")).replace("kv=0.5,0.25", "kv=0.8,0.7")
    words = shlex.split(own)[1:]
    if words[0] == "bench":
        words += ["--lengths", "128"]
    if words[0] == "eval" and "--suites" in words:
        pytest.importorskip("lm_eval")
        words += ["--out", str(tmp_path / "eval")]
    if words[0] != "recipes":
        monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
