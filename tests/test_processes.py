"""A fork of the zygote is to a test what a fresh Python process is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import processes
from tests.processes import run, start

TOLD = """
import json, os, random, sys, threading
import torch, transformers.utils, transformers.dynamic_module_utils as dynamic
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "input": sys.stdin.read(), "word": os.environ.get("WORD"),
    "compress": any(name.partition(".")[0] == "compress" for name in sys.modules), "threads": threading.active_count(),
    "code": [dynamic.HF_MODULES_CACHE, transformers.utils.HF_MODULES_CACHE], "drawn": random.random(),
    "seed": torch.initial_seed(), "main": __name__, "openmp": torch.get_num_threads(),
}))
"""


def test_a_child_finds_what_a_process_of_its_own_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "ours")
    own = {**os.environ, "WORD": "theirs", "HF_MODULES_CACHE": str(tmp_path / "code")}
    first, second = (json.loads(run("code", TOLD, "a", 1, cwd=tmp_path, env=own).stdout) for _ in range(2))
    assert first["arguments"] == ["-c", "a", "1"] and first["folder"] == str(tmp_path) and first["input"] == ""
    assert first["word"] == "theirs" and first["main"] == "__main__" and not first["compress"]
    assert first["code"] == [str(tmp_path / "code")] * 2
    if processes.zygote() is not None:
        assert first["threads"] == first["openmp"] == 1
    assert first["drawn"] != second["drawn"]
    third = json.loads(run("code", TOLD, cwd=tmp_path).stdout)
    assert third["word"] == "ours" and third["seed"] == first["seed"]


def test_a_child_that_knows_the_toolkit_is_one_too(tmp_path: Path) -> None:
    own = {**os.environ, "WORD": "theirs", "HF_MODULES_CACHE": str(tmp_path / "code")}
    children = [start("code", TOLD, "a", cwd=tmp_path, env=own, parent=processes.toolkit) for _ in range(2)]
    first, second = (json.loads(child.done(60).stdout) for child in children)
    assert first["arguments"] == ["-c", "a"] and first["folder"] == str(tmp_path) and first["word"] == "theirs"
    assert first["code"] == [str(tmp_path / "code")] * 2 and first["main"] == "__main__"
    if processes.toolkit() is not None:
        assert first["threads"] == first["openmp"] == 1
    assert first["drawn"] != second["drawn"]
    assert first["compress"] == (processes.toolkit() is not processes.zygote())
    assert not json.loads(run("code", TOLD).stdout)["compress"]
    ended = start("code", "import sys; sys.exit('a reason')", parent=processes.toolkit).done(60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "a reason\n")


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("import atexit, sys; atexit.register(lambda: print('left', file=sys.stderr))", 0, "left\n"),
        ("import os; os._exit(5)", 5, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_it_ends_as_one(code: str, status: int, told: str) -> None:
    done = run("code", code)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", told)


def test_an_error_is_a_traceback() -> None:
    done = run("code", "import torch\ntorch.ones(2) + torch.ones(3)")
    assert done.returncode == 1 and "RuntimeError: The size of tensor a" in done.stderr


def test_modules_and_files_are_found_as_python_finds_them(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 7\n")
    (tmp_path / "mine.py").write_text("import sys\nimport beside\nprint(beside.value, __name__, len(sys.argv))\n")
    assert run("module", "mine", "x", cwd=tmp_path).stdout == "7 __main__ 2\n"
    alone = run("file", str(tmp_path / "mine.py"), cwd=tmp_path)  # python -P: nothing beside it
    assert alone.returncode == 1 and "No module named 'beside'" in alone.stderr


def test_signals_reach_it_and_a_late_one_is_killed() -> None:
    process = start("code", "import signal; print('up', flush=True); signal.pause()")
    assert process.stdout.readline() == "up\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.done(60).returncode == -signal.SIGTERM
    with pytest.raises(subprocess.TimeoutExpired):
        start("code", "import signal; signal.pause()").done(0.2)


def test_where_a_fork_would_not_be_safe_every_process_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "zygote", lambda: None)
    (tmp_path / "mine.py").write_text("import os, sys\nprint(sys.argv[1:], os.getcwd())\nsys.exit(3)\n")
    done = run("module", "mine", "x", 1, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"['x', '1'] {tmp_path}\n", "")
    alone = run("file", str(tmp_path / "mine.py"), env={**os.environ, "WORD": "theirs"})
    assert alone.returncode == 3 and alone.stdout == f"[] {processes.ROOT}\n"
    process = start("code", "import signal; print('up', flush=True); signal.pause()")
    assert process.stdout.readline() == "up\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.done(0.2)


def test_a_process_that_has_loaded_checkpoints_can_become_another(tmp_path: Path) -> None:
    """As the fork of a run does for its verification: code of one cache is not looked for in the other."""
    code = r"""
import os, sys
sys.path.insert(0, "tests")
import zygote
from transformers import AutoConfig
for number in "12":
    order = {"environment": {**os.environ, "HF_MODULES_CACHE": f"code{number}"}, "folder": ".", "path": []}
    zygote.become(order | {"arguments": ["x"]})
    folder = f"model{number}"
    os.mkdir(folder)
    open(f"{folder}/config.json", "w").write('{"auto_map": {"AutoConfig": "own.Own"}, "model_type": "own"}')
    text = f"from transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    number = {number}\n"
    open(f"{folder}/own.py", "w").write(text)
    print(AutoConfig.from_pretrained(folder, trust_remote_code=True).number)
"""
    done = run("code", code.replace('"tests"', repr(str(processes.ROOT / "tests"))), cwd=tmp_path)
    assert done.stdout == "1\n2\n", done.stderr
