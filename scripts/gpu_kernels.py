"""The whole GPU check: numerics of every kernel, then time and memory beside dense attention; writes JSON and a table.

python scripts/gpu_kernels.py [FOLDER]     one GPU, under 8 minutes

Rows that do not fit into the GPU's memory are skipped, and the table says which.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.bench import kernel, measure
from compress.bench.dense import dense_attention
from compress.bench.flex import flex_prefill
from compress.bench.kernel import Shape, mix, random_qkv, spans_of, visible_share, with_mix
from compress.bench.memory import attempt, decode_need, model_need, prefill_need
from compress.bench.model import model_row
from compress.bench.report import break_even, model_lines
from compress.environment import environment
from compress.models.source import ModelSource, random_model
from compress.plan import ModelShape
from compress.profile.heads.influence import Influence
from compress.profile.passes.tiles import LayerTensors, Workspace, tiles
from compress.profile.statistic import Item, Subject
from compress.runtime import flash
from compress.runtime.impl import IMPLS
from compress.runtime.pages import Pages
from compress.runtime.span import PAGE, Span
from scripts import gpu_check
from scripts.gpu_check import error, poison, say
from scripts.gpu_models import LLAMA

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
QWEN = Shape("qwen2.5-7b", 28, 4, 128)
RULES = [Span(70, 33, 0.25), Span(0, 130, 0.0), Span(), Span(4, -20, 0.5), Span(4, 60, 0.125, PAGE)]
LSE_BOUND = 2**-20  # relative, some roundings of float32


def exact_rows(query: Any, key: Any, value: Any, rules: list[Span], at: torch.Tensor) -> torch.Tensor:
    """Attention of the queries at positions `at` in float64, `[B, H, len(at), D]`."""
    share = query.shape[1] // key.shape[1]
    keys = torch.arange(key.shape[2], device=DEVICE)
    out = []
    for head in range(query.shape[1]):
        seen = rules[head // share].visible(at[:, None], keys[None, :])
        scores = query[:, head, at].double() @ key[:, head // share].double().transpose(-1, -2)
        weights = (scores * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(weights @ value[:, head // share].double())
    return torch.stack(out, dim=1)


def exact_lse(query: Any, key: Any, rules: list[Span], at: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of the same rows in float64, `[B, H, len(at), 1]`."""
    share, keys, found = query.shape[1] // key.shape[1], torch.arange(key.shape[2], device=DEVICE), []
    for head in range(query.shape[1]):
        scores = query[:, head, at].double() @ key[:, head // share].double().transpose(-1, -2)
        seen = rules[head // share].visible(at[:, None], keys[None, :])
        found.append((scores * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).logsumexp(-1, keepdim=True))
    return torch.stack(found, dim=1)


def flash_rows(query: Any, key: Any, value: Any, rules: list[Span], at: torch.Tensor) -> torch.Tensor:
    """Dense flash attention of the queries at `at`, each over exactly the keys that it sees, `[B, H, len(at), D]`."""
    share = query.shape[1] // key.shape[1]
    keys = torch.arange(key.shape[2], device=DEVICE)
    out = torch.empty(*query.shape[:2], len(at), query.shape[-1], device=DEVICE, dtype=query.dtype)
    for group, rule in enumerate(rules):
        heads, own = slice(group * share, (group + 1) * share), slice(group, group + 1)
        for number, t in enumerate(at.tolist()):
            seen = rule.visible(torch.tensor(t, device=DEVICE), keys)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out[:, heads, number : number + 1] = scaled_dot_product_attention(
                    query[:, heads, t : t + 1], key[:, own, seen], value[:, own, seen], enable_gqa=True
                )
    return out


def numerics() -> list[dict[str, Any]]:
    """Errors against float64 beside those of dense flash attention over the same keys, random in every run."""
    torch.seed()
    rows = []
    cases = [(dim, 4, length) for dim in (64, 96, 128, 256) for length in (1, 63, 777)]
    cases += [(128, 7, 4097), (128, 1, 1025), (128, 4, 16385), (128, 4, 131072 - 1)]
    for dim, share, length in cases:
        shape = Shape("check", share * len(RULES), len(RULES), dim)
        need = 3 * prefill_need(shape, 1, length, torch.float32)
        found = attempt(f"numerics of {length} tokens", need, DEVICE, partial(checks, shape, length), say)
        rows += found or []
        measure.release(DEVICE)
    rows += gradients()
    worst = max(row["ratio"] for row in rows)
    bad = [row for row in rows if not row["ok"]]
    say(f"numerics: {len(rows)} checks, worst error {worst:.3f} times dense flash's; over 1.1: {len(bad)}")
    for row in bad:
        say(f"  {row}")
    return rows


def checks(shape: Shape, length: int) -> list[dict[str, Any]]:
    """Prefill by every kernel, and decode, at one shape and length."""
    rows = []
    dim, share = shape.head_dim, shape.query_heads // shape.groups
    query, key, value = random_qkv(shape, 1, length, DEVICE, DTYPE)
    at = torch.unique(torch.cat([torch.randint(length, (30,)), torch.tensor([0, length - 1])])).to(DEVICE)
    exact = exact_rows(query, key, value, RULES, at)
    bound = error(flash_rows(query, key, value, RULES, at), exact)
    for impl in ("triton", "flash"):
        if impl == "flash" and flash.refusal(DEVICE, DTYPE, dim) is not None:
            continue
        poison()
        if impl == "flash":
            found = flash.attend(query, key, value, RULES, dim**-0.5)
        else:
            found = IMPLS[impl].prefill(query, key, value, RULES)
        rows.append(_check("prefill", impl, dim, share, length, error(found[:, :, at], exact), bound, found))
    poison()
    lse = IMPLS["triton"].prefill(query, key, value, RULES, keep_lse=True)[1][..., None]
    exact = exact_lse(query, key, RULES, at)
    rows.append(_check("prefill lse", "triton", dim, share, length, error(lse[:, :, at], exact), LSE_BOUND, lse))
    # The last query of the same tokens through pages, beside a sequence that is half as long.
    half = max(1, length // 2)
    pages = paged(key.expand(2, -1, -1, -1), value.expand(2, -1, -1, -1))
    lengths = torch.tensor([length, half], dtype=torch.int32, device=DEVICE)
    last = lengths.long() - 1
    poison()
    found = IMPLS["triton"].decode(query[0][:, last].transpose(0, 1).contiguous(), pages, lengths, RULES)
    exact = exact_rows(query, key, value, RULES, last)
    bound = error(flash_rows(query, key, value, RULES, last), exact)
    rows.append(_check("decode", "triton", dim, share, length, error(found.transpose(0, 1)[None], exact), bound, found))
    one = query[0][:, last].transpose(0, 1).contiguous()
    lse = IMPLS["triton"].decode(one, pages, lengths, RULES, keep_lse=True)[1].T[None, :, :, None]
    exact = exact_lse(query, key, RULES, last)
    rows.append(_check("decode lse", "triton", dim, share, length, error(lse, exact), LSE_BOUND, lse))
    return rows


def paged(key: torch.Tensor, value: torch.Tensor) -> Pages:
    """Tokens `[B, G, T, D]` in pages of random places; what lies behind the last token is NaN."""
    batch, groups, length, _ = key.shape
    numbers = -(-length // PAGE)
    order = torch.randperm(batch * groups * numbers, device=DEVICE)
    pools = []
    for tokens in (key, value):
        whole = torch.nn.functional.pad(tokens, (0, 0, 0, numbers * PAGE - length), value=torch.nan)
        pool = torch.empty(len(order), PAGE, tokens.shape[-1], device=DEVICE, dtype=tokens.dtype)
        pool[order] = whole.reshape(-1, PAGE, tokens.shape[-1])
        pools.append(pool)
    return Pages(pools[0], pools[1], order.view(batch, groups, numbers).to(torch.int32))


def _check(
    what: str, impl: str, dim: int, share: int, length: int, found: float, bound: float, out: torch.Tensor
) -> dict[str, Any]:
    written = bool(out.isfinite().all())
    # One visible key: attention is a copy and flash's error is zero, so ours has to be as good as zero.
    ok = written and found <= max(1.1 * bound, 1e-6)
    ratio = found / bound if bound > 0 else float(found > 1e-6)
    return {
        "what": what,
        "impl": impl,
        "head_dim": dim,
        "share": share,
        "length": length,
        "error": found,
        "flash_error": bound,
        "ratio": ratio,
        "all_written": written,
        "ok": ok,
    }


def gradients() -> list[dict[str, Any]]:
    """Gradients of the prefill kernel against autograd of a float64 softmax, beside those of dense flash attention."""
    rows = []
    for dim, share, length in ((64, 1, 129), (128, 4, 515), (96, 2, 300), (256, 2, 257)):
        leaves = random_qkv(Shape("check", share * len(RULES), len(RULES), dim), 1, length, DEVICE, DTYPE)
        weight = torch.randn(1, share * len(RULES), length, dim, device=DEVICE, dtype=DTYPE)
        at = torch.arange(length, device=DEVICE)
        full = [Span()] * len(RULES)
        exact = grads(partial(exact_rows, rules=RULES, at=at), leaves, weight, torch.float64)
        ours = grads(partial(IMPLS["triton"].prefill, spans=RULES), leaves, weight, DTYPE)
        exact_full = grads(partial(exact_rows, rules=full, at=at), leaves, weight, torch.float64)
        dense = grads(partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True), leaves, weight, DTYPE)
        wider = torch.cat([weight, torch.randn_like(weight[..., :1])], dim=-1)
        exact_both = grads(partial(with_lse, exact_rows, exact_lse, rules=RULES, at=at), leaves, wider, torch.float64)
        both = grads(partial(kernel_with_lse, RULES), leaves, wider, DTYPE)
        for place, name in enumerate(("dQ", "dK", "dV")):
            bound = error(dense[place], exact_full[place])
            for what, a, b in ((name, ours, exact), (f"{name} through lse", both, exact_both)):
                rows.append(_check(what, "triton", dim, share, length, error(a[place], b[place]), bound, a[place]))
    return rows


def with_lse(
    out_of: Callable[..., torch.Tensor],
    lse_of: Callable[..., torch.Tensor],
    query: Any,
    key: Any,
    value: Any,
    **given: Any,
) -> torch.Tensor:
    """Output and log-sum-exp of an attention in one tensor, `[B, H, T, D + 1]`."""
    return torch.cat([out_of(query, key, value, **given), lse_of(query, key, **given)], dim=-1)


def kernel_with_lse(rules: list[Span], query: Any, key: Any, value: Any) -> torch.Tensor:
    """The same by the kernel."""
    out, lse = IMPLS["triton"].prefill(query, key, value, rules, keep_lse=True)
    return torch.cat([out, lse[..., None].to(out.dtype)], dim=-1)


def grads(
    call: Callable[..., torch.Tensor], leaves: list[torch.Tensor], weight: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Gradients of the weighted sum of an attention for query, key and value."""
    own = [tensor.detach().to(dtype).requires_grad_() for tensor in leaves]
    return torch.autograd.grad((call(*own) * weight.to(dtype)).sum(), own)


def influence_rows() -> list[dict[str, Any]]:
    """Influence tables of one Llama-3-8B-shaped layer: seconds and the most memory beyond its inputs."""
    rows = []
    for length in (8192, 32768):
        for strip in (64 << 20, 256 << 20, 1 << 30):
            # A strip is held several times over: scores, their gradients, and what is summed.
            need = prefill_need(LLAMA, 1, length, torch.float32) + 8 * strip
            what = f"influence, one layer, {length} tokens, strips of {strip >> 20} MiB"
            row = attempt(what, need, DEVICE, partial(influence_row, length, strip, what), say)
            rows += [row] if row else []
    return rows


def influence_row(length: int, strip: int, what: str) -> dict[str, Any]:
    """The table of one layer, in strips of so many bytes."""
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        layers=1,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        native_windows=(None,),
        fingerprint="sha256:" + "0" * 64,
    )
    query, key, value = (tensor[0].contiguous() for tensor in random_qkv(LLAMA, 1, length, DEVICE, DTYPE))
    layer = LayerTensors(0, query, key, value, 128**-0.5, None, torch.randn_like(query, dtype=torch.float32))
    measure.release(DEVICE)
    before = torch.cuda.memory_allocated()
    influence, item = Influence(), Item(cast(Any, None), length, 0, what)
    sums = influence.begin(Subject(cast(Any, None), shape, torch.device(DEVICE)), [length])[length]
    start = time.time()
    for tile in tiles(layer, Workspace(DEVICE), strip):
        influence.add(sums, tile, item)
    torch.cuda.synchronize()
    took = time.time() - start
    most = torch.cuda.max_memory_allocated() - before
    say(f"{what}: {took:.2f} s, {most / 2**30:.2f} GiB")
    return {"length": length, "strip_bytes": strip, "seconds": took, "peak_bytes": most}


def prefill_rows(shape: Shape) -> list[dict[str, Any]]:
    """Prefill of both plans at three lengths, every implementation in turn with every dense back end.

    Plan A* is plan A with its full groups apart from each other, as a searched plan has them.
    """
    rows = []
    for length in (16384, 65536, 131072):
        need = 2 * prefill_need(shape, 1, length, DTYPE)
        found = attempt(f"{shape.name} prefill {length}", need, DEVICE, partial(long_rows, shape, length), say)
        rows += found or []
        measure.release(DEVICE)
    return rows


def long_rows(shape: Shape, length: int) -> list[dict[str, Any]]:
    """Those of one length."""
    rows = []
    query, key, value = random_qkv(shape, 1, length, DEVICE, DTYPE)
    for name in ("A", "A*", "B"):
        groups = mix(name[0], shape.groups, length)
        if name == "A*":
            groups = [groups[group // 2 + group % 2 * (shape.groups // 2)] for group in range(shape.groups)]
        spans, share = spans_of(groups, length), visible_share(groups, length)
        calls: dict[str, Callable[[], Any]] = {"triton": partial(IMPLS["triton"].prefill, query, key, value, spans)}
        if flash.refusal(DEVICE, DTYPE, shape.head_dim) is None:
            calls["flash-4"] = partial(flash.attend, query, key, value, spans, shape.head_dim**-0.5)
        calls["flex-triton"] = flex_prefill(query, key, value, spans)
        for impl, call in list(calls.items()):
            try:
                call()
            except Exception as failure:  # a compiler's own failure is a result too
                say(f"  {name} {impl}: {type(failure).__name__} {str(failure)[:150]}")
                del calls[impl]
        dense = {f"dense {n}": call for n, call in dense_attention(query, key, value).items()}
        found = measure.times_in_turn({**dense, **calls}, DEVICE)
        base = {n.removeprefix("dense "): found.pop(n) for n in dense}
        fastest = min(time.median for time in base.values())
        listed = ", ".join(f"{n} {t.median:.3f}" for n, t in base.items())
        say(f"{shape.name} {length} {name}, density {share:.4f}; dense ms: {listed}")
        for impl, took in found.items():
            own, cudnn = fastest / took.median * share, base["cudnn"].median / took.median * share
            say(
                f"  {impl:11} {took.median:8.3f} ms ({took.lower:.3f} to {took.upper:.3f})  "
                f"{own:.3f} / density over the fastest dense, {cudnn:.3f} over cuDNN"
            )
            facts: dict[str, Any] = {
                "shape": shape.name,
                "plan": name,
                "length": length,
                "impl": impl,
                "ms": vars(took),
            }
            facts |= {"density": share, "dense_ms": {n: vars(t) for n, t in base.items()}}
            rows.append(facts | {"of_bound": own, "of_bound_cudnn": cudnn})
    return rows


def short_rows(shape: Shape) -> list[kernel.Row]:
    """Prefill under plan A at lengths where launches take longer than the arithmetic, as `auto` runs it."""
    rows = []
    for length in (256, 512, 1024, 2048, 4096, 8192):
        call = partial(kernel.prefill_row, shape, "A", 1, length, "auto", DEVICE, DTYPE)
        row = attempt(f"{shape.name} prefill A {length}", prefill_need(shape, 1, length, DTYPE), DEVICE, call, say)
        if row is None:
            continue
        dense = ", ".join(f"{n} {t.median * 1e3:.0f}" for n, t in row.dense.items())
        say(f"{shape.name} prefill A {length}: {row.plan.median * 1e3:.0f} us, dense {dense}")
        rows.append(row)
    return rows


def decode_rows(shape: Shape, copy: float) -> list[kernel.Row]:
    """Decode under plan A from 1k up, and at the sizes that the issue names."""
    rows = []
    sizes = [(1, 2**power) for power in range(10, 18)] + [(4, 16384), (4, 32768), (16, 32768), (16, 2048)]
    for batch, length in sizes:
        call = partial(kernel.decode_row, shape, "A", batch, length, "triton", DEVICE, DTYPE)
        what = f"{shape.name} decode A batch {batch} {length}"
        row = attempt(what, decode_need(shape, batch, length, DTYPE), DEVICE, call, say)
        if row is None:
            continue
        rate = (row.kept_bytes or 0) / row.plan.median * 1e3
        say(
            f"{what}: {row.plan.median * 1e3:.2f} us, dense "
            f"{row.dense[row.fastest].median * 1e3:.2f} ({row.fastest}), share {1 / row.speedup:.3f} of dense, bytes "
            f"{row.fraction:.3f}; {(row.kept_bytes or 0) / 1e6:.0f} MB at {rate / copy:.3f} of a copy"
        )
        rows.append(row)
        measure.release(DEVICE)
    return rows


def model_rows(name: str, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """A whole model under plan A at two batches, and what each is called."""
    source = ModelSource(name)
    assert source.values is not None
    weights = sum(weight.nbytes for weight in random_model(source.values, torch.device("meta"), DTYPE).parameters())
    dense = attempt(f"{name}, its weights", weights, DEVICE, partial(source.dense, DEVICE, DTYPE), say)
    for batch in (16, 1) if dense is not None else ():
        planned, label = with_mix(dense, "A", length), "A"
        call = partial(model_row, dense, planned, name, label, batch, length)
        what = f"{name}, plan {label}, batch {batch}, {length} tokens"
        row = attempt(what, model_need(dense, batch, length), DEVICE, call, say)
        del planned, call
        if row is not None:
            for line in model_lines(row):
                say(line)
            yield f"model batch {batch}", row.values()


def main() -> None:
    """Everything, in an order that keeps what matters if time runs out."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu_kernels")
    start = time.time()
    facts: dict[str, Any] = {"environment": environment()}

    def keep(name: str, value: Any) -> None:
        facts[name] = value
        facts["seconds"] = time.time() - start
        gpu_check.keep(folder, "gpu_kernels", facts)

    folder.mkdir(parents=True, exist_ok=True)
    copy = measure.copy_bandwidth(DEVICE)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a device copy moves {copy / 1e9:.0f} GB/s")
    keep("copy_bytes_per_s", copy)
    keep("numerics", numerics())
    say(f"-- {time.time() - start:.0f} s")
    keep("influence", influence_rows())
    say(f"-- {time.time() - start:.0f} s")
    for shape in (LLAMA, QWEN):
        rows = decode_rows(shape, copy)
        keep(f"decode {shape.name}", [row.values() for row in rows])
        least = break_even([row for row in rows if row.batch == 1], "decode")
        say(f"{shape.name} decode break-even, batch 1: {least} tokens")
    say(f"-- {time.time() - start:.0f} s")
    for name, found in model_rows("llama-3-8b", 32768):
        keep(name, found)
    measure.release(DEVICE)
    say(f"-- {time.time() - start:.0f} s")
    for shape in (LLAMA, QWEN):
        short = short_rows(shape)
        keep(f"short prefill {shape.name}", [row.values() for row in short])
        say(f"{shape.name} prefill break-even: {break_even(short, 'prefill')} tokens")
        keep(f"prefill {shape.name}", prefill_rows(shape))
    say(f"-- {time.time() - start:.0f} s")
    keep("done", True)
    print(json.dumps({"seconds": facts["seconds"]}))


if __name__ == "__main__":
    main()
