"""What a plan does, in words."""

from __future__ import annotations

from compress.plan.schema import Amount, Plan
from compress.words import size


def removal(plan: Plan) -> str | None:
    """A sentence on what stays of a model that the plan makes smaller; None where nothing is removed."""
    if not plan.prunes:
        return None
    model = plan.model
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
    amount = plan.predicted.of("parameters").get(None)
    if amount is None:
        return f"{', '.join(parts)} stay"
    counted = f"{amount.plan:,} of {amount.dense:,} parameters of the decoder layers stay ({amount.fraction:.2%})"
    return f"{counted}: {', '.join(parts)}"


def amount_line(amount: Amount) -> str:
    """What a plan costs in one kind of budget, as a share and in numbers."""
    unit = f"{amount.plan:,} {amount.unit}" if amount.unit != "bytes" else size(amount.plan)
    return f"{unit}{amount.at}, {amount.fraction:.1%} of {amount.of}{expectation(amount)}"


def expectation(amount: Amount) -> str:
    """What has to be known of an amount that is a mean over texts, behind a comma; nothing of any other."""
    if amount.spread is None or amount.most is None:
        return ""
    dense = max(amount.dense, 1)
    spread, most = f"{amount.spread / dense:.1%}", f"{amount.most / dense:.1%}"
    return f", on average over texts, whose standard deviation is at most {spread}; no text takes more than {most}"


def added(plan: Plan) -> tuple[str, ...]:
    """What an upcycled model is made of, and what it costs more than its seed; nothing for a plan of one model."""
    made = plan.upcycle
    if made is None:
        return ()
    attention = {
        ("soft", "expert"): "all attentions run, each on its own keys and values, times gates that sum to 1",
        ("soft", "shared"): "all attentions run on shared keys and values, times gates that sum to 1",
    }.get((made.attention, made.kv), "there is one attention")
    names = ", ".join(expert.name for expert in made.experts)
    mlps = f"{made.mlps} of {made.count} MLPs a token"
    if made.mlps == made.count:
        mlps = "all MLPs run, times gates that sum to 1"
    first = f"{made.count} models in one ({names}): {attention}, and {mlps}"
    longest = plan.predicted.longest
    if not longest:
        return (first,)
    costs = "; ".join(amount_line(amount) for amount in longest)
    return first, f"this adds to what the seed costs: {costs}"
