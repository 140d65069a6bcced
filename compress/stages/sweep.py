"""Runs the recipes of a grid, each in a run folder of its own; work that several of them need is done once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.errors import UserError
from compress.files import write_text
from compress.models.load import LoadedModel
from compress.recipe.grid import Point
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe
from compress.runfolder import RunFolder
from compress.stages.check import check_ahead
from compress.stages.evaluate import evaluate_stage
from compress.stages.export import export_stage
from compress.stages.prepare import prepare_stage
from compress.stages.profile import profile_stage
from compress.stages.recover import recover_stage
from compress.stages.reporter import Reporter
from compress.stages.search import search_stage
from compress.stages.session import Session, open_session

KEPT = ("calibration", "evaluation")  # folders of files that are named after all they depend on


def run_grid(
    points: Sequence[Point], folder: Path, reporter: Reporter, *, export: bool = False
) -> tuple[list[RunFolder], list[str]]:
    """Profile, search, recover and evaluate every recipe, and export it if asked to.

    A stage that another recipe of the grid did with the same key is taken over from its folder, and so are documents
    and measurements; what an earlier call finished is not repeated.

    Args:
        folder: gets `recipes/NAME.yaml`; the run folders are where the recipes say.

    Returns:
        The run folders that are done, and the names of the points that are not; the reasons were reported.

    Raises:
        UserError: a recipe of the grid is wrong; nothing has been run then.
    """
    recipes = [_recipe(point, folder) for point in points]
    done: list[RunFolder] = []
    failed: list[str] = []
    models: dict[tuple[str, str, str], LoadedModel] = {}
    for number, (point, recipe) in enumerate(zip(points, recipes, strict=True), 1):
        reporter.say(f"sweep: {number} of {len(points)}: {point.name}")
        try:
            with open_session(recipe, reporter) as session:
                model = (recipe.model, recipe.dtype, recipe.device)
                if model in models:
                    session.take_model(models[model])
                _run(session, done, export)
                models[model] = session.loaded
        except UserError as error:
            reporter.say(f"sweep: {point.name}: {error}")
            failed.append(point.name)
        else:
            done.append(session.run)
    return done, failed


def _recipe(point: Point, folder: Path) -> Recipe:
    path = folder / "recipes" / f"{point.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, point.text)
    return load_recipe(path)


def _run(session: Session, earlier: Sequence[RunFolder], export: bool) -> None:
    check_ahead(session)
    for name in KEPT:
        for run in earlier:
            _take(run.path / name, session.run.path / name)
    _share(session, "profile", session.profile_key, earlier)
    profile_stage(session)
    if session.recipe.prepare is not None:
        _share(session, "prepare", session.prepare_key, earlier)
        if session.recipe.prepare.effect:
            _share(session, "effect", session.effect_key, earlier)
    prepare_stage(session)
    _share(session, "search", session.search_key, earlier)
    search_stage(session)
    if session.recipe.recover is not None:
        _share(session, "recover", session.recover_key, earlier)
        if session.recipe.recover.control:
            _share(session, "control", session.control_key, earlier)
    recover_stage(session)
    if export:
        export_stage(session)
    evaluate_stage(session)


def _share(session: Session, stage: str, key: Callable[[], str], earlier: Sequence[RunFolder]) -> None:
    """Take a stage over from an earlier run folder that did it with the same key."""
    run, wanted = session.run, key()
    if run.stage_done(stage, wanted):
        return
    for other in earlier:
        if other.stage_done(stage, wanted):
            made = [str(name) for name in other.stages()[stage]["made"]]
            for name in made:
                whole = Path(name).parent if Path(name).parent != Path() else Path(name)
                _take(other.path / whole, run.path / whole)
            run.finish(stage, wanted, seconds=0.0, made=made, outline=session.outline(key))
            session.reporter.say(f"{stage}: taken over from {other.path}")
            return


def _take(source: Path, target: Path) -> None:
    """Bring a file, or all files of a folder, to another place where they are not there yet.

    Tensors and files that are never written again in their place share their bytes on the disk, all others are copied.
    """
    if source.is_dir():
        for entry in sorted(source.iterdir()):
            if not entry.name.startswith("."):
                _take(entry, target / entry.name)
    elif source.is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors" or target.parent.name in KEPT:
            try:
                os.link(source, target)
                return
            except OSError:  # a file system without hard links, or another one
                pass
        shutil.copy2(source, target)
