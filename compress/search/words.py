"""What a search says in sentences: how much a model has to give, and what the plan costs in every kind of budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.plan import Plan, amount_line
from compress.registry import budget_kinds
from compress.search.budget.kind import Row, rounded_up
from compress.search.problem import Problem
from compress.search.serve import Serve


def sliding_line(problem: Problem, smallest: Sequence[int]) -> str | None:
    """How much a model that is part local has to give; None where no layer slides by itself.

    Args:
        smallest: what the smallest plan costs in every row, in steps.
    """
    sliding = sum(native is not None for native in problem.shape.native_windows)
    if not sliding:
        return None
    shares = [
        f"{rounded_up(row.fraction(int(amount))):g} of {row.of}"
        + ("" if row.length is None else f" at {row.length:,} tokens")
        for row, amount in zip(problem.rows, smallest, strict=True)
    ]
    full = problem.shape.layers - sliding
    return (
        f"{sliding} of {problem.shape.layers} layers slide by themselves and stay as they are; only the {full} "
        f"full-attention layer{'' if full == 1 else 's'} can be compressed. The least that any plan takes is "
        f"{', '.join(shares)}"
    )


def serving_line(serve: Serve, told: Mapping[str, Any]) -> str:
    """What it costs that a plan is as an engine asks.

    Args:
        told: the losses with that and without, each of the best of the solver's plans, None where a solver predicts
            none; and whether they were measured.
    """
    asked = f"as {serve.engine} serves it ({serve.words()})"
    if told["loss"] is None or told["loss_without"] is None:
        return f"{asked}: what that costs is not known, without held-out documents and a predicted loss"
    what = "response loss" if told["measured"] else "predicted loss at the longest length"
    more = told["loss"] - told["loss_without"]
    return f"{asked}: {what} {told['loss']:.4f}, without that {told['loss_without']:.4f} ({more:+.4f})"


def cost_lines(plan: Plan, rows: Sequence[Row]) -> list[str]:
    """What a plan costs in every kind, beside the dense model and the budget, a sentence each."""
    limits = {(row.kind, row.length): row for row in rows}
    lines = []
    for amount in plan.predicted.amounts:
        row = limits.get((amount.kind, amount.length))
        below = "" if row is None else f", {(row.limit - amount.plan) / amount.dense:.2%} below the budget"
        lines.append(amount_line(amount) + below)
    for name, kind in budget_kinds.items():
        if name in plan.provenance:
            lines += kind.report_lines(plan.provenance[name])
    return lines
