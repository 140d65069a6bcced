"""One command's work on a recipe: the run folder it holds, and the model, loaded when first needed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.cli import arguments, methods, processes
from compress.cli.inputs import Inputs
from compress.cli.output import say
from compress.cli.recovery import CONTROL, RECORD
from compress.data.text import MOST, Part, characters_for
from compress.files import sweep_scratch, write_json
from compress.recipe import Recipe, load_recipe
from compress.runfolder import RunFolder, open_run, stage_key

if TYPE_CHECKING:
    from compress.models.load import LoadedModel
    from compress.plan import ModelShape


@dataclass
class Session:
    """A recipe with its run folder.

    Attributes:
        helper: whether this process only trains, for another one that holds the folder.
    """

    recipe: Recipe
    run: RunFolder
    resolved: dict[str, Any]
    helper: bool = False
    _weightless: bool = field(default=False, repr=False)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        import transformers

        from compress.models.load import load_model

        transformers.utils.logging.disable_progress_bar()
        device = resolve_device(self.recipe.device)
        started = time.monotonic()
        loaded = load_model(self.recipe.model, dtype=self.recipe.dtype, device=device)
        say(
            f"{self.recipe.model}: {self.shape_line(loaded.model)}, {self.recipe.dtype} on {device}, "
            f"loaded in {time.monotonic() - started:.1f} s"
        )
        for note in loaded.notes:
            say(f"  {note}")
        return loaded

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Sizes and fingerprint of the model."""
        return self.loaded.shape

    @property
    def fingerprint(self) -> str:
        """Of the model; nothing inside `outline`."""
        return "" if self._weightless else self.shape.fingerprint

    def outline(self, key: Callable[[], str]) -> str:
        """A key of this session without what only the weights tell: it is known before they are loaded."""
        self._weightless = True
        try:
            return key()
        finally:
            self._weightless = False

    @staticmethod
    def shape_line(model: Any) -> str:
        """Sizes in words."""
        from compress.runtime.families import groups_of

        config = model.config
        parameters = sum(weight.numel() for weight in model.parameters())
        return (
            f"{config.num_hidden_layers} layers, {config.num_attention_heads} query and "
            f"{groups_of(config)} key/value heads, {parameters / 1e6:.3g}M parameters"
        )

    @functools.cached_property
    def inputs(self) -> Inputs:
        """Hashes of all that the recipe names besides the model."""
        return Inputs(self.run.path, keeps=not self.helper)

    def profile_key(self) -> str:
        """All that a profile depends on."""
        calibration = self.resolved["calibration"]
        section = self.recipe.calibration
        read = [*section.documents, *section.training]
        texts = [self._text(source, read, "calibration") for source in (section.text, section.second) if source]
        return stage_key(
            "profile",
            texts,
            self.fingerprint,
            self.recipe.dtype,
            self.recipe.seed,
            calibration["text"],
            calibration["documents"],
            calibration["training"],
            self.resolved["profile"],
            *([calibration["second"]] if calibration["second"] else []),
        )

    def search_key(self) -> str:
        """All that a plan depends on."""
        section = self.recipe.calibration
        held_out = self.resolved["calibration"]["held_out"]
        text = self._text(section.text, section.held_out, "held_out") if section.held_out else None
        budget: Any = self.recipe.search.budget
        tables = [self.inputs.file(path) for path in budget.tables]
        return stage_key("search", self.profile_key(), held_out, text, self.resolved["search"], tables)

    def export_key(self) -> str:
        """All that a checkpoint depends on: the plan as it lies there, so an edited one is exported again."""
        return stage_key(
            "export", self._content(self.run.plan), self.recipe.dtype, self.resolved["export"], *self._trained(RECORD)
        )

    def evaluate_key(self) -> str:
        """All that the numbers depend on."""
        baselines = [self._content(path) for path in sorted((self.run.path / "search").glob("*.json"))]
        return stage_key(
            "evaluate",
            self._content(self.run.plan),
            baselines,
            self.recipe.dtype,
            resolve_device(self.recipe.device).partition(":")[0],
            self.recipe.seed,
            self.resolved["evaluate"],
            self._evaluated(),
            *self._trained(RECORD, CONTROL),
        )

    def recover_key(self) -> str:
        """All that the trained weights of the plan depend on."""
        return stage_key("recover", self._content(self.run.plan), *self._training())

    def control_key(self) -> str:
        """All that the trained weights of the dense model depend on."""
        return stage_key("control", self.fingerprint, *self._training())

    def _training(self) -> list[Any]:
        settings: Any = self.recipe.recover
        source: Any = settings.text or self.recipe.calibration.text
        text = self.inputs.text(source, characters_for(settings.text_tokens, "calibration"))
        return [settings.facts(), self.resolved["calibration"]["text"], text, self.recipe.seed, self.recipe.dtype]

    def _evaluated(self) -> list[str]:
        """Contents of the texts and task files that the evaluation reads."""
        evaluate: Any = self.recipe.evaluate
        request, harness = evaluate.perplexity, evaluate.lm_eval
        source: Any = self.recipe.calibration.text if request is None else request.text
        found = []
        if request is not None:
            found.append(self.inputs.text(source, characters_for(request.tokens, "evaluation")))
        if evaluate.recall:
            found.append(self._text(source, evaluate.recall, "evaluation"))
        if harness is not None and harness.suites:
            found.append(self.inputs.text(source, MOST))
        if harness is not None and harness.include is not None:
            found.append(self.inputs.files(f"task files: {harness.include}", harness.files))
        return found

    def _text(self, source: Any, tasks: Any, part: Part) -> str:
        """The content that some tasks read of a text."""
        return self.inputs.text(source, characters_for(max((task.length for task in tasks), default=0), part))

    def _trained(self, *records: str) -> list[str]:
        """What came of the recovery, where the recipe has one."""
        return [self._content(self.run.path / record) for record in records] if self.recipe.recover is not None else []

    @staticmethod
    def _content(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


@contextmanager
def open_session(
    recipe_file: str, *, overwrite: bool = False, fresh: bool = False, helpers: bool = False
) -> Iterator[Session]:
    """Load a recipe and hold its run folder.

    Args:
        helpers: whether the command has work for helpers, which get a session without holding the folder; in other
            commands they end here.

    Raises:
        UserError: a wrong recipe, or a folder that cannot be used (see `open_run`).
    """
    import typer
    import yaml

    from compress.cli.environment import environment
    from compress.export.staging import settle

    helper = processes.is_helper()
    if helper and not helpers:
        raise typer.Exit()
    recipe = load_recipe(arguments.recipe_file(recipe_file), methods.load)
    resolved = recipe.resolved()
    if helper:
        yield Session(recipe, RunFolder(Path(recipe.output).expanduser()), resolved, helper=True)
        return
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    output = Path(recipe.output).expanduser()
    with open_run(output, model=recipe.model, text=recipe.text, resolved=text, overwrite=overwrite, fresh=fresh) as run:
        settle(run.checkpoint)
        sweep_scratch()
        write_json(run.path / "environment.json", environment())
        run.log("start", recipe=str(recipe.source))
        yield Session(recipe, run, resolved)
        run.log("end")


def resolve_device(name: str) -> str:
    """The device of `auto`, or the one that is named; in a launch of several processes each has a GPU of its own.

    Raises:
        UserError: the named device is not there.
    """
    import torch

    from compress.errors import UserError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    launch = processes.launch()
    if name == "cuda" and launch is not None:
        name = f"cuda:{launch.local_rank}"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = name.partition(":")
    if not there.get(kind) or (number and int(number) >= torch.cuda.device_count()):
        raise UserError(
            f"device `{name}` is not there",
            expected="auto, or one of " + ", ".join(kind for kind, found in there.items() if found),
            fix="`compress doctor` lists the devices",
        )
    return name
