"""What `compress bench` prints: a table of kernels, and lines for whole models."""

from __future__ import annotations

from compress.bench.file import Kernel
from compress.bench.kernel import Row
from compress.bench.model import ModelRow
from compress.words import size

GIB = 2**30
SAVED = 1.02  # times as fast, below which two medians are not told apart


def break_even(rows: list[Row], what: str) -> int | None:
    """The least measured length from which on the plan is never slower than the fastest dense attention."""
    least = None
    for row in sorted((row for row in rows if row.what == what), key=lambda row: -row.length):
        if row.speedup < 1:
            break
        least = row.length
    return least


def kernel_lines(row: Row, copy: float) -> list[str]:
    """One row of the kernel table."""
    if row.kept_bytes is not None:
        rate = row.kept_bytes / row.plan.median * 1e3
        against_bound = f"{rate / 1e9:.0f} GB/s, {rate / copy:.2f} of a copy"
    else:
        against_bound = f"{row.speedup * row.fraction:.2f} of 1 / density"
    dense = row.dense[row.fastest]
    return [
        row.what,
        row.mix,
        str(row.batch),
        f"{row.length:,}",
        f"{row.plan.median:.4g} ({row.plan.lower:.4g} to {row.plan.upper:.4g})",
        f"{dense.median:.4g} {row.fastest}",
        f"{row.fraction:.4f}",
        f"{row.speedup:.2f}",
        against_bound,
    ]


KERNEL_HEAD = ("", "plan", "batch", "length", "ms", "dense ms", "fraction", "speed-up", "against the bound")


def _attention_words(share: float | None, most: float | None) -> str:
    """What attention and cache take of a dense step, which may be measured as slower without them."""
    if share is None or share <= 0:
        return "attention and cache take too little of a dense step to be measured"
    limit = "" if most is None else f"; no plan can gain more than {most:.2f} times"
    return f"attention and cache are {share:.2f} of a dense step{limit}"


def model_lines(row: ModelRow) -> list[str]:
    """The figures of one model, one a line."""
    ratios = row.ratios()
    graph = "CUDA graph" if row.decode_graph else "no graph"
    lines = [
        f"{row.shape}, plan {row.mix}, batch {row.batch}, {row.length:,} tokens",
        f"  prefill of one prompt: {row.plan.prefill:.1f} ms, dense {row.dense.prefill:.1f} "
        f"({row.dense.backend['prefill']}), speed-up {ratios['prefill_speedup']:.2f}",
        f"  decode step: {row.plan.decode.median:.3f} ms ({row.plan.decode.lower:.3f} to {row.plan.decode.upper:.3f}), "
        f"dense {row.dense.decode.median:.3f} ({row.dense.backend['decode']}), share "
        f"{ratios['decode_share_of_dense']:.3f} ({graph} on both sides)",
        f"  tokens a second: {ratios['decode_tokens_per_s']:.0f}, dense {ratios['decode_tokens_per_s_dense']:.0f}",
        f"  {_attention_words(ratios['attention_share_of_dense_step'], ratios['most_any_plan_gains'])}",
        f"  cache as allocated: {size(row.plan.cache_bytes)}, dense {size(row.dense.cache_bytes)}",
    ]
    lines += choosing_lines(row)
    if row.parameters != row.dense_parameters:
        lines.append(
            f"  parameters: {row.parameters:,} of {row.dense_parameters:,}, share {ratios['parameter_share']:.3f}"
        )
    if row.plan.peak_bytes is not None and row.dense.peak_bytes is not None:
        over = ratios["peak_saved_over_cache_saved"]
        lines.append(
            f"  peak memory: {row.plan.peak_bytes / GIB:.2f} GiB, dense {row.dense.peak_bytes / GIB:.2f}"
            + (f"; saved over the cache bytes saved {over:.3f}" if over is not None else "")
        )
    return lines


def choosing_lines(row: ModelRow) -> list[str]:
    """What tokens skip by choosing heads, and the times beside all heads on; plain where nothing is saved."""
    if row.all_on is None:
        return []
    prefill, decode, skips = "", "", row.skips
    if skips is not None:
        prefill = f"; skipped are {skips.of_attention:.1%} of the attention's FLOPs, {skips.of_prefill:.1%} of all"
        decode = f"; not read are {skips.of_cache:.1%} of the cache, {skips.of_step(row.batch):.1%} with the weights"
    lines = [
        _chosen("prefill", row.all_on.prefill, row.plan.prefill) + prefill,
        _chosen("decode step", row.all_on.decode.median, row.plan.decode.median) + decode,
    ]
    if row.random_routers:
        lines.append("  the routers are untrained and would choose alike for all tokens: random weights choose instead")
    return lines


def routed_line(row: Row | Kernel) -> str:
    """What choosing heads brings in one row of the kernel table, beside all heads on; empty for other plans."""
    if row.all_on is None or row.plan is None:
        return ""
    whole, skips = row.all_on.median, "of the pairs are not computed" if row.kept_bytes is None else "is not read"
    what = f"{row.what} {row.mix}, batch {row.batch}, {row.length:,} tokens: {1 - row.fraction:.1%} {skips}"
    against = f"with all heads on {whole:.4g} ms, {gain_words(whole / row.plan.median)}"
    return f"{what}; {against}; beside the fastest dense attention {gain_words(row.speedup)}"


def _chosen(what: str, whole: float, chosen: float) -> str:
    times = f"{whole:.4g} ms, with those that tokens choose {chosen:.4g}"
    return f"  {what} with all heads on: {times}: {gain_words(whole / chosen)}"


def gain_words(gain: float | None) -> str:
    """How many times as fast something is in words; empty where nobody knows."""
    if gain is None:
        return ""
    return f"{gain:.2f} times as fast" if gain >= SAVED else f"nothing is saved ({gain:.2f} times)"
