"""Everything a report shows of one folder, read from the files that the other commands left there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.evaluate.comparison import Comparison, VariantResult, read_comparison
from compress.plan import Plan, read_plan
from compress.profile.stability import stabilities
from compress.profile.store import HEADER, Profile, read_profile

WANTED = "a run folder, or a folder that `compress eval` or `compress bench --out` wrote"

BASELINES = ("uniform", "uniform-at-longest", "streaming", "random")
MAKE = "compress run RECIPE makes one; compress eval MODEL --tasks ... makes another"


@dataclass(frozen=True)
class Facts:
    """One folder.

    Attributes:
        name: the folder's own name.
        statistics: tensors of the profile with one number a head group, by key, `[layers][groups]`.
        stability: by importance statistic, how two corpora agree on it.
        plans: the plans of the evaluation's rows, by name, where they lie in the folder.
        bench: `bench.json`.
        environment: versions and devices of the last command that wrote there.
    """

    name: str
    path: Path
    comparison: Comparison | None
    plan: Plan | None
    plans: dict[str, Plan]
    statistics: dict[str, list[list[float]]]
    stability: dict[str, str]
    bench: dict[str, Any] | None
    environment: dict[str, Any]
    recipe: str | None
    seconds: dict[str, float]

    @property
    def chosen(self) -> VariantResult | None:
        """The row that the headline is about: `plan`, or else the second."""
        rows = self.comparison.variants if self.comparison else []
        return next((row for row in rows if row.name == "plan"), rows[1] if len(rows) > 1 else None)


def read_facts(folder: Path) -> Facts:
    """Read a folder.

    Raises:
        UserError: there is no such folder, nothing in it that could be shown, or a damaged file.
    """
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), expected=WANTED, fix=MAKE)
    plan = next((folder / name for name in ("plan.json", "compress_plan.json") if (folder / name).is_file()), None)
    files = {name: folder / f"{name}.json" for name in ("evaluation", "bench", "environment", "stages")}
    if plan is None and not files["evaluation"].is_file() and not files["bench"].is_file():
        raise UserError(
            "nothing in this folder can be shown",
            where=str(folder),
            expected=WANTED,
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "an empty folder",
            fix=MAKE,
        )
    stages = _json(files["stages"]).get("stages", {})
    bench = _json(files["bench"]) or None
    recipe = folder / "recipe.yaml"
    chosen = read_plan(plan) if plan is not None else None
    profile = _profile(folder / "profile")
    plans = {
        path.stem: read_plan(path) for path in sorted((folder / "search").glob("*.json")) if path.stem in BASELINES
    }
    return Facts(
        name=folder.resolve().name,
        path=folder,
        comparison=read_comparison(files["evaluation"]) if files["evaluation"].is_file() else None,
        plan=chosen,
        plans=plans | ({"plan": chosen} if chosen is not None else {}),
        statistics=_statistics(profile) if profile is not None else {},
        stability={name: found.line() for name, found in stabilities(profile).items()} if profile is not None else {},
        bench=bench,
        environment=_json(files["environment"]) or (bench or {}).get("environment", {}),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        seconds={name: float(entry["seconds"]) for name, entry in stages.items() if "seconds" in entry},
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("the file is damaged", where=str(path), fix="run the command that wrote it again") from error
    return found


def _profile(folder: Path) -> Profile | None:
    return read_profile(folder) if (folder / HEADER).is_file() else None


def _statistics(profile: Profile) -> dict[str, list[list[float]]]:
    keys = [
        key
        for statistic in profile.header.statistics.values()
        for key, entry in statistic.tensors.items()
        if entry.axes == ("layer", "group")
    ]
    return {key: profile.tensor(key).tolist() for key in sorted(keys)}
