"""A plan as a stock architecture: layers that are wholly full or slide over one window, with no code of our own."""

from __future__ import annotations

from typing import Any, Literal

import transformers

from compress.errors import UserError
from compress.models.families import family_of
from compress.models.planned import config_fields, has_own_widths, kept_units, on_weights_of
from compress.models.pruning import is_uniform
from compress.plan import Form, Plan
from compress.runtime.widths import Width
from compress.targets.target import StockForm, Target

FIX = "search with `solver: {name: layers, sink: 0}`, or write `export: {form: patched}`, which holds every plan"


def layer_windows(plan: Plan) -> list[int | None]:
    """Per layer, the window in tokens that all its groups have; None where all see everything.

    A stock layer that slides over W tokens sees key j when t - j < W.

    Raises:
        UserError: no stock architecture holds the plan; names the first layer and group in the way.
    """
    forms: list[StockForm] = []
    common: tuple[int, int] | None = None
    for layer, row in enumerate(plan.groups_that_stay()):
        first = row[0][0].stock(row[0][1])
        for group, native in row:
            form = group.stock(native)
            number = plan.layers[layer].groups.index(group)
            if form is None:
                wanted = "everything, or a fixed window of 2 tokens or more without sinks"
                raise _in_the_way(layer, number, group, native, wanted)
            if form != first:
                words = row[0][0].words(row[0][1])
                raise _in_the_way(layer, number, group, native, f"as the first group of the layer: {words}")
        assert first is not None
        if first.window is not None:
            if common is not None and first.window != common[1]:
                wanted = f"the window of layer {common[0]}, {common[1]} tokens: there is one for all"
                raise _in_the_way(layer, 0, row[0][0], row[0][1], wanted)
            common = common or (layer, first.window)
        forms.append(first)
    return [form.window for form in forms]


def form_for(plan: Plan, config: Any, asked: Literal["patched", "native", "auto"]) -> Form:
    """The form in which an export of a plan ends, so that its cost is known before it is written.

    Args:
        config: of the dense model.
        asked: what the recipe asks for; a plan that has no native form, as a baseline may be, is taken as patched.
    """
    family = family_of(config)
    if asked == "patched" or plan.stock() is None or not (plan.as_built or family.native):
        return "patched"
    kept = kept_units(plan, Width.of(config).neurons) if plan.prunes else []
    return "native" if not kept or is_uniform(config, kept) or family.twin else "patched"


def native_model(planned: Any, plan: Plan) -> Any:
    """The stock model that computes what `planned` does, on the very tensors of `planned`.

    A plan that leaves every layer as it was gives the model's own architecture; another one the architecture that
    its family is written as (`Family.native`).

    Raises:
        UserError: no stock architecture holds the plan (see `layer_windows`), or this model's weights or RoPE, or its
            family has none with layers that slide one by one.
    """
    family = family_of(planned.config)
    if plan.prunes and has_own_widths(planned):
        raise UserError(
            "a native checkpoint cannot hold this plan: layers have widths that no stock configuration says",
            where="plan: layers",
            expected="the same numbers of heads and neurons in every layer, which the architecture takes",
            found=", ".join(f"{heads} groups" for heads in sorted(set(plan.kept_heads))) + ", neurons by layer",
            fix="search with `solver: {name: amp}`, or write `export: {form: patched}`, which holds every plan",
        )
    windows = layer_windows(plan)
    unchanged = windows == list(plan.model.native_windows)
    written_as = family.architecture if unchanged else family.native
    if written_as is None:
        raise UserError(
            f"no native checkpoint of {family.architecture}: transformers has no architecture that computes the "
            "same on its weights with layers that are full or slide one by one",
            where="export.form",
            expected="a plan that leaves every layer's attention as it is",
            found="windows",
            fix="write `export: {form: patched}`, which holds every plan",
        )
    model_class = getattr(transformers, written_as)
    fields = config_fields(planned.config)
    if not unchanged:
        _check_rope(fields.get("rope_parameters"), windows, plan)
        stock = set(getattr(transformers, family.architecture).config_class().to_dict())
        there = set(model_class.config_class().to_dict())
        fields = {key: value for key, value in fields.items() if key in there or key not in stock}
        fields["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        fields["sliding_window"] = next(window for window in windows if window is not None)
        if "use_sliding_window" in there:
            fields["use_sliding_window"] = True
    _in_older_forms(fields, windows)
    try:
        return on_weights_of(planned, model_class, model_class.config_class(**fields))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"no native checkpoint of this model: {model_class.__name__} does not hold its weights",
            where="export.form",
            expected="the same weights, without biases that the architecture does not have",
            found=str(error).splitlines()[0],
            fix="write `export: {form: patched}`",
        ) from error


def _in_older_forms(fields: dict[str, Any], windows: list[int | None]) -> None:
    """Let the fields that said which layers slide before `layer_types` did agree with it, as far as they can.

    transformers ignores them beside `layer_types`; other engines may read nothing else. A plan that `max_window_layers`
    (so many full layers, then sliding ones) cannot say gets 0: with the number of layers vLLM runs Qwen2 and Qwen3
    dense and says nothing, with 0 it stops. A plan that no `sliding_window_pattern` (every so
    many layers a full one) says goes without.
    """
    full = [window is None for window in windows]
    if "max_window_layers" in fields and not all(full):
        first = full.index(False)
        fields["max_window_layers"] = 0 if any(full[first:]) else first
    for name in [name for name in ("sliding_window_pattern", "_sliding_window_pattern") if name in fields]:
        period = full.index(True) + 1 if any(full) else len(full) + 1
        del fields[name]
        if full == [(layer + 1) % period == 0 for layer in range(len(full))]:
            fields["sliding_window_pattern"] = period


def _check_rope(rope: Any, windows: list[int | None], plan: Plan) -> None:
    """Refuse to change a layer's type where RoPE depends on the type: its keys would be turned by other angles."""
    if not isinstance(rope, dict) or rope.get("full_attention") == rope.get("sliding_attention"):
        return
    for layer, (window, native) in enumerate(zip(windows, plan.model.native_windows, strict=True)):
        if (window is None) != (native is None):
            raise UserError(
                "a native checkpoint cannot hold this plan: full and sliding layers of this model turn positions by "
                "different angles (RoPE), so a full layer cannot become a sliding one",
                where=f"plan: layers.{layer}",
                expected="full",
                found=f"a window of {window} tokens",
                fix="write `export: {form: patched}`, which keeps every layer's own RoPE",
            )


def _in_the_way(layer: int, number: int, group: Target, native: int | None, expected: str) -> UserError:
    return UserError(
        "a native checkpoint cannot hold this plan",
        where=f"plan: layers.{layer}.groups.{number}",
        expected=expected,
        found=group.words(native),
        fix=FIX,
    )
