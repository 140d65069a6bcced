"""Turns a dense model into a planned one in memory: same weight tensors, the plan's attention and cache."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from compress.models.families import family_of
from compress.plan import Plan
from compress.runtime import modeling_compress


def runtime_plan(plan: Plan) -> dict[str, Any]:
    """The part of a plan that the runtime needs and a checkpoint's configuration carries."""
    layers = plan.model_dump(mode="json", by_alias=True, exclude_none=True)["layers"]
    return {"schema": 1, "layers": layers}


def planned_model(model: Any, plan: Plan) -> Any:
    """A model that runs the plan on the very tensors of `model`, which stays usable as it is.

    Raises:
        UserError: the architecture is not supported.
        ValueError: the plan's layers or groups are not this model's.
    """
    return with_runtime_plan(model, runtime_plan(plan))


def with_runtime_plan(model: Any, plan: dict[str, Any]) -> Any:
    """As `planned_model`, from the part of a plan that the runtime needs, which is bound to no weights."""
    family = family_of(model.config)
    config_class = getattr(modeling_compress, f"{family.planned}Config")
    model_class = getattr(modeling_compress, f"{family.planned}ForCausalLM")
    known = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "compress_plan", "compress_impl"):
        known.pop(key, None)
    config = config_class(**known, compress_plan=plan)
    with torch.device("meta"):
        planned = model_class(config)
    tensors = dict(model.state_dict())
    missing, unexpected = planned.load_state_dict(tensors, assign=True, strict=False)
    tied = set(getattr(planned, "all_tied_weights_keys", {}) or {})
    if set(missing) - tied or unexpected:
        raise ValueError(f"weights do not fit: missing {sorted(set(missing) - tied)[:4]}, unexpected {unexpected[:4]}")
    planned.tie_weights()
    # Buffers that are not saved (RoPE frequencies) were made on meta; the dense model has the real ones.
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(planned.get_submodule(owner), attribute, buffer)
    planned.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return planned.to(next(model.parameters()).device).train(model.training)


def set_plan(planned: Any, plan: Plan) -> None:
    """Switch a planned model to another plan of the same model, in place."""
    planned.set_plan(runtime_plan(plan))
