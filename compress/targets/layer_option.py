"""What all head groups of a layer become together: an option of a search that no single group's target can say."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from compress.registry import Method
from compress.targets.target import Target

Worth = Sequence[Sequence[float]]  # of a layer: what each head group is worth, as one number, or one a query head


class LayerOption(Method):
    """One way to decide a whole layer, the same for every layer. A subclass is registered by
    `@layer_options.register("name")`.

    Attributes:
        grid: the class of what `options` takes as `grid`; None where there is nothing to say.
    """

    grid: ClassVar[type[Method] | None] = None

    @classmethod
    @abstractmethod
    def options(cls, groups: int, queries: int, grid: Any = None) -> list[LayerOption]:
        """What a search may choose for a layer, each once.

        Args:
            groups: head groups of a layer.
            queries: query heads of a group.
            grid: which parameters to choose from, of the type `cls.grid`; None takes that type's defaults.
        """

    @classmethod
    def ranks(cls, grid: Any = None) -> tuple[str, ...]:
        """The statistics that options of a grid may rank heads by, whatever the sizes of layers."""
        return ()

    @property
    def ranked_by(self) -> str | None:
        """The statistic whose scores of heads or head groups it reads; None where it reads none."""
        return None

    @abstractmethod
    def entries(self, groups: int, queries: int, worth: Worth | None = None) -> tuple[Target, ...]:
        """The target of every head group of a layer.

        Args:
            groups: head groups of the layer.
            queries: query heads of each.
            worth: the layer's scores by `ranked_by`, the more the better; None where it reads none.

        Raises:
            ValueError: the layer has too few heads for it, or scores are missing that it reads.
        """

    @abstractmethod
    def ladder(self, groups: int, queries: int) -> list[Self]:
        """This option with all numbers of what a token uses, the dearest first, for layers of that size."""

    @abstractmethod
    def words(self) -> str:
        """What becomes of a layer, in a few words."""

    def little(self, groups: int, queries: int) -> str:
        """Why it may save little in such a layer, a clause for messages; empty where there is nothing to say."""
        return ""

    def unpriced(self) -> str | None:
        """Why it cannot be priced as it is, before anything of it was trained; None where it can."""
        return None


class Alike(LayerOption):
    """The same entry in every head group of a layer; what names one target for all of them, as `prepare` does."""

    target: Target

    @classmethod
    def options(cls, groups: int, queries: int, grid: Any = None) -> list[LayerOption]:
        """None: it is made of a target that is known."""
        return []

    def entries(self, groups: int, queries: int, worth: Worth | None = None) -> tuple[Target, ...]:
        """See `LayerOption.entries`."""
        return (self.target,) * groups

    def ladder(self, groups: int, queries: int) -> list[Self]:
        """Itself."""
        return [self]

    def words(self) -> str:
        return self.target.words()

    def little(self, groups: int, queries: int) -> str:
        return self.target.little(queries)
