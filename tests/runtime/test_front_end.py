"""Triton's compiler takes every kernel for a GPU in every form, up to its own representation; each statement in one.

The interpreter, in which the other tests run the kernels, runs much that the compiler refuses. No GPU is needed here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest

from tests.processes import ONE_THREAD, ROOT

PLUGIN = ROOT / "plugins" / "vllm"
FOLDERS = ((ROOT, "compress"), (PLUGIN, "compress_vllm"))

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton, whose compiler this asks, is not installed"
)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What a process says of all kernels that is no fork of one that has Triton with its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | ONE_THREAD
    environment["PYTHONPATH"] = os.pathsep.join([str(PLUGIN), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.front_end"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@cache
def functions() -> list[tuple[str, str, ast.FunctionDef]]:
    """Every function that Triton compiles: its module, its file and itself."""
    found = []
    for root, package in FOLDERS:
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_text()
            module = ".".join(path.relative_to(root).with_suffix("").parts)
            for node in ast.walk(ast.parse(text)) if "triton.jit" in text else ():
                marks = node.decorator_list if isinstance(node, ast.FunctionDef) else []
                if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(mark) for mark in marks):
                    found.append((module, str(path.relative_to(ROOT)), node))
    return found


def test_the_compiler_takes_every_form_of_every_kernel(told: dict[str, Any]) -> None:
    lines = {(module, node.name): (path, node.lineno) for module, path, node in functions()}
    found: dict[tuple[str, str], list[str]] = {}
    for one in told["refused"]:
        where = "before a kernel was launched"
        if one["place"] is not None:
            module, name, line = one["place"]
            path, begin = lines.get((module, name), (module, 1))
            where = f"{path}:{begin + line - 1} in {name}"
        found.setdefault((where, one["why"]), []).append(one["form"])
    said = [f"{where}: {why}\n  {len(forms)} forms: {forms[0]}" for (where, why), forms in found.items()]
    assert not said, "\n".join(said)


def test_some_form_has_each_statement_of_each_kernel(told: dict[str, Any]) -> None:
    """Else a kernel, or a part of one, was forgotten in tests/kernel_forms.py, or nothing uses it."""
    lowered, missing, count = {tuple(place) for place in told["lowered"]}, [], 0
    for module, path, function in functions():
        body = function.body[bool(ast.get_docstring(function)) :]
        for node in (statement for part in body for statement in ast.walk(part)):
            if isinstance(node, ast.stmt):
                count += 1
                if (module, function.name, node.lineno - function.lineno + 1) not in lowered:
                    missing.append(f"{path}:{node.lineno} in {function.name}: {ast.unparse(node).splitlines()[0]}")
    assert not missing, "no launch of tests/kernel_forms.py has these:\n" + "\n".join(missing)
    assert count > 1000
