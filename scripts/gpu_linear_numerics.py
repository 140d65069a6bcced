"""Sections `numerics` and `model` of `gpu_linear.py`: every kernel against float64, and a small planned model."""

from __future__ import annotations

import math
import multiprocessing
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import normalize, pad

from compress.models.planned import with_runtime_plan
from compress.runtime import (
    triton_linear_states,
)
from compress.runtime.linear_states import chunk_states, own_chunk, read
from compress.runtime.maps import MAPS
from compress.runtime.merge import log_mass, merge
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.runtime.triton_linear import additive
from compress.runtime.triton_linear_decode import absorb, read_one
from compress.runtime.triton_linear_delta import gated_delta
from compress.runtime.triton_linear_features import KINDS, features, features_of_both
from compress.runtime.triton_linear_layout import layout
from compress.targets.linear import LinearGroup
from scripts.gpu_check import LINES, error, poison, say
from scripts.gpu_linear_speed import READ_ONE, with_decode_config
from scripts.gpu_models import two_layers, ways_to_the_end

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
# Norm of the difference over the norm: one rounding to bfloat16 is .0017, and weights and states are rounded besides.
MOST = {(BF16, "out"): 5e-3, (BF16, "gradient"): 1.2e-2, (F32, "out"): 1e-5, (F32, "gradient"): 2e-5}


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


def small_model(dtype: torch.dtype, **fields: Any) -> Any:
    """Two random Llama layers whose heads are all linear."""
    dense = two_layers(2, dtype)
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
            row = {"dtype": str(dtype), "plan": fields, **ways_to_the_end(model, length, tail, (1000, 5001))}
            say(
                f"model {dtype} {fields}: chunked {row['chunked']:.1e}, decoded in a graph "
                f"{row['decoded_in_a_graph']:.1e} from prefill; prefill {row['reference']:.1e} from plain PyTorch"
            )
            found.append(row)
    return found
