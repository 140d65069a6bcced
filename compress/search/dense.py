"""The dense model as a search sees it: its sizes, what it costs as it is, and what its projections compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compress.models.families import family_of, layers_of
from compress.models.pruning import block_parameters, output_projections, parameters_per_unit
from compress.runtime.span import PAGE
from compress.targets.cost import Cost
from compress.targets.full import FullGroup

if TYPE_CHECKING:
    from compress.plan import ModelShape
    from compress.targets.unit import LayerParameters


@dataclass(frozen=True)
class Dense:
    """The model that a plan is searched for.

    Attributes:
        itemsize: bytes of one cached number, which is also one number of the weights.
        model: the model itself, for its parameters; it may have no weights. None where no budget counts parameters.
        removes: whether the search may remove heads and neurons, so that plans differ in parameters.
        bandwidth: measures the device's bandwidth in bytes per second; None where that is not possible.
    """

    shape: ModelShape
    itemsize: int
    model: Any = None
    removes: bool = False
    bandwidth: Callable[[], float] | None = None

    @functools.cached_property
    def sizes(self) -> tuple[LayerParameters, ...]:
        """Parameters by what they go with, layer by layer.

        Raises:
            UserError: nothing can be removed from the architecture, or its layers do not divide into units.
        """
        return tuple(parameters_per_unit(self.model))

    @functools.cached_property
    def biased_sizes(self) -> tuple[LayerParameters, ...]:
        """Sizes of layers in which every projection has a bias, as after a compensation."""
        return tuple(parameters_per_unit(self.model, biased=True))

    @property
    def config(self) -> Any:
        """The model's configuration; None where there is no model."""
        return getattr(self.model, "config", None)

    @functools.cached_property
    def neuron_step(self) -> int:
        """What the number of neurons of a layer is a multiple of (`Family.neuron_step`)."""
        return 1 if self.config is None else family_of(self.config).neuron_step

    @functools.cached_property
    def parameters(self) -> int:
        """Parameters of all decoder layers."""
        return block_parameters(self.model)

    @functools.cached_property
    def step_weights(self) -> int:
        """Bytes of weights that a decode step reads: all parameters, but nothing of an embedding that is only looked
        up."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        embedding, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        return weights - (0 if head is embedding else embedding.numel() * embedding.element_size())

    def cost(self, length: int, *, paged: bool = False) -> Cost:
        """What the model costs as it is for one sequence of `length` tokens; parameters are not counted.

        Args:
            paged: with the runtime's cache in whole pages; otherwise with transformers' own.
        """
        units = (self.shape.unit(layer, self.itemsize, paged=paged) for layer in range(self.shape.layers))
        return Cost.total(FullGroup().cost(unit, length) * self.shape.kv_heads for unit in units)

    @property
    def page_bytes(self) -> int:
        """Bytes of one cache page of one head group."""
        return PAGE * self.shape.unit(0, self.itemsize).token_bytes

    @torch.no_grad()
    def outputs(self, layer: int, heads: torch.Tensor, neurons: torch.Tensor) -> tuple[list[float], list[float]]:
        """What o_proj and down_proj of a layer make of inputs `[groups, query heads a group, head_dim]` and
        `[neurons]`: `hidden_size` numbers each."""
        attention, mlp = output_projections(layers_of(self.model)[layer], self.model.config)
        if attention.weight.is_meta:  # a model without weights, of which only sizes are asked
            return [0.0] * attention.out_features, [0.0] * mlp.out_features
        pairs = ((attention, heads.flatten()), (mlp, neurons))
        products = [(module.weight.double() @ inputs.to(module.weight.device)).tolist() for module, inputs in pairs]
        return products[0], products[1]
