"""Sections `decode`, `parts`, `prefill` and `train` of `gpu_linear.py`: times beside what was foretold of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.functional import normalize

from compress.bench import measure
from compress.bench.dense import dense_attention
from compress.runtime import (
    triton_linear,
    triton_linear_decode,
    triton_linear_delta,
)
from compress.runtime.mixer import Kinds, LayerFacts
from compress.runtime.mixer_linear import LinearMixer
from compress.runtime.pages import Pages
from compress.runtime.reference import Rows
from compress.runtime.span import PAGE, Span
from compress.runtime.step import Step
from compress.runtime.triton_linear_decode import absorb, read_one
from compress.runtime.triton_linear_features import features, features_of_both
from compress.runtime.triton_linear_heads import query_features
from compress.runtime.triton_linear_layout import layout, with_decays
from compress.runtime.triton_linear_states import Slots, running, segment_states
from compress.targets.linear import LinearGroup
from scripts.gpu_check import say

DEVICE = torch.device("cuda")
BF16, F32 = torch.bfloat16, torch.float32
# What is expected of an H100 80GB, from earlier runs, and what is wanted; both are told beside every figure.
FORETOLD: dict[str, float] = {
    "decode 8 4 128 256": 0.87, "decode 8 4 128 128": 0.88, "decode 3 3 64 128": 0.89, "decode 4 2 256 512": 0.88,
    "decode 4 8 128 256": 0.84, "decode 2 16 128 256": 0.77, "decode 16 1 128 128": 0.91,
    "features, 64 sequences": 4.8, "read behind features": 29.3, "pages, none leaves": 1.4,
    "pages, every sequence takes one in": 71.5,
    "window": 0.56, "features of queries": 0.365, "features of keys": 0.096, "features of both": 0.452, "states": 0.19,
    "running sums of them": 0.152, "read and merge": 0.594,
    "delta, sums of decays": 0.004, "delta, writes of chunks": 0.156, "delta, states along them": 0.237,
    "delta, read": 0.15,
    "prefill 8192": 0.479, "prefill 131072": 7.33, "largest over smallest": 1.044,
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
# Ways of a token's read: heads one after the other, and as columns of a product.
AHEAD = (192 << 10) * 132
READ_ONE: dict[bool, dict[str, Any]] = {
    False: {"dot": False, "features": 0, "numbers": 2048, "piece": 32, "warps": 1, "stages": 1, "ahead": AHEAD},
    True: {"dot": True, "features": 64, "numbers": 4096, "piece": 0, "warps": 4, "stages": 5, "ahead": AHEAD},
}
DECODE_SHAPES = (
    (8, 4, 128, 256), (8, 4, 128, 128), (3, 3, 64, 128), (4, 2, 256, 512), (4, 8, 128, 256), (2, 16, 128, 256),
    (16, 1, 128, 128),
)  # fmt: skip


def with_decode_config(config: dict[str, Any]) -> Any:
    """A context in which a token reads its state with these parameters."""
    return mock.patch.object(triton_linear_decode, "linear_decode_config", lambda *_: config)


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
