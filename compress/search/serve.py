"""What an engine asks of a plan, as a constraint of the search: head groups in slots, ranks alike, few targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from compress.errors import UserError
from compress.limits import ENTRIES
from compress.plan import LayerPlan
from compress.registry import Method
from compress.targets.target import Target

FREE = "free"  # name of the plan that is found without the constraint


class Serve(Method):
    """A plan that an engine serves with few, equal attention modules.

    A rank of tensor parallelism has an even share of the head groups of a layer, those that lie beside each other. In
    every share the number of groups with a target is a multiple of `slot`, and all shares of a layer have the same
    targets as often: vLLM frees the same blocks on all ranks. Which groups of a share are a slot is free, since the
    plugin gathers the heads of a module from wherever they lie.

    Windows that grow and sinks are not ruled out: the plugin serves them. Only windows without either run on vLLM's own
    kernels, so a plan that is to be fast needs a grid of `sinks: [0]` and `betas: [0]`.
    """

    engine: Literal["vllm"] = Field("vllm", description="the engine: vLLM with plugins/vllm")
    slot: Annotated[
        int, Field(ge=1, le=ENTRIES, description="head groups that get one target together, on each rank")
    ] = 2
    spans: Annotated[
        int, Field(ge=2, le=ENTRIES, description="most distinct targets in the model, full attention counted")
    ] = 3
    ranks: Annotated[
        int, Field(ge=1, le=ENTRIES, description="ranks of tensor parallelism, which all get the same targets")
    ] = 1

    def words(self) -> str:
        """What is asked, for a line of output."""
        slots = f"slots of {self.slot} head group{'' if self.slot == 1 else 's'}"
        ranks = "" if self.ranks == 1 else f" on each of {self.ranks} ranks"
        return f"{slots}{ranks}, at most {self.spans} targets"

    def shares(self, groups: int) -> list[range]:
        """The head groups of a layer that each rank has."""
        share = groups // self.ranks
        return [range(rank * share, (rank + 1) * share) for rank in range(self.ranks)]

    def check_groups(self, groups: int) -> None:
        """Raise UserError where the head groups of a layer do not divide into slots on all ranks."""
        if groups % (self.slot * self.ranks):
            raise UserError(
                "the head groups of a layer do not divide into slots",
                where="search.serve",
                expected=f"`slot` times `ranks` to divide {groups}, the key/value heads of a layer",
                found=f"{self.slot} times {self.ranks}",
                fix="lower one of them",
            )

    def check_targets(self, targets: Iterable[Target]) -> None:
        """Raise UserError for the first target that the engine does not serve."""
        for target in targets:
            if not target.in_vllm or target.by_length:
                raise UserError(
                    "the search may choose what the engine does not serve",
                    where="search.serve.engine",
                    expected="full attention and windows by position, which the plugin of vLLM serves",
                    found=target.words(),
                    fix="leave it out of what is priced or prepared, or leave `serve` out",
                )

    def holds(self, layers: Sequence[LayerPlan]) -> bool:
        """Whether a plan is as asked."""
        for layer in layers:
            counts = [Counter(layer.groups[group] for group in share) for share in self.shares(len(layer.groups))]
            if any(count != counts[0] for count in counts) or any(n % self.slot for n in counts[0].values()):
                return False
        return len(distinct(layers)) <= self.spans


def distinct(layers: Sequence[LayerPlan]) -> Counter[Target]:
    """The targets of a plan, with the number of head groups that each has."""
    return Counter(group for layer in layers for group in layer.groups)
