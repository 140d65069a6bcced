"""`compress export`: plan and dense model in, a verified Hugging Face checkpoint out."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import UserError
from compress.export.card import render_card
from compress.export.finite import check_weights, to_dtype
from compress.export.layout import copy_runtime, open_permissions, point_to_runtime
from compress.export.metadata import source_metadata
from compress.export.native import native_model
from compress.export.staging import staged
from compress.export.verify import Checks, verify_checkpoint
from compress.files import write_text
from compress.json_file import read_model
from compress.models.families import family_of
from compress.models.generation import plain_generation
from compress.models.load import DTYPES, LoadedModel
from compress.models.planned import patched_model, planned_model
from compress.models.pruning import block_parameters
from compress.models.tokenizer_files import write_tokenizer
from compress.models.trained import load_trained
from compress.plan import CHECKPOINT_PLAN, Plan, read_plan
from compress.versions import versions

BASE_PLAN = "compress_plan.base.json"  # of the model it was made from, where that is a checkpoint of ours
CHECKS_FILE = "compress_checks.json"
RECORD = "recover.json"  # of the training, where there was one


@dataclass(frozen=True)
class ExportReport:
    """Where the checkpoint is, its size in bytes, and what its verification found."""

    path: Path
    bytes: int
    checks: Checks


def export_checkpoint(
    loaded: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    weights: Path | None = None,
    recipe_text: str | None = None,
    table: str | None = None,
    form: Literal["patched", "native", "auto"] = "patched",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Write the checkpoint, verify it in a fresh process, and only then move it into place.

    Args:
        loaded: the dense model that the plan was made for.
        weights: folder of trained weights of the plan's model (`load_trained`); None exports the dense model's.
        recipe_text: goes into the checkpoint as recipe.yaml and into the card.
        table: measured numbers for the card, as Markdown.
        form: `patched` carries the runtime's files; `native` is a stock architecture; `auto` is native where one holds
            the plan, else patched.
        dtype: dtype of the weights on disk; None keeps the model's.
        overwrite: replace a folder that holds something.
        progress: called with a line for each step.

    Raises:
        UserError: the plan is for another model, no native checkpoint holds it, the folder holds something, the disk
            is full, a value is not finite or overflows in `dtype`, or the verification found a difference. Nothing is
            left behind, and an older checkpoint is untouched.
    """
    say = progress or (lambda line: None)
    if loaded.shape.differing(plan.source.model_dump()):
        raise UserError(
            "the plan is for another model",
            where=loaded.name,
            expected=plan.source.fingerprint,
            found=loaded.shape.fingerprint,
            fix="search again with this model",
        )
    # On the CPU, as the fresh process of the verification: other devices round differently.
    planned = planned_model(loaded.model, plan)
    if weights is not None:
        load_trained(planned, weights)
    planned = planned.to("cpu")
    check_weights(planned)
    if dtype is not None:
        to_dtype(planned, DTYPES[dtype])
    weight_bytes = sum(weight.numel() * weight.itemsize for weight in planned.parameters())
    native = _native(planned, plan, form, say)
    if native is None:
        planned = patched_model(planned, plan)
    with staged(folder, overwrite=overwrite, need_bytes=weight_bytes + (64 << 20)) as partial:
        say("writing weights")
        written = planned if native is None else native
        written.generation_config = copy.deepcopy(loaded.generation or loaded.model.generation_config)
        written.save_pretrained(partial, max_shard_size=max_shard_size)
        write_tokenizer(loaded.folder, loaded.tokenizer, partial, written.config, say)
        planned.generation_config = plain_generation(written.generation_config)
        if native is None:
            copy_runtime(partial)
            point_to_runtime(partial, family_of(planned.config))
        open_permissions(partial)
        (partial / CHECKPOINT_PLAN).write_text(plan.to_json(), encoding="utf-8")
        base = Path(loaded.name) / CHECKPOINT_PLAN
        if base.is_file():
            shutil.copyfile(base, partial / BASE_PLAN)
        if weights is not None and (weights / RECORD).is_file():
            shutil.copyfile(weights / RECORD, partial / RECORD)
        if recipe_text is not None:
            (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
        say("verifying in a fresh process")
        checks = verify_checkpoint(
            partial, planned, loaded.tokenizer, plan, native=native is not None, dense=loaded.model
        )
        (partial / CHECKS_FILE).write_text(json.dumps(checks.to_dict(), indent=1) + "\n", encoding="utf-8")
        _write_card(partial, plan, planned, loaded.name, checks, recipe_text, table)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        say("moving into place")
    return ExportReport(folder, size, checks)


def _native(planned: Any, plan: Plan, form: str, say: Callable[[str], None]) -> Any:
    """The stock model to write, or None where the checkpoint is a patched one.

    Raises:
        UserError: `native` was asked for, and no stock architecture holds the plan.
    """
    if form == "patched":
        return None
    try:
        native = native_model(planned, plan)
    except UserError as error:
        if form == "native":
            raise
        problem = error.problems[0]
        say(f"form patched, because {problem.where}: {problem.what} ({problem.found})")
        return None
    say(f"form native, as {type(native).__name__}")
    return native


def update_card(folder: Path, loaded: LoadedModel, table: str) -> None:
    """Put measured numbers into the card of a checkpoint that `export_checkpoint` wrote.

    Raises:
        UserError: the folder is no such checkpoint.
    """
    plan = read_plan(folder / CHECKPOINT_PLAN)
    checks = read_model(Checks, folder / CHECKS_FILE, "the record of the verification", fix="export again")
    recipe = folder / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else None
    _write_card(folder, plan, loaded.model, loaded.name, checks, text, table)


def _write_card(
    folder: Path, plan: Plan, model: Any, name: str, checks: Checks, recipe: str | None, table: str | None
) -> None:
    """Write README.md."""
    weight = next(model.parameters())
    card = render_card(
        plan,
        name=name,
        source=source_metadata(name, ours=(folder / BASE_PLAN).is_file()),
        dtype=str(weight.dtype).removeprefix("torch."),
        itemsize=weight.itemsize,
        context=int(model.config.max_position_embeddings),
        checks=checks,
        versions=versions(),
        recipe=recipe,
        table=table,
        trained=(folder / RECORD).is_file(),
        base=read_plan(folder / BASE_PLAN) if (folder / BASE_PLAN).is_file() else None,
        weights=block_parameters(model),
    )
    write_text(folder / "README.md", card)
