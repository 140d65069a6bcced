"""Says where a model's values stop being finite: which weight, or which layer of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from compress.errors import UserError
from compress.models.placement import input_device

PLAIN = "write `export: {dtype: bfloat16}`, which has the range of float32, or `{dtype: float32}`"
DAMAGED = "check the download, or the training that these weights come from"


def to_dtype(model: Any, dtype: torch.dtype) -> None:
    """Bring the parameters of a model to another dtype, in place; buffers (RoPE frequencies) stay as they are.

    Raises:
        UserError: a weight is too large for it; names the first one. Those before it are converted by then.
    """
    for name, weight in model.named_parameters():
        converted = weight.data.to(dtype)
        if not _is_finite(converted):
            raise UserError(
                f"a weight is too large for {_name(dtype)} and overflows",
                where=name,
                expected=f"at most {torch.finfo(dtype).max:,.6g} in size",
                found=f"{float(weight.detach().abs().max()):,.6g}",
                fix=PLAIN,
            )
        weight.data = converted


def check_weights(model: Any) -> None:
    """Refuse a model one of whose weights is infinite or no number.

    Raises:
        UserError: there is one; names the first tensor and how many of its values are so.
    """
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            wrong = int((~weight.detach().isfinite()).sum())
            raise UserError(
                "a weight of the model is infinite or not a number",
                where=name,
                expected="finite values",
                found=f"{wrong:,} of {weight.numel():,} values",
                fix=DAMAGED,
            )


def refuse_not_finite(model: Any, dense: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Raise the UserError for a model whose logits of this input `[B, T]` are not finite, which says where that began.

    Args:
        dense: the model that the plan was made for, as it was loaded; None where it is not at hand.
    """
    check_weights(model)
    if dense is not None:
        device = input_device(dense)
        place = first_not_finite(dense, ids.to(device), mask.to(device))
        if place is not None:
            raise UserError(
                "the dense model's own logits are not finite, before any plan",
                where=place[0],
                expected=f"finite values in {_name(next(dense.parameters()).dtype)}, in which it was loaded",
                found=place[1],
                fix="load it in another dtype (`dtype:` in the recipe), and check that its weights are whole",
            )
    dtype = next(model.parameters()).dtype
    where, values = first_not_finite(model, ids, mask) or ("the logits", "not finite")
    raise UserError(
        f"the model's values overflow in {_name(dtype)}, so its logits are not finite",
        where=where,
        expected=f"at most {torch.finfo(dtype).max:,.6g} in size",
        found=values,
        fix=PLAIN if dtype == torch.float16 else DAMAGED,
    )


def first_not_finite(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[str, str] | None:
    """Where a forward pass of `[B, T]` ids first has a value that is not finite, and which; None where all are.

    The place is a module whose output is the first, or one whose input is: then it happened between the module before
    and this one (in attention, a product or a sum).
    """
    with torch.inference_mode(), _watched(model) as seen:
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    if not seen and bool(logits.isfinite().all()):
        return None
    return seen[0] if seen else ("the logits", _kind(logits) or "finite")


@contextmanager
def _watched(model: Any) -> Iterator[list[tuple[str, str]]]:
    """The first module without submodules that takes or gives a value that is not finite, once there is one."""
    seen: list[tuple[str, str]] = []

    def look(place: str, value: Any) -> None:
        kind = _kind(value) if isinstance(value, torch.Tensor) else None
        if kind is not None and not seen:
            seen.append((place, kind))

    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(partial(_each, look, f"{name} (its input)")))
            handles.append(module.register_forward_hook(partial(_last, look, f"{name} (its output)")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _each(look: Callable[[str, Any], None], place: str, _: Any, given: tuple[Any, ...]) -> None:
    for value in given:
        look(place, value)


def _last(look: Callable[[str, Any], None], place: str, _: Any, given: tuple[Any, ...], out: Any) -> None:
    look(place, out)


def _kind(value: torch.Tensor) -> str | None:
    """What a tensor has that is not finite: infinite values first, since those are where an overflow begins."""
    if bool(value.isfinite().all()):
        return None
    return "infinite values" if bool(value.isinf().any()) else "values that are not a number"


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether all values are, without a mask of the weight's size: a value that is no number is least and largest."""
    return bool(torch.stack(torch.aminmax(weight.detach())).isfinite().all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
