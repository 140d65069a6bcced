"""What holds for the whole project: folder rules, a fast command, and a README whose commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if language in ("bash", "sh")
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_imports_run_downward() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "module", ["compress.cli.app", "compress.recipe.load", "compress.runfolder", "compress.registry"]
)
def test_torch_is_not_imported_before_it_is_needed(module: str) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'safetensors'}"
    assert python(f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_help_of_everything_comes_without_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from compress.cli.app import app\n"
        "commands = [[]] + [[c.name] for c in app.registered_commands]\n"
        "codes = {CliRunner().invoke(app, [*c, '--help']).exit_code for c in commands}\n"
        "print(codes, 'torch' in sys.modules)"
    )
    assert python(code).strip() == "{0} False"


def test_the_readme_names_two_commands_and_ci_runs_the_second() -> None:
    assert {"scripts/quickstart", "scripts/test"} <= set(COMMANDS)
    assert (ROOT / ".ci/run").read_text().strip().endswith('scripts/test"')


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("compress")])
def test_readme_commands_parse(command: str) -> None:
    """Each command exists with the options that the README gives it, and the recipes it names are there."""
    import typer

    from compress.cli.app import app

    name, *rest = shlex.split(command)[1:]
    group: Any = typer.main.get_command(app)
    found = group.commands[name]
    found.make_context(name, list(rest), resilient_parsing=False)
    assert all((ROOT / word).is_file() for word in rest if word.startswith("recipes/"))


@pytest.mark.parametrize(
    "code", [block for language, block in BLOCKS if language == "python"], ids=lambda code: code.split("\n")[0][:40]
)
def test_readme_python_compiles(code: str) -> None:
    assert compile(code, "README.md", "exec").co_code


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/quickstart", "scripts/test", ".ci/run"])
def test_scripts_are_executable_bash(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_readme_files_exist() -> None:
    for name in re.findall(r"`((?:recipes|scripts|compress|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
