"""Launch parameters of the kernels of heads that keep tokens, each tried and then timed.

python scripts/gpu_retain.py FOLDER "sweep of prefill"     one GPU, minutes, most of them the compiler's

A candidate changes some entries of what `tuned.py` and `tuned_retain.py` of the runtime say. First it runs once, which
compiles it; what it gives has to agree with what the parameters in use give. Those that are right are then timed one
after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from compress.bench import measure
from compress.bench.kernel import random_qkv
from compress.runtime import triton_decode, triton_prefill, triton_retain, triton_retain_step, triton_scorers
from compress.runtime.impl_retain import RETAIN_IMPLS
from compress.runtime.reference import Rows
from compress.runtime.step import Step
from scripts.gpu_check import COLD, error, say
from scripts.gpu_models import HIDDEN, LLAMA
from scripts.gpu_retain import BF16, DEVICE, MOST, Decoding, layer_of
from scripts.gpu_sweep import apart, side_by_side

Call = Callable[[], Any]
Change = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Parameters that belong together.

    Attributes:
        module, name: the function of launch parameters, where the launch looks for it.
        changes: the candidates; the first changes nothing.
        cases: what is timed, by its name: a function that makes the call.
        unit: microseconds or milliseconds.
    """

    module: Any
    name: str
    changes: list[Change]
    cases: dict[str, Callable[[], tuple[Call, int]]]
    unit: str

    def changed(self, change: Change) -> AbstractContextManager[Any]:
        """A context in which the launch is given these parameters."""
        usual = getattr(self.module, self.name)

        def given(*arguments: Any) -> Any:
            found = usual(*arguments)
            return {**found, **change} if isinstance(found, dict) else change.get("", found)

        return patch.object(self.module, self.name, given)


def decoding(length: int, batch: int, step: bool = False, scorer: str = "ridge") -> tuple[Call, int]:
    """Attention, or a whole step, of one token out of caches that no chip keeps; and how many caches a call reads."""
    torch.manual_seed(0)
    expected = round(batch * LLAMA.groups * length * 0.125 * LLAMA.head_dim * 4)
    copies = max(1, min(16, COLD // expected))
    one = Decoding(layer_of(0.125, scorer, cap=True), batch, length, copies)
    return (one.step if step else one.attend), copies


def prefilling(length: int, share: float) -> tuple[Call, int]:
    """Attention of a prefill whose lists are made already."""
    torch.manual_seed(0)
    query, key, value = random_qkv(LLAMA, 1, length, DEVICE, BF16)
    hidden, rows = torch.randn(1, length, HIDDEN, device=DEVICE, dtype=BF16), Rows.whole(1, length)
    mixer, retain = layer_of(share), RETAIN_IMPLS["triton"]
    kept = mixer.kept(key, value, None, Step(None, rows, None, None, [length], length, impl="triton", hidden=hidden))[0]
    assert retain.compact is not None
    lists = retain.compact(key, value, kept, mixer.windows, rows, None)
    return partial(retain.prefill, query, key, value, kept, mixer.windows, rows=rows, lists=lists), 1


def judging(length: int, scorer: str, what: str) -> tuple[Call, int]:
    """Judging the tokens of a prefill, counting those that are kept, or bringing together those that leave."""
    torch.manual_seed(0)
    _, key, value = random_qkv(LLAMA, 1, length, DEVICE, BF16)
    hidden, rows = torch.randn(1, length, HIDDEN, device=DEVICE, dtype=BF16), Rows.whole(1, length)
    step = Step(None, rows, None, None, [length], length, impl="triton", hidden=hidden)
    mixer, retain = layer_of(0.125, scorer, cap=True), RETAIN_IMPLS["triton"]
    if what == "judge":
        return partial(mixer.judge, key, value, step), 1
    if what == "count":
        found = mixer.judge(key, value, step)
        return lambda: mixer.rule(found, None, step, retain)[0], 1
    kept = mixer.kept(key, value, None, step)[0]
    assert retain.compact is not None
    compact = partial(retain.compact, key, value, kept, mixer.windows, rows, None)
    return lambda: compact().before, 1


def families() -> dict[str, Family]:
    """What is swept."""
    chips = torch.cuda.get_device_properties(0).multi_processor_count
    lists: dict[str, Any] = {
        "131,072 x 1": partial(decoding, 131072, 1), "32,768 x 1": partial(decoding, 32768, 1),
        "32,768 x 8": partial(decoding, 32768, 8),
    }  # fmt: skip
    decode: list[Change] = [
        {}, {"overlap": False}, {"programs": chips}, {"programs": chips, "stages": 3}, {"programs": chips, "stages": 4},
        {"programs": 2 * chips}, {"programs": 2 * chips, "stages": 3}, {"programs": 3 * chips},
        {"programs": 3 * chips, "stages": 3}, {"programs": 4 * chips, "registers": 128},
        {"programs": 2 * chips, "warps": 8}, {"fewest": 2}, {"columns": 64},
    ]  # fmt: skip
    tiles: list[Change] = [
        {},
        *({"block_m": m, "block_n": n, "warps": warps, "stages": stages} for m, n, warps, stages in (
            (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
            (128, 128, 8, 2))),
    ]  # fmt: skip
    prefill: dict[str, Any] = {
        "8,192 1/8": partial(prefilling, 8192, 0.125), "8,192 1/2": partial(prefilling, 8192, 0.5),
        "32,768 1/8": partial(prefilling, 32768, 0.125), "65,536 1/8": partial(prefilling, 65536, 0.125),
    }  # fmt: skip
    ridge: list[Change] = [{}] + [
        {"tokens": tokens, "block": block, "warps": warps, "stages": stages}
        for tokens, block, warps, stages in ((32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 4))
    ]
    mlp: list[Change] = [{}] + [
        {"tokens": tokens, "groups": groups, "block": 64, "warps": warps, "stages": stages}
        for tokens, groups, warps, stages in (
            (128, 2, 8, 3), (128, 4, 8, 4), (64, 4, 4, 3), (64, 4, 4, 4), (64, 2, 4, 3), (64, 2, 4, 4), (128, 2, 4, 3)
        )
    ]  # fmt: skip
    units: list[Change] = [{}] + [
        {"units": units, "columns": columns, "warps": warps}
        for units, columns, warps in ((8, 512, 8), (8, 4096, 8), (2, 4096, 8), (2, 4096, 4), (1, 4096, 4), (4, 1024, 4))
    ]
    both = ("8,192", 8192), ("65,536", 65536)

    def parts(scorer: str, what: str) -> dict[str, Any]:
        return {name: partial(judging, length, scorer, what) for name, length in both}

    scorer = triton_scorers, "scorer_config"
    return {
        "decode": Family(triton_decode, "decode_config", decode, lists, "us"),
        "prefill": Family(triton_prefill, "prefill_config", tiles, prefill, "ms"),
        "judge by ridge": Family(*scorer, ridge, parts("ridge", "judge"), "us"),
        "judge by mlp": Family(*scorer, mlp, parts("mlp", "judge"), "us"),
        "count": Family(
            triton_scorers, "keep_block", [{}, {"": 256}, {"": 1024}, {"": 2048}], parts("ridge", "count"), "us"
        ),
        "compact": Family(
            triton_retain, "flag_pages", [{}, {"": 16}, {"": 32}, {"": 64}, {"": 256}], parts("ridge", "compact"), "us"
        ),
        "step with mlp": Family(
            triton_retain_step, "judge_config", units, {"32,768 x 1": partial(decoding, 32768, 1, True, "mlp")}, "us"
        ),
        "step with ridge": Family(
            triton_retain_step, "judge_config", [{}, {"block": 4096}, {"block": 1024}, {"warps": 4}, {"warps": 16}],
            {"32,768 x 1": partial(decoding, 32768, 1, True)}, "us",
        ),
    }  # fmt: skip


def first(found: Any) -> torch.Tensor | None:
    """The result of a call, where it has one."""
    return found.clone() if isinstance(found, torch.Tensor) else None


@torch.inference_mode()
def check(name: str, case: str, change: Change) -> str | None:
    """Run a candidate once; what is wrong with what it gives."""
    measure.release(DEVICE)
    family = families()[name]
    call, _ = family.cases[case]()
    usual = first(call())
    with family.changed(change):
        found = first(call())
    if usual is not None and found is not None and not (worst := error(found, usual.double())) <= MOST[BF16]:
        return f"differs by {worst:.1e} from what the parameters in use give"
    return None


MADE: dict[tuple[str, str], tuple[Call, int]] = {}  # the call of the case that is timed now


@torch.inference_mode()
def spend(name: str, case: str, change: Change) -> float:
    """What a candidate takes, in the unit of its family."""
    family = families()[name]
    if (name, case) not in MADE:
        MADE.clear()
        measure.release(DEVICE)
        MADE[name, case] = family.cases[case]()
    call, copies = MADE[name, case]
    with family.changed(change):
        calls = max(1, 16 // copies) if family.unit == "us" else 2
        median = measure.graphed_times(call, DEVICE, calls=calls, seconds=0.1).median / copies
    return median * (1e3 if family.unit == "us" else 1)


def sweep_rows(begin: str = "") -> list[dict[str, Any]]:
    """Every candidate of every family whose name begins so: what it takes, or what is wrong with it."""
    some = {name: family for name, family in families().items() if name.startswith(begin)}
    every = [(name, number) for name, family in some.items() for number in range(1, len(family.changes))]
    jobs = [(name, next(iter(some[name].cases)), some[name].changes[number]) for name, number in every]
    wrong: dict[str, dict[int, str]] = {name: {} for name in some}
    for place, tried in side_by_side(check, jobs, 10).items():
        name, number = every[place]
        if (found := tried.wrong or tried.value) is not None:
            wrong[name][number] = found
    return [
        row for name, family in some.items() for row in timed(name, family.changes, list(family.cases), wrong[name])
    ]


def short_prefill() -> list[dict[str, Any]]:
    """A prefill of 8,192 tokens in tiles of which a multiprocessor has two: predicted .26 ms, where one takes .36."""
    changes: list[Change] = [{}, {"block_m": 64, "block_n": 64, "warps": 4, "stages": 3}]
    return timed("prefill", changes, ["8,192 1/8"], {})


def timed(name: str, changes: list[Change], cases: list[str], wrong: dict[int, str]) -> list[dict[str, Any]]:
    """One family's table of candidates, without those with which something is wrong."""
    rows: list[dict[str, Any]] = [{"family": name, "change": change, "spent": {}} for change in changes]
    for number, words in wrong.items():
        rows[number]["wrong"] = words
    places = [(case, number) for case in cases for number in range(len(changes)) if number not in wrong]
    jobs = [(name, case, changes[number]) for case, number in places]
    for place, tried in apart(spend, jobs, [range(len(jobs))]).items():
        case, number = places[place]
        if tried.wrong is None:
            rows[number]["spent"][case] = tried.value
        else:  # one that only this case's shape refuses
            rows[number]["wrong"] = f"{case}: {tried.wrong}"
    say(f"sweep of {name}, {families()[name].unit}: {' | '.join(cases)}")
    for row in rows:
        told = " | ".join(f"{spent:.4g}" for spent in row["spent"].values())
        say(f"  {row['change'] or 'as it is'}: {told} {row.get('wrong', '')}".rstrip())
    return rows
