"""What every measure has in common. A measure is one file in `measures/`: its keys in a recipe, its work, its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from compress.data.reader import Reader
from compress.data.text import Source
from compress.evaluate.cell import Cell
from compress.models.families import context_of
from compress.models.vocabulary import check_tokens
from compress.plan import ModelShape
from compress.registry import Method, measures
from compress.targets.cost import Cost

Step = Callable[[int, int], None]  # items done, items in all


class Result(BaseModel):
    """What a measure found on one variant, as the evaluation's file keeps it; `measure` is the measure's name."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    measure: str

    def cells(self) -> list[Cell]:
        """The numbers, in the same order for every variant.

        Variants have the same cells as the dense one, or none where there is no number. Where the dense one has none,
        as numbers of what only plans have, each has cells of its own.
        """
        raise NotImplementedError

    def words(self) -> str:
        """The conditions that belong below a table of these cells; empty where the heads say it all."""
        return ""

    def notes(self) -> str:
        """What stands out in the numbers of layers and heads, for below the variant's own table of them."""
        return ""


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Attributes:
        name: its row in the tables: `dense`, `plan`, `uniform`, ...
        build: makes the model; called only when something is not measured yet, and the model is let go afterwards.
        key: what the variant depends on besides the dense model's weights (a hash of its plan), for resuming.
        cost: what one sequence of a length in tokens costs by the variant's plan; None where no plan is known.
        tokenizer: makes its tokenizer, where that is not the dense model's; then only measures that need no common
            tokenizer can compare it.
    """

    name: str
    build: Callable[[], Any]
    key: str = ""
    cost: Callable[[int], Cost] | None = None
    tokenizer: Callable[[], Any] | None = None


@dataclass
class Subject:
    """One variant while it is measured: its model is made when it is first needed.

    Attributes:
        beside: the dense variant.
        dense: the dense model.
        sizer: the dense model's tokenizer, which sizes the items of all variants alike.
    """

    variant: Variant
    beside: Variant
    dense: Any
    sizer: Any
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The variant's model."""
        if self._model is None:
            self._model = self.variant.build()
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The variant's own tokenizer."""
        return self.sizer if self.variant.tokenizer is None else self.variant.tokenizer()


@dataclass(frozen=True)
class Setting:
    """What holds for all variants of one comparison.

    Attributes:
        reader: reads texts for the dense model.
        text: where haystacks, and measures without a text of their own, take their text from.
        lengths: tokens of the inputs of all measures, ascending; costs are predicted at these.
        varies: whether what some variant holds depends on the text.
    """

    reader: Reader
    text: Source
    seed: int
    batch_size: int
    lengths: tuple[int, ...]
    varies: bool = False

    @property
    def context(self) -> int | None:
        """The dense model's longest input in tokens; None where it has no limit."""
        return context_of(self.reader.loaded.model.config)

    def tokens(self, source: Source, count: int) -> Sequence[int]:
        """Token ids of the evaluation part of a text, as far as a request for `count` of them can use it."""
        return self.reader.ids(source, "evaluation", count)

    def check(self, tokens: Sequence[int], what: str) -> None:
        """Raise UserError where the model has no embedding for one of the tokens; `what` names the text."""
        check_tokens(tokens, self.reader.loaded.model.config, what)


@dataclass(frozen=True)
class Job:
    """One measurement, to be made on every variant.

    Attributes:
        label: what a progress bar calls it.
        facts: JSON values, all that the result depends on besides the variant and the dense model; the first names
            the kind.
        steps: items, for the progress.
        run: makes the result.
        kept: whether the result is worth a file, from which it is read the next time.
        timed: whether it is a time, which nothing else may disturb.
    """

    label: str
    facts: list[Any]
    steps: int
    run: Callable[[Subject, Step], Result]
    kept: bool = True
    timed: bool = False


@dataclass(frozen=True)
class Inputs:
    """What a measure passes through every variant: `count` inputs, each with so many tokens written behind it.

    Attributes:
        by_dense: whether variants with the dense model's attention take them, too.
    """

    length: int
    count: int
    written: int = 0
    by_dense: bool = True


@dataclass(frozen=True)
class Reading:
    """A part of a text that a measure reads.

    Attributes:
        source: None for the text that the evaluation takes for haystacks.
        tokens: how many of its tokens are of use; None for the whole text.
        check: called with (tokenizer, token ids of the part, context); raises UserError where they do not do.
        place: where in the measure's key it is asked for, as `[0]`; empty for the key itself.
    """

    source: Source | None
    tokens: int | None
    check: Callable[[Any, Sequence[int], int | None], Any] = lambda tokenizer, tokens, context: None
    place: str = ""


class Measure(Method):
    """What to measure; the fields are the recipe's keys below `evaluate.NAME`.

    A subclass is one file, registered by `@measures.register("name")`.

    Attributes:
        result: the class of its results.
        always: whether every evaluation has it, named in the recipe or not; it needs defaults for all fields then.
        one_tokenizer: whether it can only compare models that share a tokenizer.
    """

    result: ClassVar[type[Result]]
    always: ClassVar[bool] = False
    one_tokenizer: ClassVar[bool] = False

    @classmethod
    def key(cls) -> tuple[Any, Any]:
        """The recipe's key: its type, and a field with its default and description."""
        return cls | None, Field(None, description=(cls.__doc__ or "").splitlines()[0])

    @classmethod
    def of(cls, value: Any) -> list[Measure]:
        """The measures that the recipe's value of this key asks for; None stands for a key that is left out."""
        if value is None:
            return [cls()] if cls.always else []
        return [value]

    @property
    def input_lengths(self) -> tuple[int, ...]:
        """Tokens of its inputs."""
        return ()

    @property
    def haystacks(self) -> Source | None:
        """The text that it names and that the whole evaluation takes for haystacks, too; None names none."""
        return None

    def inputs(self, shape: ModelShape | None = None) -> list[Inputs]:
        """What passes through a variant, as far as it is known beforehand; an estimate of the time counts it.

        Args:
            shape: of the dense model, where it is known.
        """
        return []

    def words(self) -> str:
        """What the measure reads, for the table of `compress validate`; empty where it reads nothing."""
        return ""

    def passes(self) -> str:
        """The passes of the model that a variant takes, for the table of `compress validate`."""
        return ""

    def check(self, context: int | None) -> None:
        """Check it against the model's longest input in tokens, without weights or text. Raises UserError."""

    def readings(self, seed: int) -> list[Reading]:
        """The texts that it reads; `seed` is the recipe's."""
        return []

    @property
    def files_are(self) -> str:
        """What `files` are, for messages; empty where there are none."""
        return ""

    def files(self) -> list[Path]:
        """Other files that its result depends on. Raises UserError."""
        return []

    def packages(self) -> list[str]:
        """Packages whose versions the file of the evaluation names besides torch and transformers."""
        return []

    def jobs(self, setting: Setting) -> list[Job]:
        """The measurements; texts and prompts are made here, once for all variants.

        Raises:
            UserError: it does not fit the model or the text.
        """
        raise NotImplementedError


def asked_for(section: Any) -> list[Measure]:
    """The measures of a recipe's `evaluate` section, in the order of the registry.

    Args:
        section: has an attribute for every measure that a recipe can name.
    """
    return [measure for name, kind in measures.items() for measure in kind.of(getattr(section, name, None))]


def texts_of(asked: Sequence[Measure], default: Source) -> Source:
    """The text for haystacks: the one that a measure names, or else the default."""
    return next((measure.haystacks for measure in asked if measure.haystacks is not None), default)
