"""What every target answers: its parameters, what it costs, its words, its stock form, and what may be chosen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compress.registry import Method, targets
from compress.targets.cost import Cost
from compress.targets.unit import Unit

if TYPE_CHECKING:
    import torch

    from compress.runtime.families import Family


@dataclass(frozen=True)
class StockForm:
    """What a layer of a stock architecture is where its groups have a target.

    Attributes:
        window: sliding window in tokens: the query at t sees key j when t - j < window; None where it sees everything.
    """

    window: int | None = None


class Thresholds(Protocol):
    """What texts said of the scores of tokens in every head group (`models.retention.Retention`)."""

    def at(self, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds that keep a share of the tokens, and its standard deviation over texts, `[layers, groups]`."""

    def above(self, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of the tokens that one threshold keeps, and its standard deviation, `[layers, groups]`."""

    def wanted_above(self, score: float) -> torch.Tensor | None:
        """The share of the tokens that one threshold of the scores to stand for keeps; None where it is unknown."""


class Target(Method):
    """What one head group becomes. A subclass is one file, registered by `@targets.register("name")`.

    Its fields are what the plan file holds. What a checkpoint does with them is in the mixer that `runtime` names.

    Attributes:
        runtime: the module that registers the target's mixer (`compress.runtime.mixer`), which a checkpoint carries:
            a file of `compress/runtime/`, or of another package. None for a target that leaves nothing to run.
        noun: what a group gets, for a count of such groups, for instance `a window`; empty takes the target's name.
        removes: whether nothing of the group stays.
        as_built: whether a group that stays computes what the architecture says, so that a layer which slides by
            itself can have it.
        by_layer: whether the groups of a layer become it together, so that there are no options for a single one (but
            for whole layers, `layer_option.py`), and what one of them costs depends on the others: `together` counts.
        grid: the class of what `options` takes as `grid`; None where there is nothing to say.
        objective: name of the objective that trains before the search what the target has of its own; None where it
            has nothing.
        untrained: whether it is of use as it starts, so that nobody has to prepare it.
        in_expectation: whether what it holds depends on the text, so that `cost` is a mean over texts.
        takes_back: whether its cache can take tokens back, as assisted decoding does (`State.one_way`).
        in_vllm: whether the plugin of plugins/vllm serves it; it refuses others by name.
    """

    runtime: ClassVar[str | None] = None
    noun: ClassVar[str] = ""
    removes: ClassVar[bool] = False
    as_built: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    grid: ClassVar[type[Method] | None] = None
    objective: ClassVar[str | None] = None
    untrained: ClassVar[bool] = False
    in_expectation: ClassVar[bool] = False
    takes_back: ClassVar[bool] = False
    in_vllm: ClassVar[bool] = False

    target: str

    @property
    def learns(self) -> bool:
        """Whether it has something of its own that its objective trains."""
        return self.objective is not None

    @property
    def has_to_be_prepared(self) -> bool:
        """Whether it cannot be used before its objective has been trained."""
        return self.objective is not None and not self.untrained

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """Why head groups of a family's models cannot become this; None where they can."""
        return None

    @classmethod
    def layer_problem(cls, groups: Sequence[Target], query_heads: int) -> tuple[str, str, str] | None:
        """What is wrong with the groups of one layer that have this target and stay, taken together.

        Args:
            query_heads: of each of them, that stay.

        Returns:
            A sentence, what is expected and what was found; None where nothing is wrong.
        """
        return None

    @classmethod
    def options(cls, unit: Unit, lengths: Sequence[int], grid: Any = None) -> list[Target]:
        """What a search may choose for a head group of this target, each once; none where it has no place.

        Args:
            lengths: of the inputs that are priced or budgeted, in tokens.
            grid: which parameters to choose from, of the type `cls.grid`; None takes that type's defaults.
        """
        return []

    @abstractmethod
    def cost(self, unit: Unit, length: int) -> Cost:
        """What a group that becomes this costs for one sequence of `length` tokens."""

    def no_stock_form(self) -> ValueError:
        """What `cost` raises where tokens are asked for, and no stock architecture has this target."""
        return ValueError(f"no stock architecture has `{self.target}`: {self.words()}")

    @classmethod
    def together(cls, groups: Sequence[Any], unit: Unit, length: int) -> Cost:
        """What all groups of one layer that have this target cost together for one sequence.

        Args:
            groups: their entries, of this class.
            unit: one of them, with the query heads that the layer leaves it.
        """
        return Cost.total(group.cost(unit, length) for group in groups)

    @abstractmethod
    def words(self, native: int | None = None) -> str:
        """What becomes of a group, in a few words, for instance `sink 4, window 64`.

        Args:
            native: the sliding window of the architecture itself in the group's layer, in tokens; None without one.
        """

    def short(self, native: int | None = None) -> str:
        """`words`, short enough for a cell of a table."""
        return self.words(native)

    def rule_text(self) -> str:
        """How it is worked out which keys a query sees, in Markdown, for the model card."""
        return (type(self).__doc__ or "").strip().splitlines()[0]

    def stock(self, native: int | None) -> StockForm | None:
        """Its form in a stock architecture, in a layer that slides over `native` tokens by itself; None without one."""
        return None

    @property
    def all_on(self) -> Target:
        """The same with all that tokens choose from used by every token; itself where they choose nothing."""
        return self

    @property
    def fits_native(self) -> bool:
        """Whether a layer that slides by itself can have it."""
        return self.as_built

    @property
    def by_length(self) -> bool:
        """Whether what a query sees depends on the length of the whole input, so that chunks and turns are refused."""
        return False

    @property
    def learns_from_all(self) -> bool:
        """Whether what it has of its own learns from every token, and not from those alone that it hides."""
        return self.in_expectation

    @property
    def undoes_rope(self) -> bool:
        """Whether it needs queries and keys as they were before RoPE."""
        return False

    def little(self, query_heads: int) -> str:
        """Why it may save little, a clause for messages; empty where there is nothing to say.

        Args:
            query_heads: of the group.
        """
        return ""

    @property
    def at_random(self) -> Target:
        """The same with what it decides token by token left to chance, a control; itself where it decides nothing."""
        return self

    @property
    def prepared_as(self) -> Target:
        """The target whose trained tensors serve this one, too, where they were not trained for itself."""
        return self

    @property
    def bounded(self) -> bool:
        """Whether something bounds what it holds of a text, where its cost is an expectation (`in_expectation`)."""
        return False

    def measured(self, threshold: float | None, share: float, spread: float) -> Target:
        """The same with what it was found to hold of texts, where that is an expectation (`in_expectation`).

        Args:
            threshold: what decides which tokens it holds, where it has one.
            share: of the tokens that it may leave out, those that it holds, mean over texts; spread: their standard
                deviation.
        """
        return self

    @property
    def idle(self) -> bool:
        """Whether it changes nothing, so that no search chooses it: it names what is prepared for others."""
        return False

    @property
    def open(self) -> bool:
        """Whether something of it is still to be taken from what a preparation measured, head group by head group."""
        return False

    def placed(self, thresholds: Thresholds | None, layer: int, group: int) -> Target:
        """What a head group has where this is its option; itself where nothing is open, or nothing is known."""
        return self

    @property
    def anywhere(self) -> Target:
        """As an option for any head group, without what only one of them has: the inverse of `placed`."""
        return self

    def with_share(self, share: float) -> Target:
        """The same with another share of the tokens kept; itself where it keeps none by a share."""
        return self

    def with_threshold(self, threshold: float, share: float, spread: float) -> Target:
        """The same under a threshold that keeps a share of the tokens, with its spread; itself where it has none."""
        return self

    @property
    def chooser(self) -> str:
        """What says which tokens it keeps, however many these are: windows and scorer."""
        return self.words()

    @classmethod
    def average(cls, groups: Sequence[Any]) -> Target:
        """One entry that stands for several, which are equal but for how much of the tokens each keeps."""
        first: Target = groups[0]
        return first

    @classmethod
    def ranges(cls, groups: Sequence[Any]) -> str:
        """In which ranges the entries of one option in many head groups lie, in words; empty where they are equal.

        Args:
            groups: of this class, with the same `anywhere`, or equal but for how much of the tokens each keeps.
        """
        return ""

    @property
    def reads_norms(self) -> bool:
        """Whether it goes by the norms of queries, which have to differ from head to head and token to token."""
        return False

    def initial(self, attention: torch.nn.Module, group: int) -> dict[str, torch.Tensor]:
        """What the mixer of this target starts with for one group, converted from the weights of its attention.

        Args:
            attention: the layer's attention module, with the projections that the plan leaves.
            group: index of the head group in it.

        Returns:
            Name of a parameter of the mixer -> its entry for this group; the mixer's parameter has the groups as its
            first axis. A parameter without an entry keeps what `Mixer.reset_parameters` gave it.
        """
        return {}


def layer_cost(groups: Sequence[Target], unit: Unit, length: int) -> Cost:
    """What the head groups of one layer cost together for one sequence of `length` tokens.

    Args:
        unit: one of the groups that stay.
    """
    kinds: dict[type[Target], list[Target]] = {}
    for group in groups:
        kinds.setdefault(type(group), []).append(group)
    return Cost.total(kind.together(members, unit, length) for kind, members in kinds.items())


def targets_of(plan: dict[str, Any]) -> set[str]:
    """Names of the targets in a plan as a model's configuration carries it."""
    return {group["target"] for layer in plan["layers"] for group in layer["groups"]}


# The modules that put MLPs into layers (`runtime/mlps.py`), by the key of a layer's `mlp` that asks for one.
MLPS = {"experts": "compress.runtime.mlp_experts"}


def load_runtime(plan: dict[str, Any]) -> list[str]:
    """Import what a plan needs of the runtime, which registers its mixers and MLPs; the names of the modules.

    Args:
        plan: as a model's configuration carries it.

    Raises:
        UserError: it has a target of which there is none.
    """
    asked = {key for layer in plan["layers"] for key in layer.get("mlp") or {}}
    modules = sorted(module for key, module in MLPS.items() if key in asked)
    for module in modules:
        import_module(module)
    return load_mixers(targets_of(plan)) + modules


def load_mixers(names: Iterable[str]) -> list[str]:
    """Import the runtime of targets, which registers their mixers; the names of the modules.

    Raises:
        UserError: no target of such a name.
    """
    modules = sorted({module for name in names if (module := targets[name].runtime) is not None})
    for module in modules:
        import_module(module)
    return modules
