"""The model card of a checkpoint, built from its plan and from measured numbers; nothing in it is typed by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from compress.export.metadata import front_matter
from compress.export.native import layer_windows
from compress.export.provenance import provenance_lines
from compress.export.verify import Checks
from compress.limits import SHOWN_LENGTHS
from compress.models.load import DEMOS
from compress.plan import Form, Plan, added, removal
from compress.plan.skipped import NOTHING, STORED, Skipped, chooses, skipped
from compress.plan.states import States, states_of
from compress.targets.target import StockForm
from compress.words import counted

QWEN = (
    'with `--model-impl transformers` the plan; without, it stops ("Sliding window for some but all layers is not '
    'supported") where some layers see everything'
)
TEMPLATE = Path(__file__).with_name("card.md.jinja")
VERSIONS = Path(__file__).with_name("transformers_versions.json")
# Of native checkpoints with windows; run with vLLM 0.32 on a CPU.
VLLM = {
    "MinistralForCausalLM": "the plan, through its transformers backend, which it takes by itself",
    "Qwen2ForCausalLM": QWEN,
    "Qwen3ForCausalLM": QWEN,
}
LONG = 1 << 20  # tokens, longer than any window
UNTRAINED = "The weights are those of the original model"
OF_EXPERTS = "The weights are those of the models that it is made of, and routers that start as the recipe says"
TRAINED = "The weights were trained afterwards (recover.json)"


def render_card(
    plan: Plan,
    *,
    name: str,
    source: dict[str, Any],
    dtype: str,
    itemsize: int,
    context: int,
    checks: Checks,
    versions: dict[str, str],
    recipe: str | None = None,
    table: str | None = None,
    trained: bool = False,
    base: Plan | None = None,
    weights: int = 0,
) -> str:
    """The card as Markdown.

    Args:
        name: what the user called the model that the plan was made for.
        source: what is known of that model (`source_metadata`).
        versions: of the packages that the checkpoint was made with; transformers' is the one it was checked in.
        context: the model's longest input in tokens; lengths beyond it are left out.
        base: the plan of the model that this one was made from, where that was a checkpoint of this toolkit.
        table: measured numbers as a Markdown table with their conditions; None where nothing was measured.
        trained: the weights were trained after the plan was made.
        weights: parameters of the decoder layers.
    """
    windows = layer_windows(plan) if checks.native else None
    form: Form = "native" if checks.native else "patched"

    def dense(length: int) -> int:
        return plan.dense_cost(length, itemsize).held_bytes

    def held(length: int) -> int:
        return plan.cost(length, itemsize, form=form).held_bytes

    def about(length: int) -> dict[str, int]:
        cost = plan.cost(length, itemsize, form=form)
        return {"bytes": cost.held_bytes, "spread": cost.spread_bytes, "most": cost.most_bytes, "dense": dense(length)}

    costs = [
        {"length": length, **about(length)}
        for length in sorted(
            {length for length in SHOWN_LENGTHS if length <= context} | {min(context, SHOWN_LENGTHS[-1])}
        )
    ]
    groups = sum(plan.kept_heads)
    states = states_of(plan, itemsize, form)
    choosing = (
        [Skipped.total(skipped(plan, row["length"], itemsize, form), weights) for row in costs] if chooses(plan) else []
    )
    windowed = plan.full_groups < groups
    # Heads that tokens choose may see everything when they are chosen.
    spans = windowed and (not choosing or _hides(plan))
    changed = [group for row in plan.groups_that_stay() for group, native in row if group.stock(native) != StockForm()]
    predicted = plan.predicted
    if predicted.lengths:
        fraction = held(predicted.lengths[-1]) / dense(predicted.lengths[-1])
    else:
        fraction = costs[-1]["bytes"] / costs[-1]["dense"]
    facts: dict[str, Any] = {
        "plan": plan,
        "metadata": front_matter(source, _tags(plan, windowed, states, bool(choosing))),
        "title": source.get("base_model") or (name if name in DEMOS else Path(name).name),
        "dtype": dtype,
        "base": base,
        "groups": groups,
        "removed": removal(plan),
        "added": added(plan),
        "base_removed": None if base is None else removal(base),
        "windowed": windowed,
        "by_layer": len(plan.widths) > 1,
        "form": _form(plan, spans, windows, checks.loaded_as, states, bool(choosing)),
        "ratio": _ratio(plan, fraction),
        "changed": _changed(plan, spans, windows is None, bool(choosing)),
        "windows": windows,
        "window": next((window for window in windows or () if window is not None), None),
        "full": plan.full_groups,
        "kinds": Counter(group.noun or f"`{group.target}`" for group in changed),
        "rules": Counter(group.rule_text() for group in changed),
        "by_length": plan.by_length,
        "one_way": _one_way(plan),
        "reordered": plan.reordered_layers and counted(plan.reordered_layers, "layer"),
        "states": states,
        "varies": plan.in_expectation,
        "stored": STORED,
        "choosing": choosing,
        "saves": any(max(row.of_prefill, row.of_step()) >= NOTHING for row in choosing),
        "trained": trained,
        "costs": costs,
        "checks": checks,
        "versions": versions,
        "tried": tried(checks.loaded_as, besides=versions["transformers"]),
        "plugin": _in_vllm(plan),
        "vllm": VLLM.get(checks.loaded_as, "not tried"),
        "provenance": provenance_lines(plan.provenance),
        "recipe": recipe,
        "fence": _fence(recipe or ""),
        "table": table,
        "weights": TRAINED if trained else UNTRAINED if plan.upcycle is None else OF_EXPERTS,
    }
    return _template().render(facts)


@cache
def _template() -> jinja2.Template:
    """Compiled once, which takes longer than to render it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def tried(architecture: str, *, besides: str) -> dict[str, Any]:
    """What `scripts/transformers_versions.py` found of a small model of this class, by version of transformers.

    Returns:
        `same`: versions with the same logits and tokens; `other`: pairs of a version and what happens there.
    """
    messages_of: dict[str, list[str]] = {}
    for row in json.loads(VERSIONS.read_text(encoding="utf-8"))["rows"]:
        if row["architecture"] == architecture and row["transformers"] != besides:
            messages_of.setdefault(row["transformers"], []).extend([] if row["same"] else [row["message"]])
    return {
        "same": [version for version, messages in messages_of.items() if not messages],
        "other": [(version, messages[0].replace("|", "\\|")) for version, messages in messages_of.items() if messages],
    }


def _hides(plan: Plan) -> bool:
    """Whether some head group that stays keeps less than all keys of a long input."""
    units = [plan.unit(number, 2, plan.form) for number in range(len(plan.layers))]
    return any(
        group.cost(unit, LONG).held_bytes < LONG * unit.token_bytes
        for unit, row in zip(units, plan.groups_that_stay(), strict=True)
        for group, _ in row
    )


def _in_vllm(plan: Plan) -> bool:
    """Whether the plugin for vLLM serves a patched checkpoint of the plan."""
    refused = plan.by_length or plan.upcycle is not None
    return not refused and all(group.in_vllm for layer in plan.layers for group in layer.groups)


def _one_way(plan: Plan) -> str:
    """The targets of groups whose cache takes no token back, in Markdown; empty where every group's does."""
    groups = [group for row in plan.groups_that_stay() for group, _ in row]
    return ", ".join(sorted({f"`{group.target}`" for group in groups if not group.takes_back}))


def _tags(plan: Plan, windowed: bool, states: States | None, routed: bool) -> list[str]:
    tags = ["compress"]
    if plan.upcycle is not None:
        return [*tags, "moe", "upcycling"]
    if plan.prunes:
        tags.append("pruning")
    if windowed or not plan.prunes:
        tags += ["sparse-attention", "kv-cache"]
    if states is not None:
        tags.append("linear-attention")
    if plan.in_expectation:
        tags.append("token-eviction")
    if routed:
        tags.append("mixture-of-heads")
    return tags


def _fence(text: str) -> str:
    """A fence around a block of code that the block itself does not close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _form(
    plan: Plan,
    windowed: bool,
    windows: Sequence[int | None] | None,
    loaded_as: str,
    states: States | None,
    routed: bool,
) -> str:
    """What the checkpoint is, behind the name and sizes of its model; `windows` is None for the patched form."""
    if windows is not None and any(window is not None for window in windows):
        return (
            f"as {loaded_as}, a stock architecture of transformers whose layers see everything or slide over one window"
        )
    if windows is not None:
        return f"as an ordinary {loaded_as} of transformers"
    if plan.upcycle is not None:
        return f"as the seed of {plan.upcycle.count} models whose attentions and MLPs are side by side in every layer"
    parts = ["a width of its own for every layer"] if len(plan.widths) > 1 else []
    if windowed or not (plan.prunes or routed):
        parts.append("a span of its own for every key/value head")
    if plan.in_expectation:
        parts.append("scorers that say which older tokens some of them keep")
    if states is not None:
        parts.append("states of constant size for the keys that some of them hide")
    if routed:
        parts.append("routers that choose heads for every token")
    return f"with {' and '.join(parts)}" if parts else f"as {loaded_as}, which brings its own code"


def _ratio(plan: Plan, fraction: float) -> str:
    """What the title says the plan keeps, of every kind that it saves anything in.

    Args:
        fraction: of the KV cache, in the form of the checkpoint.
    """
    kept = [f"{amount.fraction:.0%} of {amount.of}" for amount in plan.predicted.longest if amount.kind != "kv"]
    windowed = not plan.as_built
    parts = [f"{fraction:.0%} of the KV cache"] if windowed or not kept else []
    return " and ".join([*parts, *kept])


def _changed(plan: Plan, windowed: bool, patched: bool, routed: bool) -> str:
    """What is not as in the original model, in one clause."""
    if plan.upcycle is not None:
        return "what changed is that every token mixes their attentions by its own gates, and chooses among their MLPs"
    parts = []
    if plan.prunes:
        heads = sum(plan.kept_queries) < plan.model.layers * plan.model.query_heads
        neurons = any(layer.mlp is not None for layer in plan.layers)
        gone = " and ".join(name for name, any_gone in (("heads", heads), ("neurons", neurons)) if any_gone)
        parts.append(f"whole {gone} were removed")
    if windowed or not (plan.prunes or routed):
        which = "each head group sees" if patched else "the sliding layers see"
        parts.append(f"what changed is which keys {which}, and which they keep in the cache")
    if routed:
        parts.append("every token chooses which heads it uses")
    return "; ".join(parts)
