"""The processes that share a sequence, and models that can be run so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from compress.errors import UserError
from compress.models.context.exchange import Part
from compress.models.context.layout import Layout
from compress.models.families import layers_of
from compress.models.planned import with_runtime_plan
from compress.runtime.rope import rope_change
from compress.runtime.widths import Width, width_of


def check_processes(world: int, processes: int, where: str) -> None:
    """Check that there are as many processes as sequences are shared by, or a multiple.

    Raises:
        UserError: there are not.
    """
    if processes % world:
        raise UserError(
            "a sequence cannot be shared by so many processes",
            where=where,
            expected=f"{world} processes, or a multiple of {world}",
            found=f"{processes}",
            fix=f"start them with `torchrun --nproc-per-node {world} -m compress ...`, or set `{where}` to 1",
        )


@dataclass(frozen=True)
class Sharing:
    """This process among those that share sequences with it: `world` that follow each other in a launch.

    Attributes:
        rank: of this process among them.
        group: of `torch.distributed`; None for all processes.
    """

    world: int
    rank: int
    group: Any = None

    @staticmethod
    def join(world: int) -> Sharing:
        """The processes that share a sequence with this one; all of a launch call it, and make the groups of all."""
        rank, count = distributed.get_rank(), distributed.get_world_size()
        if world == count:
            return Sharing(world, rank)
        groups = [distributed.new_group(list(range(start, start + world))) for start in range(0, count, world)]
        return Sharing(world, rank % world, groups[rank // world])

    def part(self, length: int) -> Part:
        """This process's part of sequences of `length` tokens."""
        return Part(Layout(length, self.world), self.rank, self.group)

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace tensors by their sums over the processes."""
        for tensor in tensors:
            distributed.all_reduce(tensor, group=self.group)


def part_of_sequence(length: int, world: int) -> Part:
    """This process's part of sequences of `length` tokens that `world` processes share; all of a launch call it."""
    return Sharing.join(world).part(length)


def check_shareable(model: Any, length: int, where: str) -> None:
    """Check that a model's attention can be run on a part of a sequence of `length` tokens.

    Raises:
        UserError: a target cannot; says which, and why. Or the frequencies of RoPE depend on the length by then.
    """
    change = rope_change(model.config)
    if change is not None and length > change[1]:
        raise UserError(
            f"the model's position frequencies ({change[0]}) depend on the length of the input",
            where=where,
            expected=f"sequences of at most {change[1]} tokens, up to which those of all processes are the same",
            found=f"{length} tokens",
            fix=f"set `{where}` to 1",
        )
    for kinds in getattr(model.base_model, "compress_kinds", ()):
        try:
            kinds.check_shard()
        except ValueError as error:
            raise UserError(
                "sequences cannot be shared by processes with this plan",
                where=where,
                found=str(error),
                fix=f"set `{where}` to 1, or take a plan without these targets",
            ) from None


def shareable(model: Any) -> Any:
    """A model on the same tensors that can be run on a part of a sequence: a planned one itself, and of a stock model
    one whose heads are all full."""
    if hasattr(model.base_model, "compress_kinds"):
        return model
    whole = Width.of(model.config)
    return with_runtime_plan(
        model, {"schema": 1, "layers": [_dense(layer, model.config, whole) for layer in layers_of(model)]}
    )


def _dense(layer: Any, config: Any, whole: Width) -> dict[str, Any]:
    """A layer's entry of a plan that leaves it as it is."""
    width = width_of(layer, config)
    entry: dict[str, Any] = {"groups": [{"target": "full"}] * width.groups, "query_heads": width.query_heads}
    return entry if width.neurons == whole.neurons else {**entry, "mlp": {"kept": width.neurons}}
