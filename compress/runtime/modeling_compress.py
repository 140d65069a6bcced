"""Configurations and models that carry a plan: thin subclasses of transformers' own, one trio per architecture.

Weights, projections, RoPE and norms are the stock model's. A checkpoint carries this file, the files it imports and
those of its plan's mixers and MLPs, which the exporter adds to the imports here; it loads with
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.

A trio (`CompressLlamaConfig`, `CompressLlamaModel`, `CompressLlamaForCausalLM`) is made when one of its names is first
asked for, so that a checkpoint needs only its own architecture to be there.
"""

from __future__ import annotations

import inspect
import re
from functools import cache, partial
from types import new_class
from typing import Any

import torch
import transformers
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import LlamaModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .attention import NAME, install, refuse_arguments
from .columns import positions_of, refuse_packed, valid_columns
from .families import ROWS, Family, head_size_of
from .mixer import Kinds, LayerFacts, Mixer
from .mixer_span import SpanMixer  # noqa: F401  # which registers it
from .mlps import PlannedMlp, install_mlp
from .paged_cache import PagedCache, adopt, check_foreign
from .ranks import Part, part_of
from .rope import crosses, rope_change, steady, turns
from .shard import Shard
from .span import PAGE, native_windows
from .step import Record, Step
from .widths import Width, build, width_of

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"this checkpoint needs transformers 5.0 or later, and {transformers.__version__} is installed: "
        "pip install --upgrade transformers"
    )

# The argument that the stock models take a cache by: its name changed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# Whether checkpointed layers in training mode take their cache away without gradients, too, as they did up to 5.23.
DROPS_CACHE = "is_grad_enabled" not in inspect.getsource(GradientCheckpointingLayer)

# Tokens that transformers compares where an assistant has another tokenizer, if the configuration says no other number.
LOOKBEHIND = 10

BY_NAME = {row.name: row for row in ROWS}

# Engines that put their own attention into models of transformers under a name of theirs, and so run without the plan:
# what they are called, and what runs the plan there.
ENGINES = {
    "vllm": (
        "vLLM",
        "Plans of windows and removed heads run with the plugin compress-vllm beside vLLM (plugins/vllm of the toolkit "
        "compress), others in transformers",
    ),
    "sglang": (
        "SGLang",
        "There is no plugin that runs it; transformers does, and vLLM with the plugin compress-vllm runs plans of "
        "windows and removed heads",
    ),
}
UNTAUGHT = "if its weights were trained with the plan, it is another model then"

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


class WholeLayers:
    """A model whose layers all lie in each of its processes, whole or split by heads (tensor parallel)."""

    _can_compile_fullgraph = False  # the compiler leaves the attention layers alone

    def _init_weights(self, module: Any) -> None:
        """First values of a module that no file had values for, as the stock model's and the mixers' own."""
        if isinstance(module, (Mixer, PlannedMlp)):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's.

        Raises:
            ValueError: pipeline parallelism is asked for, which would give a process a part of the layers, while the
                plan and its cache know all of them.
        """
        asked = kwargs.get("distributed_config")
        size = asked.get("pp_size") if isinstance(asked, dict) else getattr(asked, "pp_size", None)
        if (size or 1) > 1:
            raise ValueError(
                "pp_size: a planned model cannot be split over processes by layers; leave it out. Several GPUs of one "
                'process (device_map="auto"), tensor parallel (tp_plan="auto") and sharded training (FSDP) work'
            )
        if kwargs.get("attn_implementation", NAME) is None:  # nothing is asked for, which is the plan's own
            del kwargs["attn_implementation"]
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]


class PlanModel(WholeLayers):
    """The decoder without head: gives every layer its width and mixers, every pass its cache and padding."""

    config: Any
    training: bool
    compress_family: Family

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if config.compress_plan is None:
            raise ValueError("this configuration carries no `compress_plan`; load a checkpoint that `compress` wrote")
        if self.config._attn_implementation in ENGINES:
            engine, instead = ENGINES[self.config._attn_implementation]
            logger.warning_once(
                f"{engine} runs this checkpoint with attention of its own: the plan is NOT in effect, the model runs "
                f"dense and saves no memory; {UNTAUGHT}. {instead}."
            )
        rows = zip(self._layers(), self._widths(config.compress_plan), config.compress_plan["layers"], strict=True)
        for number, (layer, width, entry) in enumerate(rows):
            build(layer, width, config)
            attention = self.compress_family.attention_of(layer)
            if not self.compress_family.hands_on:
                hand_on(layer, attention)
            install_mlp(layer, attention, entry.get("mlp") or {}, config.hidden_size, number)
        self.compress_rope_change = rope_change(config)
        steady(self)  # type: ignore[arg-type]
        self.set_plan(config.compress_plan)

    def _layers(self) -> list[Any]:
        """The decoder layers, in order."""
        return self.compress_family.layers_of(self)  # type: ignore[arg-type]

    def _widths(self, plan: dict[str, Any]) -> list[Width]:
        """The width of every layer under a plan."""
        widths = []
        for number, layer in enumerate(plan["layers"]):
            try:
                widths.append(Width.of_plan(layer, self.config))
            except ValueError as error:
                raise ValueError(f"compress_plan: layer {number}: {error}") from None
        return widths

    def set_plan(self, plan: dict[str, Any]) -> None:
        """Put a plan (`{"layers": [...]}`) into effect and into the configuration, in place of the one before.

        Head groups that become the same as before keep their mixers with what these have learned.

        Raises:
            ValueError: the plan has another number of layers, a layer with other heads or neurons than are there, or a
                target that this runtime does not have.
        """
        layers = self._layers()
        for number, (layer, width) in enumerate(zip(layers, self._widths(plan), strict=True)):
            there = width_of(layer, self.config)
            if width != there:
                raise ValueError(f"compress_plan: layer {number}: expected {there}, the plan has {width}")
        self.config.compress_plan = plan
        windows = native_windows(self.config, len(layers))
        self.compress_kinds = []
        for number, (layer, entries, native) in enumerate(zip(layers, plan["layers"], windows, strict=True)):
            width, attention = width_of(layer, self.config), self.compress_family.attention_of(layer)
            facts = LayerFacts(
                index=number,
                head_dim=head_size_of(self.config),
                hidden_size=self.config.hidden_size,
                group_size=width.query_heads // width.groups,
                native_window=native,
                frequencies=partial(turns, self, number),
            )
            before = attention.compress_kinds.mixers if hasattr(attention, "compress_kinds") else ()
            kinds = Kinds(entries["groups"], facts, before)
            like = next(attention.parameters())
            for mixer in set(kinds.mixers).difference(before):
                mixer.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
            install(attention, kinds)
            self.compress_kinds.append(kinds)
        self.compress_split: bool | None = None  # whether heads are split over processes; nobody has looked yet
        self.compress_key = tuple(kinds.key for kinds in self.compress_kinds)
        self.compress_by_length = any(mixer.by_length for kinds in self.compress_kinds for mixer in kinds.mixers)

    def split(self) -> None:
        """Leave every layer those head groups alone whose keys this process computes, where weights are split by heads
        over processes (tensor parallel). The first pass or cache under a plan does this; the configuration keeps the
        whole plan.

        Raises:
            ValueError: a layer cannot be split; says why.
        """
        if self.compress_split is not None:
            return
        parts = [self._part(layer) for layer in self._layers()]
        self.compress_split = not all(part.whole for part in parts)
        if not self.compress_split:
            return
        if any("experts" in (row.get("mlp") or {}) for row in self.config.compress_plan["layers"]):
            raise ValueError("tensor parallel: several models lie side by side here; use device_map or FSDP")
        self.compress_kinds = [kinds.part(part) for kinds, part in zip(self.compress_kinds, parts, strict=True)]
        for layer, kinds in zip(self._layers(), self.compress_kinds, strict=True):
            install(self.compress_family.attention_of(layer), kinds)
        self.compress_key = tuple(kinds.key for kinds in self.compress_kinds)

    def _part(self, layer: Any) -> Part:
        """The head groups of a layer whose keys this process computes."""
        for name, row in self.compress_family.projections.items():
            if "key_value" in row.parts:
                weight = layer.get_submodule(name).weight
                asked = getattr(getattr(self.config, "distributed_config", None), "tp_size", None) or 1
                return part_of(weight, by_rows=row.by_group or len(row.parts) == 1, asked=asked)
        return Part()

    def new_cache(self, max_length: int | None = None, slack: int = 0) -> PagedCache:
        """An empty cache for this plan; `max_length` reserves it for that many tokens a sequence.

        `slack` last tokens can be taken back (`PagedCache.crop`), for which pages are freed that much later.
        """
        self.split()
        return PagedCache(self.compress_kinds, max_length, slack)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        compress_record: Record | None = None,
        compress_shard: Shard | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the stock model's, with a `PagedCache`; `cache` is what transformers 5.24 calls `past_key_values`.

        A `compress_record` takes the side losses and gates that the layers' mixers report of the pass; the language
        model hands it on to here.

        An empty `DynamicCache` or `StaticCache` becomes a `PagedCache` where it is. Under transformers' gradient
        checkpointing there is no cache. With a `compress_shard` the tokens are those of one sequence, or of several of
        the same length, that are here, and other processes run the same pass on the others. Spans by length take their
        windows from the tokens of the first pass into a cache, and of every pass without one.

        Raises:
            ValueError: another kind of cache, one with tokens of another plan, or any in a pass that is checkpointed;
                a mask that is not `[B, columns]`; packed sequences; arguments that would change what attention
                computes, a request for its weights among them. With spans by length also several tokens behind
                cached ones, and sequences of different lengths. The cache is then what it was.
        """
        given = past_key_values if cache is None else cache
        arguments = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **kwargs}
        if self.config._attn_implementation != NAME:
            return self._dense(
                given, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **arguments
            )
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export: an exported program cannot choose pages and windows while it runs, as the plan needs; "
                "export the dense model, or a native checkpoint where the plan has one"
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "torch.jit.trace: a traced program keeps the pages and windows of the tokens that it was traced with; "
                "trace the dense model, or a native checkpoint where the plan has one"
            )
        refuse_arguments(kwargs)
        if getattr(self.config, "output_attentions", False):
            refuse_arguments({"output_attentions": True})
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        tokens: torch.Tensor = input_ids if input_ids is not None else inputs_embeds  # type: ignore[assignment]
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if compress_shard is not None:
            use_cache = self._check_shard(compress_shard, given, attention_mask, position_ids)
        if self.compress_split is None:
            self.split()
        if self._is_checkpointed():
            use_cache = _no_cache(given)
        check_foreign(given)
        held = given if isinstance(given, PagedCache) else None
        if held is not None:
            held.check(self.compress_key, tokens.shape[0])
        count, past = tokens.shape[1], 0 if held is None else held.get_seq_length()
        valid, seen = valid_columns(attention_mask, held, tokens)
        if position_ids is not None:
            refuse_packed(position_ids, valid)
        whole = count if compress_shard is None else compress_shard.length
        length = self._length_of_input(past, valid, whole) if self.compress_by_length else None
        if self.compress_rope_change is not None and crosses(self.compress_rope_change, past, whole):
            _tell_of_rope(self.compress_rope_change)
        paged = adopt(given, self.compress_kinds) if given is not None else self.new_cache() if use_cache else None
        if length is not None and paged is not None and past == 0:
            paged.resolve(length)
        step = Step.begin(paged, valid, tokens.shape[0], count, tokens.device)
        step.seen = seen
        step.impl, step.input_length, step.record = self.config.compress_impl, length, compress_record
        step.shard = compress_shard
        if compress_record is not None:
            compress_record.closed = False
        if position_ids is None:
            position_ids = (
                positions_of(paged, valid, tokens) if step.shard is None else step.positions(tokens.device)[:1]
            )
        try:
            out = super().forward(  # type: ignore[misc]
                attention_mask=None,
                position_ids=position_ids,
                use_cache=use_cache,
                compress_step=step,
                **{CACHE: paged},
                **arguments,
            )
        except BaseException:
            step.fail()
            raise
        step.end()
        return out

    def _check_shard(self, shard: Shard, cache: Any, mask: Any, position_ids: Any) -> bool:
        """Whether a pass on a part of a sequence has a cache, which it never has.

        Raises:
            ValueError: it is given one, or a mask or positions; or frequencies of RoPE would differ by process.
        """
        given = {CACHE: cache, "attention_mask": mask, "position_ids": position_ids}
        if names := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"{', '.join(names)}: where processes share the tokens of a sequence, no cache is filled, there is no "
                "padding, and every token has its own position; leave it out"
            )
        if self.compress_rope_change is not None and shard.length > self.compress_rope_change[1]:
            kind, switch = self.compress_rope_change
            raise ValueError(
                f"this model's position frequencies ({kind}) depend on the length beyond {switch} tokens, of which a "
                f"process sees its own part alone: take sequences of at most {switch} tokens, or one process for each"
            )
        return False

    def _dense(self, cache: Any, **arguments: Any) -> Any:
        """A forward pass of the dense model, with another attention than the plan's."""
        name = self.config._attn_implementation
        if name.startswith("paged|"):
            raise ValueError(
                f"attn_implementation={name!r}: continuous batching has pages of its own and would run without the "
                "plan; leave attn_implementation out, and use generate()"
            )
        if any("experts" in (layer.get("mlp") or {}) for layer in self.config.compress_plan["layers"]):
            raise ValueError(
                f"attn_implementation={name!r}: there is no dense model here, because the attentions of several models "
                "lie side by side and are mixed by the plan's gates; leave attn_implementation out"
            )
        if isinstance(cache, PagedCache):
            raise ValueError(
                f"past_key_values: a PagedCache holds keys and values for the plan, and attn_implementation={name!r} "
                "runs the model dense; pass a DynamicCache, or leave attn_implementation out"
            )
        if name not in ENGINES:  # those were named when the model was made
            logger.warning_once(
                f"attn_implementation={name!r} was asked for: the plan is NOT in effect, the model runs dense with a "
                f"dense cache; {UNTAUGHT}. Leave attn_implementation out to run the plan."
            )
        return super().forward(**{CACHE: cache}, **arguments)  # type: ignore[misc]

    def _is_checkpointed(self) -> bool:
        """Whether transformers computes layers again in the backward pass of this one; it takes their cache away."""
        return (DROPS_CACHE or torch.is_grad_enabled()) and any(
            getattr(layer, "gradient_checkpointing", False) and layer.training for layer in self._layers()
        )

    def _length_of_input(self, past: int, valid: torch.Tensor | None, count: int) -> int:
        """Tokens of the input in a pass of `count` columns, where spans depend on it; `past` columns are cached.

        Raises:
            ValueError: the input goes on behind cached tokens, whose windows it would have changed, or the batch has
                inputs of several lengths.
        """
        if past > 0:
            if count > 1:
                raise ValueError(
                    "the plan's windows come from the length of the input (`rule: length`), so it has to be one pass "
                    f"into an empty cache; got {count} tokens behind {past} cached ones. Pass the whole input at "
                    "once with a new cache, or take a plan with `rule: position`"
                )
            return past
        lengths = {count} if valid is None else set(valid.sum(dim=1).tolist())
        if len(lengths) > 1 or 0 in lengths:
            raise ValueError(
                "the plan's windows come from the length of the input (`rule: length`), and the sequences of this "
                f"batch have {sorted(lengths)} tokens; give inputs of one length, or take a plan with `rule: position`"
            )
        return lengths.pop()


def hand_on(layer: Any, attention: Any) -> None:
    """Let the step of a pass that a layer is given reach its attention, where the layer's own code keeps it."""
    layer.register_forward_pre_hook(partial(_leave_step, attention), with_kwargs=True)
    attention.register_forward_pre_hook(_take_step, with_kwargs=True)


def _leave_step(attention: Any, layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Before a layer: its attention, which runs next, finds the step."""
    attention.compress_step = kwargs.get("compress_step")


# The steps of passes that may be computed again in the backward pass, where no hook before a layer runs: by the rotary
# table of the pass, which its layers share and which lives as long as what is computed again.
_STEPS = WeakTensorKeyDictionary()


def _take_step(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before attention: the step is its argument."""
    step, attention.compress_step = vars(attention).get("compress_step"), None
    table = kwargs["position_embeddings"][0]
    if step is None:
        step = _STEPS.get(table)
    elif attention.training or torch.is_grad_enabled():
        _STEPS[table] = step
    return args, kwargs if step is None else kwargs | {"compress_step": step}


def _no_cache(cache: Any) -> bool:
    """False, for a pass that is computed again in the backward pass. Raises ValueError where a cache is given."""
    if cache is not None:
        raise ValueError(
            "past_key_values: gradient checkpointing computes layers again in the backward pass, so none can be filled "
            "or read meanwhile; leave the cache out, or call model.gradient_checkpointing_disable()"
        )
    return False


def _tell_of_rope(change: tuple[str, int]) -> None:
    kind, switch = change
    logger.warning_once(
        f"this model's position frequencies ({kind}) change beyond {switch} tokens, and a cache that was filled before "
        "keeps keys with the earlier ones: what follows is not what one pass over the whole input gives, nor is it in "
        "the stock model. For that, pass the whole input at once into a new cache."
    )


def _candidates(draft: Any, cache: PagedCache, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What `draft` puts behind `input_ids` `[1, T]`, and its logits or None: the cache keeps what taking it back needs.

    What a reserved cache has no room for, or could not take back, is left out.
    """
    tokens, logits = draft(input_ids, *args, **kwargs)
    length = input_ids.shape[1]
    if cache.max_length is None:
        cache.hold(tokens.shape[1] - length)
        return tokens, logits
    most = max(0, min(cache.slack, cache.max_length - length))
    return tokens[:, : length + most], None if logits is None else logits[:, :most]


class PlanForCausalLM(WholeLayers):
    """The language model around a `PlanModel`; `generate` uses the paged cache."""

    config: Any
    base_model: Any
    base_model_prefix: str
    planned_model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, self.base_model_prefix, self.planned_model(config))
        self.post_init()  # type: ignore[attr-defined]

    def set_plan(self, plan: dict[str, Any]) -> None:
        """Put another plan into effect; see `PlanModel.set_plan`."""
        self.base_model.set_plan(plan)

    def new_cache(self, max_length: int | None = None, slack: int = 0) -> PagedCache:
        """An empty cache for this plan; see `PlanModel.new_cache`."""
        return self.base_model.new_cache(max_length, slack)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.config._attn_implementation != NAME:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        kind = generation_config.cache_implementation
        slack = 0
        if generation_config.is_assistant:
            # What was drafted last, and what another tokenizer may have cut otherwise, is taken back by the next call.
            slack = generation_config.max_new_tokens + (generation_config.assistant_lookbehind or LOOKBEHIND)
        elif generation_mode.value == "assisted_generation":
            # A growing cache holds more as soon as a draft is known to be longer.
            slack = 1 if kind != "static" else generation_config.prompt_lookup_num_tokens or PAGE
        if slack and self.base_model.compress_by_length:
            raise ValueError(
                "assisted decoding checks several tokens in a pass, and the plan's windows come from the length of the "
                "input (`rule: length`); generate without assistant_model and prompt_lookup_num_tokens, or take a plan "
                "with `rule: position`"
            )
        if self.base_model.compress_by_length and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size: the plan's windows come from the length of the input (`rule: length`), so it is "
                "not taken in chunks; leave prefill_chunk_size out, or take a plan with `rule: position`"
            )
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a planned model brings its own paged cache; leave "
                "cache_implementation out, or say 'static' to reserve it for the whole generation at once"
            )
        given = model_kwargs.get(CACHE)
        if given is not None:
            if kind is not None:
                raise ValueError("past_key_values and cache_implementation were both given; give one of them")
            check_foreign(given)
            self.base_model.split()
            adopt(given, self.base_model.compress_kinds)
        elif generation_config.use_cache is not False:
            most = max(generation_config.max_length, getattr(generation_config, "max_cache_len", None) or 0)
            given = model_kwargs[CACHE] = self.new_cache(most if kind == "static" else None)
        if slack and given is not None:
            try:
                given.hold(slack)
            except ValueError as error:
                raise ValueError(
                    f"assisted decoding takes tokens back from the cache: {str(error).removeprefix('slack: ')}. "
                    "What works is to generate without assistant_model and prompt_lookup_num_tokens"
                ) from None
        return None

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's, with drafts that the cache can take back."""
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        cache = kwargs["model_kwargs"].get(CACHE)
        if isinstance(cache, PagedCache):
            generator.get_candidates = partial(_candidates, generator.get_candidates, cache)
        return generator

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock model's, where it runs dense. Raises ValueError where the plan is in effect."""
        if self.config._attn_implementation == NAME:
            raise ValueError(
                "generate_batch: continuous batching keeps its own pages of keys and values, which know no plan; use "
                "generate(), or a native export where the plan has one"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    """The class of a family (PEP 562), made with its two companions when the first of them is asked for.

    `transformers serve` reads a configuration and then looks for the class that it names in transformers itself, so
    the one whose configuration was asked for last is there.

    Raises:
        AttributeError: no such class.
        ImportError: the installed transformers lacks the architecture.
    """
    match = re.fullmatch(r"Compress(\w+?)(?:Config|Model|ForCausalLM)", name)
    if match is None or match[1] not in BY_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    trio = _trio(match[1])
    if name.endswith("Config"):
        causal = f"Compress{match[1]}ForCausalLM"
        setattr(transformers, causal, trio[causal])
    return trio[name]


@cache  # not in the module's namespace: transformers runs the file again in the same module when it has changed
def _trio(family: str) -> dict[str, type]:
    """Configuration, decoder and language model of a family, by name."""
    row = BY_NAME[family]
    names = row.classes()
    lacking = [name for name in names if not hasattr(transformers, name)]
    if lacking:
        raise ImportError(
            f"this checkpoint is a {family} model, and transformers {transformers.__version__} has no "
            f"{lacking[0]}: pip install --upgrade transformers"
        )
    stock_config, stock_model, stock_causal = (getattr(transformers, name) for name in names)

    def make(kind: str, bases: tuple[type, ...], **fields: Any) -> type:
        fields["__module__"] = __name__
        return new_class(f"Compress{family}{kind}", bases, exec_body=lambda space: space.update(fields))

    config = make("Config", (PlanConfig, stock_config), model_type=f"compress_{stock_config.model_type}")
    model = make("Model", (PlanModel, stock_model), config_class=config, compress_family=row)
    causal = make("ForCausalLM", (PlanForCausalLM, stock_causal), config_class=config, planned_model=model)
    return {made.__name__: made for made in (config, model, causal)}
