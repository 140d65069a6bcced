"""What is measured: a checkpoint, a model with a plan, or random weights of a known shape, with its dense twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.bench.kernel import Shape, mix
from compress.bench.model import random_model
from compress.bench.shapes import SHAPES
from compress.errors import UserError
from compress.models.families import family_of
from compress.models.load import check_loaded, load_model
from compress.plan import read_plan
from compress.runtime import modeling_compress
from compress.runtime.span import Span
from compress.runtime.widths import Width
from compress.targets.apply import planned_model, with_runtime_plan

CARRIED = ("compress_plan", "compress_impl", "auto_map", "architectures", "transformers_version")


class Source:
    """A model by name, loaded when it is asked for.

    Args:
        spec: a name of `SHAPES`, a config.json, an exported checkpoint, or what a recipe's `model:` takes.
        plan: a plan.json for a model that carries none; it may remove heads and neurons.

    Raises:
        UserError: nothing of that name.
    """

    def __init__(self, spec: str, plan: str | None = None) -> None:
        self.spec, self.plan_file = spec, plan
        path = Path(spec).expanduser()
        self.values: dict[str, Any] | None = None
        if spec in SHAPES:
            self.values = SHAPES[spec]
        elif path.suffix == ".json":
            if not path.is_file():
                raise UserError("no such configuration", where=spec, expected="a config.json")
            self.values = json.loads(path.read_text(encoding="utf-8"))
        found = path / "config.json"
        self.checkpoint = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
        self.random = self.values is not None

    @property
    def name(self) -> str:
        """What the tables call it."""
        return Path(self.spec).name if self.spec not in SHAPES else self.spec

    def shape(self) -> Shape:
        """Heads of one layer, without loading weights where the configuration says it."""
        values = self.values or self.checkpoint or load_model(self.spec).model.config.to_dict()
        heads = values["num_attention_heads"]
        dim = values.get("head_dim") or values["hidden_size"] // heads
        return Shape(self.name, heads, values.get("num_key_value_heads") or heads, dim)

    def dense(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The dense model; of an exported checkpoint, the stock architecture on its weights, without remote code.

        Raises:
            UserError: the checkpoint's layers have widths of their own, so that no dense model has its weights.
        """
        if self.values is not None:
            return random_model(self.values, device, dtype)
        if not self.carries_plan:
            return load_model(self.spec, dtype=str(dtype).split(".")[-1], device=str(device)).model
        if self.has_own_widths:
            raise UserError(
                "heads and neurons of this checkpoint were removed layer by layer, so no dense model has its weights",
                where=self.spec,
                fix="name the model that it was made from as the dense one: compress eval DENSE CHECKPOINT, or "
                "compress bench CHECKPOINT --dense DENSE",
            )
        options: dict[str, Any] = {"config": self._stock_config(), "dtype": dtype, "output_loading_info": True}
        found: Any = AutoModelForCausalLM.from_pretrained(self.spec, **options)
        model, told = found
        check_loaded(self.spec, told)
        return model.to(device).eval()

    @property
    def carries_plan(self) -> bool:
        """Whether it is a checkpoint in the patched form."""
        return "compress_plan" in self.checkpoint

    @property
    def has_own_widths(self) -> bool:
        """Whether the plan that it carries gives layers other widths than the configuration."""
        if not self.carries_plan:
            return False
        config = self._stock_config()
        return any(
            Width.of_plan(layer, config) != Width.of(config) for layer in self.checkpoint["compress_plan"]["layers"]
        )

    def carried(self, device: torch.device, dtype: torch.dtype) -> Any:
        """A checkpoint as it is meant to run; one with a plan on this project's own code, not on what it brings."""
        if not self.carries_plan:
            return self.dense(device, dtype)
        planned = family_of(self._stock_config()).planned
        model_class = getattr(modeling_compress, f"{planned}ForCausalLM")
        model, told = model_class.from_pretrained(self.spec, dtype=dtype, output_loading_info=True)
        check_loaded(self.spec, told)
        return model.to(device).eval()

    def _stock_config(self) -> Any:
        stock = {key: value for key, value in self.checkpoint.items() if key not in CARRIED}
        return AutoConfig.for_model(stock.pop("model_type").removeprefix("compress_"), **stock)

    def layer(self, device: torch.device, dtype: torch.dtype) -> Any:
        """One decoder layer of this shape with random weights, behind a vocabulary that costs nothing."""
        values = self.values or self.checkpoint or load_model(self.spec).model.config.to_dict()
        known = {key: value for key, value in values.items() if key not in (*CARRIED, "layer_types")}
        known["model_type"] = known["model_type"].removeprefix("compress_")
        return random_model(known | {"num_hidden_layers": 1, "vocab_size": 256}, device, dtype)

    def planned(self, dense: Any, name: str | None, length: int) -> tuple[Any, str]:
        """The dense model's twin with its own plan, or with a named mix at a length; and what the tables call it."""
        if name is not None:
            config = dense.config
            spans = mix(name, config.num_key_value_heads, length)
            layers = [{"groups": [group_of(span) for span in spans]} for _ in range(config.num_hidden_layers)]
            return with_runtime_plan(dense, {"schema": 1, "layers": layers}), name
        if self.plan_file is not None:
            return planned_model(dense, read_plan(self.plan_file)), Path(self.plan_file).name
        if self.carries_plan:
            return with_runtime_plan(dense, self.checkpoint["compress_plan"]), "its own plan"
        raise UserError(
            f"{self.spec} carries no plan",
            expected="--plan plan.json, a named --mix (A, B or full), or the --dense model of a pruned checkpoint",
        )


def group_of(span: Span) -> dict[str, Any]:
    """A group of the runtime's plan that has this span."""
    if span.is_full:
        return {"target": "full"}
    return {"target": "window", "sink": span.sink, "alpha": span.alpha, "beta": span.beta}
