"""Lets vLLM read a checkpoint's config.json as the stock configuration, with the plan beside it and no remote code."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from compress_vllm.families import ROWS, Row
from compress_vllm.plan import read_layers

# Of the checkpoint's own code, which is not loaded here.
OF_REMOTE_CODE = ("auto_map", "compress_impl")


def register_configs() -> None:
    """Make `AutoConfig` know the model types of checkpoints."""
    for row in ROWS:
        AutoConfig.register(f"compress_{row.model_type}", _reader(row), exist_ok=True)


def _reader(row: Row) -> type[PreTrainedConfig]:
    """A class that `AutoConfig` asks for a configuration, and that gives the stock one.

    What vLLM asks by model type (window layers, dtypes, rotary embeddings) is then answered as for the stock model.
    """

    class Reader(PreTrainedConfig):
        """See above."""

        model_type = f"compress_{row.model_type}"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """The stock configuration of a planned one's fields, with `compress_plan` as an attribute."""
            fields = {key: value for key, value in config_dict.items() if key not in OF_REMOTE_CODE}
            plan = fields.pop("compress_plan")
            found = AutoConfig.for_model(row.model_type).from_dict(fields | {"model_type": row.model_type}, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.compress_plan = plan
            _narrow(config, row)
            return found

    return Reader


def _narrow(config: Any, row: Row) -> None:
    """Write the width that all layers have into the configuration, where the plan takes the same off each."""
    layers = read_layers(config.compress_plan, row, config)
    widths = {(len(layer.rules), layer.query_heads, layer.neurons) for layer in layers}
    if len(widths) > 1:
        return  # `widths.own_widths` gives every layer its own while it is made
    set_width(config, row, *widths.pop())


def set_width(config: Any, row: Row, groups: int, query_heads: int, neurons: int) -> None:
    """Give a configuration other numbers of heads and neurons, with heads as long as before."""
    wanted = {row.groups: groups, "num_attention_heads": query_heads, row.neurons: neurons}
    if all(getattr(config, name, None) == value for name, value in wanted.items()):
        return
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name, value in wanted.items():
        setattr(config, name, value)
