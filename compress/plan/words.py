"""What a plan does, in words."""

from __future__ import annotations

from compress.plan.schema import Plan


def removal(plan: Plan) -> str | None:
    """In words, what stays of a model that the plan makes smaller; None where nothing is removed."""
    if not plan.prunes:
        return None
    model = plan.model
    left, whole = plan.predicted.parameters, plan.predicted.dense_parameters
    parts = [
        f"{sum(plan.kept_heads)} of {model.layers * model.kv_heads} head groups",
        f"{sum(plan.kept_queries)} of {model.layers * model.query_heads} query heads",
    ]
    neurons = [layer.mlp.kept if layer.mlp is not None else None for layer in plan.layers]
    known = [number for number in neurons if number is not None]
    if known:
        span = f"{min(known):,}" if len(set(known)) == 1 else f"{min(known):,} to {max(known):,}"
        untouched = len(neurons) - len(known)
        parts.append(f"{span} neurons a layer" + (f", all of them in {untouched} layers" if untouched else ""))
    if left is None or not whole:
        return f"{', '.join(parts)} stay"
    return f"{left:,} of {whole:,} parameters of the decoder layers stay ({left / whole:.2%}): {', '.join(parts)}"
