"""A whole model: prefill, decode step and peak memory of a planned or pruned model beside the dense one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from compress.bench.dense import BACKENDS, ON_CPU, dense_attention
from compress.bench.measure import Time, peak_bytes, release, times
from compress.errors import UserError
from compress.models.cache_bytes import cache_bytes
from compress.models.graph import graph_of
from compress.models.placement import input_device, placement_of, takes_graphs
from compress.models.planned import all_on_model, carried_targets, mixers_of
from compress.models.pruning import block_parameters
from compress.models.replaced import AttentionCall, attention_function
from compress.models.shape import shape_without_weights
from compress.plan import Plan, make_plan
from compress.plan.skipped import Skipped, skipped
from compress.runtime.families import groups_of, head_size_of
from compress.runtime.modeling_compress import CACHE
from compress.runtime.span import native_windows

DENSE, NONE = "compress_bench_dense", "compress_bench_none"


class DenseLayer(CacheLayerMixin):
    """Keys and values of one layer in one block that was allocated once: a dense cache without copies or growth."""

    is_compileable = False
    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the shapes from the first tokens, `[B, G, T, D]`."""
        batch, groups, _, dim = key_states.shape
        self.keys = key_states.new_zeros(batch, groups, self.capacity, dim)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write the new tokens behind the others; everything so far, `[B, G, N, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all columns."""
        return self.length + query_length, 0


def _dense(call: AttentionCall) -> torch.Tensor:
    if call.scores is not None:
        raise UserError(
            "PyTorch's dense attention caps no scores and has no extra logit in its softmax",
            where=type(call.module).__name__,
            expected="a model whose attention is a plain softmax",
            fix="write `--what kernel`, which needs no dense model",
        )
    query, key, value = call.query, call.key, call.value
    with sdpa_kernel(call.module.config.bench_backend):
        causal = query.shape[2] > 1
        return scaled_dot_product_attention(query, key, value, is_causal=causal, scale=call.scaling, enable_gqa=True)


for _name, _attend in ((DENSE, _dense), (NONE, lambda call: call.query)):
    AttentionInterface.register(_name, attention_function(_attend))
    AttentionMaskInterface.register(_name, lambda *args, **kwargs: None)


@dataclass(frozen=True)
class Side:
    """One model's figures; bytes are the allocator's, None on a CPU.

    Attributes:
        peak_bytes: most bytes at once, without the weights of the model beside it.
        backend: PyTorch's dense attention by what it ran for, the fastest here; empty for a model with a plan.
    """

    prefill_ms: list[float]
    decode: Time
    peak_bytes: int | None
    cache_bytes: int
    backend: dict[str, str]

    @property
    def prefill(self) -> float:
        """Median milliseconds of the prefill of one prompt."""
        return sorted(self.prefill_ms)[len(self.prefill_ms) // 2]


@dataclass(frozen=True)
class ModelRow:
    """End to end: `batch` prompts prefilled one after the other, then decode steps of the whole batch.

    Attributes:
        plan: a model with a plan on the dense model's weights, or a pruned one.
        without_attention: a decode step of the dense model whose attention and cache do nothing.
        parameters, dense_parameters: of the whole models, tied ones counted once.
        all_on: the other model with all that tokens choose from used by every token; None where they choose nothing.
        skips: what tokens skip by choosing, as its plan expects; None where that is not known.
        random_routers: whether tokens choose by random weights, as the routers are untrained and would choose alike.
    """

    shape: str
    mix: str
    batch: int
    length: int
    dense: Side
    plan: Side
    without_attention: Time
    decode_graph: bool
    parameters: int
    dense_parameters: int
    all_on: Side | None = None
    skips: Skipped | None = None
    random_routers: bool = False

    def values(self) -> dict[str, Any]:
        """For JSON, with the ratios that follow."""
        return {**asdict(self), **self.ratios()}

    def ratios(self) -> dict[str, float | None]:
        """Ratios of the two models' figures; bounds by attention's part of a step are given for equal weights only."""
        dense, plan = self.dense, self.plan
        saved = dense.cache_bytes - plan.cache_bytes
        peaks = (dense.peak_bytes, plan.peak_bytes)
        pruned = self.parameters != self.dense_parameters
        return self._chosen() | {
            "parameter_share": self.parameters / self.dense_parameters,
            "prefill_speedup": dense.prefill / plan.prefill,
            "decode_share_of_dense": plan.decode.median / dense.decode.median,
            "decode_tokens_per_s": self.batch / plan.decode.median * 1e3,
            "decode_tokens_per_s_dense": self.batch / dense.decode.median * 1e3,
            "attention_share_of_dense_step": 1 - self.without_attention.median / dense.decode.median,
            "most_any_plan_gains": None if pruned else dense.decode.median / self.without_attention.median,
            "peak_saved_over_cache_saved": (peaks[0] - peaks[1]) / saved
            if peaks[0] and peaks[1] and saved and not pruned
            else None,
        }

    def _chosen(self) -> dict[str, float | None]:
        """What choosing heads brings: times of all heads over those of the chosen, and shares that the plan expects."""
        found: dict[str, float | None] = {}
        if self.all_on is not None:
            found["prefill_speedup_of_choosing"] = self.all_on.prefill / self.plan.prefill
            found["decode_speedup_of_choosing"] = self.all_on.decode.median / self.plan.decode.median
        if self.skips is not None:
            found["prefill_attention_flops_skipped"] = self.skips.of_attention
            found["prefill_flops_skipped"] = self.skips.of_prefill
            found["decode_cache_bytes_skipped"] = self.skips.of_cache
            found["decode_bytes_skipped"] = self.skips.of_step(self.batch)
        return found


def model_row(
    dense: Any,
    other: Any,
    shape: str,
    mix: str,
    batch: int,
    length: int,
    steps: int = 64,
    *,
    plan: Plan | None = None,
) -> ModelRow:
    """Measure both models, one after the other; where tokens choose their heads, also the other with all heads on.

    Routers of the other model that would choose alike for all tokens have random weights from then on.

    Args:
        dense: the model as it is; other: one with a plan (`targets.planned_model`), or a pruned one.
        length: tokens of each prompt; `steps` more are reserved for decoding.
        plan: of the other model; None takes what it carries, where no head groups are removed.

    Raises:
        UserError: see `side`.
    """
    device = input_device(dense)
    ids = torch.randint(dense.config.vocab_size, (batch, length), device=device)
    untied = [mixer.untie() for mixer in mixers_of(other)]
    planned = side(other, ids, steps, beside=dense)
    unchosen = all_on_model(other)
    all_on = None if unchosen is None else side(unchosen, ids, steps, beside=dense)
    dense_side = side(dense, ids, steps, beside=other)
    release(*placement_of(dense).devices)
    token = ids[:, :1].contiguous()
    with torch.inference_mode(), _attention(dense, NONE):
        bare = _step_times(dense, lambda: dense(input_ids=token, use_cache=False), device, steps)
    counts = [sum(weight.numel() for weight in model.parameters()) for model in (other, dense)]
    skips = None
    if all_on is not None and (plan := plan or _carried_plan(other, dense)) is not None:
        skips = Skipped.total(skipped(plan, length, next(dense.parameters()).itemsize), block_parameters(other))
    own, of_dense = counts
    graph = takes_graphs(dense)
    sides = (dense_side, planned, bare, graph, own, of_dense, all_on, skips, any(untied))
    return ModelRow(shape, mix, batch, length, *sides)


def _carried_plan(planned: Any, dense: Any) -> Plan | None:
    """The plan that a model runs, bound to no weights; None where it lacks head groups of the dense model."""
    shape, targets = shape_without_weights(dense), carried_targets(planned)
    whole = all(len(groups) == shape.kv_heads for groups in targets)
    return make_plan(shape.unbound(), targets) if whole else None


@torch.inference_mode()
def side(model: Any, ids: torch.Tensor, steps: int = 64, *, beside: Any = None) -> Side:
    """One model's figures: one with a plan on its own cache, any other with PyTorch's fastest dense attention.

    Args:
        ids: `[B, N]` prompts.
        steps: decode steps to reserve for, more than 8.
        beside: a model that is in memory meanwhile; the weights that it alone has do not count.

    Raises:
        UserError: layers slide over less than the prompt by themselves, and no plan says so: dense attention has no
            windows here, so its times would be those of another model.
    """
    release(*placement_of(model).devices)
    if hasattr(model, "new_cache"):
        figures = _planned_side(model, ids, steps)
    else:
        _check_windows(model, ids.shape[1])
        figures = _dense_side(model, ids, steps)
    if figures.peak_bytes is None or beside is None:
        return figures
    weights = {weight.data_ptr() for weight in model.parameters()}
    others = sum(weight.nbytes for weight in beside.parameters() if weight.data_ptr() not in weights)
    return replace(figures, peak_bytes=figures.peak_bytes - others)


def _check_windows(model: Any, length: int) -> None:
    windows = [window for window in native_windows(model.config, model.config.num_hidden_layers) if window is not None]
    if windows and min(windows) < length:
        raise UserError(
            "the dense model can only be timed on prompts no longer than the sliding window of its layers",
            where=type(model).__name__,
            expected=f"prompts of at most {min(windows)} tokens",
            found=f"{length}",
        )


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """The model with another attention, which is put back, and so is what it reads of the configuration."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        vars(model.config).pop("bench_backend", None)


def _planned_side(model: Any, ids: torch.Tensor, steps: int) -> Side:
    batch, length = ids.shape
    device, devices = ids.device, placement_of(model).devices
    fresh = lambda: _last(model, ids[:1], model.new_cache(max_length=length + steps))  # noqa: E731
    spent = _first_prefills(fresh, batch, device)
    release(*devices)
    cache = model.new_cache(max_length=length + steps)
    cache.resolve(length)
    for row in range(batch):
        # Reserved pools hold one sequence after the other, so a prompt prefilled alone is copied to its place.
        alone = model.new_cache(max_length=length + steps)
        spent.append(_spent(partial(_last, model, ids[row : row + 1], alone), device))
        for whole, part in zip(cache.paged, alone.paged, strict=True):
            whole.fill(row, part, batch)
        del alone, whole, part
    cache.begin(batch, device)
    cache.assume(length)
    token = ids[:, -1:].contiguous()
    step = lambda: model(input_ids=token, **{CACHE: cache})  # noqa: E731
    decode = _step_times(model, step, device, steps, lambda: cache.assume(length))
    return Side(spent, decode, peak_bytes(*devices), cache_bytes(cache) or 0, {})


def _dense_side(model: Any, ids: torch.Tensor, steps: int) -> Side:
    batch, length = ids.shape
    device, devices = ids.device, placement_of(model).devices
    backends = _backends(model, batch, length, device)
    layers = model.config.num_hidden_layers

    def blocks(capacity: int) -> list[DenseLayer]:
        return [DenseLayer(capacity) for _ in range(layers)]

    def prefill(row: int, alone: list[DenseLayer]) -> torch.Tensor:
        return _last(model, ids[row : row + 1], Cache(layers=list(alone)))

    with _attention(model, DENSE):
        model.config.bench_backend = backends["prefill"][1]
        spent = _first_prefills(lambda: prefill(0, blocks(length + 1)), batch, device)
        release(*devices)
        held = blocks(length + 1)
        for row in range(batch):
            alone = blocks(length + 1)
            spent.append(_spent(partial(prefill, row, alone), device))
            for whole, part in zip(held, alone, strict=True):
                if row == 0:
                    whole.lazy_initialization(part.keys.new_empty(batch, *part.keys.shape[1:]), part.values)
                whole.keys[row], whole.values[row] = part.keys[0], part.values[0]
            del alone, whole, part
        model.config.bench_backend = backends["decode"][1]
        cache = Cache(layers=list(held))
        token = ids[:, -1:].contiguous()
        position = torch.full((batch, 1), length, device=device)

        def step() -> None:
            for block in held:  # every step is the same: one token behind the prompt
                block.length = length
            model(input_ids=token, position_ids=position, **{CACHE: cache})

        decode = _step_times(model, step, device, steps)
    return Side(
        spent,
        decode,
        peak_bytes(*devices),
        cache_bytes(cache) or 0,
        {what: name for what, (name, _) in backends.items()},
    )


def _backends(model: Any, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    """The fastest dense back end of PyTorch for the prefill of one prompt and for a decode step, by measurement."""
    config = model.config
    heads, groups, dim = config.num_attention_heads, groups_of(config), head_size_of(config)
    dtype = next(model.parameters()).dtype
    known = BACKENDS if device.type == "cuda" else ON_CPU
    chosen = {}
    for what, rows, queries in (("prefill", 1, length), ("decode", batch, 1)):
        make = lambda h, t, b=rows: torch.randn(b, t, h, dim, device=device, dtype=dtype).transpose(1, 2)  # noqa: E731
        calls = dense_attention(make(heads, queries), make(groups, length), make(groups, length))
        spent = {name: times(call, device, seconds=0.1).median for name, call in calls.items() if name in known}
        name = min(spent, key=lambda name: spent[name])
        chosen[what] = (name, known[name])
        del calls
        release(*placement_of(model).devices)
    return chosen


def _last(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache}).logits


def _first_prefills(call: Callable[[], Any], batch: int, device: torch.device) -> list[float]:
    """One prefill that compiles what a first call compiles, then as many as make three with those of the batch."""
    call()
    return [_spent(call, device) for _ in range(max(0, 3 - batch))]


def _spent(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _step_times(
    model: Any, step: Callable[[], Any], device: torch.device, steps: int, again: Callable[[], None] = lambda: None
) -> Time:
    """Decode steps, replayed from a CUDA graph on a GPU; at most as many as were reserved for."""
    if not takes_graphs(model):
        step()
        again()

        def one() -> None:
            again()
            step()

        return times(one, device, seconds=0.1, most=max(5, steps // 2))
    replay = graph_of(step)
    again()
    return times(replay, device, seconds=2.0, most=steps - 8)
