#!/usr/bin/env python3
"""Runs jobs in vLLM and writes down what it did; started by scripts/vllm_check.py with the Python that has vLLM.

    scripts/vllm_engine.py RESULTS < JOBS

Jobs come as lines of JSON, and each is run as soon as it is there. RESULTS gets a line of JSON with the versions, and
one for each job once that has ended. A job has the path of a model, the engine's options and environment, and rounds
of prompts, of which some at once. The result has the tokens of each round, the engine's KV cache groups and attention,
the blocks that each request held in its last step (unless `watch_blocks` is false), the time, and how many requests
ran at once. Nothing here imports compress.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is in this process, where it can be looked at
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": 32,
    "kv_cache_memory_bytes": 256 << 20,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
}


class Watch:
    """Looks at every step of a scheduler."""

    def __init__(self, core: Any, blocks: bool) -> None:
        self.scheduler, self.blocks = core.scheduler, blocks
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.step, self.scheduler.schedule = self.scheduler.schedule, self.schedule
        self.clear()

    def clear(self) -> None:
        """Forget what was seen."""
        self.held: dict[str, dict[str, Any]] = {}
        self.running: Counter[int] = Counter()
        self.preempted = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the scheduler's own, which it calls."""
        before = {request.request_id: request.num_computed_tokens for request in self.scheduler.running}
        waiting = bool(self.scheduler.waiting)
        found = self.step(*args, **kwargs)
        self.preempted += len(found.preempted_req_ids or ())
        if waiting:  # while more could be done at once, if there were memory
            self.running[len(self.scheduler.running)] += 1
        for request, new in found.num_scheduled_tokens.items() if self.blocks else ():
            done = before.get(request, 0)
            self.held[request] = {"before": done, "after": done + new, "blocks": self._blocks(request)}
        return found

    def _blocks(self, request: str) -> list[list[int]]:
        tables = (manager.req_to_blocks.get(request, ()) for manager in self.managers)
        return [[number for number, block in enumerate(table) if not block.is_null] for table in tables]


def group_of(group: Any) -> dict[str, Any]:
    """A KV cache group in plain values."""
    spec, rule = group.kv_cache_spec, getattr(group.kv_cache_spec, "rule", None)
    return {
        "kind": type(spec).__name__,
        "modules": list(group.layer_names),
        "heads": getattr(spec, "num_kv_heads", None),
        "block": spec.block_size,
        "page_bytes": spec.page_size_bytes,
        "window": getattr(spec, "sliding_window", None),
        "rule": None if rule is None else [rule.sink, rule.alpha, rule.beta_units, rule.granule],
    }


def class_of(llm: Any) -> str:
    """The class of vLLM that a model has, or whose attention the plugin has split."""
    found = type(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)
    own = found.__bases__[-1] if found.__name__.startswith("Compress") else found
    return str(own.__name__)


def backends_of(llm: Any) -> dict[str, int]:
    """What computes attention, and in how many modules; with the version of FlashAttention."""
    modules = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    kinds = [module.impl for module in modules if hasattr(module, "impl")]
    names = (f"{type(kind).__name__} {getattr(kind, 'vllm_flash_attn_version', '') or ''}".strip() for kind in kinds)
    return dict(Counter(names))


def cpu_seconds() -> float:
    """Of this process, on all its threads, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def poison(core: Any) -> None:
    """Write NaN where freed entries of block tables point to."""
    for cache in core.model_executor.driver_worker.worker.model_runner.kv_caches:
        cache[0].fill_(float("nan"))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, all rounds of a job."""
    from vllm import LLM, SamplingParams

    os.environ |= job.get("environment", {})
    started = time.perf_counter()
    ranks = job.get("options", {}).get("tensor_parallel_size", 1)
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
    if ranks > 1:  # by itself vLLM wants a NUMA node for each
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
    llm = LLM(model=job["model"], **OPTIONS | job.get("options", {}))
    core = llm.llm_engine.engine_core.engine_core
    result: dict[str, Any] = {
        "groups": [group_of(group) for group in core.scheduler.kv_cache_config.kv_cache_groups],
        "blocks": core.scheduler.kv_cache_config.num_blocks,
        "class": class_of(llm) if ranks == 1 else None,
        "backends": backends_of(llm),
        "start_seconds": time.perf_counter() - started,
        "rounds": [],
    }
    watch = Watch(core, job.get("watch_blocks", True))
    if job.get("poison"):
        poison(core)
    for round_ in job["rounds"]:
        watch.clear()
        sampling = SamplingParams(max_tokens=round_["new"], temperature=0, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in round_["prompts"]]
        size, found = round_.get("at_once") or len(prompts), []
        started, used = time.perf_counter(), cpu_seconds()
        for first in range(0, len(prompts), size):
            found += llm.generate(prompts[first : first + size], sampling, use_tqdm=False)
        result["rounds"].append(
            {
                "tokens": [list(one.outputs[0].token_ids) for one in found],
                "cached": [one.num_cached_tokens for one in found],
                "seconds": time.perf_counter() - started,
                "cpu_seconds": cpu_seconds() - used,
                "held": list(watch.held.values()),
                "running": dict(watch.running),
                "preempted": watch.preempted,
            }
        )
    core.shutdown()
    if bound is None:
        os.environ.pop("VLLM_CPU_OMP_THREADS_BIND", None)
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = bound
    return result


def tell(result: dict[str, Any]) -> None:
    """One more line of results."""
    with Path(sys.argv[1]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def main() -> int:
    """All jobs, one engine after the other in this process; an engine that fails gives its error."""
    import torch
    import transformers
    import vllm
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    tell(versions)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            tell({"name": job["name"], **run(job)})
        except Exception as error:  # whatever it is, it is the result of this job
            traceback.print_exc()
            tell({"name": job["name"], "error": f"{type(error).__name__}: {error}"})
        for name in job.get("environment", {}):
            os.environ.pop(name, None)
        gc.collect()
        cleanup_dist_env_and_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
