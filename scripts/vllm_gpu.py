#!/usr/bin/env python3
"""Serves plans in vLLM on one GPU, with the plugin of plugins/vllm: tokens beside transformers, and requests at once.

    PYTHONPATH=.:plugins/vllm scripts/vllm_gpu.py [--python FILE] [--out FILE] [--layers N] [--eager] [NAME ...]

    tokens   greedy tokens of small models in float32 are those of transformers, and the blocks held those of the plan
    graphs   the same from CUDA graphs, and the shape of SmolLM2 with twelve layers
    half     in bfloat16, where the last bit decides between tokens that are as good: each is the best one of
             transformers in float32, or as good as that but for the rounding of bfloat16
    speed    the shape of Llama-3-8B with N layers (16): requests at once and tokens a second in the same memory, dense
             and by plans with half of the head groups windowed

All weights are random, so nothing is downloaded. vLLM and the plugin are those of the Python that runs this, or of
`--python`. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from compress.models.shape import shape_of
from compress.plan import Plan, make_plan
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from scripts.vllm_check import (
    SINKS,
    SLIDES,
    Job,
    Text,
    check,
    greedy,
    rule_of,
    run_engine,
    special_jobs,
    tiny_job,
    write_patched,
)

COMMON: dict[str, Any] = {"gpu_memory_utilization": 0.3}  # of which the script uses little; engines follow each other
GRAPHS: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 12, 16, 20, 24, 32, 48],
    },
}
GROUPS, SIZE, PROMPT, NEW, REQUESTS, DENSE_AT_ONCE = 8, 128, 4096, 512, 48, 12.5
Row = Callable[[Job, dict[str, Any]], dict[str, Any]]  # what is told of a job and its result
CLOSE = 0.15  # standard deviations of the logits by which bfloat16 may prefer another token


def small_llama(**sizes: Any) -> Any:
    """A random Llama of the shape of SmolLM2-135M, with fewer layers and words."""
    given = {
        "vocab_size": 4096,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**given | sizes)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def texts(count: int, vocabulary: int) -> list[list[int]]:
    """Random tokens, each row longer than the last."""
    torch.manual_seed(1)
    return [torch.randint(vocabulary, (80 + 70 * number,)).tolist() for number in range(count)]


def plan_of(model: Any, targets: tuple[Any, ...]) -> Plan:
    """The targets one after the other, over all head groups of all layers."""
    shape = shape_of(model)
    groups = [targets[number % len(targets)] for number in range(shape.layers * shape.kv_heads)]
    return make_plan(shape, [groups[row * shape.kv_heads : (row + 1) * shape.kv_heads] for row in range(shape.layers)])


def token_jobs(folder: Path) -> Iterator[Job]:
    """In float32, step by step."""
    yield from special_jobs(folder)
    for family in ("llama-gqa", "qwen3", "gemma2"):
        yield tiny_job(family, folder)


def graph_jobs(folder: Path) -> Iterator[Job]:
    """In float32, from CUDA graphs."""
    job = tiny_job("llama-gqa", folder)
    job.name, job.options = "llama-gqa, CUDA graphs", job.options | GRAPHS
    yield job
    model, prompts = small_llama(), texts(8, 4096)
    for name, targets, environment in (
        ("sinks, growing", SINKS, {}),
        (
            "sinks, R-SWA",
            (FullGroup(), SINKS[1], WindowGroup(sink=64, alpha=40, beta=0.0)),
            {"COMPRESS_VLLM_BACKEND": "rswa"},
        ),
    ):
        path = folder / f"shape-{name.replace(' ', '')}"
        patched, layers = write_patched(model, plan_of(model, targets), path)
        job = Job(f"shape of SmolLM2, {name}", path, prompts, greedy(patched, prompts, 24), (1, 8), layers=layers)
        job.options, job.environment = {"max_num_batched_tokens": 256} | GRAPHS, environment
        yield job


def half_job(folder: Path) -> tuple[Job, Any, Any]:
    """In bfloat16; the job, the model in float32 with the plan and without."""
    model, prompts = small_llama(num_hidden_layers=8).to(torch.bfloat16), texts(8, 4096)
    targets = (FullGroup(), SLIDES, SINKS[1], SINKS[2])
    patched, layers = write_patched(model, plan_of(model, targets), folder / "half")
    job = Job("bfloat16", folder / "half", prompts, [Text([0] * 48)] * len(prompts), layers=layers)
    job.options = {"max_num_batched_tokens": 512, "dtype": "bfloat16"} | GRAPHS
    return job, patched.float(), model.float()


def gaps(model: Any, prompts: list[list[int]], found: list[list[int]]) -> tuple[float, float]:
    """The share of tokens that a model finds best, and by how much any is worse, in standard deviations of logits."""
    worst, best, total = 0.0, 0, 0
    for ids, new in zip(prompts, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + new[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
        gap = (logits.amax(-1) - logits.gather(1, torch.tensor(new)[:, None])[:, 0]) / logits.std(-1)
        worst, best, total = max(worst, float(gap.max())), best + int((gap == 0).sum()), total + len(new)
    return best / total, worst


def check_half(job: Job, result: dict[str, Any], patched: Any, dense: Any) -> dict[str, Any]:
    """What of the tokens in bfloat16 is not as it has to be, and the figures."""
    if "error" in result:
        return {"wrong": [result["error"]]}
    found = result["rounds"][0]["tokens"]
    (share, worst), (_, control) = gaps(patched, job.prompts, found), gaps(dense, job.prompts, found)
    job.expected = [Text(tokens) for tokens in found]  # so that what is left to check are the blocks
    wrong = check(job, result)
    if worst > CLOSE:
        wrong.append(f"a token is {worst:.2f} standard deviations below the best one")
    if control <= CLOSE:
        wrong.append(f"the dense model does not differ: {control:.2f} standard deviations")
    return {"wrong": wrong, "best": share, "below_best": worst, "below_best_of_dense": control}


def speed_jobs(folder: Path, layers: int) -> list[Job]:
    """Configurations alone: vLLM makes the weights up."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    token = layers * GROUPS * SIZE * 2 * torch.bfloat16.itemsize
    options = {
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": PROMPT + NEW,
        "max_num_seqs": REQUESTS,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": int(token * (PROMPT + NEW) * DENSE_AT_ONCE),
        **GRAPHS,
    }
    torch.manual_seed(2)
    prompts = torch.randint(32000, (REQUESTS, PROMPT)).tolist()
    jobs = []
    for name, window, environment in (
        ("dense", None, {}),
        ("half windows of 320", WindowGroup(sink=0, alpha=320, beta=0.0), {}),
        ("half 64 sinks and 256", WindowGroup(sink=64, alpha=256, beta=0.0), {}),
        ("half 64 sinks and 256, R-SWA", WindowGroup(sink=64, alpha=256, beta=0.0), {"COMPRESS_VLLM_BACKEND": "rswa"}),
        ("half 64 sinks, 128 and 1/32 of the length", WindowGroup(sink=64, alpha=128, beta=1 / 32), {}),
    ):
        path = folder / name.replace(" ", "-").replace(",", "").replace("/", "-")
        config.save_pretrained(path)
        if window is not None:
            targets = (*[FullGroup()] * (GROUPS // 2), *[window] * (GROUPS // 2))
            layer = {"groups": [target.model_dump(mode="json") for target in targets]}
            fields = json.loads((path / "config.json").read_text())
            fields |= {
                "architectures": ["CompressLlamaForCausalLM"],
                "model_type": "compress_llama",
                "compress_plan": {"layers": [layer] * layers},
            }
            (path / "config.json").write_text(json.dumps(fields))
        job = Job(name, path, prompts, [Text([0] * NEW)] * REQUESTS, options=options, environment=environment)
        jobs.append(job)
    return jobs


def speed_row(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """Figures of one engine; bytes are of the blocks that the rules hold at the end of a request."""
    if "error" in result:
        return {"wrong": [result["error"]]}
    timed, held, length = result["rounds"][-1], 0, PROMPT + NEW
    for group in result["groups"]:
        rule, block = rule_of(group), group["block"]
        blocks = -(-length // block) if rule is None else len(rule.held(length, block))
        held += blocks * len(group["modules"]) * group["page_bytes"]
    return {
        "wrong": [],
        "at_once": max(int(count) for count in timed["running"]),
        "preempted": timed["preempted"],
        "seconds": timed["seconds"],
        "tokens_per_second": len(job.prompts) * length / timed["seconds"],
        "new_tokens_per_second": len(job.prompts) * NEW / timed["seconds"],
        "bytes_of_a_request": held,
    }


class Engine:
    """Runs jobs in vLLM, and tells the row of each as soon as it has one; the versions and what it printed are kept.

    Args:
        tell: called with a row.
    """

    def __init__(self, python: Path, tell: Callable[[dict[str, Any]], None]) -> None:
        self.python, self.tell, self.printed = python, tell, ""
        self.versions: dict[str, str] = {}

    def run(self, jobs: Iterable[Job], row_of: Row, ask: Callable[[Job], dict[str, Any]] = Job.as_json) -> None:
        """Run jobs, which are made meanwhile; `ask` says what the engine's script reads."""
        environment = {
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            # vLLM's own Triton kernel would round what it multiplies in float32 to 10 bits.
            "TRITON_F32_DEFAULT": "ieee",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy tokens need none, and the package is large
        }
        made: dict[str, Job] = {}

        def asked() -> Iterator[dict[str, Any]]:
            for job in jobs:
                made[job.name] = job
                job.options = COMMON | job.options
                yield ask(job)

        def tell(versions: dict[str, str], result: dict[str, Any]) -> None:
            job, self.versions = made[result["name"]], versions
            self.tell(row_of(job, result) | facts_of(job, result))

        _, self.printed = run_engine(self.python, asked(), tell, **environment)


def checked(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """What is not as it has to be, and of how many texts."""
    return {"wrong": check(job, result), "texts": len(job.prompts)}


def tokens(engine: Engine, folder: Path, layers: int) -> None:
    """See the file."""
    engine.run(token_jobs(folder), checked)


def graphs(engine: Engine, folder: Path, layers: int) -> None:
    """See the file."""
    engine.run(graph_jobs(folder), checked)


def half(engine: Engine, folder: Path, layers: int) -> None:
    """See the file."""
    job, patched, dense = half_job(folder)
    engine.run([job], lambda job, result: check_half(job, result, patched, dense))


def speed(engine: Engine, folder: Path, layers: int) -> None:
    """See the file."""
    jobs = speed_jobs(folder, layers)
    compiles = {"prompts": [jobs[0].prompts[0][:64]], "new": 4}

    def ask(job: Job) -> dict[str, Any]:
        given = job.as_json()
        # To watch blocks takes longer than a step.
        return given | {"rounds": [compiles, *given["rounds"]], "watch_blocks": False}

    engine.run(jobs, speed_row, ask)


def facts_of(job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """What is said of every engine."""
    facts: dict[str, Any] = {"name": job.name}
    if "error" not in result:
        facts |= {"backends": result["backends"], "kv_groups": len(result["groups"]), "start": result["start_seconds"]}
    return facts


PARTS: dict[str, Callable[[Engine, Path, int], None]] = {
    "tokens": tokens,
    "graphs": graphs,
    "half": half,
    "speed": speed,
}


def main() -> int:
    """Write checkpoints, run them, print what was found; 0 where all agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PARTS)}; all without")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of an environment with vLLM")
    parser.add_argument("--out", type=Path, help="write what was found to this JSON file, after every checkpoint")
    parser.add_argument("--layers", type=int, default=16, help="of the model of which the speed is measured")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    options = parser.parse_args()
    if options.eager:
        GRAPHS.clear()
    names = options.names or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"{unknown[0]}: expected {', '.join(PARTS)}")

    rows: list[dict[str, Any]] = []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None

    def tell(row: dict[str, Any]) -> None:
        rows.append({"part": name} | row)
        print(json.dumps(rows[-1]), flush=True)
        keep()

    def keep() -> None:
        facts = {"gpu": gpu, **engine.versions, "layers": options.layers, "rows": rows}
        if options.out is not None:
            options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    engine = Engine(options.python, tell)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            PARTS[name](engine, Path(scratch), options.layers)
            if any(row["wrong"] for row in rows if row["part"] == name):
                print(engine.printed[-6000:])
            keep()
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
