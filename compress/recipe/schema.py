"""The schema of a recipe: its sections, typed by the classes that they may name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, create_model, field_validator, model_validator

from compress import registry
from compress.data.prompt import Task
from compress.data.text import EmbeddedText, TextSource
from compress.limits import BATCH, LONGEST, PROCESSES
from compress.plan import MlpRouting
from compress.profile.statistic import Statistic
from compress.recipe.outline import REPLACED, SECTIONS, Dtype, Outline, Section
from compress.registry import PathText
from compress.search import baselines
from compress.search.budget.budget import Budget
from compress.search.refine.refine import Refine
from compress.search.serve import Serve
from compress.search.solver import Solver
from compress.targets.expert import MOST_EXPERTS
from compress.train.settings import PrepareSettings, RecoverSettings

if TYPE_CHECKING:
    Baseline = str
else:
    Baseline = Literal[("plan", *baselines.NAMES)]
Tasks = tuple[Annotated[Task, registry.tasks], ...]


class CalibrationSection(Section):
    """The documents that heads are measured on."""

    text: TextSource = Field(default_factory=EmbeddedText, description="where the haystacks come from")
    documents: Tasks = Field(
        min_length=1, description="what is profiled, one entry per task and length; by default facts and plain text"
    )
    training: Tasks = Field(
        (), description="what statistics that train, and refinement, learn from; without it, `documents`"
    )
    second: TextSource | None = Field(
        None, description="another text; importance statistics then run on both, and the profile says how they agree"
    )
    held_out: Tasks = Field((), description="what the final plan is chosen on; best at longer lengths")

    @property
    def lengths(self) -> set[int]:
        """What is profiled, in tokens."""
        return {task.length for task in self.documents}


class ProfileSection(Section):
    """What is measured."""

    statistics: tuple[Annotated[Statistic, registry.statistics], ...] = Field(
        min_length=1, description="statistics to take; by default those that the solver reads"
    )
    stream: bool = Field(
        False,
        description="read the model layer by layer, so that one layer of it is in memory: for models larger than the "
        "device. The numbers are the same. Documents then need `answer: text`",
    )
    context: int = Field(
        1,
        ge=1,
        le=PROCESSES,
        description="processes that share each document, for documents that one GPU cannot hold; statistics that need "
        "all tokens of a document in one process are refused",
    )


class UpcycleSection(Section):
    """Several models of one shape as one (BAM, arXiv 2408.08274); the recipe's model is their seed."""

    experts: tuple[PathText, ...] = Field(
        min_length=1, max_length=MOST_EXPERTS - 1, description="models of the seed's shape, with its tokenizer"
    )
    seed: bool = Field(False, description="the seed is an expert, too, the first one, as in the paper")
    attention: Literal["soft", "base"] = Field(
        "soft",
        description="soft: each expert's attention runs, times a gate for each token, and the outputs are added; base: "
        "one attention for all, as `rest` says, and experts are MLPs alone",
    )
    kv: Literal["expert", "shared"] = Field(
        "expert",
        description="keys and values of each expert, all of them in the cache; or their mean for all",
    )
    mlp: MlpRouting = Field(default_factory=MlpRouting, description="how tokens use the experts' MLPs")
    rest: Literal["average", "seed"] = Field(
        "average", description="where all other weights come from: the mean of the experts', or the seed's"
    )
    start: Literal["random", "zero"] = Field(
        "random", description="what routers start with where there are no `texts`: random as published, or equal gates"
    )
    texts: tuple[TextSource, ...] = Field(
        (),
        max_length=MOST_EXPERTS,
        description="a text for each expert, in their order: routers then start with what tells these texts apart",
    )
    text_tokens: int = Field(8192, ge=64, le=LONGEST, description="of each of these texts that are read")

    @model_validator(mode="after")
    def _a_text_each(self) -> Self:
        if len(set(self.experts)) < len(self.experts):
            raise ValueError("expected each expert once")
        if self.count < 2:
            raise ValueError("expected two experts or more; `seed: true` makes the seed one")
        if self.texts and len(self.texts) != self.count:
            raise ValueError(f"texts: expected one for each of the {self.count} experts, got {len(self.texts)}")
        if self.mlp.top != "all" and self.mlp.top > self.count:
            raise ValueError(f"mlp.top: expected at most {self.count}, the experts, got {self.mlp.top}")
        return self

    @property
    def count(self) -> int:
        """Experts."""
        return len(self.experts) + self.seed

    def names(self, seed: str) -> tuple[str, ...]:
        """The names of all experts, in their order, where `seed` is that of the recipe's model."""
        return ((seed,) if self.seed else ()) + self.experts


class SearchSection(Section):
    """How the plan is decided."""

    solver: Annotated[Solver, registry.solvers] = Field(description="the method that decides")
    budget: Budget = Field(description="what the plan may cost")
    refine: Refine | None = Field(None, description="exchanges between units by measured loss, afterwards")
    serve: Serve | None = Field(None, description="what an engine asks of the plan")


class ExportSection(Section):
    """The form of the checkpoint."""

    form: Literal["patched", "native", "auto"] = Field(
        "patched",
        description="patched carries its own attention code and holds every plan; native is a stock architecture, for "
        "plans of full layers and one window without sinks; auto is native where the plan allows it",
    )
    dtype: Dtype | None = Field(None, description="dtype of the weights on disk; null keeps the recipe's")
    max_shard_size: str = Field(
        "5GB", pattern=r"^[1-9][0-9]{0,5}(KB|MB|GB)$", description="largest weight file, as 5GB"
    )


# One key for each registered measure.
_Measures: Any = create_model(
    "_Measures", __base__=Section, **{name: kind.key() for name, kind in registry.measures.items()}
)


class EvaluateSection(_Measures):
    """What the checkpoint is compared on; the dense model is always beside it."""

    compare: tuple[Baseline, ...] = Field(
        ("plan", "uniform"), description="plans beside the dense model, baselines at the plan's bytes"
    )
    if TYPE_CHECKING:
        recall: Tasks = ()

    batch_size: int = Field(1, ge=1, le=BATCH, description="recall prompts answered at once; more is faster on a GPU")

    @field_validator("compare")
    @classmethod
    def _each_once(cls, compare: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(compare)) < len(compare):
            raise ValueError("expected each name once")
        return compare


class Recipe(Outline):
    """One run, from the model to the numbers."""

    calibration: CalibrationSection = Field(description=SECTIONS["calibration"])
    profile: ProfileSection = Field(description=SECTIONS["profile"])
    prepare: PrepareSettings | None = Field(None, description=SECTIONS["prepare"])
    upcycle: UpcycleSection | None = Field(None, description=SECTIONS["upcycle"])
    search: SearchSection = Field(description=SECTIONS["search"])
    recover: RecoverSettings | None = Field(None, description=SECTIONS["recover"])
    export: ExportSection = Field(default_factory=ExportSection, description=SECTIONS["export"])
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description=SECTIONS["evaluate"])

    _text: str = PrivateAttr("")
    _source: Path = PrivateAttr(Path())
    _words: str = PrivateAttr("")
    _chosen: tuple[str, ...] = PrivateAttr(())

    @property
    def text(self) -> str:
        """The file, verbatim."""
        return self._text

    @property
    def source(self) -> Path:
        """The file's path."""
        return self._source

    @property
    def words(self) -> str:
        """How a command names the recipe: the file, and what `--set` changes in it."""
        return self._words

    @property
    def chosen(self) -> tuple[str, ...]:
        """What the recipe leaves out and was chosen for the model and this machine, a line for each part."""
        return self._chosen

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default written out, in the order of the schema, and the same for the same recipe.

        Only what an upcycled model needs is there of a recipe that makes one, and nothing of that in any other; what an
        engine asks only where one is named.
        """
        left_out: dict[str, Any] = {"search": {"serve"}} if self.search.serve is None else {}
        left_out |= dict.fromkeys(["upcycle"] if self.upcycle is None else REPLACED, True)
        return self.model_dump(mode="json", by_alias=True, exclude=left_out)
