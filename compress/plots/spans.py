"""How far every head group of a plan sees: a heat map over layers and groups, of one plan or of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.plan import Plan
from compress.plots.figure import new_figure, save, style


def span_map(plan: Plan, length: int) -> list[list[int]]:
    """Keys that the query at the end of `length` tokens sees, `[layers][groups]`."""
    return [
        [group.cost(plan.unit(number, 2, "patched"), length).keys for group in layer.groups]
        for number, layer in enumerate(plan.layers)
    ]


def draw_spans(plans: Mapping[str, Plan], length: int, path: Path) -> list[Path]:
    """Heat maps of plans by name, side by side on one scale; the files.

    Layers that slide by themselves carry an s, head groups with a state of constant size a plus sign, and groups that
    some tokens do not use an r, where the mean over tokens is shown.
    """
    models = [plan.model for plan in plans.values()]
    layers, groups = max(model.layers for model in models), max(model.kv_heads for model in models)
    with style():
        figure = new_figure(1.5 + len(plans) * max(2.2, 0.35 * groups), max(2.5, 1.5 + 0.16 * layers))
        axes = figure.subplots(1, len(plans), squeeze=False)[0]
        stateful = routed = False
        for axis, (name, plan) in zip(axes, plans.items(), strict=True):
            shown = axis.imshow(span_map(plan, length), vmin=0, vmax=length, aspect="auto", cmap="viridis")
            axis.set(title=name, xlabel="head group", xticks=range(plan.model.kv_heads))
            axis.set_yticks(range(0, plan.model.layers, -(-plan.model.layers // 16)))
            for layer, native in enumerate(plan.model.native_windows):
                unit = plan.unit(layer, 2, "patched")
                for number, group in enumerate(plan.layers[layer].groups):
                    state = group.cost(unit, length).state_bytes > 0
                    chosen = group.all_on != group
                    stateful, routed = stateful | state, routed | chosen
                    if native is not None or state or chosen:
                        letter = "s" if native is not None else "+" if state else "r"
                        axis.text(number, layer, letter, ha="center", va="center", color="white", fontsize=7)
        axes[0].set_ylabel("layer")
        slides = any(native is not None for model in models for native in model.native_windows)
        marks = ["s: the layer slides by itself"] if slides else []
        marks += ["+: a state stands for the others"] if stateful else []
        marks += ["r: only by tokens that choose the group, the mean"] if routed else []
        what = f"tokens seen at {length:,}" + (f" ({'; '.join(marks)})" if marks else "")
        figure.colorbar(shown, ax=list(axes), label=what)
    return save(figure, path)
