"""What every target has in common: a name in the plan, and parameters that are checked."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from compress.errors import nearest
from compress.registry import Method, targets

if TYPE_CHECKING:
    from compress.models.families import Family

# The kinds of attention that CAB distinguishes (arXiv 2210.07661): whether a query sees what comes after it, and
# whether keys come from its own sequence.
PATTERNS = ("causal self", "bidirectional self", "causal cross", "bidirectional cross")


class Target(Method):
    """What one head group becomes. A subclass is one file, registered by `@targets.register("name")`.

    Its fields are what the plan file holds. What a checkpoint does with them is in the mixer that `runtime` names.

    Attributes:
        runtime: the module that registers the target's mixer (`compress.runtime.mixer`), which a checkpoint carries:
            a file of `compress/runtime/`, or of another package. None for a target that leaves nothing to run.
        patterns: those of `PATTERNS` in which the target can stand; each is tested.
    """

    runtime: ClassVar[str | None] = None
    patterns: ClassVar[tuple[str, ...]] = ("causal self",)

    target: str

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """Why head groups of a family's models cannot become this; None where they can."""
        return None


def parse_target(value: Any) -> Any:
    """A target from its plan form, `{"target": name, ...}`; anything that is none is left to pydantic.

    Raises:
        ValueError: no target of that name.
    """
    if not isinstance(value, dict) or "target" not in value:
        return value
    known = dict(targets.items())
    name = value["target"]
    if not isinstance(name, str) or name not in known:
        hint = nearest(name, known)
        raise ValueError(
            f"unknown target {reprlib.repr(name)}, expected one of {', '.join(known)}" + (f"; {hint}" if hint else "")
        )
    return known[name].model_validate(value, strict=True)


def targets_of(plan: dict[str, Any]) -> set[str]:
    """Names of the targets in a plan as a model's configuration carries it."""
    return {group["target"] for layer in plan["layers"] for group in layer["groups"]}


def load_mixers(names: Iterable[str]) -> list[str]:
    """Import the runtime of targets, which registers their mixers; the names of the modules.

    Raises:
        UserError: no target of such a name.
    """
    modules = sorted({module for name in names if (module := targets[name].runtime) is not None})
    for module in modules:
        import_module(module)
    return modules
