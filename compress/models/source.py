"""Which model is meant: a checkpoint, a model with a plan, or random weights of a known shape, and its dense twin."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compress.errors import UserError
from compress.json_file import read_object
from compress.models.carried import check_carried
from compress.models.families import check_head, family_of, unsupported
from compress.models.folder import CONFIG, PLAN, check_values, read_config, repairs
from compress.models.known_shapes import SHAPES
from compress.models.load import check_loaded, check_sizes, load_config, load_model, quiet, read_by
from compress.models.placement import filled, loading, place_for, put, room_on
from compress.models.planned import planned_model, read_mixers, with_runtime_plan
from compress.models.shape import shape_of
from compress.models.weights import read_tensors
from compress.plan import CHECKPOINT_PLAN, Plan, read_plan
from compress.runtime import modeling_compress
from compress.runtime.widths import Width
from compress.targets.target import load_runtime

META = torch.device("meta")
CARRIED = (PLAN, "compress_impl", "auto_map", "architectures", "transformers_version")


def random_model(values: dict[str, Any], place: Any, dtype: torch.dtype) -> Any:
    """A model of random weights for a configuration given as a dictionary, made where it is to be.

    Args:
        place: a device, or a map of modules (`placement.place_for`).
    """
    known = dict(values)
    config = AutoConfig.for_model(known.pop("model_type"), **known)
    with META if isinstance(place, dict) else torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return (filled(model, place) if isinstance(place, dict) else model).eval()


class ModelSource:
    """A model by name, loaded when it is asked for; its small files are checked at once.

    Args:
        spec: a name of `SHAPES`, a config.json, an exported checkpoint, or what a recipe's `model:` takes.
        plan: a plan.json for a model that carries none; it may remove heads and neurons.

    Raises:
        UserError: nothing of that name, or files that are damaged or of a model that is not supported.
    """

    def __init__(self, spec: str, plan: str | None = None) -> None:
        self.spec, self.plan_file = spec, plan
        path = Path(spec).expanduser()
        self.values: dict[str, Any] | None = None
        self.checkpoint: dict[str, Any] = {}
        if spec in SHAPES:
            self.values = SHAPES[spec]
        elif path.suffix == ".json":
            self.values = read_object(path, "the configuration", fix="name a config.json", finite=False)
            check_values(self.values, str(path))
        elif path.is_dir():
            self.checkpoint = read_config(path, spec)
            tensors = read_tensors(path, self.checkpoint.get("transformers_weights"))
            if self.carries_plan:
                config = self._stock_config()
                where = str(path / CONFIG)
                check_carried(self.checkpoint[PLAN], config.num_hidden_layers, where)
                # Layers that were made narrower hold fewer numbers than the configuration describes.
                check_sizes(config, tensors, where, whole=not self.has_own_widths)
        self.random = self.values is not None

    @property
    def name(self) -> str:
        """What the tables call it."""
        return Path(self.spec).name if self.spec not in SHAPES else self.spec

    def config(self) -> Any:
        """The stock configuration, without loading weights."""
        return self._stock_config() if self.values or self.checkpoint else load_config(self.spec)

    def dense(self, device: str | torch.device, dtype: torch.dtype) -> Any:
        """The dense model; of an exported checkpoint, the stock architecture on its weights, without remote code.

        Raises:
            UserError: the checkpoint's layers have widths of their own, so that no dense model has its weights.
        """
        if self.values is not None:
            self._check_memory(device, dtype)
            empty = partial(random_model, self.values, META, dtype)
            return random_model(self.values, place_for(device, dtype, empty, self.spec), dtype)
        if not self.carries_plan:
            return load_model(self.spec, dtype=str(dtype).split(".")[-1], device=str(device)).model
        if self.has_own_widths:
            raise UserError(
                "several models lie side by side in this checkpoint, so no dense model has its weights"
                if self.has_experts
                else "heads and neurons of this checkpoint were removed layer by layer, so no dense model has its "
                "weights",
                where=self.spec,
                fix="name the model that it was made from as the dense one: compress eval DENSE CHECKPOINT, or "
                "compress bench CHECKPOINT --dense DENSE",
            )
        return self._weights_in(AutoModelForCausalLM, device, dtype, config=self._stock_config())

    def _check_memory(self, device: str | torch.device, dtype: torch.dtype) -> None:
        """Refuse random weights that do not fit, by the numbers of one layer and of none, which take no memory."""
        config = self._stock_config()
        layers = config.num_hidden_layers

        def numbers(count: int) -> int:
            values = {**config.to_dict(), "num_hidden_layers": count, "layer_types": None}
            return sum(weight.numel() for weight in random_model(values, META, dtype).parameters())

        none, one = read_by("configuration", self.spec, lambda: (numbers(0), numbers(1)))
        needed, free = (none + layers * (one - none)) * dtype.itemsize, room_on(device)
        if free is not None and needed > free:
            raise UserError(
                "random weights of this shape need more memory than is available",
                where=self.spec,
                expected=f"at most {free:,} bytes on {device}",
                found=f"{needed:,} bytes, {layers:,} layers",
                fix="take a smaller shape, or --what kernel,layer, which make one layer",
            )

    @property
    def carries_plan(self) -> bool:
        """Whether it is a checkpoint in the patched form."""
        return PLAN in self.checkpoint

    @property
    def has_own_widths(self) -> bool:
        """Whether the plan that it carries gives layers other widths than the configuration, or the MLPs of several
        models."""
        if not self.carries_plan:
            return False
        if self.has_experts:
            return True
        config = self._stock_config()
        layers = self.checkpoint[PLAN]["layers"]
        return read_by(
            "plan", self.spec, lambda: any(Width.of_plan(layer, config) != Width.of(config) for layer in layers)
        )

    @property
    def has_experts(self) -> bool:
        """Whether it is several models side by side."""
        return self.carries_plan and any("experts" in (row.get("mlp") or {}) for row in self.checkpoint[PLAN]["layers"])

    def carried(self, device: str | torch.device, dtype: torch.dtype) -> Any:
        """A checkpoint as it is meant to run; one with a plan on this project's own code, not on what it brings."""
        if not self.carries_plan:
            return self.dense(device, dtype)
        load_runtime(self.checkpoint[PLAN])
        planned = family_of(self._stock_config()).planned
        return self._weights_in(getattr(modeling_compress, f"{planned}ForCausalLM"), device, dtype)

    def _weights_in(self, model_class: Any, device: str | torch.device, dtype: torch.dtype, **options: Any) -> Any:
        """The checkpoint's weights in a class of our own or of transformers, in eval mode; never a pickle."""
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        folder = Path(self.spec).expanduser()
        with quiet():
            place = place_for(device, dtype, lambda: self._empty(model_class, folder, options), self.spec)
            options |= loading(place)
            model, found = read_by("model", self.spec, lambda: model_class.from_pretrained(folder, **options))
        check_loaded(self.spec, found)
        return put(model, place).eval()

    @staticmethod
    def _empty(model_class: Any, folder: Path, options: dict[str, Any]) -> Any:
        """What `_weights_in` makes, without weights."""
        config = options.get("config")
        with META:
            if config is not None:
                return model_class.from_config(config)
            return model_class(model_class.config_class.from_pretrained(folder))

    def _stock_config(self) -> Any:
        """The configuration of the stock architecture, with what is set instead of values such as `return_dict`."""
        values = self.values or self.checkpoint
        stock = {key: value for key, value in values.items() if key not in CARRIED} | repairs(values)[0]
        model_type = stock.pop("model_type").removeprefix("compress_")
        if model_type not in CONFIG_MAPPING:
            raise unsupported(model_type, values.get("architectures") or [])
        check_head(values.get("architectures") or [], self.spec)
        config = read_by("configuration", self.spec, lambda: AutoConfig.for_model(model_type, **stock))
        family_of(config, self.spec)
        return config

    def layer(self, device: torch.device, dtype: torch.dtype) -> Any:
        """One decoder layer of this shape with random weights, behind a vocabulary that costs nothing."""
        values = self.values or self.checkpoint or load_config(self.spec).to_dict()
        known = {key: value for key, value in values.items() if key not in (*CARRIED, "layer_types")}
        known["model_type"] = known["model_type"].removeprefix("compress_")
        return random_model(known | {"num_hidden_layers": 1, "vocab_size": 256}, device, dtype)

    def written_plan(self) -> Plan | None:
        """The plan that was named, or the one that lies beside a checkpoint's weights; None where there is neither.

        Raises:
            UserError: its file is damaged.
        """
        path = Path(self.plan_file or Path(self.spec).expanduser() / CHECKPOINT_PLAN)
        return read_plan(path) if path.is_file() else None

    def planned(self, dense: Any) -> tuple[Any, str]:
        """The dense model's twin with the plan that was named or that the checkpoint carries; and its name in tables.

        Raises:
            UserError: there is no plan, or it is of another model.
        """
        if self.plan_file is not None:
            # Random weights are nobody's: there only the sizes have to be those of the plan, and nothing is trained.
            plan = read_plan(self.plan_file, shape_of(dense), any_weights=self.random)
            return planned_model(dense, plan, untrained=self.random), Path(self.plan_file).name
        if self.carries_plan:
            planned = with_runtime_plan(dense, self.checkpoint[PLAN])
            read_by("model", self.spec, lambda: read_mixers(planned, Path(self.spec).expanduser()))
            return planned, "its own plan"
        raise UserError(
            f"{self.spec} carries no plan",
            expected="--plan plan.json, a named --mix (such as A or R75), or the --dense model of a pruned checkpoint",
        )
