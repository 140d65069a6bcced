"""The budget of a search: the fields of all registered kinds, and the constraints that they make together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.errors import Problem, UserError
from compress.limits import ENTRIES, LONGEST
from compress.registry import Method, budget_kinds
from compress.search.budget.kind import Row

if TYPE_CHECKING:
    from compress.search.dense import Dense

    Kinds: type[Method] = Method
else:
    # pydantic takes the fields of the last base first, and `kv` has to be validated after all others.
    Kinds = create_model(
        "Kinds", __base__=tuple(kind for _, kind in sorted(budget_kinds.items(), key=lambda item: item[0] != "kv"))
    )


class Budget(Kinds):  # type: ignore[valid-type,misc]
    """What a plan may cost for one sequence, at every length a constraint of its own. All kinds that are given hold."""

    registered: ClassVar[str] = ""

    lengths: Annotated[
        tuple[Annotated[int, Field(le=LONGEST)], ...] | None,
        Field(
            max_length=ENTRIES,
            description="input lengths in tokens at which the budget holds; null takes the profiled lengths",
        ),
    ] = None

    @field_validator("lengths")
    @classmethod
    def _check_lengths(cls, lengths: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if lengths is not None and (not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths)):
            raise ValueError("expected one or more lengths of at least 1 token, each once")
        return lengths

    @model_validator(mode="after")
    def _check_together(self) -> Budget:
        for name, value in self.given().items():
            if isinstance(value, dict) and self.lengths is not None and set(self.lengths) != set(value):
                raise ValueError(f"lengths: leave it out, or name the lengths of `{name}`, when `{name}` is a mapping")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without newer kinds that are not given, so that plans and keys from before there were any stay the same."""
        written: dict[str, Any] = write(self)
        for name, kind in budget_kinds.items():
            if kind.newer and kind.value(self) is None:
                written.pop(name, None)
        return written

    def given(self) -> dict[str, Any]:
        """The kinds that are limited, with their values."""
        values = {name: kind.value(self) for name, kind in budget_kinds.items()}
        return {name: value for name, value in values.items() if value is not None}

    def words(self) -> str:
        """The limits that are given, for instance `kv 0.5, parameters 0.9`."""
        return ", ".join(f"{name} {json.dumps(value)}" for name, value in self.given().items())

    def rows(self, dense: Dense, profiled: Sequence[int]) -> tuple[Row, ...]:
        """Every constraint, kind by kind, ascending lengths.

        Args:
            profiled: lengths in tokens to take where the budget names none.

        Raises:
            UserError: what a kind needs besides is missing (see `BudgetKind.rows`).
        """
        return tuple(row for name in self.given() for row in budget_kinds[name].rows(self, dense, profiled))


def check_lengths(budget: Budget, context: int | None) -> None:
    """Refuse a budget at inputs that the model cannot take.

    Args:
        context: the model's longest input in tokens; None where there is no limit.

    Raises:
        UserError: there are such lengths.
    """
    if context is None:
        return
    named = {"lengths": budget.lengths or ()}
    named |= {name: tuple(value) for name, value in budget.given().items() if isinstance(value, dict)}
    problems = [
        Problem(
            "the budget is for inputs that are longer than the model's context",
            f"search.budget.{key}",
            expected=f"lengths of at most {context} tokens",
            found=", ".join(str(length) for length in sorted(lengths) if length > context),
        )
        for key, lengths in named.items()
        if any(length > context for length in lengths)
    ]
    if problems:
        raise UserError(problems)
