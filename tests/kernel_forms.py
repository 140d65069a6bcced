"""Launches of every Triton kernel in the forms that it has, as the code asks for them, on CPU tensors of any numbers.

What is computed means nothing here: the launches are for a compiler (tests/hopper.py). A form is one that differs in
what is compiled: options of an entry point, dtypes, head sizes that other tiles belong to, and sizes of 1 and strides
beyond 32 bits, for which Triton makes other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from compress.runtime.mixer import LayerFacts
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.retain_state import ListedPages
from compress.runtime.routers import Router
from compress.runtime.score_functions import ScoreFunction
from compress.runtime.scorer_gate import Gate
from compress.runtime.scorer_key_norm import KeyNorm
from compress.runtime.scorer_mlp import Mlp
from compress.runtime.scorer_ridge import Ridge
from compress.runtime.scorer_value_norm import ValueNorm
from compress.runtime.scorers import Scorer
from compress.runtime.scores import Scores
from compress.runtime.span import PAGE, Span
from compress.runtime.triton_attention import prefill
from compress.runtime.triton_decode import decode
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_decode import absorb, read_one
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_features import KINDS, features, features_of_both, sides
from compress.runtime.triton_linear_layout import layout
from compress.runtime.triton_retain import append, compact
from compress.runtime.triton_retain import decode as retain_decode
from compress.runtime.triton_retain import prefill as retain_prefill
from compress.runtime.triton_retain_step import take
from compress.runtime.triton_retain_training import prefill as training_prefill
from compress.runtime.triton_routed import prefill as routed_prefill
from compress.runtime.triton_router import route
from compress.runtime.triton_scorers import keep, scores
from compress.runtime.triton_store import store, store_one
from compress.train.triton_losses import Divergence, Surprise
from compress_vllm import kernel as plugin
from compress_vllm.rule import Rule

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = 1 << 32  # a stride beyond 32 bits
HIDDEN = 512  # size of a layer's input
Form = tuple[str, Callable[[], object]]
# Dtype, and sizes of keys and values. The first ones differ in code, the others in tiles alone.
Size = tuple[torch.dtype, int, int]
SIZES: tuple[Size, ...] = (
    (BF16, 128, 128),
    (FP32, 96, 80),
    (BF16, 64, 64),
    (FP16, 128, 128),
    (BF16, 256, 256),
    (FP32, 64, 64),
    (FP32, 128, 128),
    (FP32, 256, 256),
)
CODE = SIZES[:2]
SCORES = ("cap", "extra", "cap, extra", "sigmoid", "sigmoid of one length", "lssa")


def form(call: Callable[..., object], *given: object, **named: object) -> Form:
    """A launch, and what it is called."""
    words = [str(getattr(x, "__name__", x)) for x in (call, *given)] + [f"{name}={x}" for name, x in named.items()]
    return " ".join(words).replace("torch.", ""), partial(call, *given, **named)


def random(*shape: int, dtype: torch.dtype = BF16, leaf: bool = False) -> torch.Tensor:
    """Numbers, of which it does not matter what they are."""
    return torch.rand(*shape).to(dtype).requires_grad_(leaf)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """A batch of one with a stride beyond 32 bits, as a part of a large one has it."""
    assert tensor.shape[0] == 1
    return tensor.as_strided(tensor.shape, (WIDE, *tensor.stride()[1:]))


def backward(*outputs: torch.Tensor | None) -> None:
    """Gradients of all that has some."""
    torch.stack([out.float().sum() for out in outputs if out is not None and out.requires_grad]).sum().backward()


class Layer:
    """Queries, keys and values of a layer, and what attends to them; with `paged` windows that move by whole pages."""

    def __init__(
        self,
        dtype: torch.dtype = BF16,
        dim: int = 64,
        value_dim: int | None = None,
        *,
        batch: int = 2,
        share: int = 4,
        groups: int = 2,
        columns: int = 100,
        ahead: int = 0,
        leaf: bool = False,
        paged: bool = False,
    ) -> None:
        self.dtype, self.batch, self.groups, self.heads, self.columns = dtype, batch, groups, groups * share, columns
        self.dim, self.value_dim = dim, value_dim or dim
        self.query = random(batch, self.heads, columns, dim, dtype=dtype, leaf=leaf)
        self.key = random(batch, groups, columns + ahead, dim, dtype=dtype, leaf=leaf)
        self.value = random(batch, groups, columns + ahead, self.value_dim, dtype=dtype, leaf=leaf)
        self.spans = (Span(0, PAGE, 0.0, PAGE) if paged else Span(4, 64, 0.0),) * groups
        self.lengths = torch.full((batch,), 70, dtype=torch.int32)
        self.positions = torch.arange(columns).expand(batch, columns)

    def __str__(self) -> str:
        leaf = " leaf" if self.query.requires_grad else ""
        return f"{self.dtype} {self.dim} [{self.batch}, {self.heads}/{self.groups}, {self.columns}]{leaf}"

    @property
    def qkv(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All three."""
        return self.query, self.key, self.value

    @property
    def one(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of one token."""
        return self.query[:, :, 0], self.key[:, :, 0], self.value[:, :, 0]

    @property
    def rows(self) -> Rows:
        """Columns of which the first are padding, behind a history."""
        return Rows((70,) * self.batch, (1,) * self.batch, (self.columns - 1,) * self.batch)

    def scores(self, what: str | None) -> Scores | None:
        """Scores by what is done to them."""
        extra = random(self.heads, dtype=self.dtype, leaf=self.query.requires_grad)
        made = {
            None: None,
            "cap": Scores(30.0),
            "extra": Scores(None, extra),
            "cap, extra": Scores(30.0, extra),
            "sigmoid": ScoreFunction(bias=extra),
            "sigmoid of one length": ScoreFunction(bias=extra, length=100),
            "lssa": ScoreFunction(name="lssa"),
        }
        return made[what]

    def pages(self) -> Pages:
        """Some, in which anything lies."""
        table = torch.zeros(self.batch, self.groups, 4, dtype=torch.int32)
        keys, values = (random(8, PAGE, size, dtype=self.dtype) for size in (self.dim, self.value_dim))
        return Pages(keys, values, table)

    def listed(self, *, rings: bool = False) -> ListedPages:
        """Pages of which the first two are for lists."""
        made, listed = self.pages(), torch.zeros(self.batch, self.groups, dtype=torch.int32)
        ring = (torch.ones(self.groups, 3, dtype=torch.int32), 8) if rings else None
        flags = torch.zeros(8, PAGE, 1, dtype=torch.bool)
        return ListedPages(made.keys, made.values, made.table, flags, listed, 2, ring)

    def flags(self, units: int, *columns: int) -> torch.Tensor:
        """What is on, or kept."""
        return torch.ones(self.batch, units, *columns, dtype=torch.bool)


def attention(sizes: Sequence[Size]) -> Iterator[Form]:
    """Prompts and chunks, and the gradients of prompts."""

    def prompt(layer: Layer, what: str | None = None, *, keep_lse: bool = False, far: bool = False) -> None:
        query, key, value = (wide(x) if far else x for x in layer.qkv)
        found = prefill(query, key, value, layer.spans, scores=layer.scores(what), keep_lse=keep_lse)
        if layer.query.requires_grad:
            backward(*(found if keep_lse else (found,)))

    def chunk(layer: Layer, what: str | None = None) -> None:
        prefill(*layer.qkv, layer.spans, rows=layer.rows, pages=layer.pages(), scores=layer.scores(what))

    for leaf in (False, True):
        for size in sizes:
            yield form(prompt, Layer(*size, leaf=leaf), keep_lse=leaf)
        yield form(prompt, Layer(ahead=30, leaf=leaf), keep_lse=True)
        yield form(prompt, Layer(batch=1, share=1, groups=1, columns=1, leaf=leaf), "sigmoid")
        yield form(prompt, Layer(batch=1, leaf=leaf), "cap", far=True)
    for what in SCORES:
        yield form(prompt, Layer(leaf=True), what, keep_lse=what not in ("cap", "lssa"))
    for what in ("cap, extra", "sigmoid", "lssa"):
        yield form(prompt, Layer(), what)
    yield form(prompt, Layer(FP16, leaf=True))
    yield form(prompt, Layer(FP32, leaf=True), "lssa")
    for size in sizes:
        yield form(chunk, Layer(*size))
    for what in ("cap, extra", "sigmoid", "lssa"):
        yield form(chunk, Layer(), what)


def tokens(sizes: Sequence[Size]) -> Iterator[Form]:
    """Single tokens, and where tokens are stored."""

    def token(layer: Layer, what: str | None = None, *, units: int = 0, gated: bool = False, lse: bool = False) -> None:
        active = layer.flags(units) if units else None
        gates = torch.ones(layer.batch, units) if gated else None
        more: dict[str, Any] = {"active": active, "gates": gates, "keep_lse": lse}
        decode(layer.one[0], layer.pages(), layer.lengths, layer.spans, scores=layer.scores(what), **more)

    def stored(layer: Layer) -> None:
        store(layer.key, layer.value, layer.pages(), layer.rows, layer.spans)
        store_one(*layer.one[1:], layer.pages(), layer.lengths, layer.spans)

    for size in sizes:
        yield form(token, Layer(*size))
        yield form(stored, Layer(*size))
    yield form(stored, Layer(batch=1, groups=1, columns=1))
    for what in SCORES:
        yield form(token, Layer(), what, lse=what not in ("cap", "lssa"))
    yield form(token, Layer(), units=2)
    yield form(token, Layer(), "cap", units=2, gated=True)
    yield form(token, Layer(), units=8, lse=True)
    yield form(token, Layer(), "sigmoid", units=8, gated=True)
    yield form(token, Layer(batch=1, share=1, groups=1), "extra")
    for units in (0, 2, 8):  # of so many sequences that a launch counts their pages before
        yield form(token, Layer(dim=16, batch=300, columns=1), "extra", units=units, gated=units > 0, lse=units != 2)


def retain(sizes: Sequence[Size]) -> Iterator[Form]:
    """Heads that keep tokens: prompts, chunks, steps, judgements and training."""

    def paged(*size: Any, **more: Any) -> Layer:
        return Layer(*size, paged=True, columns=200, **more)

    def prompt(layer: Layer, what: str | None = None, *, chunk: bool = False) -> None:
        pages, rows = (layer.listed(), layer.rows) if chunk else (None, None)
        kept = layer.flags(layer.groups, layer.columns)
        retain_prefill(*layer.qkv, kept, layer.spans, rows=rows, pages=pages, scores=layer.scores(what))

    for chunk in (False, True):
        for size in sizes:
            yield form(prompt, paged(*size), chunk=chunk)
        for what in ("cap, extra", "sigmoid", "lssa"):
            yield form(prompt, paged(), what, chunk=chunk)
        yield form(prompt, paged(batch=1, share=1, groups=1), chunk=chunk)

    def appended(layer: Layer) -> None:
        kept = layer.flags(layer.groups, layer.columns)
        append(compact(layer.key, layer.value, kept, layer.spans, layer.rows, layer.listed()), layer.listed())

    yield form(appended, paged())
    yield form(appended, paged(FP32, batch=1, groups=1))

    def token(layer: Layer, what: str | None = None, *, rings: bool = False) -> None:
        pages = layer.listed(rings=rings)
        retain_decode(layer.one[0], pages, layer.lengths, layer.spans, scores=layer.scores(what))

    for rings in (False, True):
        for size in sizes:
            yield form(token, paged(*size), rings=rings)
    for rings, what in ((False, "cap, extra"), (True, "cap, extra"), (False, "sigmoid"), (True, "lssa")):
        yield form(token, paged(), what, rings=rings)

    rules = torch.zeros(2), torch.zeros(2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64)

    def judged(kind: type[Scorer], layer: Layer, *, leaves: bool) -> None:
        scorer = kind(2, HIDDEN, layer.dim).to(layer.dtype).requires_grad_(False)
        hidden = random(layer.batch, layer.columns, HIDDEN, dtype=layer.dtype)
        scores(scorer, hidden, layer.key, layer.value, layer.positions)
        count, all_off = torch.zeros(layer.batch, 2, dtype=torch.int32), torch.zeros(layer.batch, 2, 1)
        of = (layer.lengths, count, rules, layer.listed(), layer.spans, leaves, lambda: all_off)
        _, key, value = layer.one
        take(scorer, hidden[:, :1], key, value, *of)

    for kind in (Ridge, Mlp, KeyNorm, ValueNorm, Gate):
        yield form(judged, kind, paged(), leaves=True)
        yield form(judged, kind, paged(), leaves=False)
    for kind in (Ridge, Mlp):
        yield form(judged, kind, paged(FP32, 64, 48, batch=1), leaves=True)

    def kept(batch: int, columns: int) -> None:
        counts = torch.zeros(batch, 2, dtype=torch.int32)
        keep(torch.rand(batch, 2, columns), torch.arange(columns).expand(batch, columns), counts, *rules)

    for batch, columns in ((2, 2000), (1, 100), (1, 1)):
        yield form(kept, batch, columns)

    def trained(layer: Layer, what: str | None = None, *, hard: bool) -> None:
        decided = random(layer.batch, layer.groups, layer.columns, dtype=FP32, leaf=True)
        more: dict[str, Any] = {"hard": hard, "scores": layer.scores(what)}
        backward(training_prefill(*layer.qkv, decided, layer.spans, layer.rows, **more))

    for number, size in enumerate(sizes):
        yield form(trained, paged(*size, leaf=True), hard=number % 2 == 1)
    for hard in (False, True):
        yield form(trained, paged(leaf=True), "cap, extra" if hard else "cap", hard=hard)
        yield form(trained, paged(batch=1, share=1, groups=1, leaf=True), "extra", hard=hard)


def routed(sizes: Sequence[Size]) -> Iterator[Form]:
    """Heads and groups that tokens choose."""

    def prompt(layer: Layer, what: str | None = None, *, units: int, gated: bool, chunk: bool = False) -> None:
        more: dict[str, Any] = {"rows": layer.rows, "pages": layer.pages()} if chunk else {}
        gates = torch.ones(layer.batch, units, layer.columns) if gated else None
        active = layer.flags(units, layer.columns)
        routed_prefill(*layer.qkv, layer.spans, active, gates=gates, scores=layer.scores(what), **more)

    for size in sizes:
        yield form(prompt, Layer(*size), units=2, gated=False)
    yield form(prompt, Layer(), "cap, extra", units=2, gated=True, chunk=True)
    yield form(prompt, Layer(), "sigmoid", units=8, gated=True)
    yield form(prompt, Layer(), units=8, gated=False, chunk=True)
    yield form(prompt, Layer(FP32), "lssa", units=8, gated=True, chunk=True)
    yield form(prompt, Layer(batch=1, share=1, groups=1, columns=1), units=1, gated=True)

    def chosen(kind: str, unit: str, gates: str, shared: bool, dtype: torch.dtype, batch: int, columns: int) -> None:
        first = ("all" if unit == "group" else (1,)) if shared else ()
        entry = {"router": kind, "unit": unit, "gates": gates, "active": 2, "shared": ()}
        router = Router([{**entry, "shared": first}, *[entry] * 4], LayerFacts(0, 64, HIDDEN, 3, None)).to(dtype)
        route(router, random(batch, 15, columns, 64), random(batch, columns, HIDDEN))

    for kind, unit, gates, shared in (
        ("two_stage", "group", "weighted", False),
        ("two_stage", "head", "weighted", True),
        ("two_stage", "head", "one", True),
        ("norm", "group", "weighted", True),
        ("norm", "head", "one", False),
    ):
        for dtype, batch, columns in ((BF16, 2, 70), (FP32, 2, 70), (FP32, 2, 3), (BF16, 1, 1)):
            yield form(chosen, kind, unit, gates, shared, dtype, batch, columns)


def linear_features(sizes: Sequence[Size]) -> Iterator[Form]:
    """Feature maps of linear heads."""

    def mapped(kind: str, dtype: torch.dtype, of: torch.dtype, dim: int, width: int, columns: int = 70) -> None:
        batch, heads = (1, 1) if columns == 1 else (2, 4)
        query = random(batch, heads, columns, dim, dtype=dtype, leaf=True)
        weight, gain = random(heads, dim, width, dtype=of), (random(heads, dtype=FP32), random(heads, dim, dtype=of))
        backward(*features(query, weight, None, kind, 0.1, *gain))
        backward(features(query, weight, random(heads, width, dtype=of), kind, 0.1)[0])

    def mapped_both(kind: str, dtype: torch.dtype, of: torch.dtype, dim: int, width: int) -> None:
        query, key = (random(2, heads, 70, dim, dtype=dtype) for heads in (4, 2))
        weights = random(4, dim, width, dtype=of), random(2, dim, width, dtype=of)
        gain = random(4, dtype=FP32), random(4, dim, dtype=of)
        features_of_both(query, key, weights, None, kind, 0.1, *gain)
        features_of_both(query, key, weights, (random(4, width, dtype=of), random(2, width, dtype=of)), kind, 0.1)

    kinds = [("hedgehog", BF16, BF16, 128, 64), ("hedgehog_exp", BF16, FP32, 128, 128), ("elu", FP32, FP32, 48, 32)]
    for of in (*kinds, ("relu", BF16, BF16, 256, 256)):
        yield form(mapped, *of)
        yield form(mapped_both, *of)
    yield form(mapped, "relu", BF16, BF16, 64, 64, 1)


def linear(sizes: Sequence[Size]) -> Iterator[Form]:
    """Linear heads without the delta rule, and their gradients."""

    def additive_pass(
        dtype: torch.dtype = BF16,
        count: int = 64,
        dim: int = 64,
        *,
        batch: int = 2,
        groups: int = 2,
        share: int = 2,
        stream: int = 256,
        own: bool = False,
        window: bool = False,
        decay: bool = False,
        first: bool = False,
        mean: bool = True,
        mass: bool = True,
        leaf: bool = False,
        far: bool = False,
    ) -> None:
        made = partial(random, dtype=dtype, leaf=leaf)
        of_rows = (batch, groups * share, stream - 10)
        given = [made(*of_rows, count), made(batch, groups, stream, count), made(batch, groups, stream, dim)]
        more: dict[str, Any] = {"log_decay": random(groups, dtype=FP32)} if decay else {}
        if window:
            more["window"] = made(*of_rows, dim), random(*of_rows, dtype=FP32, leaf=leaf)
            more["log_gain"] = random(*of_rows, dtype=FP32, leaf=leaf)
        state = random(batch, groups, count, dim + 1, dtype=FP32, leaf=leaf) if first else None
        where = placed(batch, groups, stream, own=own, segment=2)
        query, key, value = (wide(x) if far else x for x in given)
        found, masses, last = additive(query, key, value, state, where, mean=mean, mass=mass, **more)
        if leaf:
            backward(found, masses if mass and not mean else None, last if own else None)

    for size in sizes:
        yield form(additive_pass, *size, window=True, decay=True, first=True, leaf=True)
        yield form(additive_pass, *size, own=True, leaf=True)
    yield form(additive_pass, own=True, decay=True, leaf=True)
    yield form(additive_pass, own=True, mean=False, leaf=True)
    yield form(additive_pass, mean=False, mass=False, leaf=True)
    yield form(additive_pass, FP32, own=True, decay=True, mean=False, mass=False)
    for decay in (False, True):  # walks along the keys where there are enough blocks of states
        yield form(additive_pass, batch=3, groups=8, own=True, decay=decay, first=decay)
        yield form(additive_pass, batch=8, groups=8, share=1, own=decay, window=not decay, decay=decay, first=decay)
    yield form(additive_pass, count=1024, dim=256, window=True, first=True, leaf=True)
    yield form(additive_pass, count=40, dim=24, share=3, window=True, leaf=True)
    one: dict[str, Any] = {"batch": 1, "groups": 1, "share": 1, "stream": 64}
    yield form(additive_pass, **one, own=True, decay=True, first=True, leaf=True)
    yield form(additive_pass, batch=1, window=True, leaf=True, far=True)


def placed(batch: int, groups: int, stream: int, *, own: bool, segment: int) -> Any:
    """Where the tokens of a pass are, of which the last page has some."""
    chunk = torch.arange(stream // PAGE).expand(batch, groups, -1).contiguous()
    count, absorbed = (torch.full((batch, groups), stream - less) for less in (10, PAGE))
    rows = Rows.whole(batch, stream - 10)
    return layout(rows, chunk, stream, count=count, absorbed=absorbed, own=own, segment=segment)


def linear_delta(sizes: Sequence[Size]) -> Iterator[Form]:
    """The gated delta rule, and its gradients."""

    def delta_pass(
        dtype: torch.dtype = BF16,
        count: int = 64,
        dim: int = 64,
        *,
        batch: int = 2,
        groups: int = 2,
        stream: int = 256,
        own: bool = False,
        decay: bool = True,
        first: bool = False,
        leaf: bool = True,
    ) -> None:
        query = random(batch, groups * 2, stream - 10, count, dtype=dtype, leaf=leaf)
        key = random(batch, groups, stream, count, dtype=dtype, leaf=leaf)
        value = random(batch, groups, stream, dim, dtype=dtype, leaf=leaf)
        state = random(batch, groups, count, dim, dtype=FP32, leaf=leaf) if first else None
        strength, decays = (random(batch, groups, stream, dtype=FP32, leaf=leaf) for _ in range(2))
        where = placed(batch, groups, stream, own=own, segment=1 if leaf else 2)
        log_decay = decays if decay else None
        found = gated_delta(query, key, value, state, where, log_decay=log_decay, strength=strength)
        if leaf:
            backward(*found)

    for size in sizes:
        yield form(delta_pass, *size, own=True, first=True)
    for decay in (False, True):
        yield form(delta_pass, decay=decay)
        yield form(delta_pass, own=not decay, decay=decay, first=decay, leaf=False)
    yield form(delta_pass, batch=1, groups=1, stream=64, own=True)


def linear_tokens(sizes: Sequence[Size]) -> Iterator[Form]:
    """Single tokens of linear heads: what they read, and pages that states take in."""

    def read(
        dtype: torch.dtype,
        share: int,
        count: int,
        dim: int,
        *,
        mean: bool = True,
        window: bool = True,
        batch: int = 2,
        gap: int = 0,
    ) -> None:
        held = random(batch, 2, dim + 1, count + gap, dtype=FP32)[..., :count].mT
        query, lengths = random(batch, 2 * share, count, dtype=dtype), torch.full((batch,), 70, dtype=torch.int32)
        of_window = random(batch, 2 * share, dim, dtype=dtype), random(batch, 2 * share, dtype=FP32)
        read_one(query, held, lengths, dim, dtype, mean=mean, window=of_window if window else None)

    for share, count in ((1, 512), (2, 128), (4, 128)):
        for dtype in (BF16, FP32):
            yield form(read, dtype, share, count, 128)
        yield form(read, BF16, share, count, 128, window=False)
        yield form(read, FP32, share, count, 128, window=False, mean=False)
    yield form(read, FP16, 12, 64, 64)
    yield form(read, BF16, 3, 40, 24, batch=1, gap=3)

    def absorbed(
        kind: str, dtype: torch.dtype, of: torch.dtype, width: int, *, bias: bool, decay: bool, batch: int = 2
    ) -> None:
        layer = Layer(dtype, 128 if width > 32 else 48, batch=batch, paged=True)
        held = random(batch, 2, layer.value_dim + 1, sides(kind) * width, dtype=FP32).mT
        weight, of_bias = random(2, layer.dim, width, dtype=of), random(2, width, dtype=of)
        decays = random(2, dtype=FP32) if decay else None
        more = (weight, of_bias if bias else None, 0.1, decays)
        absorb(held, layer.pages(), layer.lengths, layer.spans, kind, *more)

    for kind in KINDS:
        yield form(absorbed, kind, BF16, BF16, 64, bias=False, decay=True)
    yield form(absorbed, "hedgehog", BF16, FP32, 128, bias=True, decay=True)
    yield form(absorbed, "hedgehog", FP32, FP32, 32, bias=True, decay=False)
    yield form(absorbed, "hedgehog", BF16, BF16, 256, bias=False, decay=False, batch=1)


def losses(sizes: Sequence[Size]) -> Iterator[Form]:
    """Losses over a vocabulary."""

    def over(dtype: torch.dtype, rows: int, size: int) -> None:
        student, teacher = random(rows, size, dtype=dtype, leaf=True), random(rows, size, dtype=dtype)
        backward(Divergence.apply(student, teacher, 2.0))
        backward(Surprise.apply(student, torch.zeros(rows, dtype=torch.int64)))

    for dtype in (BF16, FP16, FP32):
        yield form(over, dtype, 3, 9000)
    yield form(over, BF16, 1, 1000)


def vllm(sizes: Sequence[Size]) -> Iterator[Form]:
    """The plugin for vLLM."""

    def attend(
        dtype: torch.dtype, dim: int, queries: int, longest: int, *, more: bool, share: int = 4, requests: int = 2
    ) -> None:
        cache = random(4, 2, 16, 2 * dim, dtype=dtype)
        query = random(requests * queries, 2 * share, dim, dtype=dtype)
        plugin.store(cache, query[:, :2], query[:, :2], torch.zeros(requests * queries, dtype=torch.int64))
        table, lengths = torch.zeros(requests, 8, dtype=torch.int32), torch.full((requests,), 64, dtype=torch.int32)
        starts = torch.arange(requests + 1, dtype=torch.int32) * queries
        cap, extra = (30.0, random(2 * share, dtype=dtype)) if more else (None, None)
        of = (table, starts, lengths, queries, longest, 0.1, cap, torch.empty_like(query), extra)
        plugin.attend(query, cache, Rule(4, 0, 1024), *of)

    for dtype, dim, _ in sizes:
        yield form(attend, dtype, dim, 20, 64, more=False)
        yield form(attend, dtype, dim, 1, 5000, more=True)
    yield form(attend, BF16, 80, 20, 64, more=True)
    yield form(attend, BF16, 128, 1, 64, more=False, share=1, requests=1)


ROOMS = (
    attention,
    tokens,
    retain,
    routed,
    linear_features,
    linear,
    linear_delta,
    linear_tokens,
    losses,
    vllm,
)
