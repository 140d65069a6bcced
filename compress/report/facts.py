"""Everything a report shows of one folder, read from the files that the other commands left there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from compress.bench.file import BenchFile, read_bench
from compress.errors import UserError
from compress.evaluate.comparison import Comparison, VariantResult, read_comparison
from compress.export.layout import checkpoint_form
from compress.files import listed
from compress.json_file import AGAIN, read_bytes, read_model, read_object
from compress.plan import CHECKPOINT_PLAN, Form, Plan, read_plan
from compress.profile.key import Key
from compress.profile.stability import stabilities
from compress.profile.store import HEADER, Profile, read_profile
from compress.runfolder import TRAINED_PLAN

WANTED = "a run folder, or a folder that `compress eval` or `compress bench --out` wrote"

MAKE = "compress run RECIPE makes one; compress eval MODEL --tasks ... makes another"


class _Stage(BaseModel):
    model_config = ConfigDict(extra="ignore")

    seconds: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class _Stages(BaseModel):
    """What a report reads of `stages.json`."""

    model_config = ConfigDict(extra="ignore")

    stages: dict[str, _Stage]


@dataclass(frozen=True)
class RetentionCurves:
    """Of the statistic `reconstruction`: what share of its keys a head group needs for shares of their scores.

    Attributes:
        length: of the documents, in tokens.
        shares: of the scores of KVzip+, ascending.
        needed: `[layers][groups][shares]`, shares of the keys; 0 in layers that slide by themselves.
    """

    length: int
    shares: tuple[float, ...]
    needed: list[list[list[float]]]


@dataclass(frozen=True)
class Facts:
    """One folder.

    Attributes:
        name: the folder's own name.
        statistics: tensors of the profile with one number a head group, by key, `[layers][groups]`.
        stability: by importance statistic, how two corpora agree on it.
        form: of the checkpoint that the plan was exported to; None before it was.
        environment: versions and devices of the last command that wrote there.
        retention: curves of the longest documents; None where they were not measured.
    """

    name: str
    path: Path
    comparison: Comparison | None
    plan: Plan | None
    form: Form | None
    statistics: dict[str, list[list[float]]]
    stability: dict[str, str]
    bench: BenchFile | None
    environment: dict[str, Any]
    recipe: str | None
    seconds: dict[str, float]
    retention: RetentionCurves | None = None

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
    plans = (TRAINED_PLAN, "plan.json", CHECKPOINT_PLAN)
    plan = next((folder / name for name in plans if (folder / name).is_file()), None)
    files = {name: folder / f"{name}.json" for name in ("evaluation", "bench", "environment", "stages")}
    there = {name: path.is_file() for name, path in files.items()}
    if plan is None and not there["evaluation"] and not there["bench"]:
        unfinished = there["stages"]
        raise UserError(
            "this run has no plan yet, which is the first that a report shows"
            if unfinished
            else "nothing in this folder can be shown",
            where=str(folder),
            expected=WANTED,
            found=listed(folder),
            fix="compress run RECIPE goes on with it" if unfinished else MAKE,
        )
    stages = read_model(_Stages, files["stages"], "the list of stages", fix=AGAIN).stages if there["stages"] else {}
    bench = read_bench(files["bench"], fix=AGAIN) if there["bench"] else None
    environment = read_object(files["environment"], "the environment", fix=AGAIN) if there["environment"] else None
    recipe = folder / "recipe.yaml"
    chosen = read_plan(plan) if plan is not None else None
    profile = _profile(folder / "profile", chosen)
    return Facts(
        name=folder.resolve().name,
        path=folder,
        comparison=read_comparison(files["evaluation"]) if there["evaluation"] else None,
        plan=chosen,
        form=checkpoint_form(folder) or checkpoint_form(folder / "checkpoint"),
        statistics=_statistics(profile) if profile is not None else {},
        retention=retention_curves(profile) if profile is not None else None,
        stability={name: agreement.line() for name, agreement in stabilities(profile).items()}
        if profile is not None
        else {},
        bench=bench,
        environment=environment or (bench.shown_environment() if bench is not None else {}),
        recipe=_text(recipe) if recipe.is_file() else None,
        seconds={name: entry.seconds for name, entry in stages.items() if entry.seconds is not None},
    )


def _text(path: Path) -> str:
    try:
        return read_bytes(path, "the recipe").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("the recipe is not UTF-8 text", where=str(path), found=str(error)) from None


def _profile(folder: Path, plan: Plan | None) -> Profile | None:
    if not (folder / HEADER).is_file():
        return None
    profile = read_profile(folder)
    measured = profile.header.model
    if plan is not None and (measured.layers, measured.kv_heads) != (plan.model.layers, plan.model.kv_heads):
        raise UserError(
            "the profile and the plan are of different models",
            where=str(folder),
            expected=f"{plan.model.layers} layers of {plan.model.kv_heads} head groups, as the plan has",
            found=f"{measured.layers} layers of {measured.kv_heads}",
            fix="run the recipe again: compress run RECIPE",
        )
    return profile


def _statistics(profile: Profile) -> dict[str, list[list[float]]]:
    keys = [key for key in profile.tensors if profile.entry(key).axes == ("layer", "group") and key.target is None]
    return {str(key): profile.tensor(key).tolist() for key in sorted(keys, key=str)}


def retention_curves(profile: Profile) -> RetentionCurves | None:
    """What the statistic `reconstruction` says of the longest documents; None where a profile has it not."""
    entry = profile.header.statistics.get("reconstruction")
    length = max(profile.lengths)
    needed = profile.find(Key("reconstruction", "moved", length))
    if entry is None or needed is None:
        return None
    order = sorted(range(needed.shape[-1]), key=lambda place: entry.parameters["shares"][place])
    shares = tuple(float(entry.parameters["shares"][place]) for place in order)
    return RetentionCurves(length, shares, needed[..., order].tolist())
