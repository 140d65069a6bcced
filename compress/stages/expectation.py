"""What heads that keep tokens by their scores would hold, before anything is measured: mean, spread and bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compress.models.prepared import Prepared, placed_for
from compress.plan import ModelShape
from compress.recipe.schema import Recipe
from compress.registry import budget_kinds
from compress.search.budget.kind import shares_by_length
from compress.targets.full import FullGroup
from compress.targets.target import Target
from compress.targets.unit import Unit


@dataclass(frozen=True)
class Expectation:
    """The row of `compress validate` on budgets that hold on average over texts.

    Attributes:
        mean: what the options hold.
        spread: its standard deviation over texts, as far as it is known.
        bound: what no text exceeds.
    """

    mean: str
    spread: str
    bound: str


def expectation(recipe: Recipe, shape: ModelShape | None, prepared: Prepared = ()) -> Expectation | None:
    """What a recipe's options hold at the longest budgeted length; None where none depends on the text.

    Args:
        shape: of the recipe's model.
        prepared: what an earlier run left, whose thresholds say how texts deviate.
    """
    options = [target for target in _named(recipe, shape) if target.in_expectation]
    if not options or shape is None:
        return None
    lengths = recipe.calibration.lengths | set(recipe.search.budget.lengths or ())
    for given in recipe.search.budget.given().values():
        lengths |= set(shares_by_length(given, ())) if isinstance(given, dict) else set()
    length = max(recipe.search.budget.lengths or lengths)
    unit = shape.free_unit
    dense = FullGroup().cost(unit, length).held_bytes
    costs = [target.cost(unit, length) for target in options if not target.idle]
    at = f"at {length:,} tokens"
    spread = _spread(options, shape, unit, length, prepared)
    if not costs:
        return Expectation(f"shares as large as the budget holds {at}", spread, "all tokens: no cap")
    held, most = ([getattr(cost, name) / dense for cost in costs] for name in ("held_bytes", "most_bytes"))
    many = "1 option" if len(costs) == 1 else f"{len(costs)} options"
    free = sum(not target.bounded for target in options)
    bound = f"{_range(most)} of any text" + (f"\n{free} of {len(options)} without a cap" if free else "")
    counted = {field for kind in recipe.search.budget.given() for field in budget_kinds[kind].reads}
    asked = "\nthe budget asks for the bound" if "most_bytes" in counted and "held_bytes" not in counted else ""
    return Expectation(
        f"{many}: {_range(held)} of a head group's\nKV bytes {at}, mean over texts{asked}", spread, bound
    )


def _named(recipe: Recipe, shape: ModelShape | None) -> Iterator[Target]:
    """The targets that a search may choose, as far as the recipe names them."""
    prepare = recipe.prepare
    if prepare is None or shape is None or recipe.upcycle is not None:
        return
    if prepare.effect:
        lengths = sorted(recipe.calibration.lengths)
        yield from prepare.pricing().resolved(shape, lengths).priced
    else:
        yield from prepare.targets
    yield from recipe.search.solver.named


def _spread(options: Sequence[Target], shape: ModelShape, unit: Unit, length: int, prepared: Prepared) -> str:
    """The standard deviation of the options' bytes over the texts of a preparation, mean over head groups."""
    placed, dense, found = placed_for(prepared), FullGroup().cost(unit, length).held_bytes, []
    for target in options:
        groups = [placed(target, layer, group) for layer in range(shape.layers) for group in range(shape.kv_heads)]
        spreads = [group.cost(unit, length).spread_bytes / dense for group in groups if not group.open]
        if target.open and spreads:
            found.append(sum(spreads) / len(spreads))
    if not found:
        return "known after prepare, from its texts"
    return f"{_range(found)} of a head group's KV bytes,\nas prepared before, mean over head groups"


def _range(shares: list[float]) -> str:
    low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
    return low if low == high else f"{low} to {high}"
