"""Registries of methods. A method is one pydantic class: its fields are recipe keys, help text and documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compress.errors import UserError, nearest


def _usable(path: str) -> str:
    """A path that the operating system can be asked for, whether or not anything is there."""
    try:
        parts = Path(path).expanduser().parts
    except RuntimeError:
        raise ValueError(f"expected a path; nobody here has the home folder of `{path.split('/')[0][:60]}`") from None
    if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in parts):
        raise ValueError(f"expected a path; a name in it has more than {LONGEST_NAME} bytes")
    return path


LONGEST_NAME = 255  # bytes, of a file or folder in all common file systems
PathText = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_usable)]


class Method(BaseModel):
    """Base of every registered method: frozen, and unknown parameters are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    registered: ClassVar[str] = ""  # the name that recipes and plans give the class
    # What a statistic leaves for a search to read, by name: `units` (a score of every head and neuron), `means` (their
    # mean inputs), `groups` (one number a head group), `rules` (a table of span rules) or `targets` (what each of some
    # targets costs a head group).
    gives: ClassVar[Mapping[str, str]] = {}

    def scores_read(self) -> Mapping[str, str]:
        """What a profile must have for it, as far as its fields name that: names and forms as in `gives`."""
        return {}


T = TypeVar("T", bound=Method)


class Registry(Generic[T]):
    """Name -> class, filled by a decorator on the class."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._methods: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises ValueError when the name is taken by another class."""

        def add(method: type[T]) -> type[T]:
            if name in self._methods and self._methods[name].__qualname__ != method.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._methods[name] = method
            method.registered = name
            return method

        return add

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._methods:
            raise UserError(
                f"unknown {self.kind} `{name}`",
                expected=f"one of {', '.join(self)}",
                fix=nearest(name, self),
            )
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._methods))

    def items(self) -> list[tuple[str, type[T]]]:
        return [(name, self._methods[name]) for name in self]


statistics: Registry[Any] = Registry("statistic")
solvers: Registry[Any] = Registry("solver")
targets: Registry[Any] = Registry("target")
tasks: Registry[Any] = Registry("task")
budget_kinds: Registry[Any] = Registry("kind of budget")
objectives: Registry[Any] = Registry("objective")
