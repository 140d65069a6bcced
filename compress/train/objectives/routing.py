"""What routers are trained for beside the model's own loss: an even load, small logits, and scores that fit a layer.

All of it is computed from what the layers recorded of one pass (`runtime.step.Routing`), which has tokens alone:
padding counts nowhere, and two passes, or two models, have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from compress.limits import FACTOR
from compress.registry import objectives
from compress.runtime.step import Record, Routing
from compress.train.objectives.hidden import wide
from compress.train.objectives.objective import Inputs, Objective, tokens_of

Over = Literal["sequence", "pass"]


def balance_loss(routing: Routing, over: Over = "sequence") -> torch.Tensor:
    """Load balance of a layer, summed over tokens: E sum_e(P_e f_e) of every sequence times the tokens that it has.

    P_e is the mean probability of routed unit e over tokens, f_e the share of tokens that chose it, E the number of
    routed units: E times the loss of Mixture-of-Head (arXiv 2410.11842), and E^2 mean_e(P_e f_e) of its released code.
    Where all units are chosen alike it is K a token, of the K units that a token chooses. Only P_e has gradients.
    What is mixed, and not chosen, has no load: 0.

    Args:
        over: `sequence` takes both means over a sequence, whose loss then does not depend on what else is in the
            batch; `pass` over all tokens of the pass, as the released code does.
    """
    if routing.mixed:
        return routing.probs.new_zeros(())
    sizes = routing.tokens if over == "sequence" else (len(routing.probs),)
    probs, chosen = (_sums(values.to(routing.probs.dtype), sizes) for values in (routing.probs, routing.chosen))
    counts = torch.tensor(sizes, device=probs.device).clamp(min=1)
    return probs.shape[1] * ((probs * chosen).sum(1) / counts).sum()


def _sums(values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Sums over the rows of each of several runs, `[N, E]` to `[runs, E]`."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1, values.shape[1]).sum(1)
    return torch.stack([run.sum(0) for run in values.split(list(sizes))])


def router_z_loss(routing: Routing) -> torch.Tensor:
    """Squared log-sum-exp of a token's logits, summed over tokens (ST-MoE, arXiv 2202.08906)."""
    return wide(routing.logits).logsumexp(-1).square().sum()


def contributions(outputs: torch.Tensor, projection: torch.Tensor, units: Sequence[Sequence[int]]) -> torch.Tensor:
    """Size of what each unit adds to the layer's output, the norm of sum_h H^h W_O^h over its heads: `[N, units]`.

    Args:
        outputs: H, `[N, H, D]` of all query heads.
        projection: W_O, `[hidden, H D]` as a linear module has it.
        units: query heads of each.
    """
    found, weight = [], wide(projection).unflatten(1, outputs.shape[1:])
    for heads in units:
        own = weight[:, list(heads)].flatten(1)
        given = wide(outputs[:, list(heads)]).flatten(1)
        found.append(((given @ (own.T @ own)) * given).sum(-1).clamp(min=0).sqrt())
    return torch.stack(found, dim=-1)


class _OfRouters(Objective):
    """A loss of what routers did in a whole model."""

    of_routers: ClassVar[bool] = True

    def count(self, inputs: Inputs) -> int:
        """Tokens that are no padding."""
        return tokens_of(inputs)

    def by_layer(self, student: Any, loss: Callable[[Routing], torch.Tensor]) -> torch.Tensor:
        """A loss of each layer that has a router, `[layers]`.

        Raises:
            ValueError: no layer has a router.
        """
        record: Record = student["record"]
        found = [loss(routing) for routing in (*record.routing.values(), *record.mlp_routing.values())]
        if not found:
            raise ValueError(f"`{self.registered}` is a loss of routers, and no layer of the model has one")
        return torch.stack([each.to(found[0].device) for each in found])


@objectives.register("balance")
class Balance(_OfRouters):
    """Even load of the units that a router chooses from, by the record of a pass: E sum_e P_e f_e a layer.

    The released code of Mixture-of-Head takes `over: pass` and `layers: mean`. In a pretrained model with 22 routed
    layers the gradient of that mean on a router is a fiftieth of that of the text, about, at a weight of .01;
    a sum, as in Switch (arXiv 2101.03961), gives each router the same loss whatever the number of layers.
    """

    weight: float = Field(0.01, ge=0, le=FACTOR, description="weight in the sum of losses; 0 only records it")
    over: Over = Field(
        "sequence",
        description="tokens that the load is taken over: of each sequence, so that neither padding nor the rest of the "
        "batch changes the loss, or of the whole `pass`, as the released code of Mixture-of-Head",
    )

    layers: Literal["sum", "mean"] = Field("sum", description="what is taken of the losses of the layers")

    unit: ClassVar[str] = "chosen units a token where the load is even, summed over layers"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        found = self.by_layer(student, lambda routing: balance_loss(routing, self.over))
        return found.sum() if self.layers == "sum" else found.mean()


@objectives.register("router_z")
class RouterZ(_OfRouters):
    """Squared log-sum-exp of the routers' logits, which keeps them small (ST-MoE, arXiv 2202.08906)."""

    unit: ClassVar[str] = "squared nats a token, summed over layers"

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        return self.by_layer(student, router_z_loss).sum()


@objectives.register("routing")
class Route(Objective):
    """Cross entropy of a router's probabilities on the units' shares of a layer's output, in the dense model.

    A unit's share is the norm of what it adds to the output behind the output projection, over the sum of all units'.
    Where a unit adds more than others for every token, its share makes it the choice of every token; with `relative`
    every unit counts by how much more than usual it adds, so that all units are of use to some tokens.
    """

    relative: bool = Field(
        False, description="take each norm over its mean in the sequence, so that the units are chosen alike often"
    )

    needs_teacher: ClassVar[bool] = True
    of_layer: ClassVar[bool] = True
    needs_choice: ClassVar[bool] = True
    unit: ClassVar[str] = "nats a token, summed over layers"

    def trained(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """What scores the units; how shared and routed parts are weighed is not asked here."""
        return {name: weight for name, weight in super().trained(module).items() if name.endswith(".route")}

    def loss(self, student: Any, teacher: Any, inputs: Inputs) -> torch.Tensor:
        """Of one layer.

        Args:
            student: `record` with the layer's `Routing`, and `layer`.
            teacher: `outputs` `[B, T, H, D]`, and `projection`, the weight of the layer's output projection.
        """
        routing: Routing = student["record"].routing[student["layer"]]
        sizes = contributions(teacher["outputs"].flatten(0, 1), teacher["projection"], routing.units)
        if self.relative:
            runs = sizes.split(list(routing.tokens))
            sizes = torch.cat([run / run.mean(0).clamp(min=torch.finfo(run.dtype).tiny) for run in runs])
        shares = functional.normalize(sizes, p=1.0, dim=-1)
        return -(shares * functional.log_softmax(wide(routing.logits), -1)).sum()
