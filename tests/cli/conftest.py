"""A run that is done once and read by many tests; tests that write get a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli.app import app
from compress.plots import figure
from tests.cli.recipes import make_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, sketches: Callable[..., bytes]) -> Path:
    """The recipe of a finished run, with its plots drawn whichever test asks for it first."""
    recipe = make_recipe(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "rendered", sketches)
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
