"""What heads or head groups are worth by a statistic of any form, and what options that rank by it make of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from compress.errors import UserError
from compress.profile.key import Key
from compress.targets.target import Target

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.targets.layer_option import LayerOption

Find = Callable[[Key], torch.Tensor | None]
Assignment = dict[int, tuple[Target, ...]]  # by layer, the target of every head group


def worth_of(find: Find, name: str, lengths: Sequence[int], where: str) -> torch.Tensor:
    """One statistic as a score of heads, the more the better: `[layers, groups, query heads]` where it knows query
    heads, else `[layers, groups, 1]`; float64, the mean over the lengths that have it.

    Args:
        find: one tensor that was measured, None where there is none of that key.
        name: of a statistic with scores of heads, such as `taylor`, or with one number a head group, such as
            `retrieval`.
        where: the recipe's key that names it.

    Raises:
        UserError: nothing of that name was measured, or it is neither.
    """
    key = Key.parse(name)
    heads = Key(key.statistic, "heads")
    for known in (heads, key):
        at = [known.at(length) for length in lengths]
        found = [tensor for one in (known, *at) if (tensor := find(one)) is not None and tensor.ndim in (2, 3)]
        if found and not (known == heads and key.part):
            mean = torch.stack([tensor.double() for tensor in found]).mean(0)
            return mean if mean.ndim == 3 else mean[..., None]
    raise UserError(
        f"`{name}` does not say what heads or head groups are worth",
        where=where,
        expected="a statistic of `profile.statistics` with a score of every head, such as `taylor` or `amp`, or with "
        "one number for every head group, such as `retrieval`",
        found=name,
    )


def entries_of(option: LayerOption, shape: ModelShape, find: Find, lengths: Sequence[int], where: str) -> Assignment:
    """What an option makes of the layers of a model, those that slide by themselves left out.

    Args:
        find: one tensor that was measured, None where there is none of that key.
        lengths: that were profiled, in tokens.
        where: the recipe's key that names the option.

    Raises:
        UserError: the layers are too small for it, or its scores were not measured.
    """
    worth = None if option.ranked_by is None else worth_of(find, option.ranked_by, lengths, where).tolist()
    free = [layer for layer, native in enumerate(shape.native_windows) if native is None]
    try:
        return {
            layer: option.entries(shape.kv_heads, shape.group_size, None if worth is None else worth[layer])
            for layer in free
        }
    except ValueError as error:
        raise UserError(
            f"`{option.registered}` does not fit the layers of this model",
            where=where,
            found=str(error),
        ) from None
