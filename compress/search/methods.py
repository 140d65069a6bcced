"""All solvers. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import compress.search.allocated
import compress.search.amp
import compress.search.heads
import compress.search.layers
import compress.search.moa
import compress.search.streaming
import compress.search.uniform  # noqa: F401  (importing a solver registers it)
from compress.errors import UserError
from compress.registry import solvers
from compress.search.problem import Solver
from compress.search.widths import PruningSolver


def parse_solver(value: Any) -> Any:
    """A `Solver` or `PruningSolver` from its recipe form, `{name: moa, points: 4}`; either is returned as it is.

    Raises:
        UserError: no name, or an unknown one.
        pydantic.ValidationError: a wrong parameter.
    """
    if isinstance(value, Solver | PruningSolver):
        return value
    if not isinstance(value, Mapping) or "name" not in value:
        raise UserError(
            "the solver has no name",
            where="search.solver",
            expected=f"a mapping with name: one of {', '.join(solvers)}",
            found=repr(value),
        )
    fields = {key: item for key, item in value.items() if key != "name"}
    solver: Solver | PruningSolver = solvers[value["name"]](**fields)
    return solver
