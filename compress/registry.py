"""Registries of methods. A method is one pydantic class: its fields are recipe keys, help text and documentation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from compress.errors import UserError, nearest


def _usable(path: str) -> str:
    """A path that the operating system can be asked for, whether or not anything is there."""
    try:
        parts = Path(path).expanduser().parts
    except RuntimeError:
        raise ValueError(f"expected a path; this machine has no user `{path.split('/')[0][:60]}`") from None
    if any(len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in parts):
        raise ValueError(f"expected a path; a name in it has more than {LONGEST_NAME} bytes")
    return path


LONGEST_NAME = 255  # bytes, of a file or folder in all common file systems
PathText = Annotated[str, Field(min_length=1, max_length=4095), AfterValidator(_usable)]


class Method(BaseModel):
    """Base of every registered method: frozen, and unknown parameters are refused.

    Attributes:
        registered: the name that recipes and plans give the class; empty where it has none.
        gives: what a statistic leaves for a search to read, by name: `units` (a score of every head and neuron),
            `means` (their mean inputs), `groups` (one number a head group), `rules` (a table of span rules) or
            `targets` (what each of some targets costs a head group).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registered: ClassVar[str] = ""
    gives: ClassVar[Mapping[str, str]] = {}

    def scores_read(self) -> Mapping[str, str]:
        """What a profile must have for it, as far as its fields name that: names and forms as in `gives`."""
        return {}


T = TypeVar("T", bound=Method)
Named = TypeVar("Named", bound=type[Method])


class Registry(Generic[T]):
    """Name -> class, filled by a decorator on the class.

    As an annotation, `Annotated[Solver, solvers]`, it lets a field hold one of its methods, which is written as a
    mapping with the name under `key` beside the parameters: `{name: moa, points: 4}`.

    Args:
        kind: what one is called in messages.
        homes: the modules whose import registers what the toolkit has; of a package, every file. They are imported when
            something is looked up, so that no reader of a registry can find it half filled.
        key: names the method in its written form.
    """

    def __init__(self, kind: str, *homes: str, key: str = "name") -> None:
        self.kind = kind
        self.key = key
        self._unread = list(homes)
        self._registered: dict[str, type[T]] = {}

    @property
    def _methods(self) -> dict[str, type[T]]:
        """All methods by name, those of the toolkit included."""
        while self._unread:  # a module that looks something up while it is imported goes on from here
            home = import_module(self._unread.pop())
            self._unread += [f"{home.__name__}.{file.name}" for file in iter_modules(getattr(home, "__path__", ()))]
        return self._registered

    def register(self, name: str) -> Callable[[Named], Named]:
        """Class decorator. Raises ValueError when the name is taken by another class."""

        def add(method: Named) -> Named:
            known = self._registered.get(name)
            if known is not None and known.__qualname__ != method.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._registered[name] = method  # type: ignore[assignment]  # the registry's base class is not known here
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

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._methods))

    def items(self) -> list[tuple[str, type[T]]]:
        """Names and classes, in the order of the names."""
        return [(name, self._methods[name]) for name in self]

    def parse(self, value: Any) -> Any:
        """A method from its written form; one that is a method already is returned as it is.

        Numbers and texts are told apart: `true` and `"4"` are no numbers.

        Raises:
            PydanticCustomError: no mapping, no name, or an unknown one; `ctx` has the registry's `kind` and `key`.
            pydantic.ValidationError: a wrong parameter.
        """
        if isinstance(value, Method):
            return value
        about = {"kind": self.kind, "key": self.key, "known": ", ".join(self)}
        if not isinstance(value, Mapping):
            raise PydanticCustomError("no_method", "expected `{key}: ...` and its parameters", about)
        if self.key not in value:
            raise PydanticCustomError("no_name", "expected `{key}: ...`, one of {known}", about)
        name = value[self.key]
        if not isinstance(name, str) or name not in self._methods:
            hint = nearest(str(name), self)
            about |= {"name": str(name)[:60], "hint": f"; {hint}" if hint else ""}
            raise PydanticCustomError("unknown_name", "unknown {kind} `{name}`, expected one of {known}{hint}", about)
        method = self._methods[name]
        given = {key: item for key, item in value.items() if key != self.key or key in method.model_fields}
        return method.model_validate(typed(given), strict=True)

    def written(self, method: Method) -> dict[str, Any]:
        """The form that `parse` reads, of JSON's types, with every default written out."""
        return {self.key: method.registered, **method.model_dump(mode="json")}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def write(method: Method, dump: core_schema.SerializerFunctionWrapHandler) -> dict[str, Any]:
            return {self.key: method.registered, **dump(method)}

        form = core_schema.wrap_serializer_function_ser_schema(write, schema=core_schema.any_schema())
        return core_schema.no_info_before_validator_function(self.parse, handler(source), serialization=form)


def is_echo(item: Any) -> bool:
    """Whether one of pydantic's errors calls a list too short only because its wrong entries do not count."""
    return bool(item["type"] == "too_short" and len(item["input"]) > item["ctx"]["actual_length"])


_WHOLE = re.compile(r"[1-9][0-9]{0,17}")


def typed(value: Any) -> Any:
    """JSON's or YAML's values in Python's types, for strict validation: lists as tuples, keys of digits as numbers.

    What YAML shares by aliases is taken apart.
    """
    if isinstance(value, Mapping):
        return {
            int(key) if isinstance(key, str) and _WHOLE.fullmatch(key) else key: typed(item)
            for key, item in value.items()
        }
    return tuple(typed(item) for item in value) if isinstance(value, list | tuple) else value


statistics: Registry[Any] = Registry("statistic", "compress.profile.heads", "compress.profile.units")
solvers: Registry[Any] = Registry("solver", "compress.search.solvers")
targets: Registry[Any] = Registry("target", "compress.targets", key="target")
layer_options: Registry[Any] = Registry("layer option", "compress.targets", key="option")
tasks: Registry[Any] = Registry("task", "compress.data.tasks", key="task")
sources: Registry[Any] = Registry("text source", "compress.data.sources", key="source")
budget_kinds: Registry[Any] = Registry("kind of budget", "compress.search.budget")
measures: Registry[Any] = Registry("measure", "compress.evaluate.measures")
objectives: Registry[Any] = Registry("objective", "compress.train.objectives")
