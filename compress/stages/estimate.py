"""How long a run takes on this machine, and how much memory: about, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from compress.data.prompt import Task
from compress.evaluate.comparison import CONTROL_ROW, WINDOWS_ROW
from compress.evaluate.measure import asked_for
from compress.recipe.defaults import Situation
from compress.recipe.schema import Recipe
from compress.stages.check import uses_of
from compress.stages.evaluate import row_names

# Forward passes that one profiled sample costs, with and without gradients: the tables of rules are most of it.
PROFILED, WITH_GRADIENTS = 2.5, 5.0
TRAINED = 3.0  # forward passes of a training step
EFFICIENCY = {"cpu": 0.7, "cuda": 0.3}  # of a model's passes, against one large product of matrices
STEP = {"cpu": 0.03, "cuda": 0.03}  # seconds of a decoded token besides its arithmetic
# Documents that a model writes at once, and seconds of a step of all of them besides its arithmetic.
WRITING = {"cpu": (16, 0.06), "cuda": (512, 0.005)}
EXPORT = 30.0  # seconds, most of them in a fresh process that imports torch
TRIED = 4  # plans and baselines that a search measures besides the points of the Pareto set
SIZE, REPEATS = {"cpu": 768, "cuda": 8192}, 5


def rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a product of matrices on a device, the best of a few."""
    kind = device.partition(":")[0]
    size = SIZE.get(kind, SIZE["cpu"])
    left = torch.ones(size, size, device=device, dtype=dtype)
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        float((left @ left)[0, 0])
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest


def seconds(recipe: Recipe, situation: Situation, device: str) -> dict[str, float]:
    """Seconds of each stage, about.

    Args:
        situation: of the recipe's model.
        device: where the work is done.
    """
    kind = device.partition(":")[0]
    speed = rate(device, torch.float32 if kind == "cpu" else getattr(torch, recipe.dtype)) * EFFICIENCY.get(kind, 0.5)
    token = 2 * situation.parameters / speed

    def answering(tasks: Sequence[Task], prefills: float = 1.0) -> float:
        written = sum(task.count for task in tasks if task.answer == "model") * 12
        return prefills * token * _tokens(tasks) + written * (STEP.get(kind, 0.03) + token)

    calibration, evaluate, search = recipe.calibration, recipe.evaluate, recipe.search
    passes = WITH_GRADIENTS if any(each.needs_gradient for each in recipe.profile.statistics) else PROFILED
    documents = [*calibration.documents, *calibration.training]
    stages: dict[str, float] = {}
    written = {(use.source.model_dump_json(), use.part): use.source.written(use.part) for use in uses_of(recipe)}
    if total := sum(written.values()):
        at_once, step = WRITING.get(kind, WRITING["cpu"])
        stages["text"] = total * (token + step / at_once)
    plans = int(getattr(search.solver, "points", 0)) + TRIED
    stages["profile"] = answering(documents) + passes * token * _tokens(calibration.documents)
    stages["search"] = answering(calibration.held_out, 1.0 + plans)
    if search.refine is not None:
        stages["search"] += 60 * search.refine.minutes
    rows = row_names(recipe)
    if recipe.recover is not None:
        trained = recipe.recover.step_count * recipe.recover.batch_size * recipe.recover.length
        stages["recover"] = TRAINED * token * trained * (1 + (CONTROL_ROW in rows) + (WINDOWS_ROW in rows))
    stages["export"] = EXPORT
    windows = sum(int(getattr(measure, "tokens", 0)) for measure in asked_for(evaluate))
    stages["evaluate"] = len(rows) * (token * windows + answering(evaluate.recall))
    return stages


def _tokens(tasks: Sequence[Task]) -> int:
    return sum(task.length * task.count for task in tasks)


def memory(recipe: Recipe, situation: Situation) -> int:
    """Bytes that the run holds at most, about."""
    tasks = [*recipe.calibration.documents, *recipe.calibration.held_out, *recipe.evaluate.recall]
    return situation.held(max((task.length for task in tasks), default=0))
