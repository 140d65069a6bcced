"""Layers of unequal width: every decoder layer is made with its own numbers of heads and neurons."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.model_executor.models import utils

from compress_vllm.config import set_width
from compress_vllm.families import Row
from compress_vllm.plan import Layer


@contextmanager
def own_widths(config: Any, row: Row, layers: Sequence[Layer]) -> Iterator[None]:
    """Inside, `make_layers` of vLLM makes each layer from a configuration that says the layer's width.

    vLLM's model classes make their layers one by one with that function, and read the sizes of a layer from the one
    configuration while they make it. Outside, the configuration is as wide as the widest layer.

    Raises:
        ValueError: layers differ in width, and the model class did not use the function.
    """
    before: tuple[Any, ...] = (
        getattr(config, row.groups),
        config.num_attention_heads,
        getattr(config, row.neurons, None),
    )
    own = [(len(layer.rules), layer.query_heads, layer.neurons) for layer in layers]
    if len(set(own)) == 1:
        yield
        return
    stock, made = utils.make_layers, []

    def make_layers(count: int, layer_fn: Callable[..., Any], prefix: str, **kwargs: Any) -> Any:
        def layer_of_own_width(*, prefix: str) -> Any:
            number = int(prefix.rsplit(".", 1)[1])
            set_width(config, row, *own[number])
            made.append(number)
            try:
                return layer_fn(prefix=prefix)
            finally:
                set_width(config, row, *before)

        return stock(count, layer_of_own_width, prefix, **kwargs)

    modules: list[Any] = list(sys.modules.values())
    # By `vars`: asked by name, modules that import lazily would import.
    users = [module for module in modules if vars(module).get("make_layers") is stock]
    for module in users:
        module.make_layers = make_layers
    try:
        yield
    finally:
        for module in users:
            module.make_layers = stock
    if not made:
        raise ValueError(
            f"a {row.architecture} whose layers differ in width cannot be served: vLLM has no class for it that makes "
            "its layers one by one; take a plan that removes as much in every layer"
        )
