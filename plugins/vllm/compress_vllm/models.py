"""The model classes: vLLM's own, whose attention is split by the plan.

A class is made when it is first asked for (PEP 562), from the class that vLLM has for the stock architecture; where
vLLM has none, or one that computes or reads something else, from its backend that runs transformers' modelling code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from compress_vllm.families import BY_CLASS, Row
from compress_vllm.plan import read_layers
from compress_vllm.routers import routers_kept
from compress_vllm.split import arguments_kept, split
from compress_vllm.widths import own_widths


class Planned:
    """Put before a model class of vLLM, makes it serve the plan of its configuration."""

    compress_row: Row

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        layers = read_layers(config.compress_plan, self.compress_row, config)
        _check(vllm_config, [rule for layer in layers for rule in layer.rules if rule and not rule.is_plain])
        with own_widths(config, self.compress_row, layers), arguments_kept(), routers_kept():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        split(self, layers, config)  # type: ignore[arg-type]


def _check(vllm_config: Any, own_rules: list[Any]) -> None:
    """Raise ValueError where vLLM was asked for what caches with sinks or growing windows cannot do."""
    if not own_rules:
        return
    parallel = vllm_config.parallel_config
    for option, asked in (
        ("--disable-hybrid-kv-cache-manager", vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
        ("--kv-transfer-config", vllm_config.kv_transfer_config is not None),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size > 1),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1),
    ):
        if asked:
            raise ValueError(
                f"{option}: head groups of this plan have sinks or growing windows, which it does not know"
            )


def __getattr__(name: str) -> Any:
    if name not in BY_CLASS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class(name)


@cache
def _class(name: str) -> type:
    row = BY_CLASS[name]
    return type(name, (Planned, _stock(row)), {"__module__": __name__, "compress_row": row})


def _stock(row: Row) -> type:
    from vllm.model_executor.models.registry import ModelRegistry

    known = ModelRegistry.models
    if row.experts:
        return known["TransformersMoEForCausalLM"].load_model_cls()
    own = row.own and row.architecture in known
    return known[row.architecture if own else "TransformersForCausalLM"].load_model_cls()
