"""What an engine asks of a plan, as a constraint of the search: head groups in slots, ranks alike, few targets; and the
order of head groups that gives every rank the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field

from compress.errors import UserError
from compress.limits import ENTRIES
from compress.plan import LayerPlan, Plan
from compress.registry import Method
from compress.targets.target import Target

FREE = "free"  # name of the plan that is found without the constraint


class Serve(Method):
    """A plan that an engine serves with few, equal attention modules.

    A rank of tensor parallelism has an even share of the head groups of a layer, those that lie beside each other. In
    every share the number of groups with a target is a multiple of `slot`, and all shares of a layer have the same
    targets as often: vLLM frees the same blocks on all ranks. Which groups of a share are a slot is free.

    Where head groups are put in another order (`permute`), which no output depends on, any groups of a layer can become
    a rank's share: then how often the layer has a target is all that counts, a multiple of `slot` times `ranks`.

    Windows that grow and sinks are not ruled out: the plugin serves them. Only windows without either run on vLLM's own
    kernels, which a grid of `sinks: [0]` and `betas: [0]` asks for.
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
    permute: bool = Field(
        True,
        description="put the head groups of a layer in an order in which those of a target lie side by side and every "
        "rank has as many of each; the model's outputs stay the same",
    )

    def words(self) -> str:
        """What is asked, for a line of output."""
        slots = f"slots of {self.slot} head group{'' if self.slot == 1 else 's'}"
        ranks = "" if self.ranks == 1 else f" on each of {self.ranks} ranks"
        order = ", head groups in another order" if self.permute else ""
        return f"{slots}{ranks}, at most {self.spans} targets{order}"

    @property
    def size(self) -> int:
        """Of how many head groups of one share the number with a target is a multiple."""
        return self.slot * self.ranks if self.permute else self.slot

    def shares(self, groups: int) -> list[range]:
        """The head groups of a layer that have to have the same targets as often: those of each rank, or all."""
        count = 1 if self.permute else self.ranks
        share = groups // count
        return [range(number * share, (number + 1) * share) for number in range(count)]

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
            if any(count != counts[0] for count in counts) or any(n % self.size for n in counts[0].values()):
                return False
        return len(distinct(layers)) <= self.spans

    def ordered(self, plan: Plan) -> Plan:
        """A plan that is as asked with the order of head groups in which the engine gets it: rank behind rank, and in
        each the groups of a target side by side. Without `permute` it stays as it is."""
        if not self.permute:
            return plan
        layers = [layer.model_copy(update={"order": self._order(layer)}) for layer in plan.layers]
        return plan.model_copy(update={"layers": tuple(layers)})

    def _order(self, layer: LayerPlan) -> tuple[int, ...] | None:
        """The order of the head groups of a layer; None where that is the model's."""
        places: dict[Target, list[int]] = {}
        for group, target in enumerate(layer.groups):
            places.setdefault(target, []).append(group)
        order = [
            group
            for rank in range(self.ranks)
            for groups in places.values()
            for group in groups[rank * len(groups) // self.ranks : (rank + 1) * len(groups) // self.ranks]
        ]
        return None if order == sorted(order) else tuple(order)


def distinct(layers: Sequence[LayerPlan]) -> Counter[Target]:
    """The targets of a plan, with the number of head groups that each has."""
    return Counter(group for layer in layers for group in layer.groups)
