"""What a search says in sentences: how much a model has to give, and what the plan costs in every kind of budget."""

from __future__ import annotations

from collections.abc import Sequence

from compress.plan import Plan
from compress.search.budget.kind import rounded_up
from compress.search.problem import Problem

HELD = (("held_bytes", 1),)


def sliding_line(problem: Problem, smallest: Sequence[int]) -> str | None:
    """How much a model that is part local has to give; None where no layer slides by itself.

    Args:
        smallest: what the smallest plan costs in every row, in steps.
    """
    sliding = sum(native is not None for native in problem.shape.native_windows)
    if not sliding:
        return None
    shares = [
        f"{rounded_up(row.share(int(amount))):g} of {row.of}"
        + ("" if row.length is None else f" at {row.length:,} tokens")
        for row, amount in zip(problem.rows, smallest, strict=True)
    ]
    full = problem.shape.layers - sliding
    return (
        f"{sliding} of {problem.shape.layers} layers slide by themselves and stay as they are; only the {full} "
        f"full-attention layer{'' if full == 1 else 's'} can be compressed. The least that any plan takes is "
        f"{', '.join(shares)}"
    )


def cost_lines(plan: Plan, problem: Problem) -> list[str]:
    """What a plan costs in every row of the budget, a sentence each; bytes held are told by the plan itself."""
    lines = [
        line
        for row, steps in zip(problem.rows, problem.total(plan.layers), strict=True)
        if (line := row.line(int(steps))) is not None and row.counts != HELD
    ]
    for row in plan.provenance.get("decode_time", {}).get("rows", []):
        lines.append(
            f"decode step at {row['length']:,} tokens, batch {row['batch']}: {row['ms']:.3g} ms predicted, "
            f"dense {row['dense_ms']:.3g} ms, {row['share']:.1%}"
        )
    return lines
