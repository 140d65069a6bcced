"""A run that is done once and read by many tests; tests that write get a copy."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli.app import app
from tests.cli.recipes import make_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a finished run."""
    recipe = make_recipe(tmp_path_factory.mktemp("finished"))
    result = CliRunner().invoke(app, ["run", str(recipe)])
    assert result.exit_code == 0, result.output
    return recipe


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The recipe of a copy of the finished run, which a test may change."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.parent, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(f"{finished.parent}/run", f"{folder}/run"))
    return recipe
