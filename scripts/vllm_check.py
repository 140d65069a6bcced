#!/usr/bin/env python3
"""Serves checkpoints in vLLM on a CPU, with the plugin of plugins/vllm, and compares with transformers.

    scripts/vllm_check [--out FILE] [NAME ...]                 makes vLLM's environment and calls this file
    scripts/vllm_check.py --python VLLM/bin/python ...         with an environment that is there

Greedy tokens, one request at a time and eight at once, prompts whole and in chunks; the blocks that each head group
held against its span; prefixes from the cache; ranks of tensor parallelism; native checkpoints; and how many requests
run at once in the same memory, dense and by a plan. All in float32; the exit status is 1 where anything differs but
for a token that is as good within the rounding of the largest logit.
Weights are those of SmolLM2 and random ones of small models. On two cores all of it takes some 20 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from compress.export.layout import copy_runtime, point_to_runtime
from compress.export.native import native_model
from compress.models.families import family_of
from compress.models.load import load_model
from compress.models.planned import patched_model, planned_model
from compress.models.shape import shape_of
from compress.plan import LayerPlan, Mlp, Plan, make_plan, plan_of_layers, read_plan
from compress.search.serve import Serve
from compress.targets.full import FullGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup
from compress_vllm.families import ROWS
from compress_vllm.plan import read_layers
from compress_vllm.rule import Rule
from tests import tiny

ROOT = Path(__file__).parents[1]
ENGINE = Path(__file__).with_name("vllm_engine.py")
HALF = ROOT / "profiles" / "smollm2-135m" / "quickstart.plan.json"
QUARTER = ROOT / "profiles" / "smollm2-135m" / "quarter.plan.json"
SERVED = ROOT / "profiles" / "smollm2-135m" / "served.plan.json"  # by scripts/serve_rows.py
SINKS = (
    FullGroup(),
    WindowGroup(sink=4, alpha=30, beta=0.0),
    WindowGroup(sink=64, alpha=40, beta=0.25),
    WindowGroup(sink=0, alpha=48, beta=0.0),
    WindowGroup(sink=0, alpha=5, beta=0.5),
)
SLIDES = WindowGroup(sink=0, alpha=50, beta=0.0)
ROUNDING = 1e-6  # of the largest logit: eight units in the last place of a float32 number
Tell = Callable[[dict[str, str], dict[str, Any]], None]


class Text(list[int]):
    """The greedy tokens behind a prompt.

    Attributes:
        rivals: for every place the second best token where it is as good as the best but for the rounding of float32,
            else None.
    """

    rivals: Sequence[int | None] = ()

    def parts_at(self, found: Sequence[int]) -> int | None:
        """The first place at which other tokens are not these; None where they all are."""
        return next((place for place, (own, other) in enumerate(zip(self, found, strict=True)) if own != other), None)

    def is_that_of(self, found: Sequence[int]) -> bool:
        """Whether tokens are these, up to a place where a rival was taken; what follows that is another text."""
        place = self.parts_at(found)
        return place is None or (place < len(self.rivals) and found[place] == self.rivals[place])


@dataclass
class Job:
    """One engine: a checkpoint, options, rounds of prompts with the tokens that transformers gives.

    Attributes:
        layers: per layer, the rule of every head group that stays, None where it sees everything; None of a stock
            architecture.
        fails: what the engine's error has to say, where it must not start.
        cached: the tokens that each prompt of the last round finds in the cache; None where it is not asked.
    """

    name: str
    model: Path
    prompts: list[list[int]]
    expected: list[Text]
    sizes: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[tuple[Rule | None, ...]] | None = None
    fails: str | None = None
    cached: list[int] | None = None
    poison: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What the engine's script reads."""
        rounds = [{"prompts": self.prompts, "at_once": size, "new": len(self.expected[0])} for size in self.sizes]
        return {
            "name": self.name,
            "model": str(self.model),
            "options": self.options,
            "rounds": rounds,
            "poison": self.poison,
            "environment": self.environment,
        }


def greedy(model: Any, prompts: Sequence[Sequence[int]], new: int) -> list[Text]:
    """What transformers generates behind each prompt."""
    found = []
    for ids in prompts:
        row = torch.tensor([list(ids)])
        with torch.inference_mode():
            out = model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat(out.logits)  # [new, vocabulary]
        best = logits.topk(2)
        near = best.values[:, 0] - best.values[:, 1] <= ROUNDING * logits.abs().amax(-1)
        text = Text(out.sequences[0, len(ids) :].tolist())
        # The best of two equal ones may stand in either place.
        second = (best.indices.sum(-1) - torch.tensor(text)).tolist()
        text.rivals = [token if close else None for token, close in zip(second, near, strict=True)]
        found.append(text)
    return found


def write_patched(dense: Any, plan: Plan, folder: Path) -> tuple[Any, list[tuple[Rule | None, ...]]]:
    """A checkpoint with its own code, as `compress export` writes it without tokenizer and card; and its rules."""
    model = patched_model(planned_model(dense, plan), plan)
    model.save_pretrained(folder)
    copy_runtime(folder)
    point_to_runtime(folder, family_of(model.config))
    row = next(row for row in ROWS if row.planned == type(model).__name__)
    layers = read_layers(model.config.compress_plan, row, model.config)
    windows = plan.model.native_windows
    own = [None if window is None else Rule(0, window, 0) for window in windows]
    return model, [
        tuple(native if rule is None else rule for rule in layer.rules)
        for layer, native in zip(layers, own, strict=True)
    ]


def small_model(family: str) -> Any:
    """A random model whose heads are as long as vLLM's kernels for CPUs want them."""
    sizes = dict(tiny.SIZES)
    tiny.SIZES.update(hidden_size=128)
    try:
        stock = family in tiny.CONFIGS
        config = (
            tiny.CONFIGS[family]()
            if stock
            else transformers.AutoConfig.for_model(family, **tiny.SIZES | tiny.MORE[family])
        )
    finally:
        tiny.SIZES.update(sizes)
    if getattr(config, "head_dim", None) in (12, 16):
        config.head_dim = 32
    if hasattr(config, "rotary_dim"):
        config.rotary_dim = 16
    if family == "gpt_oss":  # vLLM's class lets layers of even numbers slide, as published models do
        config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    # What the tests give every family, and only some know.
    for name in ("num_key_value_heads", "moe_intermediate_size"):
        if name not in type(config)().to_dict():
            vars(config).pop(name, None)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def small_prompts() -> list[list[int]]:
    """Two prompts of another length each."""
    return [[4 + (number * 7) % 90 for number in range(300)], [4 + (number * 11) % 90 for number in range(150)]]


def tiny_job(family: str, folder: Path) -> Job:
    """A small random model of a family with full heads, sinks and windows, fixed and growing."""
    prompts, dense = small_prompts(), small_model(family)
    model, layers = write_patched(dense, tiny.mixed_plan(shape_of(dense), SINKS), folder / family)
    job = Job(family, folder / family, prompts, greedy(model, prompts, 24), layers=layers)
    job.options = {"max_num_batched_tokens": 128}
    return job


def tiny_jobs(folder: Path) -> Iterator[Job]:
    """Small random models of every family."""
    for family in sorted({"llama-gqa", "gemma3", "ministral", "mistral", "phi3", "qwen2", "qwen3", *tiny.MORE}):
        yield tiny_job(family, folder)


def special_jobs(folder: Path) -> Iterator[Job]:
    """Unequal widths, freed memory full of NaN, prefixes from the cache."""
    prompts, dense = small_prompts(), small_model("llama-mha")
    shape = shape_of(dense)
    window, other = WindowGroup(sink=4, alpha=30, beta=0.0), WindowGroup(sink=64, alpha=40, beta=0.25)
    narrow = LayerPlan(groups=(window, FullGroup(), PrunedGroup(), window), mlp=Mlp.of(range(32)))
    whole = LayerPlan(groups=(FullGroup(), other, other, FullGroup()))
    plan = plan_of_layers(shape, [narrow, whole, narrow])
    model, layers = write_patched(dense, plan, folder / "widths")
    yield Job("layers of other widths", folder / "widths", prompts, greedy(model, prompts, 24), layers=layers)

    model, layers = write_patched(dense, even_plan(shape), folder / "even")
    expected = greedy(model, prompts, 24)
    yield Job("freed blocks hold NaN", folder / "even", prompts, expected, layers=layers, poison=True)

    shared = [[*prompts[0][:288], 5, 6, 7], [*prompts[0][:288], 8, 9, 10, 11]]
    job = Job("prefixes from the cache", folder / "even", shared, greedy(model, shared, 24), layers=layers)
    job.options, job.sizes, job.cached = {"enable_prefix_caching": True}, (1, 1), [288, 288]
    yield job


def even_plan(shape: Any) -> Plan:
    """Four head groups a layer, of which both halves have the same spans."""
    full, window, other = (
        FullGroup(),
        WindowGroup(sink=4, alpha=30, beta=0.0),
        WindowGroup(sink=64, alpha=40, beta=0.25),
    )
    return make_plan(shape, [(full, window, window, full), (other, window, window, other), (full,) * 4])


def ranks_jobs(folder: Path) -> Iterator[Job]:
    """Two ranks of tensor parallelism: halves that are alike as they are, and after head groups changed places."""
    prompts, dense = small_prompts(), small_model("llama-mha")
    shape, options = shape_of(dense), {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    model, layers = write_patched(dense, even_plan(shape), folder / "ranks")
    yield Job(
        "two ranks of tensor parallelism",
        folder / "ranks",
        prompts,
        greedy(model, prompts, 24),
        options=options,
        layers=layers,
    )

    full, window, other = SINKS[0], SINKS[1], SINKS[2]
    plan = make_plan(
        shape, [(full, full, window, window), (window, other, other, window), (window, full, full, window)]
    )
    _, layers = write_patched(dense, Serve(slot=1, ranks=2).ordered(plan), folder / "order")
    yield Job(
        "two ranks, head groups in another order",
        folder / "order",
        prompts,
        greedy(planned_model(dense, plan), prompts, 24),  # in the model's own order
        options=options,
        layers=layers,
    )


def native_prompts() -> list[list[int]]:
    """Twenty prompts of 100 to 290 tokens."""
    return [[4 + (place * (7 + 2 * number)) % 90 for place in range(100 + 10 * number)] for number in range(20)]


def native_jobs(folder: Path) -> Iterator[Job]:
    """Stock architectures with layers that slide, and pruned ones; 20 prompts, one at a time and eight at once."""
    prompts = native_prompts()
    flag = {"model_impl": "transformers"}

    def both(name: str, path: Path, expected: list[Text], options: dict[str, Any]) -> Iterator[Job]:
        for how, tokens in (("whole", 4096), ("in chunks of 128", 128)):
            job = Job(f"{name}: {how}", path, prompts, expected, (1, 8))
            job.options = options | {"max_num_batched_tokens": tokens}
            yield job

    for family in ("llama-gqa", "mistral", "qwen2", "qwen3"):
        dense = small_model(family)
        shape = shape_of(dense)
        plan = make_plan(shape, [[target] * shape.kv_heads for target in (SLIDES, FullGroup(), SLIDES)])
        model = native_model(planned_model(dense, plan), plan)
        path = folder / f"native-{family}"
        model.save_pretrained(path)
        expected = greedy(model, prompts, 12)
        assert expected != greedy(dense, prompts, 12)
        needs_flag = family.startswith("qwen")
        yield from both(f"native {family}, windows", path, expected, flag if needs_flag else {})
        if needs_flag:
            stops = "Sliding window for some but all layers is not supported"
            yield Job(f"native {family}, without the flag", path, prompts, expected, fails=stops)
    for family in ("llama-gqa", "llama-mha", "qwen2", "qwen3"):
        dense = small_model(family)
        shape = shape_of(dense)
        groups = (FullGroup(),) * (shape.kv_heads - 1) + (PrunedGroup(),)
        plan = plan_of_layers(shape, [LayerPlan(groups=groups, mlp=Mlp.of(range(32)))] * shape.layers)
        model = native_model(planned_model(dense, plan), plan)
        path = folder / f"pruned-{family}"
        model.save_pretrained(path)
        expected = greedy(model, prompts, 12)
        # vLLM's own class of Qwen2 works the size of a head out from the number of heads.
        yield from both(f"native {family}, pruned", path, expected, flag if family == "qwen2" else {})
        if family == "qwen2":
            yield Job("native qwen2, pruned, without the flag", path, prompts, expected, fails="exceeds dimension size")


def texts(tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts of SmolLM2 from the documents of this project; the last three are long enough for its half plan to hide
    much."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer.encode(text)
    lengths = [80 + 16 * number if number < count - 3 else 800 for number in range(count)]
    return [ids[number * 600 : number * 600 + length] for number, length in enumerate(lengths)]


def hides(model: Any, dense: Any, ids: Sequence[int]) -> bool:
    """Whether a plan hides something that a prompt's last logits depend on; the tokens may be the same all the same."""
    row = torch.tensor([list(ids)])
    with torch.inference_mode():
        planned, whole = (each(row, logits_to_keep=1).logits for each in (model, dense))
    return float((planned - whole).abs().max()) > 0.01 * float(whole.abs().max())


def smollm2_jobs(folder: Path) -> Iterator[Job]:
    """SmolLM2 by its half plan, and by one with sinks, growing windows and layers without some heads; 20 texts."""
    loaded = load_model("demo/smollm2-135m")
    prompts = texts(loaded.tokenizer, 20)
    shape = shape_of(loaded.model)
    kinds = [SINKS[number % len(SINKS)] for number in range(shape.layers * shape.kv_heads)]
    rows = [tuple(kinds[layer * 3 : layer * 3 + 3]) for layer in range(shape.layers)]
    mixed = plan_of_layers(
        shape,
        [
            LayerPlan(groups=(*row[:2], PrunedGroup()), mlp=Mlp.of(range(1024)))
            if layer % 5 == 4
            else LayerPlan(groups=row)
            for layer, row in enumerate(rows)
        ],
    )
    for name, plan in (("half", read_plan(HALF)), ("sinks, growing, pruned", mixed)):
        path = folder / f"smollm2-{name.partition(',')[0]}"
        model, layers = write_patched(loaded.model, plan, path)
        expected = greedy(model, prompts, 12)
        assert hides(model, loaded.model, prompts[-1])
        for how, tokens in (("whole", 4096), ("in chunks of 128", 128)):
            job = Job(f"SmolLM2, {name}: {how}", path, prompts, expected, (1, 8), layers=layers)
            job.options = {"max_num_batched_tokens": tokens}
            yield job


def served_jobs(folder: Path) -> Iterator[Job]:
    """SmolLM2 by a plan of few targets, whose head groups changed places; six texts."""
    loaded, plan = load_model("demo/smollm2-135m"), read_plan(SERVED)
    prompts = texts(loaded.tokenizer, 6)
    _, layers = write_patched(loaded.model, plan, folder / "served")
    own = [layer.model_copy(update={"order": None}) for layer in plan.layers]
    model = planned_model(loaded.model, plan_of_layers(plan.model, own))
    assert hides(model, loaded.model, prompts[-1])
    expected = greedy(model, prompts, 12)
    yield Job("SmolLM2, served, head groups in another order", folder / "served", prompts, expected, layers=layers)


SETS: dict[str, Callable[[Path], Iterator[Job]]] = {
    "tiny": tiny_jobs,
    "special": special_jobs,
    "ranks": ranks_jobs,
    "native": native_jobs,
    "smollm2": smollm2_jobs,
    "served": served_jobs,
}


def check(job: Job, result: dict[str, Any]) -> list[str]:
    """What of a result is not as it has to be."""
    error = result.get("error")
    if job.fails is not None:
        return [] if error and job.fails in error else [f"expected the error {job.fails!r}, got {error or 'none'}"]
    if error:
        return [error]
    wrong = []
    for size, round_ in zip(job.sizes, result["rounds"], strict=True):
        same = sum(text.is_that_of(tokens) for tokens, text in zip(round_["tokens"], job.expected, strict=True))
        if same < len(job.expected):
            wrong.append(f"{same} of {len(job.expected)} texts are the same, {size or 'all'} at once")
    if job.cached is not None and result["rounds"][-1]["cached"] != job.cached:
        wrong.append(f"tokens from the cache: {result['rounds'][-1]['cached']}, expected {job.cached}")
    if job.layers is not None:
        wrong += check_groups(job.layers, result["groups"])
        if job.cached is None:
            wrong += check_held(result)
    return wrong


def parted(job: Job, result: dict[str, Any]) -> int:
    """Texts, of all rounds, that go on with a token as good as that of transformers but for rounding."""
    rounds = [zip(each["tokens"], job.expected, strict=True) for each in result["rounds"]]
    return sum(text.parts_at(tokens) is not None for each in rounds for tokens, text in each)


def rule_of(group: dict[str, Any]) -> Rule | None:
    """The rule of a KV cache group of the engine."""
    if group["rule"] is not None:
        return Rule(*group["rule"])
    return Rule(0, group["window"], 0) if group["kind"] == "SlidingWindowSpec" else None


def check_groups(layers: list[tuple[Rule | None, ...]], groups: list[dict[str, Any]]) -> list[str]:
    """Whether the engine has as many heads of each rule in each layer as the plan."""
    found: Counter[tuple[int, Rule | None]] = Counter()
    for group in groups:
        for module in group["modules"]:
            found[int(module.split("layers.")[-1].split("h.")[-1].split(".")[0]), rule_of(group)] += group["heads"]
    wanted = Counter((number, rule) for number, row in enumerate(layers) for rule in row)
    ranks = sum(wanted.values()) // sum(found.values())  # the engine's groups are those of one
    for (number, rule), heads in wanted.items():
        if found[number, rule] * ranks != heads:
            return [f"layer {number}: {heads} head groups of {rule}, the engine has {found[number, rule] * ranks}"]
    return []


def check_held(result: dict[str, Any]) -> list[str]:
    """Whether every request held, in its last step, the blocks that its rules say."""
    for round_ in result["rounds"]:
        for request in round_["held"]:
            for group, held in zip(result["groups"], request["blocks"], strict=True):
                rule, block = rule_of(group), group["block"]
                there = range(-(-request["after"] // block))
                # A step that is computed while the next is planned is given back one step later.
                allowed = []
                for done in (request["before"], request["before"] - 1):
                    start, end = (0, 0) if rule is None else rule.gap(done, block)
                    allowed.append([number for number in there if not start <= number < end])
                if held not in allowed:
                    return [f"{rule}: after {request['after']} tokens blocks {held}, expected {allowed[0]}"]
    return []


def pages(result: dict[str, Any]) -> tuple[int, int]:
    """Pages that the requests of the first round held in their last step, and those that dense ones would."""
    held = dense = 0
    for request in result["rounds"][0]["held"]:
        for group, blocks in zip(result["groups"], request["blocks"], strict=True):
            held += len(blocks) * len(group["modules"])
            dense += -(-request["after"] // group["block"]) * len(group["modules"])
    return held, dense


def run_engine(
    python: Path, jobs: Iterable[dict[str, Any]], tell: Tell = lambda versions, result: None, **environment: str
) -> tuple[dict[str, Any], str]:
    """Run jobs in vLLM's interpreter, which starts while they are made; the results, and what it printed.

    Args:
        tell: called with the versions and a result as soon as it is there.

    Raises:
        RuntimeError: vLLM ended before all jobs had.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        (Path(scratch) / "printed").open("w+", encoding="utf-8") as log,
        ThreadPoolExecutor(1) as beside,
    ):
        written = Path(scratch) / "results"
        written.touch()
        engine = subprocess.Popen(
            [str(python), "-P", str(ENGINE), str(written)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": "", **environment},
        )
        try:
            given, found, ended = beside.submit(give, engine, jobs), list[dict[str, Any]](), False
            while not ended:
                ended = engine.poll() is not None  # looked at first, so that nothing is missed
                for line in written.read_text(encoding="utf-8").split("\n")[len(found) : -1]:
                    found.append(json.loads(line))
                    if len(found) > 1:
                        tell(found[0], found[-1])
                time.sleep(0 if ended else 0.2)
        finally:
            engine.kill()
            engine.wait()
        log.seek(0)
        printed = log.read()
        if len(found) != 1 + given.result():
            raise RuntimeError(f"vLLM ended with status {engine.returncode}: {printed[-3000:]}")
        return {"versions": found[0], "results": found[1:]}, printed


def give(engine: subprocess.Popen[str], jobs: Iterable[dict[str, Any]]) -> int:
    """Hand an engine its jobs as they are made; how many they are."""
    assert engine.stdin is not None
    count = 0
    with contextlib.suppress(BrokenPipeError), engine.stdin as lines:  # an engine that has ended says why itself
        for job in jobs:
            count += 1
            lines.write(json.dumps(job) + "\n")
            lines.flush()
    return count


def speed(python: Path, folder: Path) -> dict[str, Any]:
    """How many requests run at once, and how many tokens a second come out, dense and by a plan, in the same memory.

    SmolLM2 in bfloat16, 40 requests of 640 tokens and 64 new ones, in the memory of twelve dense ones and a half: there
    the quarter plan of 2k tokens keeps half of the blocks, and the plan that was searched for the engine a little
    less. Seconds of the processor are given beside those of the clock, which depend on what else runs.
    """
    loaded, new, length = load_model("demo/smollm2-135m"), 64, 640
    write_patched(loaded.model, read_plan(QUARTER), folder / "plan")
    write_patched(loaded.model, read_plan(SERVED), folder / "served")
    loaded.model.save_pretrained(folder / "dense")
    prompts = [[100 + (row * 7919 + token * 104729) % 40000 for token in range(length)] for row in range(40)]
    rounds = [{"prompts": [prompts[0][:64]], "new": 4}, {"prompts": prompts, "new": new}]
    shape = shape_of(loaded.model)
    token = shape.layers * shape.kv_heads * shape.head_dim * 2 * torch.bfloat16.itemsize
    options = {
        "kv_cache_memory_bytes": token * (length + new) * 25 // 2,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "dtype": "bfloat16",
    }
    jobs = [
        {"name": name, "model": str(folder / name), "options": options, "rounds": rounds}
        for name in ("dense", "plan", "served")
    ]
    found, _ = run_engine(python, jobs)
    rows = {}
    for result in found["results"]:
        if "error" in result:
            raise RuntimeError(result["error"])
        round_ = result["rounds"][1]
        pages = sum(
            len(blocks) * len(group["modules"]) * group["page_bytes"]
            for request in round_["held"]
            for group, blocks in zip(result["groups"], request["blocks"], strict=True)
        )
        rows[result["name"]] = {
            "at_once": max(int(count) for count in round_["running"]),
            "preempted": round_["preempted"],
            "seconds": round_["seconds"],
            "cpu_seconds": round_["cpu_seconds"],
            "tokens_per_second": len(prompts) * (length + new) / round_["seconds"],
            "tokens_per_cpu_second": len(prompts) * (length + new) / round_["cpu_seconds"],
            "bytes_of_a_request": pages // len(prompts),
            "kv_groups": len(result["groups"]),
        }
    return {
        "requests": len(prompts),
        "prompt_tokens": length,
        "new_tokens": new,
        **options,
        **rows,
        "bytes": rows["plan"]["bytes_of_a_request"] / rows["dense"]["bytes_of_a_request"],
        "more_at_once": rows["plan"]["at_once"] / rows["dense"]["at_once"],
        "faster": rows["dense"]["cpu_seconds"] / rows["plan"]["cpu_seconds"],
    }


def without_plugin(python: Path, folder: Path) -> list[str]:
    """What is wrong where the plugin is not loaded: a patched checkpoint runs dense there, and says so."""
    prompts, dense = small_prompts(), small_model("llama-gqa")
    write_patched(dense, tiny.mixed_plan(shape_of(dense), SINKS), folder / "alone")
    job = Job("alone", folder / "alone", prompts, greedy(dense, prompts, 24), options={"trust_remote_code": True})
    found, printed = run_engine(python, [job.as_json()], VLLM_PLUGINS="none")
    wrong = check(job, found["results"][0])
    said = "the plan is NOT in effect" in printed and "compress-vllm" in printed
    return wrong if said else [*wrong, "it does not say that the plan is not in effect"]


def write(path: Path, found: dict[str, Any], rows: list[dict[str, Any]], measured: dict[str, Any] | None) -> None:
    """Put what was found into a file, in place of rows of the same names that are there."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    new = {row["name"] for row in rows}
    facts = {
        "engine": found["versions"],
        "compared_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "machine": f"{os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}",
        "rows": [row for row in before.get("rows", []) if row["name"] not in new] + rows,
        "speed": measured or before.get("speed"),
    }
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Write checkpoints, run them, print a table; 0 where all agrees."""
    parts = [*SETS, "alone", "speed"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(parts)}; all without")
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM and the plugin")
    parser.add_argument("--out", type=Path, help="write what was found to this JSON file, over rows of the same names")
    options = parser.parse_args()
    names = options.names or parts
    if unknown := [name for name in names if name not in parts]:
        parser.error(f"{unknown[0]}: expected {', '.join(parts)}")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jobs = [job for name in SETS if name in names for job in SETS[name](folder)]
        # Processes of several ranks leave what the next engine in the process would stumble over.
        jobs.sort(key=lambda job: "tensor_parallel_size" in job.options)
        several = [job.as_json() for job in jobs if "tensor_parallel_size" in job.options]
        found, _ = run_engine(options.python, [job.as_json() for job in jobs[: len(jobs) - len(several)]])
        for job_ in several:
            found["results"] += run_engine(options.python, [job_])[0]["results"]
        alone = without_plugin(options.python, folder) if "alone" in names else None
        measured = speed(options.python, folder) if "speed" in names else None
    table = Table(title=", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    for head in ("checkpoint", "class", "KV groups", "pages of dense", "as transformers"):
        table.add_column(head)
    rows = []
    for job, result in zip(jobs, found["results"], strict=True):
        row: dict[str, Any] = {"name": job.name, "wrong": check(job, result)}
        held, dense = (0, 0) if "error" in result else pages(result)
        verdict = "NO: " + "; ".join(row["wrong"]) if row["wrong"] else "stops, as it has to" if job.fails else "yes"
        if job.fails is not None:
            row["stops"] = job.fails
        elif "error" not in result:
            row |= {"class": result["class"], "kv_groups": len(result["groups"]), "pages": [held, dense]}
            row["texts"], row["at_once"] = len(job.expected), list(job.sizes)
            if ties := parted(job, result):
                row["ties"] = ties
        rows.append(row)
        saved = f"{held} of {dense}" if dense else ""
        table.add_row(job.name, row.get("class", ""), str(row.get("kv_groups", "")), saved, verdict)
    if alone is not None:
        rows.append({"name": "patched, without the plugin", "wrong": alone})
        table.add_row(rows[-1]["name"], "", "", "", "NO: " + "; ".join(alone) if alone else "dense, and says so")
    console = Console(width=150)
    console.print(table)
    if measured is not None:
        console.print_json(json.dumps(measured))
    if options.out is not None:
        write(options.out, found, rows, measured)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
