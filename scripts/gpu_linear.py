"""The GPU check of linear heads: every kernel against float64, then speed beside dense attention and fla.

python scripts/gpu_linear.py [FOLDER] [SECTION ...]     one GPU, under 5 minutes; without sections, all but sweeps

Writes JSON and a table into the folder.

flash-linear-attention is compared with where it is installed (the wheel `fla-core` and `einops` are enough).
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import normalize, pad
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.bench import measure
from compress.bench.dense import dense_attention
from compress.models.graph import graph_of
from compress.models.planned import with_runtime_plan
from compress.runtime import (
    triton_linear,
    triton_linear_decode,
    triton_linear_delta,
    triton_linear_features,
    triton_linear_layout,
    triton_linear_states,
    tuned,
)
from compress.runtime.linear_states import chunk_states, own_chunk, read
from compress.runtime.maps import MAPS
from compress.runtime.merge import log_mass, merge
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Step
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_decode import absorb, read_one
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_features import KINDS, features, features_of_both
from compress.runtime.triton_linear_heads import query_features
from compress.runtime.triton_linear_layout import SEGMENT, layout, with_decays
from compress.runtime.triton_linear_states import Slots, running, segment_states
from compress.targets.linear import LinearGroup
from scripts.gpu_check import LINES, START, error, poison, run_sections, say

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
# Norm of the difference over the norm: one rounding to bfloat16 is .0017, and weights and states are rounded besides.
MOST = {(BF16, "out"): 5e-3, (BF16, "gradient"): 1.2e-2, (F32, "out"): 1e-5, (F32, "gradient"): 2e-5}


# What was foretold of an H100 80GB before it was measured, and what is wanted; both are told beside every figure.
FORETOLD: dict[str, float] = {
    "decode 8 4 128 256": 0.91, "decode 8 4 128 128": 0.90, "decode 3 3 64 128": 0.90, "decode 4 2 256 512": 0.93,
    "decode 4 8 128 256": 0.89, "decode 2 16 128 256": 0.84, "decode 16 1 128 128": 0.92,
    "features, 64 sequences": 5.0, "read behind features": 23.0, "pages, none leaves": 2.2,
    "pages, every sequence takes one in": 60.0,
    "window": 0.56, "features of queries": 0.365, "features of keys": 0.096, "features of both": 0.452, "states": 0.19,
    "running sums of them": 0.152, "read and merge": 0.594,
    "delta, sums of decays": 0.004, "delta, writes of chunks": 0.156, "delta, states along them": 0.237,
    "delta, read": 0.15,
    "prefill 8192": 0.467, "prefill 131072": 7.22, "largest over smallest": 1.036,
    "train smollm2-135m": 5.0, "train smollm2-135m delta": 6.5, "train llama-3-8b": 4.0,
    "fla normalised 8192": 0.215, "fla plain 8192": 0.218, "fla decay 8192": 0.25, "fla gated delta 8192": 0.54,
    "fla normalised 32768": 0.85, "fla plain 32768": 0.86, "fla decay 32768": 0.99, "fla gated delta 32768": 2.1,
    "fla normalised both": 1.12, "fla plain both": 1.07, "fla decay both": 1.18, "fla gated delta both": 3.0,
}  # fmt: skip
WANTED: dict[str, str] = {"decode": "at least .85", "largest over smallest": "at most 1.05", "fla": "as fast as fla"}


def foretold(name: str) -> str:
    """What was foretold of a figure, and what is wanted of its kind, for the end of its line."""
    parts = [f"foretold {FORETOLD[name]:g}"] if name in FORETOLD else []
    parts += [f"wanted {text}" for kind, text in WANTED.items() if name.startswith(kind)]
    return f" [{', '.join(parts)}]" if parts else ""


class Checks:
    """Errors found so far, and which of them are too large."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, kind: str, dtype: torch.dtype, found: torch.Tensor, exact: torch.Tensor) -> None:
        """One tensor against its float64 twin."""
        took = error(found, exact)
        ok = took <= MOST[dtype, kind]  # NaN is not
        self.rows.append({"what": what, "kind": kind, "dtype": str(dtype), "error": took, "ok": ok})
        if not ok:
            say(f"  FAILED {what}: {took:.2e}, and {MOST[dtype, kind]:.0e} is allowed")

    def tell(self, name: str) -> list[dict[str, Any]]:
        """A line on all of them."""
        for kind in ("out", "gradient"):
            for dtype in (BF16, F32):
                rows = [row for row in self.rows if (row["kind"], row["dtype"]) == (kind, str(dtype))]
                if rows:
                    worst = max(rows, key=lambda row: row["error"])
                    bad = sum(not row["ok"] for row in rows)
                    say(
                        f"{name}, {kind} in {dtype}: {len(rows)} checks, {bad} failed, worst {worst['error']:.1e} "
                        f"({worst['what']})"
                    )
        return self.rows


# --- numerics


def leaves_of(tensors: list[torch.Tensor | None], dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    """Fresh leaves with gradients, in their own dtype or another."""
    return [None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]


def prefill_case(
    checks: Checks, dim: int, count: int, share: int, dtype: torch.dtype, *, own: bool, decay: bool, ragged: bool
) -> None:
    """`additive` at one shape, forward and backward, with sequences that start anywhere in a page."""
    groups, window, value_dim = 2, 1, dim
    past = [0, 70] if ragged else [0]
    counts, columns = ([517, 401], 530) if ragged else ([777], 777)
    start = [columns - number for number in counts] if ragged else [0]
    batch, heads = len(past), groups * share
    rows = Rows(tuple(past), tuple(start), tuple(counts))
    pages = max((p % PAGE + n + PAGE - 1) // PAGE for p, n in zip(past, counts, strict=True))
    numbers = torch.arange(pages)
    chunk = (numbers if own else (numbers - window).clamp(min=0)).expand(batch, groups, -1).contiguous()
    ends = [(p % PAGE + n - 1) // PAGE for p, n in zip(past, counts, strict=True)]
    last = [end if own else max(end - window, 0) for end in ends]
    tokens = [p % PAGE + n if own else final * PAGE for p, n, final in zip(past, counts, last, strict=True)]
    stream = -(-max(tokens) // PAGE) * PAGE
    chunk = torch.minimum(chunk, torch.tensor(last)[:, None, None]).to(DEVICE)
    count_of = torch.tensor(tokens, device=DEVICE)[:, None].expand(-1, groups)
    absorbed = torch.tensor(last, device=DEVICE)[:, None].expand(-1, groups) * PAGE

    make = partial(torch.rand, device=DEVICE)
    query, key = make(batch, heads, columns, count).to(dtype), make(batch, groups, stream, count).to(dtype)
    value = torch.randn(batch, groups, stream, value_dim, device=DEVICE).to(dtype)
    first = make(batch, groups, count, value_dim + 1) * 10
    out = torch.randn(batch, heads, columns, value_dim, device=DEVICE).to(dtype)
    lse, gain = (torch.randn(batch, heads, columns, device=DEVICE) + shift for shift in (8.0, 0.0))
    log_decay = -torch.rand(batch, groups, stream, device=DEVICE) * 0.05 if decay else None
    given: list[torch.Tensor | None] = [query, key, value, first, *((None,) * 3 if own else (out, lse, gain))]
    valid = torch.zeros(batch, columns, dtype=torch.bool, device=DEVICE)
    for b in range(batch):
        valid[b, start[b] : start[b] + counts[b]] = True
        for tensor in (query, out, lse, gain):
            tensor[b, :, ~valid[b]] = torch.nan
        for tensor in (key, value):
            tensor[b, :, tokens[b] :] = torch.nan

    exact_leaves = leaves_of(given, torch.float64)
    exact, weights = [], torch.randn(batch, heads, columns, value_dim, device=DEVICE).double()
    for b in range(batch):
        q, k, v, s, o, e, g = (None if x is None else x[b : b + 1] for x in exact_leaves)
        assert q is not None and k is not None and v is not None
        here, shift = slice(start[b], start[b] + counts[b]), past[b] % PAGE
        end = -(-tokens[b] // PAGE) * PAGE
        k, v = (pad(x[:, :, : tokens[b]], (0, 0, 0, end - tokens[b])) for x in (k, v))
        paged = pad(q[:, :, here], (0, 0, shift, pages * PAGE - shift - counts[b]))
        options: dict[str, Any] = {"count": count_of[b : b + 1]}
        if log_decay is not None:
            options["log_decay"] = log_decay[b : b + 1, :, :end].double()
        if not end:
            states = s[:, :, None] if s is not None else None
        else:
            states = chunk_states(k, v, s, **options)
        assert states is not None
        if own:
            wide = dict(options)
            if log_decay is not None:
                wide["log_decay"] = pad(options["log_decay"], (0, pages * PAGE - end))
            k, v = (pad(x, (0, 0, 0, pages * PAGE - end)) for x in (k, v))
            found = own_chunk(paged, k, v, states, chunk[b : b + 1].long(), **wide)
        else:
            found = read(paged, states, chunk[b : b + 1].long())
        found = found[:, :, shift : shift + counts[b]]
        num, den = found[..., :-1], found[..., -1]
        if o is None or e is None or g is None:
            mean = num / den.clamp(min=1e-300)[..., None]
        else:
            mean = merge(o[:, :, here], e[:, :, here], num, log_mass(den), g[:, :, here])
        exact.append((mean, states[:, :, last[b]]))
    loss = sum((mean * weights[b, :, valid[b]]).sum() for b, (mean, _) in enumerate(exact))
    wanted: Any = torch.autograd.grad(loss, [x for x in exact_leaves if x is not None])  # type: ignore[arg-type]

    leaves = leaves_of(given)
    where = layout(rows, chunk, stream, count=count_of, absorbed=absorbed, own=own)
    poison()
    q, k, v, s, o, e, g = leaves
    assert q is not None and k is not None and v is not None
    window_of = None if o is None or e is None else (o, e)
    # With their own chunks by states that walk along the keys, else by sums of segments.
    with mock.patch.object(triton_linear_states, "linear_scans", lambda *_: own):
        mine, _, state = additive(q, k, v, s, where, log_decay=log_decay, window=window_of, log_gain=g)
    name = f"D {dim} F {count} heads {share}{' own' * own}{' decay' * decay}{' ragged' * ragged}"
    for b, (mean, after) in enumerate(exact):
        checks.add(f"{name} out {b}", "out", dtype, mine[b, :, valid[b]], mean[0])
        checks.add(f"{name} state {b}", "out", dtype, state[b], after[0])
    poison()
    weights = torch.where(valid[:, None, :, None], weights, 0).to(dtype)
    found_grads = torch.autograd.grad(mine, [x for x in leaves if x is not None], weights)
    names = ("query", "key", "value", "first", "window", "lse", "gain")
    for label, a, b_exact in zip(names, found_grads, wanted, strict=False):
        checks.add(f"{name} d{label}", "gradient", dtype, a, b_exact)


def delta_case(checks: Checks, dim: int, share: int, dtype: torch.dtype, *, decay: bool, own: bool) -> None:
    """`gated_delta` at one shape, forward and backward."""
    batch, groups, columns = 2, 2, 500
    heads, pages = groups * share, -(-columns // PAGE)
    stream = pages * PAGE if own else (pages - 1) * PAGE
    tokens, last = (columns, pages - 1) if own else (stream, pages - 1)
    numbers = torch.arange(pages, device=DEVICE)
    chunk = (numbers if own else (numbers - 1).clamp(min=0)).expand(batch, groups, -1).contiguous()
    query = torch.randn(batch, heads, columns, dim, device=DEVICE).to(dtype)
    key = normalize(torch.randn(batch, groups, stream, dim, device=DEVICE), dim=-1).to(dtype)
    value = torch.randn(batch, groups, stream, dim, device=DEVICE).to(dtype)
    strength = torch.rand(batch, groups, stream, device=DEVICE)
    log_decay = -torch.rand(batch, groups, stream, device=DEVICE) * 0.05 if decay else None
    first = torch.randn(batch, groups, dim, dim, device=DEVICE) * 0.1
    given = [query, key, value, first, strength, log_decay]
    leaves64, weights = leaves_of(given, torch.float64), torch.randn(batch, heads, columns, dim, device=DEVICE)
    q, k, v, s, b, d = leaves64
    assert q is not None and k is not None and v is not None
    count = torch.full((batch, groups), tokens, device=DEVICE)
    options: dict[str, Any] = {"rule": "delta", "strength": b, "log_decay": d, "count": count}
    states, paged = chunk_states(k, v, s, **options), pad(q, (0, 0, 0, pages * PAGE - columns))
    exact = own_chunk(paged, k, v, states, chunk, **options) if own else read(paged, states, chunk)
    exact = exact[:, :, :columns]
    wanted = torch.autograd.grad(exact, [x for x in leaves64 if x is not None], weights.double())
    for tensor in (key, value, strength):
        tensor[:, :, tokens:] = torch.nan
    leaves = leaves_of(given)
    q, k, v, s, b, d = leaves
    assert q is not None and k is not None and v is not None
    absorbed = torch.full_like(count, last * PAGE)
    where = layout(Rows.whole(batch, columns), chunk, stream, count=count, absorbed=absorbed, own=own, segment=1)
    poison()
    mine, state = gated_delta(q, k, v, s, where, log_decay=d, strength=b)
    name = f"delta D {dim} heads {share}{' decay' * decay}{' own' * own}"
    checks.add(f"{name} out", "out", dtype, mine, exact)
    checks.add(f"{name} state", "out", dtype, state, states[:, :, last])
    pairs = layout(Rows.whole(batch, columns), chunk, stream, count=count, absorbed=absorbed, own=own)
    poison()
    with torch.inference_mode():  # a state for every other chunk, which only gradients want
        again, state = gated_delta(q, k, v, s, pairs, log_decay=d, strength=b)
    checks.add(f"{name} out by pairs", "out", dtype, again, exact)
    checks.add(f"{name} state by pairs", "out", dtype, state, states[:, :, last])
    poison()
    found = torch.autograd.grad(mine, [x for x in leaves if x is not None], weights.to(mine.dtype))
    for label, a, e in zip(("query", "key", "value", "first", "strength", "decay"), found, wanted, strict=False):
        checks.add(f"{name} d{label}", "gradient", dtype, a, e)


def map_case(checks: Checks, kind: str, dim: int, dtype: torch.dtype) -> None:
    """A feature map with its gradients, against the module in float64."""
    torch.manual_seed(dim)
    made = MAPS[kind](2, 2, dim).to(DEVICE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = torch.randn(2, 2, 333, dim, device=DEVICE).to(dtype)
    weight, bias = made.key.detach(), None if made.key_bias is None else made.key_bias.detach()
    turn, gain = torch.randn(2, dim, device=DEVICE), torch.randn(2, device=DEVICE)
    leaves = leaves_of([rows, weight, bias, gain, turn])
    x, w, c, g, u = leaves_of([rows, weight, bias, gain, turn], torch.float64)
    assert x is not None and w is not None and g is not None and u is not None
    projected = x @ w
    exact: Any = made.activate(x, projected if c is None else projected + c[:, None], dim**-0.5, None)
    exact_gain = g[:, None] + (x * u[:, None]).sum(-1)
    weights, more = torch.randn_like(exact), torch.randn_like(exact_gain)
    wanted: Any = torch.autograd.grad(
        (exact * weights).sum() + (exact_gain * more).sum(), [y for y in (x, w, c, g, u) if y is not None]
    )
    poison()
    of_rows, of_weight, of_bias, of_gain, of_turn = leaves
    assert of_rows is not None and of_weight is not None
    mine, mine_gain = features(of_rows, of_weight, of_bias, kind, dim**-0.5, of_gain, of_turn)
    assert mine_gain is not None
    checks.add(f"map {kind} D {dim}", "out", dtype, mine, exact)
    checks.add(f"gain of {kind} D {dim}", "out", dtype, mine_gain, exact_gain)
    with torch.no_grad():
        poison()
        biases = None if bias is None else (bias, bias)
        both = features_of_both(rows, rows[:, :, :300], (weight, weight), biases, kind, dim**-0.5, gain, turn)
    for label, a, e in zip(("queries", "gains", "keys"), both, (exact, exact_gain, exact[:, :, :300]), strict=True):
        assert a is not None
        checks.add(f"map {kind} D {dim} of both, {label}", "out", dtype, a, e)
    found = torch.autograd.grad(
        (mine.double() * weights).sum() + (mine_gain.double() * more).sum(), [y for y in leaves if y is not None]
    )
    for number, (a, e) in enumerate(zip(found, wanted, strict=True)):
        checks.add(f"map {kind} D {dim} gradient {number}", "gradient", dtype, a, e)


def decode_case(checks: Checks, dim: int, share: int, dtype: torch.dtype, kind: str, *, decay: bool) -> None:
    """A page that is taken in, and the read of one token, at one shape."""
    batch, groups, numbers = 3, 2, 6
    made = MAPS[kind](groups, share, dim).to(DEVICE)
    heads, count = groups * share, made.features
    spans = [Span(0, 64, 0.0, granule=PAGE), Span(70, 100, 0.0, granule=PAGE)]
    lengths = torch.tensor([193, 0, 321], dtype=torch.int32, device=DEVICE)
    pools = [torch.randn(batch * groups * numbers, PAGE, dim, device=DEVICE).to(dtype) for _ in range(2)]
    table = torch.randperm(batch * groups * numbers, device=DEVICE).view(batch, groups, numbers).to(torch.int32)
    log_decay = torch.tensor([-0.01, -0.2], device=DEVICE) if decay else None
    held = (torch.rand(batch, groups, dim + 1, count, device=DEVICE) * (0.1 if KINDS[kind] == 0 else 10)).mT
    exact = held.double()
    for b in range(batch):
        for g, span in enumerate(spans):
            t = int(lengths[b]) - 1
            if t < 0 or span.boundary(t) == span.boundary(t - 1):
                continue
            place = table[b, g, span.boundary(t - 1) // PAGE].long()
            key, value = (pool[place].double()[None, None] for pool in pools)
            projected = key @ made.key[g].double()
            projected = projected if made.key_bias is None else projected + made.key_bias[g].double()
            key = made.activate(key, projected, dim**-0.5, None)
            options: dict[str, Any] = {} if log_decay is None else {"log_decay": log_decay[g : g + 1].double()}
            exact[b, g] = chunk_states(key, value, exact[b : b + 1, g : g + 1], **options)[0, 0, 1]
    name = f"decode {kind} D {dim} heads {share}{' decay' * decay}"
    bias = None if made.key_bias is None else made.key_bias.detach()
    absorb(held, Pages(pools[0], pools[1], table), lengths, spans, kind, made.key.detach(), bias, dim**-0.5, log_decay)
    checks.add(f"{name} absorb", "out", dtype, held, exact)
    query = torch.rand(batch, heads, count, device=DEVICE).to(dtype)
    out = torch.randn(batch, heads, dim, device=DEVICE).to(dtype)
    lse, gain = (torch.randn(batch, heads, device=DEVICE) + shift for shift in (8.0, 0.0))
    found = query.double().unflatten(1, (groups, share)) @ held.double()
    found = found.flatten(1, 2)
    wanted = merge(out.double(), lse.double(), found[..., :-1], log_mass(found[..., -1]), gain.double())
    wanted[1] = 0
    for dot in (False, True):
        with with_decode_config(READ_ONE[dot]):
            poison()
            mine = read_one(query, held, lengths, dim, dtype, mean=True, window=(out, lse), log_gain=gain)
        checks.add(f"{name} read {'as a product' if dot else 'by head'}", "out", dtype, mine, wanted)


PREFILL_CASES = (
    (BF16, 64, 128, 3, True, True, True), (BF16, 128, 256, 4, False, False, True),
    (BF16, 256, 512, 1, False, True, False), (BF16, 64, 273, 2, False, False, True),
    (F32, 64, 128, 3, False, True, True), (F32, 96, 96, 7, True, False, False),
)  # fmt: skip
DELTA_CASES = (
    (BF16, 64, 3, True, True), (BF16, 128, 4, True, False), (BF16, 256, 1, False, True), (F32, 64, 2, True, True)
)  # fmt: skip
MAP_CASES = (
    (BF16, 128, "hedgehog"), (BF16, 256, "hedgehog"), (BF16, 64, "hedgehog_exp"), (BF16, 256, "hedgehog_exp"),
    (BF16, 256, "elu"), (BF16, 128, "relu"), (F32, 64, "hedgehog"), (F32, 128, "elu"),
)  # fmt: skip


def numeric_case(what: str, case: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one case, and the lines that it printed; runs in a process of its own."""
    torch.seed()
    checks = Checks()
    LINES.clear()
    try:
        if what == "prefill":
            dtype, dim, count, share, own, decay, ragged = case
            prefill_case(checks, dim, count, share, dtype, own=own, decay=decay, ragged=ragged)
        elif what == "delta":
            dtype, dim, share, decay, own = case
            delta_case(checks, dim, share, dtype, decay=decay, own=own)
        else:
            dtype, dim, kind = case
            map_case(checks, kind, dim, dtype)
            for share in {64: (4,), 128: (4, 8, 16)}.get(dim, (3,)):
                decode_case(checks, dim, share, dtype, kind, decay=dim == 64)
    except Exception:  # told as a failed check, and the other cases go on
        say(f"  FAILED {what} {case}: {traceback.format_exc()}")
        checks.rows.append(
            {"what": f"{what} {case}", "kind": "out", "dtype": str(case[0]), "error": math.inf, "ok": False}
        )
    return checks.rows, list(LINES)


def numerics() -> list[dict[str, Any]]:
    """Every kernel against float64; cases run side by side, as most of their time is the compiler's."""
    cases = [
        (what, case)
        for what, of in (("prefill", PREFILL_CASES), ("delta", DELTA_CASES), ("map", MAP_CASES))
        for case in of
    ]
    checks = Checks()
    with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows, lines in pool.map(numeric_case, *zip(*cases, strict=True)):
            checks.rows += rows
            LINES.extend(lines)
    return checks.tell("numerics")


# --- a small planned model


def small_model(dtype: torch.dtype, **fields: Any) -> Any:
    """Two random Llama layers whose heads are all linear."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=16384,
    )  # fmt: skip
    dense: Any = LlamaForCausalLM(config)
    dense = dense.to(DEVICE, dtype).eval()
    entry = LinearGroup(**fields).model_dump(mode="json")
    model = with_runtime_plan(dense, {"schema": 1, "layers": [{"groups": [entry] * 2}] * 2})
    for module in model.modules():
        if isinstance(module, LinearMixer):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@torch.inference_mode()
def model_rows() -> list[dict[str, Any]]:
    """Prefill, chunks and decoding of a small model give one function, and a CUDA graph holds a decode step."""
    found = []
    length, tail = 8192, 140
    plans: list[dict[str, Any]] = [{}, {"rule": "delta", "decay": "token"}, {"alone": True}]
    plans += [{"rule": "delta", "alone": True}]
    for dtype in (BF16, F32):
        for fields in plans if dtype == BF16 else plans[:2]:
            model = small_model(dtype, **fields)
            model.config.compress_impl = "triton"
            ids = torch.randint(512, (1, length), device=DEVICE)
            whole = model(ids).logits[:, -tail:].double()
            cache = model.new_cache()
            parts = [
                model(ids[:, a:b], past_key_values=cache).logits
                for a, b in ((0, 1000), (1000, 5001), (5001, length - tail), (length - tail, length))
            ]
            chunked = parts[-1].double()
            cache = model.new_cache(max_length=length + 8)
            model(ids[:, : length - tail], past_key_values=cache)
            token = ids[:, :1].clone()
            kept: dict[str, torch.Tensor] = {}
            replay = graph_of(lambda m=model, t=token, c=cache, k=kept: k.update(out=m(t, past_key_values=c).logits))  # type: ignore[misc]
            cache.assume(length - tail)  # what the warm-up stored is written again; it crossed no page
            steps = []
            for t in range(length - tail, length):
                token.copy_(ids[:, t : t + 1])
                replay()
                steps.append(kept["out"].clone())
            decoded = torch.cat(steps, dim=1).double()
            model.config.compress_impl = "reference"
            plain = model(ids).logits[:, -tail:].double()
            row = {"dtype": str(dtype), "plan": fields, "chunked": error(chunked, whole)}
            row |= {"decoded_in_a_graph": error(decoded, whole), "reference": error(whole, plain)}
            say(
                f"model {dtype} {fields}: chunked {row['chunked']:.1e}, decoded in a graph "
                f"{row['decoded_in_a_graph']:.1e} from prefill; prefill {row['reference']:.1e} from plain PyTorch"
            )
            found.append(row)
    return found


# --- speed


def layer(heads: int, groups: int, dim: int, **fields: Any) -> LinearMixer:
    """The mixer of a layer whose heads are all linear."""
    entry = LinearGroup(**fields).model_dump(mode="json")
    kinds = Kinds([entry] * groups, LayerFacts(0, dim, heads * dim, heads // groups, None))
    mixer = kinds.mixers[0]
    assert isinstance(mixer, LinearMixer)
    return mixer.to(DEVICE, BF16)


def tensors_of(batch: int, heads: int, groups: int, length: int, dim: int) -> list[torch.Tensor]:
    """Random query, key and value."""
    make = partial(torch.randn, device=DEVICE, dtype=BF16)
    return [make(batch, number, length, dim) for number in (heads, groups, groups)]


def mixed(mixer: LinearMixer, qkv: Any) -> Callable[[], Any]:
    """The prefill of a layer without a cache, as a model runs it."""
    batch, _, length, _ = qkv[0].shape
    step = Step.begin(None, None, batch, length, DEVICE)
    step.impl = "triton"
    query, key, value = qkv
    return lambda: mixer.prefill(query, key, value, None, step, scale=None, dropout=0.0)


@torch.inference_mode()
def prefill_rows() -> list[dict[str, Any]]:
    """A layer of the shape of Llama-3-8B, all heads linear behind a window of 64, from 512 to 128k tokens."""
    rows = []
    mixer = layer(32, 8, 128)
    for length in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        measure.release(DEVICE)
        qkv = tensors_of(1, 32, 8, length, 128)
        ours = mixed(mixer, qkv)
        took = measure.graphed_times(ours, DEVICE, calls=max(1, min(10, 65536 // length)))
        eager = measure.times(ours, DEVICE)
        dense = measure.times_in_turn(dense_attention(*qkv), DEVICE, turns=1)
        name = min(dense, key=lambda n: dense[n].median)
        row: dict[str, Any] = {
            "length": length,
            "ms": vars(took),
            "eager_ms": vars(eager),
            "dense_ms": dense[name].median,
        }
        row |= {"dense": name, "ns_per_token": took.median / length * 1e6}
        rows.append(row)
        say(
            f"prefill {length}: {took.median:.3f} ms ({row['ns_per_token']:.1f} ns a token; eager {eager.median:.3f}), "
            f"dense {name} {dense[name].median:.3f}, {dense[name].median / took.median:.2f} times as fast"
            f"{foretold(f'prefill {length}')}"
        )
        del qkv, ours
    long = [row["ns_per_token"] for row in rows if row["length"] >= 8192]
    name = "largest over smallest"
    say(f"prefill, time a token from 8k to 128k: {name} {max(long) / min(long):.3f}{foretold(name)}")
    wins = [row["length"] for row in rows if row["dense_ms"] > row["ms"]["median"]]
    eager_wins = [row["length"] for row in rows if row["dense_ms"] > row["eager_ms"]["median"]]
    say(f"prefill wins over dense from {min(wins, default=None)} tokens; launched by the host from {min(eager_wins)}")
    return rows


@torch.inference_mode()
def part_rows() -> dict[str, float]:
    """Where the time of one layer goes, at 32k tokens."""
    length, heads, groups, dim = 32768, 32, 8, 128
    mixer = layer(heads, groups, dim)
    query, key, value = tensors_of(1, heads, groups, length, dim)
    q = features(query, mixer.map.query.flatten(0, 1), None, "hedgehog", 1.0)[0]
    k = features(key, mixer.map.key, None, "hedgehog", 1.0)[0]
    pages = length // PAGE
    chunk = (torch.arange(pages, device=DEVICE) - 1).clamp(min=0).expand(1, groups, -1).contiguous()
    k, v = k[:, :, : length - PAGE], value[:, :, : length - PAGE]
    where = layout(Rows.whole(1, length), chunk, length - PAGE)
    out, lse = query.clone(), torch.randn(1, heads, length, device=DEVICE)
    from compress.runtime.impl import IMPLS

    spans = [Span(0, 64, 0.0, granule=PAGE)] * groups
    slots, _ = segment_states(k, v, None, where)
    sums = Slots.like(k, v, where.segments, torch.float32)
    sums.matrices.zero_()
    sums.norms.zero_()
    calls: dict[str, Callable[[], Any]] = {
        "window": lambda: IMPLS["triton"].prefill(query, key, value, spans, keep_lse=True),
        "features of queries": lambda: features(query, mixer.map.query.flatten(0, 1), None, "hedgehog", 1.0),
        "features of keys": lambda: features(key, mixer.map.key, None, "hedgehog", 1.0),
        "features of both": lambda: features_of_both(
            query, key, (mixer.map.query.flatten(0, 1), mixer.map.key), None, "hedgehog", 1.0
        ),
        "states": lambda: segment_states(k, v, None, where),
        "running sums of them": lambda: running(sums, slots, None, where, reverse=False),
        "read and merge": lambda: triton_linear.read(q, k, v, slots, where, (out, lse, lse), mean=True, mass=True),
    }
    took = {name: measure.graphed_times(call, DEVICE, calls=5).median for name, call in calls.items()}
    held = slots.matrices.nbytes + slots.norms.nbytes
    summed = sums.matrices.nbytes + sums.norms.nbytes
    moved = {
        "window": 2 * (query.nbytes + key.nbytes),
        "features of queries": query.nbytes + q.nbytes,
        "features of keys": key.nbytes + k.nbytes,
        "features of both": query.nbytes + q.nbytes + key.nbytes + k.nbytes,
        "states": k.nbytes + v.nbytes + held,
        "running sums of them": summed + held,
        "read and merge": q.nbytes + 2 * query.nbytes + k.nbytes + v.nbytes + held,
    }
    for name, ms in took.items():
        say(f"32k, {name}: {ms:.3f} ms, {moved[name] / ms / 1e6:.0f} GB/s of what it has to move{foretold(name)}")
    return took | delta_parts(8192)


def delta_parts(length: int) -> dict[str, float]:
    """Where the time of the gated delta rule goes, at the sizes that it is compared with fla at."""
    heads, dim = 32, 128
    query = torch.rand(1, heads, length, dim, device=DEVICE, dtype=BF16)
    key = normalize(torch.rand(1, heads, length, dim, device=DEVICE, dtype=BF16), dim=-1)
    value = torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16)
    strength, log_decay = (torch.rand(1, heads, length, device=DEVICE) for _ in range(2))
    chunk = torch.arange(length // PAGE, device=DEVICE).expand(1, heads, -1).contiguous()
    log_decay = -0.05 * log_decay
    bare = layout(Rows.whole(1, length), chunk, length, own=True)
    where = with_decays(bare, log_decay, length)
    written, erased = triton_linear_delta.chunk_writes(key, value, strength, where)
    slots = Slots(triton_linear_delta.chunk_updates(key, written, erased, None, where)[0], strength)
    calls: dict[str, Callable[[], Any]] = {
        "sums of decays": lambda: with_decays(bare, log_decay, length),
        "writes of chunks": lambda: triton_linear_delta.chunk_writes(key, value, strength, where),
        "states along them": lambda: triton_linear_delta.chunk_updates(key, written, erased, None, where),
        "read": lambda: triton_linear.read(query, key, written, slots, where, None, mean=False, mass=False),
    }
    took = {f"delta, {name}": measure.graphed_times(call, DEVICE, calls=5).median for name, call in calls.items()}
    for name, ms in took.items():
        say(f"{length:,} tokens, {name}: {ms:.3f} ms{foretold(name)}")
    return took


def train_rows() -> list[dict[str, Any]]:
    """Forward and backward of a layer, kernels beside plain PyTorch, shapes of SmolLM2-135M and Llama-3-8B."""
    rows = []
    for name, batch, heads, groups, length, dim, fields in (
        ("smollm2-135m", 8, 9, 3, 2048, 64, {}),
        ("smollm2-135m delta", 8, 9, 3, 2048, 64, {"rule": "delta", "decay": "token"}),
        ("llama-3-8b", 1, 32, 8, 8192, 128, {}),
    ):
        mixer = layer(heads, groups, dim, **fields).float()
        qkv = [x.requires_grad_() for x in tensors_of(batch, heads, groups, length, dim)]
        hidden = torch.randn(batch, length, heads * dim, device=DEVICE, dtype=BF16)
        grad = torch.randn(batch, length, heads, dim, device=DEVICE, dtype=BF16)
        took = {}
        for impl in ("triton", "reference"):
            step = Step.begin(None, None, batch, length, DEVICE)
            step.impl, step.hidden = impl, hidden

            def both(step: Step = step, mixer: Any = mixer, qkv: Any = qkv, grad: Any = grad) -> None:
                out = mixer.prefill(*qkv, None, step, scale=None, dropout=0.0)
                torch.autograd.grad(out, [*qkv, *mixer.parameters()], grad)

            measure.release(DEVICE)
            both()
            took[impl] = (measure.times(both, DEVICE).median, torch.cuda.max_memory_allocated())
        row = {"shape": name, "ms": {n: ms for n, (ms, _) in took.items()}}
        rows.append(row | {"bytes": {n: size for n, (_, size) in took.items()}})
        say(
            f"train {name}: {took['triton'][0]:.2f} ms and {took['triton'][1] / 2**30:.2f} GiB, plain PyTorch "
            f"{took['reference'][0]:.2f} ms and {took['reference'][1] / 2**30:.2f} GiB{foretold(f'train {name}')}"
        )
    return rows


# Groups, query heads of each, head size, features.
DECODE_SHAPES = (
    (8, 4, 128, 256), (8, 4, 128, 128), (3, 3, 64, 128), (4, 2, 256, 512), (4, 8, 128, 256), (2, 16, 128, 256),
    (16, 1, 128, 128),
)  # fmt: skip


def decode_step(groups: int, share: int, dim: int, count: int, size: int) -> tuple[Callable[[], None], int]:
    """A read of each of four states of `size` bytes or a little more, which a chip's cache cannot hold; their bytes."""
    each = groups * count * (dim + 1) * 4
    batch = -(-size // each)
    states = [torch.rand(batch, groups, dim + 1, count, device=DEVICE).mT for _ in range(4)]
    query = torch.rand(batch, groups * share, count, device=DEVICE, dtype=BF16)
    out = torch.randn(batch, groups * share, dim, device=DEVICE, dtype=BF16)
    lse = torch.randn(batch, groups * share, device=DEVICE)
    lengths = torch.full((batch,), 1000, dtype=torch.int32, device=DEVICE)

    def step() -> None:
        for state in states:
            read_one(query, state, lengths, dim, BF16, mean=True, window=(out, lse), log_gain=lse)

    return step, batch * each


@torch.inference_mode()
def decode_rows() -> list[dict[str, Any]]:
    """Reading the states of one layer, a token a sequence; four states in turn, so that the chip's cache is cold."""
    copy = measure.copy_bandwidth(DEVICE)
    say(f"a device copy moves {copy / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for groups, share, dim, count in DECODE_SHAPES:
        for least in (16 << 20, 64 << 20, 256 << 20):
            step, size = decode_step(groups, share, dim, count, least)
            took = measure.graphed_times(step, DEVICE, calls=5).median / 4
            rate = size / took * 1e3
            found: dict[str, Any] = {"groups": groups, "share": share, "dim": dim, "features": count, "bytes": size}
            rows.append(found | {"us": took * 1e3, "share_of_copy": rate / copy})
            name = f"decode {groups} {share} {dim} {count}"
            say(
                f"decode {groups} groups of {share}, D {dim}, F {count}, {size / 2**20:.0f} MiB: "
                f"{took * 1e3:.1f} us, {rate / copy:.3f} of a copy{foretold(name) if least == 64 << 20 else ''}"
            )
    made, more = read_behind_features()
    say(f"features of a query of each of 64 sequences, 32 heads: {made:.1f} us{foretold('features, 64 sequences')}")
    say(f"decode 8 groups of 4, D 128, F 256, 64 MiB, adds to them {more:.1f} us{foretold('read behind features')}")
    rows.append({"features_us": made, "read_behind_features_us": more})
    for what, at in (("none leaves", 150), ("every sequence takes one in", 129)):
        took = measure.graphed_times(absorb_step(8, 128, 256, 64, at), DEVICE).median
        say(f"pages of 64 sequences, {what}: {took * 1e3:.1f} us{foretold(f'pages, {what}')}")
        rows.append({"absorb": what, "us": took * 1e3})
    return rows


def read_behind_features() -> tuple[float, float]:
    """Microseconds of features of one query of each of 64 sequences, and what a read of 64 MiB behind them adds."""
    heads, dim, batch = 32, 128, 64
    mixer = layer(heads, 8, dim)
    states = [torch.rand(batch, 8, dim + 1, 256, device=DEVICE).mT for _ in range(4)]
    query = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=BF16)
    out, lse = query[:, :, 0], torch.randn(batch, heads, device=DEVICE)
    lengths = torch.full((batch,), 1000, dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = {"mean": True, "window": (out, lse)}

    def step(reads: bool) -> None:
        for state in states:
            made, gain = query_features(mixer.map, "hedgehog", query, 1.0, None, mixer._gains())
            assert gain is not None
            if reads:
                read_one(made[:, :, 0], state, lengths, dim, BF16, log_gain=gain[:, :, 0], **options)

    both, alone = (measure.graphed_times(partial(step, reads), DEVICE, calls=5).median for reads in (True, False))
    return alone / 4 * 1e3, (both - alone) / 4 * 1e3


def absorb_step(groups: int, dim: int, count: int, batch: int, length: int) -> Callable[[], None]:
    """The launch ahead of the token that makes so many of each of `batch` sequences; a page leaves with token 129."""
    held = torch.rand(batch, groups, dim + 1, count, device=DEVICE).mT
    table = torch.arange(batch * groups * 3, device=DEVICE, dtype=torch.int32).view(batch, groups, 3)
    pools = [torch.randn(table.numel(), PAGE, dim, device=DEVICE, dtype=BF16) for _ in range(2)]
    weight = torch.randn(groups, dim, count // 2, device=DEVICE, dtype=BF16)
    spans = [Span(0, 64, 0.0, granule=PAGE)] * groups
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    return partial(absorb, held, Pages(pools[0], pools[1], table), lengths, spans, "hedgehog", weight, None, 1.0)


def fla_pairs(length: int) -> tuple[dict[str, tuple[Callable[[], Any], Callable[[], Any]]], dict[str, Any]]:
    """What both compute, at 32 heads of 128 numbers: calls of ours and theirs, and the leaves of each.

    Heads without window, one query head a group. Raises ImportError without the package.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    heads, dim = 32, 128
    query, key = (torch.rand(1, heads, length, dim, device=DEVICE, dtype=BF16) for _ in range(2))
    value = torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16)
    by_token = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    chunk = torch.arange(length // PAGE, device=DEVICE).expand(1, heads, -1).contiguous()
    absorbed = torch.full((1, heads), length - PAGE, device=DEVICE)
    where = layout(Rows.whole(1, length), chunk, length, absorbed=absorbed, own=True)
    slopes = -torch.linspace(0.001, 0.1, heads, device=DEVICE)
    by_chunk = layout(Rows.whole(1, length), chunk, length, absorbed=absorbed, own=True, segment=1)
    unit = normalize(key, dim=-1)
    strength, log_decay = (torch.rand(1, heads, length, device=DEVICE) for _ in range(2))
    log_decay = -0.05 * log_decay
    with_unit = [by_token[0], unit.transpose(1, 2).contiguous(), by_token[2]]
    gates = [x.transpose(1, 2).contiguous() for x in (log_decay, strength)]
    plain: dict[str, Any] = {"mean": False, "mass": False}
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "normalised": (
            lambda: additive(query, key, value, None, where)[0],
            lambda: chunk_linear_attn(*by_token, scale=1.0, normalize=True)[0],
        ),
        "plain": (
            lambda: additive(query, key, value, None, where, **plain)[0],
            lambda: chunk_linear_attn(*by_token, scale=1.0, normalize=False)[0],
        ),
        "decay": (
            lambda: additive(query, key, value, None, where, log_decay=slopes, **plain)[0],
            lambda: chunk_simple_gla(*by_token, scale=1.0, g_gamma=slopes)[0],
        ),
        "gated delta": (
            lambda: gated_delta(
                query,
                unit,
                value,
                None,
                where if torch.is_inference_mode_enabled() else by_chunk,
                log_decay=log_decay,
                strength=strength,
            )[0],
            lambda: chunk_gated_delta_rule(*with_unit, *gates, scale=1.0)[0],
        ),
    }
    of_ours, of_theirs = (query, key, value), by_token
    leaves: dict[str, Any] = dict.fromkeys(pairs, (of_ours, of_theirs))
    leaves["gated delta"] = ((query, unit, value), with_unit)
    return pairs, leaves


def with_gradients(call: Callable[[], Any], leaves: Any) -> Callable[[], Any]:
    """A call with its gradients."""

    def both() -> None:
        for x in leaves:
            x.requires_grad_()
        out = call()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        for x in leaves:
            x.requires_grad_(False)

    return both


def fla_compile(part: int, parts: int) -> None:
    """Compile every `parts`-th of the launches that the package tries; in a process of its own, into Triton's cache."""
    import os

    os.environ["FLA_CACHE_RESULTS"] = "0"  # the package shall measure by itself which is the fastest
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner

    def once(call: Callable[[], Any], **_: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    choose = Autotuner.prune_configs

    def some(self: Any, kwargs: Any) -> Any:
        configs = choose(self, kwargs)
        return configs[part::parts] or configs[:1]

    with (
        mock.patch.object(driver.active, "get_benchmarker", lambda: once),
        mock.patch.object(Autotuner, "prune_configs", some),
    ):
        pairs, leaves = fla_pairs(FLA_LENGTHS[0])
        for name, (_, theirs) in pairs.items():
            try:
                theirs()
                with_gradients(theirs, leaves[name][1])()
            except Exception:  # what cannot run is told where it is measured
                continue
        torch.cuda.synchronize()


FLA_LENGTHS = (8192, 32768)


def fla_rows() -> list[dict[str, Any]]:
    """Beside flash-linear-attention where the function is the same."""
    try:
        import fla
    except ImportError as missing:
        say(f"flash-linear-attention is not here ({missing})")
        return []
    from triton.runtime import driver
    from triton.testing import do_bench

    say(f"flash-linear-attention {fla.__version__}")
    workers = max(1, min(12, torch.multiprocessing.cpu_count() - 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(fla_compile, range(workers), [workers] * workers))
    say(f"  its launches are compiled after {time.time() - START:.0f} s")
    rows = []
    # Its kernels choose their launches by measuring; .1 s for each of some hundred is more than they need.
    with mock.patch.object(driver.active, "get_benchmarker", lambda: partial(do_bench, warmup=5, rep=25)):
        for length in FLA_LENGTHS:
            measure.release(DEVICE)
            pairs, leaves = fla_pairs(length)
            for name, (ours, theirs) in pairs.items():
                with torch.inference_mode():
                    difference = error(ours(), theirs().transpose(1, 2).double())
                    # In a graph, so that the host's share of neither counts.
                    took = {n: measure.graphed_times(f, DEVICE, calls=5) for n, f in (("ours", ours), ("fla", theirs))}
                row: dict[str, Any] = {"length": length, "what": name, "difference": difference}
                row |= {n: t.median for n, t in took.items()}
                words = []
                if length == FLA_LENGTHS[0]:
                    for n, call, of in zip(("ours", "fla"), (ours, theirs), leaves[name], strict=True):
                        try:
                            both = with_gradients(call, of)
                            row[f"{n}_both_eager"] = measure.times(both, DEVICE).median
                            row[f"{n}_both"] = measure.graphed_times(both, DEVICE, calls=3).median
                            words.append(f"{row[f'{n}_both']:.2f} (launched by the host {row[f'{n}_both_eager']:.2f})")
                        except RuntimeError as refused:  # its gated delta on some versions of Triton
                            for x in of:
                                x.requires_grad_(False)
                            row[f"{n}_refuses"] = str(refused)
                            words.append(f"none of {n} ({str(refused)[:100]}...)")
                rows.append(row)
                say(
                    f"fla {name} {length}: ours {row['ours']:.3f} ms, fla {row['fla']:.3f} "
                    f"({row['fla'] / row['ours']:.2f} times as long)"
                    f"{'; with gradients ' * bool(words)}{' and '.join(words)}; results differ by {difference:.1e}"
                    f"{foretold(f'fla {name} {length}')}{foretold(f'fla {name} both') if words else ''}"
                )
    return rows


# --- launch parameters


# Ways of a token's read: heads one after the other, and as columns of a product.
AHEAD = (192 << 10) * 132
READ_ONE: dict[bool, dict[str, Any]] = {
    False: {"dot": False, "features": 0, "numbers": 2048, "piece": 32, "warps": 1, "stages": 1, "ahead": AHEAD},
    True: {"dot": True, "features": 64, "numbers": 4096, "piece": 0, "warps": 4, "stages": 4, "ahead": AHEAD},
}
READ_ONE_CHANGES: tuple[tuple[bool, dict[str, Any]], ...] = (
    (True, {}), (True, {"ahead": 0}), (False, {}), (False, {"piece": 1024}), (False, {"numbers": 1024}),
    (True, {"stages": 3}), (True, {"stages": 5}), (True, {"numbers": 2048, "warps": 2}),
    (True, {"numbers": 8192, "warps": 8}), (True, {"features": 128, "numbers": 8192, "stages": 3}),
    (True, {"features": 128, "warps": 2, "stages": 3}), (True, {"features": 32, "numbers": 2048, "stages": 6}),
)  # fmt: skip
ABSORB: tuple[dict[str, int], ...] = (
    {"warps": 8}, {"warps": 8, "registers": 128}, {"warps": 16}, {"warps": 4}, {"warps": 4, "registers": 128},
)  # fmt: skip
SWEEP_SECONDS = 60  # of the sweep of decoding alone
# Heads, groups, head size, features, tokens, and whether there is no window; what `additive` is measured with.
LLAMA, ALONE = (32, 8, 128, 256, 32768, False), (32, 32, 128, 128, 8192, True)
STATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scan", {}), ("scan", {"stages": 3}), ("scan", {"stages": 2}), ("scan", {"stages": 4}), ("scan", {"values": 32}),
    ("scan", {"features": 128}), ("scan", {"features": 128, "values": 32}), ("scan", {"features": 128, "warps": 8}),
    ("sums", {}), ("sums", {"features": 128, "warps": 8}), ("sums", {"features": 128, "values": 64}),
    ("sums", {"values": 64}), ("sums", {"warps": 8}), ("sums", {"registers": 128}),
)  # fmt: skip
READ: tuple[dict[str, Any], ...] = (
    {}, {"stages": 2}, {"features": 128, "stages": 2}, {"features": 32}, {"features": 32, "stages": 4},
    {"registers": 168}, {"heads": 2}, {"heads": 2, "warps": 8, "registers": 168}, {"warps": 8, "registers": 255},
    {"warps": 8, "registers": 168}, {"features": 32, "warps": 8, "registers": 168},
)  # fmt: skip
# With decays, and without sums of weights.
STATES_DECAY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("scan", {}), ("scan", {"stages": 4}), ("scan", {"stages": 2}), ("scan", {"warps": 8}),
    ("scan", {"warps": 8, "stages": 4}), ("scan", {"features": 128, "warps": 8}), ("scan", {"values": 32}),
    ("scan", {"features": 32}), ("sums", {}),
)  # fmt: skip
READ_DECAY: tuple[dict[str, Any], ...] = (
    {}, {"stages": 3}, {"stages": 1}, {"features": 32, "stages": 3}, {"features": 32, "stages": 4},
    {"features": 128, "stages": 1}, {"warps": 8, "registers": 255}, {"warps": 8, "registers": 168},
    {"registers": 168}, {"values": 64, "warps": 8, "registers": 128},
)  # fmt: skip
GRADIENTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("queries", {}), ("queries", {"stages": 2}), ("queries", {"registers": 255}), ("queries", {"features": 64}),
    ("queries", {"stages": 2, "registers": 255}), ("queries", {"features": 64, "stages": 2}),
    ("keys", {}), ("keys", {"stages": 2}), ("keys", {"registers": 255}), ("keys", {"warps": 8, "registers": 168}),
    ("keys", {"warps": 8, "registers": 255}), ("keys", {"features": 64}), ("keys", {"features": 64, "stages": 2}),
    ("query_sums", {}), ("query_sums", {"stages": 3}), ("query_sums", {"registers": 128}),
    ("query_sums", {"values": 64, "warps": 4}),
)  # fmt: skip
FEATURES: tuple[dict[str, Any], ...] = (
    {}, {"registers": 128}, {"registers": 144}, {"registers": 192}, {"registers": 255}, {"warps": 8, "registers": 128},
    {"tokens": 32}, {"tokens": 32, "warps": 2}, {"tokens": 128, "warps": 8},
)  # fmt: skip
DELTA: tuple[tuple[str, dict[str, Any]], ...] = (
    ("delta", {}), ("delta", {"stages": 1}), ("delta", {"stages": 2}), ("delta", {"stages": 4}),
    ("delta", {"values": 16}), ("delta", {"values": 16, "stages": 2}), ("delta", {"values": 64}),
    ("delta", {"warps": 8}), ("writes", {"registers": 128}), ("writes", {"registers": 255}),
    ("writes", {"warps": 8, "registers": 128}), ("writes", {"warps": 8, "registers": 80}),
    ("apart", {}), ("apart", {"stages": 1}),
)  # fmt: skip


def with_config(name: str, change: dict[str, int]) -> Any:
    """A context in which the launches of that name, or of one that begins so, have other parameters."""
    configs = tuned.linear_config(2, DEVICE)
    changed = {of: config | change if of.startswith(name) else config for of, config in configs.items()}
    module = triton_linear_delta if name in ("delta", "writes") else triton_linear_layout
    return mock.patch.object(module, "linear_config", lambda *_: changed)


def with_decode_config(config: dict[str, Any]) -> Any:
    """A context in which a token reads its state with these parameters."""
    return mock.patch.object(triton_linear_decode, "linear_decode_config", lambda *_: config)


def sweep_jobs() -> list[tuple[str, Any, Any]]:
    """What is tried: a kernel, sizes, and what is changed."""
    jobs: list[tuple[str, Any, Any]] = [("delta", ALONE, change) for change in DELTA]
    # The launch of gradients inside chunks also where plain PyTorch stands in for it, with and without decays.
    jobs += [("inside", (4, 4, dim, dim, 8192, True), decays) for dim in (64, 128, 256) for decays in (True, False)]
    jobs += [("states", (*ALONE, "decay"), change) for change in STATES_DECAY]
    jobs += [("read", (*ALONE, "decay"), change) for change in READ_DECAY]
    jobs += decode_jobs()
    jobs += [("gradients", ALONE, change) for change in GRADIENTS]
    for shape in (LLAMA, ALONE):
        jobs += [("states", shape, change) for change in STATES]
        jobs += [("read", shape, change) for change in READ]
        jobs += [("segments", shape, segment) for segment in (1, 2)]
    jobs += [("features", LLAMA, change) for change in FEATURES]
    return jobs


def decode_jobs() -> list[tuple[str, Any, Any]]:
    """The same of decoding: what `tuned.py` says of every shape first, then other ways, for all shapes in turn."""
    shapes = [(*sizes, 64 << 20) for sizes in DECODE_SHAPES]
    of_tuned = {shape: tuned.linear_decode_config(shape[1], shape[3], DEVICE) for shape in shapes}
    jobs: list[tuple[str, Any, Any]] = [("decode", shape, None) for shape in shapes]
    absorbed = ((8, 128, 256), (3, 64, 128), (4, 256, 512))
    jobs += [
        ("absorb", sizes, change) for change in (None, *ABSORB) for sizes in absorbed if not change or sizes[1] < 256
    ]
    for dot, change in READ_ONE_CHANGES:
        for shape in shapes:
            # One after the other, many heads take twice as long as by products.
            if (dot or shape[1] <= 4) and READ_ONE[dot] | change != of_tuned[shape]:
                jobs.append(("decode", shape, (dot, change)))
    return jobs


def sweep_call(what: str, shape: Any, change: Any) -> Callable[[], Any]:
    """A call of that kernel."""
    if what == "decode":
        step, _ = decode_step(*shape)
        found = change and READ_ONE[change[0]] | change[1]

        def decode() -> None:
            with with_decode_config(found or tuned.linear_decode_config(shape[1], shape[3], DEVICE)):
                step()

        return decode
    if what == "absorb":
        groups, dim, count = shape
        take = absorb_step(groups, dim, count, (64 << 20) // (4 * groups * dim * count), 129)
        found = change or tuned.linear_absorb_config(count // 2, True, DEVICE)

        def absorbs() -> None:
            with mock.patch.object(triton_linear_decode, "linear_absorb_config", lambda *_: found):
                take()

        return absorbs
    heads, groups, dim, count, length, own, *decay = shape
    if what == "features":
        rows = torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16)
        weight = torch.randn(heads, dim, count // 2, device=DEVICE, dtype=BF16)
        gain, turn = torch.randn(heads, device=DEVICE), torch.randn(heads, dim, device=DEVICE)
        config = tuned.linear_features_config(count // 2, DEVICE) | change

        def make() -> None:
            with mock.patch.object(triton_linear_features, "linear_features_config", lambda *_: config):
                features(rows, weight, None, "hedgehog", 1.0, gain, turn)

        return make
    stream = length if own else length - PAGE
    pages = torch.arange(length // PAGE, device=DEVICE)
    chunk = (pages if own else (pages - 1).clamp(min=0)).expand(1, groups, -1).contiguous()
    query = torch.rand(1, heads, length, count, device=DEVICE, dtype=BF16)
    key = torch.rand(1, groups, stream, count, device=DEVICE, dtype=BF16)
    value = torch.rand(1, groups, stream, dim, device=DEVICE, dtype=BF16)
    segment = change if what == "segments" else SEGMENT
    where = layout(Rows.whole(1, length), chunk, stream, own=own, segment=segment)
    if decay:
        where = with_decays(where, -0.05 * torch.rand(1, groups, stream, device=DEVICE), stream)
    if what == "states":
        way, more = change

        def states() -> None:
            scans = mock.patch.object(triton_linear_states, "linear_scans", lambda *_: way == "scan")
            with with_config(way, more), scans:
                segment_states(key, value, None, where)

        return states
    if what == "delta":
        strength, log_decay = torch.rand(1, groups, stream, device=DEVICE), -torch.rand(groups, device=DEVICE)
        unit = normalize(key, dim=-1)

        def delta() -> None:
            way, more = change
            # Apart: no launch takes its place before the one ahead of it has ended.
            apart = mock.patch.object(triton_linear_layout, "launches_overlap", lambda _: way != "apart")
            with with_config("delta" if way == "apart" else way, more), apart, torch.inference_mode():
                gated_delta(query, unit, value, None, where, log_decay=log_decay, strength=strength)

        return delta
    if what == "inside":
        strength, unit = torch.rand(1, groups, stream, device=DEVICE), normalize(key, dim=-1)
        decay_of = -torch.rand(groups, device=DEVICE) if change else None
        where = layout(Rows.whole(1, length), chunk, stream, own=own, segment=1)
        step_back = with_gradients(
            lambda: gated_delta(query, unit, value, None, where, log_decay=decay_of, strength=strength)[0],
            (query, unit, value),
        )

        def inside() -> None:
            with mock.patch.object(triton_linear_delta, "linear_inside", lambda *_: True):
                step_back()

        return inside
    if what == "gradients":
        both = with_gradients(lambda: additive(query, key, value, None, where)[0], (query, key, value))

        def gradients() -> None:
            with with_config(*change):
                both()

        return gradients
    out, lse = (
        torch.randn(1, heads, length, dim, device=DEVICE, dtype=BF16),
        torch.randn(1, heads, length, device=DEVICE),
    )
    if what == "segments":
        window: dict[str, Any] = {} if own else {"window": (out, lse), "log_gain": lse}
        return lambda: additive(query, key, value, None, where, **window)
    slots, _ = segment_states(key, value, None, where)
    merged, mean = None if own else (out, lse, lse), not decay

    def reads() -> None:
        with with_config("read", change):
            triton_linear.read(query, key, value, slots, where, merged, mean=mean, mass=mean)

    return reads


def sweep_run(
    jobs: list[tuple[str, Any, Any]], numbers: list[int], timed: bool, told: Any, until: float = math.inf
) -> None:
    """Call those jobs, once or `timed`, in a process of its own; tells each that is done, and its milliseconds.

    A launch that breaks the process's context ends it here: the first job that was not told is the one. None begins
    after the time `until`.
    """
    for number in numbers:
        if time.time() > until:
            return
        took = math.nan
        try:
            call = sweep_call(*jobs[number])
            if timed:
                measure.release(DEVICE)
                took = try_time(call)
            else:  # Triton's cache has it then
                call()
                torch.cuda.synchronize()
        except torch.AcceleratorError as failure:
            print(f"  {jobs[number]}: {str(failure)[:150]}", flush=True)
            return
        except Exception as failure:  # a compiler's refusal is a result, too
            print(f"  {jobs[number]}: {type(failure).__name__}: {str(failure)[:150]}", flush=True)
        told.put((number, took))


def sweep_processes(
    jobs: list[tuple[str, Any, Any]], lists: list[list[int]], *, timed: bool, until: float = math.inf
) -> tuple[dict[int, float], set[int]]:
    """Run lists of jobs, each in a process of its own and all side by side; behind a job that breaks its process
    another takes what is left. Milliseconds by job, and the jobs that broke theirs; none begins after `until`."""
    context = multiprocessing.get_context("spawn")
    took, breaks = dict[int, float](), set[int]()
    while lists := [numbers for numbers in lists if numbers]:
        queues = [context.SimpleQueue() for _ in lists]
        processes = [
            context.Process(target=sweep_run, args=(jobs, numbers, timed, told, until))
            for numbers, told in zip(lists, queues, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        for place, (numbers, told) in enumerate(zip(lists, queues, strict=True)):
            while not told.empty():
                number, ms = told.get()
                took[number] = ms
            left = [number for number in numbers if number not in took]
            late = time.time() > until  # then they may as well not have begun
            breaks.update([] if late else left[:1])
            lists[place] = [] if late else left[1:]
    return took, breaks


def sweep_rows() -> list[dict[str, Any]]:
    """Other launch parameters for the kernels; the fastest should be those of `tuned.py`, the first of each list.

    Every kernel is timed in a process of its own, so that a launch that breaks it ends nothing else.
    """
    return sweep_through(sweep_jobs(), until=math.inf, apart=True)


def sweep_decode_rows() -> list[dict[str, Any]]:
    """The same of decoding alone, in SWEEP_SECONDS: what has not been timed by then is left out."""
    rows = sweep_through(decode_jobs(), until=time.time() + SWEEP_SECONDS, apart=False)
    copy = measure.copy_bandwidth(DEVICE)
    say(f"  of a copy's bandwidth, {copy / 1e9:.0f} GB/s, over 64 MiB: as in tuned.py, and the best that was tried")
    for groups, share, dim, count in DECODE_SHAPES:
        shape = (groups, share, dim, count, 64 << 20)
        tried = [row for row in rows if row["shape"] == shape and math.isfinite(row.get("us", math.nan))]
        each = groups * count * (dim + 1) * 4
        least = -(-shape[-1] // each) * each / copy * 1e6
        ours = [f"{least / row['us']:.3f}" for row in tried if row["change"] is None]
        if tried:
            best = min(tried, key=lambda row: row["us"])
            told = foretold(f"decode {groups} {share} {dim} {count}")
            say(
                f"  {groups} groups of {share}, D {dim}, F {count}: {' '.join(ours) or 'not timed'}, "
                f"{least / best['us']:.3f} with {best['change'] or 'the same'}{told}"
            )
    return rows


def sweep_through(jobs: list[tuple[str, Any, Any]], *, until: float, apart: bool) -> list[dict[str, Any]]:
    """Compile all, time one after the other until then, and tell the fastest of each kernel and shape.

    With `apart` each kernel has a process of its own.
    """
    workers = max(1, min(14, torch.multiprocessing.cpu_count() - 2))
    _, breaks = sweep_processes(jobs, [list(range(at, len(jobs), workers)) for at in range(workers)], timed=False)
    say(f"  launches are compiled after {time.time() - START:.0f} s")
    rows: list[dict[str, Any]] = []
    best: dict[str, list[tuple[float, str]]] = {}
    for of in dict.fromkeys(what if apart else "" for what, _, _ in jobs):
        numbers = [number for number, (what, _, _) in enumerate(jobs) if of in ("", what) and number not in breaks]
        took, more = sweep_processes(jobs, [numbers], timed=True, until=until)
        breaks |= more
        for number, ms in took.items():
            what, shape, change = jobs[number]
            us = ms * 1e3 / (4 if what == "decode" else 1)
            rows.append({"what": what, "shape": shape, "change": change, "us": us})
            say(f"sweep {what} {shape} {change}: {us:.1f} us")
            best.setdefault(f"{what} {shape}", []).append((us if math.isfinite(us) else math.inf, str(change)))
    for name, found in best.items():
        least, change = min(found)
        say(f"best {name}: {least:.1f} us with {change}; the first tried {found[0][0]:.1f} us")
    for number in sorted(breaks):
        say(f"  BREAKS {jobs[number]}")
        rows.append(dict(zip(("what", "shape", "change"), jobs[number], strict=True)) | {"breaks": True})
    return rows


def try_time(call: Callable[[], Any]) -> float:
    """Milliseconds of a call in a CUDA graph; NaN where it needs more than the chip has."""
    try:
        return measure.graphed_times(call, DEVICE, calls=3, seconds=0.1).median
    except Exception as failure:  # a compiler's refusal is a result
        print(f"  {type(failure).__name__}: {str(failure)[:150]}", flush=True)
        torch.cuda.synchronize()
        return math.nan


SECTIONS: dict[str, Callable[[], Any]] = {
    "numerics": numerics,
    "model": model_rows,
    "decode": decode_rows,
    "parts": part_rows,
    "prefill": prefill_rows,
    "train": train_rows,
    "fla": fla_rows,
    "sweep": sweep_rows,
    "sweep-decode": sweep_decode_rows,
}


def main() -> None:
    """See `run_sections`; all but the sweeps of launch parameters."""
    run_sections("gpu_linear", SECTIONS, [name for name in SECTIONS if not name.startswith("sweep")])


if __name__ == "__main__":
    main()
