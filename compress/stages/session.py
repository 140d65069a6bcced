"""One command's work on a recipe: the run folder it holds, and the model, loaded when first needed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import yaml

from compress.data.prompt import Task
from compress.data.reader import Progress, Reader
from compress.data.text import MOST, Part, Source, characters_for
from compress.environment import environment
from compress.errors import placed
from compress.evaluate.measure import asked_for, texts_of
from compress.export.staging import settle
from compress.files import sweep_scratch, write_json
from compress.models.load import LoadedModel, load_model, load_streamed
from compress.models.placement import first_device, placement_of
from compress.models.prepared import attach
from compress.plan import ModelShape
from compress.recipe.schema import Recipe
from compress.runfolder import CONTROL, PREPARED, RECOVERED, WINDOWS, RunFolder, open_run, stage_key
from compress.stages.device import resolve_device
from compress.stages.inputs import Inputs
from compress.stages.processes import together
from compress.stages.reporter import Reporter
from compress.train.settings import TrainSettings


@dataclass
class Session:
    """A recipe with its run folder.

    Attributes:
        resolved: the recipe as plain data with every default written out.
        helper: whether this process only works beside another one, which holds the folder.
        helpers: whether all processes of a launch have this session; else there is one, or the others have ended.
    """

    recipe: Recipe
    run: RunFolder
    resolved: dict[str, Any]
    reporter: Reporter
    helper: bool = False
    helpers: bool = False
    _weightless: bool = field(default=False, repr=False)

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        """The dense model."""
        transformers.utils.logging.disable_progress_bar()
        device = resolve_device(self.recipe.device)
        started = time.monotonic()
        with placed(f"{self.recipe.source}: model"):
            loaded = load_model(self.recipe.model, dtype=self.recipe.dtype, device=device)
        self.reporter.say(
            f"{self.recipe.model}: {self.shape_line(loaded.model)}, {self.recipe.dtype} on "
            f"{_places(loaded.model, device)}, loaded in {time.monotonic() - started:.1f} s"
        )
        for note in loaded.notes:
            self.reporter.say(f"  {note}")
        return loaded

    @functools.cached_property
    def measured(self) -> LoadedModel:
        """The dense model as the profile reads it: the whole one, or layer by layer where the recipe says so."""
        if not self.recipe.profile.stream or "loaded" in vars(self):
            return self.loaded
        device = resolve_device(self.recipe.device)
        with placed(f"{self.recipe.source}: model"):
            loaded = load_streamed(self.recipe.model, dtype=self.recipe.dtype, device=device)
        self.reporter.say(f"{self.recipe.model}: {self.shape_line(loaded.model)}, layer by layer on {device}")
        return loaded

    def together(self) -> AbstractContextManager[None]:
        """All processes that have this session meet here, and are one group inside (`processes.together`)."""
        return together(resolve_device(self.recipe.device)) if self.helpers else nullcontext()

    def take_model(self, loaded: LoadedModel) -> None:
        """Use a dense model that is in memory already: the same name, dtype and device."""
        attach(loaded.model, ())  # what another run prepared
        vars(self)["loaded"] = loaded

    @functools.cached_property
    def shape(self) -> ModelShape:
        """Sizes and fingerprint of the model."""
        known = vars(self).get("loaded") or vars(self).get("measured")
        return self.loaded.shape if known is None else known.shape

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model; empty inside `outline`, where no weights may be read."""
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
        """The sizes of a model in a sentence."""
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
        return Inputs(self.run.path, self.reporter, keeps=not self.helper)

    def reader(self, progress: Progress | None) -> Reader:
        """Reads texts for the model; what this writes is kept beside the documents that it answers."""
        say = (lambda line: None) if self.helper else self.reporter.say
        return Reader(self.loaded, self.recipe.seed, self.run.path / "calibration", progress, say)

    def prepare_key(self) -> str:
        """All that the tensors of prepared targets depend on."""
        return stage_key("prepare", self.fingerprint, *self._training(self.recipe.prepare))

    def effect_key(self) -> str:
        """All that the measured effects of prepared targets depend on."""
        section, calibration = self.recipe.calibration, self.resolved["calibration"]
        text = self._text(section.text, section.documents, "calibration")
        return stage_key(
            "effect",
            self.fingerprint,
            *self._prepared(),
            text,
            calibration["text"],
            calibration["documents"],
            self.recipe.seed,
            self.recipe.dtype,
            *self._priced_layers(),
        )

    def _priced_layers(self) -> list[Any]:
        """What is priced after the preparation beside its targets, and the profile that ranks heads for it."""
        settings = self.recipe.prepare
        if settings is None or not (settings.layers or settings.options):
            return []
        written = self.resolved["prepare"]
        return [written["layers"], written["options"], self.profile_key()]

    def profile_key(self) -> str:
        """A key of everything that a profile depends on."""
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
            {key: value for key, value in self.resolved["profile"].items() if key not in ("stream", "context")},
            *([calibration["second"]] if calibration["second"] else []),
        )

    def search_key(self) -> str:
        """All that a plan depends on."""
        section = self.recipe.calibration
        held_out = self.resolved["calibration"]["held_out"]
        text = self._text(section.text, section.held_out, "held_out") if section.held_out else None
        tables = [self.inputs.file(path) for path in self.recipe.search.budget.tables]
        prepared = self._prepared()
        priced = ["effect", *self._priced_layers()] if self.recipe.prepare and self.recipe.prepare.effect else []
        search = self.resolved["search"]
        return stage_key("search", self.profile_key(), held_out, text, search, tables, *prepared, *priced)

    def upcycle_key(self) -> str:
        """All that an upcycled model depends on."""
        section = self.recipe.upcycle
        if section is None:
            raise ValueError("the recipe upcycles nothing")
        experts = [self.inputs.model(name) for name in section.experts]
        most = characters_for(section.text_tokens, "calibration")
        texts = [self.inputs.text(text, most) for text in section.texts]
        settings = self.resolved["upcycle"]
        return stage_key("upcycle", self.fingerprint, settings, experts, texts, self.recipe.seed, self.recipe.dtype)

    def export_key(self) -> str:
        """All that a checkpoint depends on: the plan as it lies there, so an edited one is exported again."""
        plan, trained = self._content(self.run.plan), [*self._prepared(), *self._trained(RECOVERED)]
        return stage_key("export", plan, self.recipe.dtype, self.resolved["export"], *trained)

    def evaluate_key(self) -> str:
        """A key of everything that the evaluation depends on."""
        baselines = [self._content(path) for path in sorted((self.run.path / "search").glob("*.json"))]
        return stage_key(
            "evaluate",
            self._content(self.run.plan),
            baselines,
            self.recipe.dtype,
            first_device(resolve_device(self.recipe.device)).type,
            self.recipe.seed,
            {key: value for key, value in self.resolved["evaluate"].items() if value is not None},
            *(form for form in [self.resolved["export"]["form"]] if form != "patched"),  # whose bytes are counted
            self._evaluated(),
            *self._prepared(),
            *self._trained(RECOVERED, CONTROL, *([WINDOWS] if self._has_windows else [])),
        )

    def recover_key(self) -> str:
        """All that the trained weights of the plan depend on."""
        return stage_key(
            "recover", self._content(self.run.plan), *self._prepared(), *self._training(self.recipe.recover)
        )

    def windows_key(self) -> str:
        """All that the trained weights of the plan without its states depend on."""
        return stage_key("windows", self.recover_key())

    @property
    def _has_windows(self) -> bool:
        return self.recipe.recover is not None and self.recipe.recover.window_control

    def control_key(self) -> str:
        """All that the trained weights of the dense model depend on."""
        settings = self.recipe.recover
        return stage_key("control", self.fingerprint, *self._training(settings and settings.of_control))

    def _training(self, settings: TrainSettings | None) -> list[Any]:
        if settings is None:
            raise ValueError("the recipe trains nothing")
        source = settings.text or self.recipe.calibration.text
        most = characters_for(settings.text_tokens, "calibration")
        text = self.inputs.text(source, most)
        others = [] if settings.second is None else [self.inputs.text(settings.second, most)]
        facts = [settings.facts(), self.resolved["calibration"]["text"], text, self.recipe.seed, self.recipe.dtype]
        return facts + others

    def _evaluated(self) -> list[str]:
        """Contents of the texts and files that the evaluation reads."""
        asked = asked_for(self.recipe.evaluate)
        text = texts_of(asked, self.recipe.calibration.text)
        contents = []
        for measure in asked:
            for reading in measure.readings(self.recipe.seed):
                count = MOST if reading.tokens is None else characters_for(reading.tokens, "evaluation")
                contents.append(self.inputs.text(reading.source or text, count))
            if measure.files_are:
                contents.append(self.inputs.files(measure.files_are, measure.files))
        return contents

    def _text(self, source: Source, tasks: Sequence[Task], part: Part) -> str:
        """The content that some tasks read of a text."""
        return self.inputs.text(source, characters_for(max((task.length for task in tasks), default=0), part))

    def _prepared(self) -> list[str]:
        """What came of the preparation, where the recipe has one."""
        return [self._content(self.run.path / PREPARED)] if self.recipe.prepare is not None else []

    def _trained(self, *records: str) -> list[str]:
        """What came of the recovery, where the recipe has one."""
        return [self._content(self.run.path / record) for record in records] if self.recipe.recover is not None else []

    @staticmethod
    def _content(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _places(model: Any, device: str) -> str:
    """The device of a model as it was named, or all that it lies on."""
    devices = placement_of(model).devices
    return device if len(devices) == 1 else " and ".join(map(str, devices))


@contextmanager
def open_session(
    recipe: Recipe,
    reporter: Reporter,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    helper: bool = False,
    helpers: bool = False,
) -> Iterator[Session]:
    """Hold the run folder of a recipe.

    Args:
        overwrite, fresh: as of `open_run`.
        helper, helpers: as of `Session`.

    Raises:
        UserError: a folder that cannot be used (see `open_run`).
    """
    resolved = recipe.resolved()
    output = Path(recipe.output).expanduser()
    if helper:
        yield Session(recipe, RunFolder(output), resolved, reporter, helper=True, helpers=True)
        return
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    with open_run(output, model=recipe.model, text=recipe.text, resolved=text, overwrite=overwrite, fresh=fresh) as run:
        settle(run.checkpoint)
        sweep_scratch()
        write_json(run.path / "environment.json", environment())
        run.log("start", recipe=str(recipe.source))
        yield Session(recipe, run, resolved, reporter, helpers=helpers)
        run.log("end")
