"""Configurations and models that carry a plan: thin subclasses of transformers' own, one trio per architecture.

Weights, projections, RoPE and norms are the stock model's. A checkpoint carries this file and the files it
imports, and loads with `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.

A trio (`CompressLlamaConfig`, `CompressLlamaModel`, `CompressLlamaForCausalLM`) is made when one of its names is first
asked for, so that a checkpoint needs only its own architecture to be there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from functools import cache
from types import new_class
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import LlamaModel
from transformers.utils import logging

from .attention import NAME, Step
from .paged_cache import PagedCache
from .span import Span, has_length_rule, native_windows, spans_at, spans_of_plan
from .widths import Width, build, width_of

if TYPE_CHECKING:
    # Every other file of the checkpoint by name: out of a local folder, transformers up to 5.8 copies only the files
    # that this one names, not those that they name in turn.
    from .flash import refusal  # noqa: F401
    from .reference import Rows  # noqa: F401
    from .triton_attention import TRITON  # noqa: F401
    from .triton_backward import backward  # noqa: F401
    from .triton_decode import decode  # noqa: F401
    from .triton_prefill import forward  # noqa: F401
    from .triton_span import span_rules  # noqa: F401
    from .triton_store import store  # noqa: F401
    from .tuned import decode_config  # noqa: F401

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"this checkpoint needs transformers 5.0 or later, and {transformers.__version__} is installed: "
        "pip install --upgrade transformers"
    )

# The argument that the stock models take a cache by: its name changed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# The families, as the classes here call them, and how transformers' classes of configuration and decoder begin.
FAMILIES = {
    "Gemma3": "Gemma3Text",
    "Llama": "Llama",
    "Ministral": "Ministral",
    "Mistral": "Mistral",
    "Phi3": "Phi3",
    "Qwen2": "Qwen2",
    "Qwen3": "Qwen3",
}

logger = logging.get_logger(__name__)


class PlanConfig:
    """Adds `compress_plan` (the plan's `layers`) and `compress_impl`, and selects the plan's attention by default."""

    def __init__(self, **kwargs: Any) -> None:
        # Reached where transformers' configurations are no dataclasses, up to 5.2 or 5.3.
        super().__init__(**self._without_own(kwargs))

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**self._without_own(kwargs))  # type: ignore[misc]

    def _without_own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the two fields from the arguments; what is left for the stock configuration."""
        self.compress_plan = kwargs.pop("compress_plan", None)
        self.compress_impl = kwargs.pop("compress_impl", "auto")
        if kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = NAME
        return kwargs


class PlanModel:
    """The decoder without head: gives every layer its width and spans, and every forward pass its cache and padding."""

    config: Any
    layers: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if config.compress_plan is None:
            raise ValueError("this configuration carries no `compress_plan`; load a checkpoint that `compress` wrote")
        for layer, width in zip(self.layers, self._widths(config.compress_plan), strict=True):
            build(layer, width)
        self.set_plan(config.compress_plan)

    def _widths(self, plan: dict[str, Any]) -> list[Width]:
        """The width of every layer under a plan."""
        found = []
        for number, layer in enumerate(plan["layers"]):
            try:
                found.append(Width.of_plan(layer, self.config))
            except ValueError as error:
                raise ValueError(f"compress_plan: layer {number}: {error}") from None
        return found

    def set_plan(self, plan: dict[str, Any]) -> None:
        """Put a plan (`{"layers": [...]}`) into effect and into the configuration, in place of the one before.

        Raises:
            ValueError: the plan has another number of layers, or a layer with other heads or neurons than are there.
        """
        for number, (layer, width) in enumerate(zip(self.layers, self._widths(plan), strict=True)):
            if width != width_of(layer):
                raise ValueError(f"compress_plan: layer {number}: expected {width_of(layer)}, the plan has {width}")
        self.config.compress_plan = plan
        self.compress_spans = spans_of_plan(plan, native_windows(self.config, len(self.layers)))
        for layer, spans in zip(self.layers, self.compress_spans, strict=True):
            layer.self_attn.compress_spans = spans
        self.compress_by_length = has_length_rule(self.compress_spans)

    def new_cache(self, max_length: int | None = None) -> PagedCache:
        """An empty cache for this plan; `max_length` reserves it for that many tokens a sequence."""
        return PagedCache(self.compress_spans, max_length)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model's; `past_key_values`, or `cache` as it is named since transformers 5.24, has to be a
        `PagedCache` (or None).

        Spans by length take their windows from the tokens of the first pass into a cache, and of every pass without
        one.

        Raises:
            ValueError: another kind of cache, a mask that is not `[B, columns]`, packed sequences, or a request
                for attention weights, which this attention never has. With spans by length also several tokens
                behind cached ones, and sequences of different lengths.
        """
        past_key_values = cache if past_key_values is None else past_key_values
        if self.config._attn_implementation != NAME:
            logger.warning_once(
                f"attn_implementation={self.config._attn_implementation!r} was asked for: the plan is NOT in effect, "
                "the model runs dense with a dense cache. Leave attn_implementation out to run the plan."
            )
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise ValueError("a planned model has no attention weights to return; use the dense model for that")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache()
        if past_key_values is not None and not hasattr(past_key_values, "seen"):
            if past_key_values.get_seq_length() > 0:
                raise ValueError(
                    f"past_key_values: expected the model's PagedCache, got a {type(past_key_values).__name__} "
                    "that holds tokens already; start with past_key_values=None or model.new_cache()"
                )
            past_key_values = self.new_cache()
        if self.compress_by_length:
            _refuse_later_input(past_key_values, tokens.shape[1])
        valid = _valid_columns(attention_mask, past_key_values, tokens)
        spans = self._spans_of_input(past_key_values, valid, tokens.shape[1]) if self.compress_by_length else None
        step = Step.begin(past_key_values, valid, tokens.shape[0], tokens.shape[1], tokens.device)
        step.spans = spans
        if position_ids is None:
            position_ids = _positions(past_key_values, valid, tokens)
        elif attention_mask is None and past_key_values is None and bool((position_ids.diff(dim=-1) != 1).any()):
            raise ValueError("position_ids: packed sequences are not supported; pass one sequence per row")
        out = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=None,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            compress_step=step,
            **{CACHE: past_key_values},
            **kwargs,
        )
        step.end()
        return out

    def _spans_of_input(
        self, cache: PagedCache | None, valid: torch.Tensor | None, count: int
    ) -> Sequence[Sequence[Span]]:
        """The spans of a pass of `count` columns, where some depend on the length; those that the cache has fixed."""
        if cache is not None and cache.get_seq_length() > 0:
            return [layer.spans for layer in cache.paged]
        lengths = {count} if valid is None else set(valid.sum(dim=1).tolist())
        if len(lengths) > 1 or 0 in lengths:
            if cache is not None:
                cache.seen = None
            raise ValueError(
                "the plan's windows come from the length of the input (`rule: length`), and the sequences of this "
                f"batch have {sorted(lengths)} tokens; give inputs of one length, or take a plan with `rule: position`"
            )
        (length,) = lengths
        if cache is None:
            return spans_at(self.compress_spans, length)
        cache.resolve(length)
        return [layer.spans for layer in cache.paged]


def _refuse_later_input(cache: PagedCache | None, count: int) -> None:
    """Raise ValueError where an input goes on behind cached tokens, whose windows it would have changed."""
    if cache is not None and count > 1 and cache.get_seq_length() > 0:
        raise ValueError(
            "the plan's windows come from the length of the input (`rule: length`), so it has to be one pass into an "
            f"empty cache; got {count} tokens behind {cache.get_seq_length()} cached ones. Pass the whole input at "
            "once with a new cache, or take a plan with `rule: position`"
        )


def _valid_columns(mask: torch.Tensor | None, cache: PagedCache | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """Which new columns are tokens, `[B, T]`; None when all are. Records them in the cache and checks the past."""
    batch, count = tokens.shape[:2]
    past = 0 if cache is None else cache.get_seq_length()
    seen = None if cache is None else cache.seen
    if mask is None:
        if seen is not None and not bool(seen.all()):
            raise ValueError("attention_mask: the cached columns hold padding, so a mask over all columns is needed")
        return None
    if mask.dim() != 2 or mask.shape != (batch, past + count):
        raise ValueError(
            f"attention_mask: expected one value for each cached and new column, {(batch, past + count)}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.bool()
    if cache is not None and cache.max_length is not None and count == 1 and past > 0:
        # A step that the host need not follow: what the mask says of the past is not compared, since that would
        # wait for the device.
        cache.seen = mask
        return mask[:, -1:]
    before = mask.new_ones(batch, past) if seen is None else seen
    if not torch.equal(mask[:, :past], before):
        raise ValueError("attention_mask: the cached columns were masked differently when they were cached")
    if bool(mask.all()):
        return None
    if cache is not None:
        cache.seen = mask
    valid = mask[:, past:]
    return None if bool(valid.all()) else valid


def _positions(cache: PagedCache | None, valid: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    """Position of each new column among its sequence's tokens, `[B, T]` or `[1, T]`; 0 for leading padding."""
    new = torch.arange(tokens.shape[1], device=tokens.device)[None] if valid is None else valid.long().cumsum(1) - 1
    if cache is None or cache.lengths is None:
        return new.clamp(min=0)
    return (cache.lengths[:, None] + new).clamp(min=0)


class PlanForCausalLM:
    """The language model around a `PlanModel`; `generate` uses the paged cache."""

    config: Any
    model: Any
    planned_model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.planned_model(config)
        self.post_init()  # type: ignore[attr-defined]

    def set_plan(self, plan: dict[str, Any]) -> None:
        """Put another plan into effect; see `PlanModel.set_plan`."""
        self.model.set_plan(plan)

    def new_cache(self, max_length: int | None = None) -> PagedCache:
        """An empty cache for this plan; `max_length` reserves it for that many tokens a sequence."""
        return self.model.new_cache(max_length)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.config._attn_implementation != NAME:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        if generation_mode.value == "assisted_generation" or generation_config.is_assistant:
            raise ValueError(
                "assisted decoding takes tokens back from the cache, and a paged cache has freed their pages; "
                "generate without assistant_model and prompt_lookup_num_tokens"
            )
        if self.model.compress_by_length and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size: the plan's windows come from the length of the input (`rule: length`), so it is "
                "not taken in chunks; leave prefill_chunk_size out, or take a plan with `rule: position`"
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a planned model brings its own paged cache; leave "
                "cache_implementation out, or say 'static' to reserve it for the whole generation at once"
            )
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache(generation_config.max_length if kind else None)
        return None


def __getattr__(name: str) -> Any:
    """The class of a family (PEP 562), made with its two companions when the first of them is asked for.

    Raises:
        AttributeError: no such class.
        ImportError: the installed transformers lacks the architecture.
    """
    match = re.fullmatch(r"Compress(\w+?)(?:Config|Model|ForCausalLM)", name)
    if match is None or match[1] not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _trio(match[1])[name]


@cache  # not in the module's namespace: transformers runs the file again in the same module when it has changed
def _trio(family: str) -> dict[str, type]:
    """Configuration, decoder and language model of a family, by name."""
    body = FAMILIES[family]
    names = (f"{body}Config", f"{body}Model", f"{family}ForCausalLM")
    lacking = [each for each in names if not hasattr(transformers, each)]
    if lacking:
        raise ImportError(
            f"this checkpoint is a {family} model, and transformers {transformers.__version__} has no "
            f"{lacking[0]}: pip install --upgrade transformers"
        )
    stock_config, stock_model, stock_causal = (getattr(transformers, each) for each in names)

    def make(kind: str, bases: tuple[type, ...], **fields: Any) -> type:
        fields["__module__"] = __name__
        return new_class(f"Compress{family}{kind}", bases, exec_body=lambda space: space.update(fields))

    config = make("Config", (PlanConfig, stock_config), model_type=f"compress_{stock_config.model_type}")
    model = make("Model", (PlanModel, stock_model), config_class=config)
    causal = make("ForCausalLM", (PlanForCausalLM, stock_causal), config_class=config, planned_model=model)
    return {each.__name__: each for each in (config, model, causal)}
