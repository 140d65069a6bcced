"""What models do on several GPUs, beside one: pipelines of one process, heads split, documents shared, weights spread.

python scripts/gpu_placement.py FOLDER [SECTION ...]     two GPUs, under 10 minutes; with --small on any machine

Every section is a process, or a launch, of its own; one that fails is told, and the others go on. `FOLDER` gets what
each has found (SECTION.json) and the table. Sections:

* `spread`: a model over all GPUs of one process (`device: balanced`): profile, training and measures are those of one;
* `heads`: a patched checkpoint of an 8B shape with random weights, loaded by `AutoModelForCausalLM` alone, under
  `device_map="auto"` and under tensor parallel: logits, greedy tokens and cache bytes are those of one GPU;
* `profile`: the documents of a profile over two processes: the bytes of one, in what share of its time;
* `recover`: LoRA and full, in two processes, and with weights spread by FSDP2: the losses of one;
* `context`: a sequence of 128k tokens that two processes share (`recover: {context: 2}`): time, memory and gradients
  beside one GPU, for windows, linear heads, full ones and a mixture;
* `stream`: a 70B shape profiled layer by layer on one GPU, with a bound on memory.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.bench.measure import peak_bytes, release
from compress.data.sample import TextSample
from compress.evaluate.measures.perplexity import Perplexity, perplexity
from compress.export.layout import copy_runtime, point_to_runtime
from compress.files import write_json
from compress.models.backward import recomputed
from compress.models.cache_bytes import cache_bytes
from compress.models.context.processes import part_of_sequence
from compress.models.families import family_of
from compress.models.known_shapes import SHAPES
from compress.models.load import LoadedModel, load_model
from compress.models.placement import placement_of
from compress.models.planned import planned_model, with_runtime_plan
from compress.models.shape import shape_of
from compress.models.source import random_model
from compress.models.stream import RandomWeights, Stream
from compress.plan import make_plan
from compress.profile.heads.attention import Attention
from compress.profile.heads.influence import Influence
from compress.profile.run import run_profile
from compress.profile.units.amp import Amp
from compress.runtime.families import groups_of
from compress.runtime.mixer_span import attend_view
from compress.runtime.modeling_compress import CACHE
from compress.runtime.span import FULL
from compress.search.response import response_loss
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.window import WindowGroup
from compress.train.curve import Curve
from compress.train.objectives.text import Text
from compress.train.prepare import prepare
from compress.train.recovery import recover
from compress.train.settings import PrepareSettings, RecoverSettings
from compress.train.student import Student
from compress.train.token_losses import next_tokens
from scripts.gpu_check import error

GPU = torch.cuda.is_available()
MODULE = "scripts.gpu_placement"
WORDS = 96  # of the vocabulary that models written here have, beside four special tokens
# Largest relative difference of logits in float32, where products are added in another order. That in bfloat16 is only
# told: random weights carry other roundings through all layers, and tokens may be others.
BELOW = 1e-4
TOGETHER = (
    ("spread", "recover"),
    ("heads",),
    ("profile",),
    ("context",),
    ("stream",),
)  # what no time is taken of runs at once
LIMIT = {"spread": 120, "heads": 170, "profile": 240, "recover": 200, "context": 160, "stream": 150}  # seconds


def shape(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """A configuration of SHAPES, or with `--small` a tiny one in its place."""
    if not options.small:
        return dict(SHAPES[name])
    tiny = {"num_hidden_layers": 4, "initializer_range": 0.2, "max_position_embeddings": 1024}
    return {**SHAPES["tiny"], **tiny, "head_dim": 8}


def place(rank: int = 0) -> str:
    """The device of a process."""
    return f"cuda:{rank}" if GPU else "cpu"


def dtype(options: argparse.Namespace) -> torch.dtype:
    """What large models are kept in."""
    return torch.float32 if options.small else torch.bfloat16


def documents(count: int, length: int, vocabulary: int) -> dict[int, list[TextSample]]:
    """Random tokens with the loss on the last 64."""
    made = []
    for seed in range(count):
        ids = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
        made.append(TextSample(tuple(ids.tolist()), (length - min(64, length // 2), length)))
    return {length: made}


def plan_entries(groups: int) -> list[dict[str, Any]]:
    """Windows and full groups in turn, so that every process has some of both."""
    window, full = WindowGroup(sink=64, alpha=256, beta=0.125), FullGroup()
    return [(full if number % 2 else window).model_dump(mode="json") for number in range(groups)]


def written_model(folder: Path, layers: int = 8, hidden: int = 512) -> Path:
    """A random Llama with a tokenizer of words, as a folder of a model."""
    from tests.tiny import tiny_tokenizer

    torch.manual_seed(0)
    values = {**SHAPES["tiny"], "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    values |= {"vocab_size": WORDS + 1, "initializer_range": 0.05, "max_position_embeddings": 8192}
    model = random_model(values, torch.device("cpu"), torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def written_text(path: Path, tokens: int) -> Path:
    """Words in an order that can be learnt a little: each follows one of three others."""
    generator, words, last = torch.Generator().manual_seed(0), [], 3
    for step in torch.randint(0, 3, (tokens,), generator=generator).tolist():
        last = 3 + (5 * last + step) % (WORDS - 3)
        words.append(f"w{last}")
    path.write_text(" ".join(words), encoding="utf-8")
    return path


# --- one process, several GPUs ---------------------------------------------------------------------------------------


def spread(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """What the stages compute of a small model over all GPUs, and of the same on one."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = written_model(Path(scratch) / "model", layers=4 if options.small else 8)
        found = []
        for number, device in enumerate((place(), "balanced" if GPU else place())):
            loaded = load_model(str(folder), dtype="float32", device=device)
            found.append(stages(loaded, Path(scratch) / str(number)))
            facts[f"devices of {device}"] = [str(each) for each in placement_of(loaded.model).devices]
            say(f"{device}: layers on {', '.join(map(str, placement_of(loaded.model).devices))}")
        one, other = found
        alike = []
        for name, value in one.items():
            same = value == other[name]
            gap = 0.0 if same else difference(value, other[name])
            facts[name] = {"equal": same, "difference": gap}
            if same:
                alike.append(name)
            else:
                say(f"{name}: largest relative difference {gap:.1e}{mark(gap < 1e-4)}")
        say(f"equal to the bit, {len(alike)} of {len(one)}: {'; '.join(alike)}")


def stages(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    """What a profile, a measure, a preparation and trainings give."""
    model, size = loaded.model, loaded.shape
    folder.mkdir()
    statistics = [Influence(), Attention(sink=4), Amp()]
    texts = documents(2, 512, WORDS)
    made = run_profile(loaded, texts, statistics, folder / "profile", seed=0, checkpointing=False)
    found: dict[str, Any] = {f"profile, {key}": values.flatten().tolist() for key, values in made.tensors.items()}
    ids = [number % WORDS for number in range(3, 3 + 2 * 1024)]
    groups: list[Any] = [WindowGroup(sink=4, alpha=64, beta=0.125), FullGroup()] * (size.kv_heads // 2)
    plan = make_plan(size, [groups] * size.layers)
    planned = planned_model(model, plan)
    for name, each in (("dense", model), ("plan", planned)):
        found[f"perplexity, {name}"] = perplexity(each, ids, Perplexity(length=512, windows=2)).window_nll
        found[f"response loss, {name}"] = response_loss(each, texts[512])
    given = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    prompt = torch.tensor([ids[:300]], device=placement_of(model).inputs)
    found["tokens, plan"] = planned.generate(prompt, **given)[0].tolist()
    found["tokens, plan, static"] = planned.generate(prompt, cache_implementation="static", **given)[0].tolist()
    settings = PrepareSettings(targets=(LinearGroup(map="hedgehog"),), steps=3, batch_size=4, length=128)
    options = prepare(model, size, settings, ids, folder / "options", seed=0)
    found["prepare, linear heads"] = [options[name].last_loss for name in options]
    for train in ("lora", "full"):
        kind: Any = train
        training = RecoverSettings(
            steps=3, batch_size=4, length=128, train=kind, dropout=0.0, loss="both", precision="float32"
        )
        recover(planned_model(model, plan), training, ids, folder / train, seed=0, teacher=model)
        found[f"recover, {train}"] = [step["loss"] for step in Curve(folder / train / "loss.jsonl").steps()]
    return found


def difference(one: Any, other: Any) -> float:
    """The largest difference of two numbers or lists of numbers, over the largest size of the first."""
    first, second = (torch.tensor(value, dtype=torch.float64).flatten() for value in (one, other))
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-30))


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """A patched checkpoint on one GPU, over all of one process, and with its heads split over two."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoint"
        started = time.time()
        values = shape(options, "llama-3-8b")
        if options.layers:
            values["num_hidden_layers"] = options.layers
        torch.manual_seed(0)
        dense = random_model(values, torch.device(place()), dtype(options))
        layer = {"groups": plan_entries(groups_of(dense.config))}
        planned = with_runtime_plan(dense, {"schema": 1, "layers": [layer] * dense.config.num_hidden_layers})
        numbers = sum(weight.numel() for weight in planned.parameters())
        say(f"{dense.config.num_hidden_layers} layers, {numbers / 1e9:.2f}B random weights, windows and full groups")
        planned.save_pretrained(folder)
        copy_runtime(folder)
        point_to_runtime(folder, family_of(dense.config))
        del dense, planned
        release(torch.device(place()))
        say(f"written in {time.time() - started:.0f} s")
        facts["one"] = run_child(options, "heads_one", folder, 1)
        facts["device_map"] = run_child(options, "heads_map", folder, 1)
        facts["tensor_parallel"] = run_child(options, "heads_split", folder, 2)
        expected = torch.load(folder / "one.pt", weights_only=True)
        for name in ("device_map", "tensor_parallel"):
            found = torch.load(folder / f"{name}.pt", weights_only=True)
            gap, agree = error(found["logits"], expected["logits"]), 0
            while agree < len(expected["tokens"]) and bool((found["tokens"] == expected["tokens"])[agree]):
                agree += 1
            kept, whole = facts[name]["cache_bytes"], facts["one"]["cache_bytes"]
            exact = name == "device_map"
            gap_wide = error(found["wide"], expected["wide"])
            ok = (gap == 0 if exact else gap_wide < BELOW) and sum(kept) == sum(whole)
            facts[name] |= {"error": gap, "error_float32": gap_wide, "equal_tokens": agree}
            say(
                f"{name}: logits {gap:.1e} from one GPU, {gap_wide:.1e} in float32, {agree} of "
                f"{len(expected['tokens'])} greedy tokens equal, "
                f"cache {' + '.join(f'{each:,}' for each in kept)} bytes of {sum(whole):,}, "
                f"{facts[name]['seconds_a_token'] * 1e3:.1f} ms a token beside "
                f"{facts['one']['seconds_a_token'] * 1e3:.1f}{mark(ok)}"
            )


def heads_child(options: argparse.Namespace, name: str, **how: Any) -> None:
    """Load the checkpoint in some way, and write its logits, greedy tokens, cache bytes and speed."""
    rank, folder = int(os.environ.get("RANK", "0")), Path(options.work)
    if GPU:
        torch.cuda.set_device(rank)
    started = time.time()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype(options), trust_remote_code=True, **how).eval()
    loaded = time.time() - started
    length = 300 if options.small else 2048
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(place(rank) if "device_map" not in how else model.get_input_embeddings().weight.device)
    wanted: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "return_dict_in_generate": True}
    wanted |= {"eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=64).logits[0].float().cpu()
        model.generate(ids, **wanted)
        synchronize()
        started = time.time()
        output = model.generate(ids, **wanted)
        synchronize()
        spent = (time.time() - started) / wanted["max_new_tokens"]
        wide = model.float()(ids, logits_to_keep=64).logits[0].cpu()
    found = {
        "rank": rank,
        "load_seconds": loaded,
        "seconds_a_token": spent,
        "cache_bytes": cache_bytes(getattr(output, CACHE)),
        "devices": sorted({str(weight.device) for weight in model.parameters()}),
    }
    if rank == 0:
        torch.save(
            {"logits": logits, "wide": wide, "tokens": output.sequences[0, length:].cpu()}, folder / f"{name}.pt"
        )
    write_json(folder / f"{options.child}-{rank}.json", found)


def heads_one(options: argparse.Namespace) -> None:
    """On one device."""
    heads_child(options, "one", device_map={"": place()})


def heads_map(options: argparse.Namespace) -> None:
    """Over all GPUs of this process."""
    heads_child(options, "device_map", device_map="auto" if GPU else {"": "cpu"})


def heads_split(options: argparse.Namespace) -> None:
    """In one of the processes that heads are split over."""
    from transformers.distributed.configuration_utils import DistributedConfig

    heads_child(options, "tensor_parallel", distributed_config=DistributedConfig(tp_size=2))
    torch.distributed.destroy_process_group()


# --- documents -------------------------------------------------------------------------------------------------------


def profile(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """One set of documents in one process, and shared by two: the same bits, as in a second run of one process."""
    with tempfile.TemporaryDirectory() as scratch:
        for count in (1, 2):
            facts[str(count)] = run_child(options, "profile_child", Path(scratch) / str(count), count)
        alone, again, shared = (
            load_file(Path(scratch) / place / "statistics.safetensors")
            for place in ("1/profile", "1/again", "2/profile")
        )
        one, two = (max(facts[str(count)]["seconds"]) for count in (1, 2))
        facts["ratio"], facts["gaps"] = two / one, {}
        say(
            f"profile of {facts['1']['documents'][0]} documents of {facts['1']['length'][0]:,} tokens: {one:.1f} s in "
            f"one process, {two:.1f} s in two ({two / one:.2f}, at most .6 wanted{mark(two / one <= 0.6)})"
        )
        for what, found in (("two processes", shared), ("a second run of one process", again)):
            differing = [name for name, values in alone.items() if not torch.equal(found[name], values)]
            gaps = {name: error(found[name], alone[name]) for name in differing}
            facts["gaps"][what] = gaps
            others = "".join(f"; {name} differs by {gap:.1e} of its norm" for name, gap in gaps.items())
            equal = f"{len(alone) - len(gaps)} of {len(alone)} statistics equal to the bit"
            say(f"  {what}: {equal}{others}{mark(not gaps)}")


def profile_child(options: argparse.Namespace) -> None:
    """One of the processes that share the documents."""
    rank, folder = int(os.environ.get("RANK", "0")), Path(options.work)
    device = torch.device(place(rank))
    if GPU:
        torch.cuda.set_device(device)
    values = shape(options, "llama-3-8b")
    torch.manual_seed(0)
    model = random_model(values, device, dtype(options))
    loaded: Any = LoadedModel(model, None, "random")
    count, length = (4, 256) if options.small else (8, 4096)
    statistics = [Influence(), Attention(sink=4)]
    run_profile(loaded, documents(2, length // 2, 96), statistics, folder / "first", seed=1)
    synchronize()
    started = time.time()
    run_profile(loaded, documents(count, length, 96), statistics, folder / "profile", seed=0)
    synchronize()
    found = {"rank": rank, "seconds": time.time() - started, "documents": count, "length": length}
    if "RANK" not in os.environ:
        run_profile(loaded, documents(count, length, 96), statistics, folder / "again", seed=0)
    write_json(folder / f"{options.child}-{rank}.json", found)


# --- training --------------------------------------------------------------------------------------------------------


def recovery(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """`scripts.recover_processes` on a small random model, with LoRA and in full."""
    with tempfile.TemporaryDirectory() as scratch:
        small = options.small
        model = written_model(Path(scratch) / "model", layers=2 if small else 8, hidden=64 if small else 512)
        text = written_text(Path(scratch) / "text.txt", 40_000)
        running = {}
        for train in ("lora", "full"):
            command = [sys.executable, "-m", "scripts.recover_processes", "--model", str(model), "--text", str(text)]
            command += ["--train", train, "--steps", "4" if small else "10", "--length", "128", "--batch", "8"]
            command += ["--shard"] if GPU else []
            running[train] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for train, process in running.items():
            told, wrong = process.communicate()
            rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
            facts[train] = rows
            for row in rows[1:]:
                gap = row["largest_gap_to_one_process"]
                what = "weights spread (FSDP2)" if row["spread"] else "whole weights"
                say(
                    f"recover, {train}, {row['processes']} processes, {what}: loss {row['first_loss']:.4f} to "
                    f"{row['last_loss']:.4f}, at most {gap:.1e} from one process{mark(gap < 0.01)}"
                )
            if process.returncode:
                say(f"recover, {train}: FAILED: {wrong.strip()[-1500:]}")


# --- one sequence over two GPUs --------------------------------------------------------------------------------------


# Of SmolLM2-135M; positions go further than its own.
SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
# Time on two GPUs over that on one, as it was expected before anything was measured: half, and beside it what every
# process does by itself or waits for, a share that is larger the less there is to compute.
PREDICTED = {"windows": 0.57, "linear": 0.62, "full": 0.52, "mixed": 0.54}


def context_plans() -> dict[str, tuple[Any, ...]]:
    """Targets that head groups have in turn, by the name of a plan."""
    window, grown = WindowGroup(sink=64, alpha=2048, beta=0.0), WindowGroup(sink=64, alpha=256, beta=0.0625)
    linear = LinearGroup(sink=64, alpha=512)
    return {
        "windows": (window,),
        "linear": (linear,),
        "full": (FullGroup(),),
        "mixed": (FullGroup(), grown, linear, window),
    }


def context(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """Training passes over one sequence on one GPU, and shared by two processes (`recover: {context: 2}`)."""
    work = options.folder / "context"
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("*.json"):
        old.unlink()
    command = [*command_of(options, 2), "--child", "context_child", "--work", str(work)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit, wrong = LIMIT["context"] * (5 if options.small else 1) - 10, None
    try:
        told, _ = child.communicate(timeout=limit)
        wrong = told[-1500:] if child.returncode else None
    except subprocess.TimeoutExpired:
        child.terminate()  # which ends its processes
        child.communicate()
        wrong = f"more than {limit} s"
    rows = [json.loads(path.read_text()) for path in sorted(work.glob("row-*.json"))]
    facts["rows"] = rows
    for row in rows:
        say(row["line"])
    if wrong is not None:
        say(f"context FAILED: {wrong}")


class ContextChild:
    """One of the two processes: models are made anew for each row, and the main process runs alone after both have.

    So kernels are compiled in both at once. In bfloat16 the faster of two passes counts; float32 is plain PyTorch.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rank = options, int(os.environ.get("RANK", "0"))
        self.device = torch.device(place(self.rank))
        if GPU:
            torch.cuda.set_device(self.device)
        PartialState(cpu=not GPU)
        self.rows, self.begun = 0, time.time()

    def told(self, line: str, **facts: Any) -> None:
        """Leave a row; the main process does."""
        self.rows += 1
        if self.rank == 0:
            write_json(Path(self.options.work) / f"row-{self.rows:02d}.json", {"line": line, **facts})

    def model(self, targets: tuple[Any, ...], layers: int, dtype: torch.dtype) -> Any:
        """A model with random weights under a plan."""
        values = {**(shape(self.options, "tiny") if self.options.small else SMOLLM2), "num_hidden_layers": layers}
        torch.manual_seed(0)
        dense = random_model(values, self.device, dtype)
        turn, known = itertools.cycle(targets), shape_of(dense)
        plan = make_plan(known, [[next(turn) for _ in range(known.kv_heads)] for _ in range(layers)])
        return planned_model(dense, plan, untrained=True)

    def passes(self, model: Any, length: int, shard: Any, low: torch.dtype | None, times: int) -> dict[str, Any]:
        """The loss and gradients of a sequence, or of the part that is here; seconds of the fastest pass, and bytes."""
        ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        here = torch.arange(length) if shard is None else shard.positions(ids.device)
        inputs = {"input_ids": ids[:, here].to(self.device), "next_ids": next_tokens(ids)[:, here].to(self.device)}
        student, text = Student(model, None, low, whole=False, as_kept=low is not None, shard=shard), Text()
        model.config.compress_impl = "reference" if low is None else "auto"
        spent, total = [], torch.zeros((), device=self.device)

        def learn(made: Any, teacher: Any, some: Any = inputs, **_: Any) -> None:
            if "logits" in made:
                loss = text.loss(made, None, some) / (length - 1)
                total.add_(loss.detach())
                loss.backward()

        with recomputed(model, len(here), chosen=True, trained=True):
            for _ in range(times):
                model.zero_grad(set_to_none=True)
                total.zero_()
                release(self.device)
                self.wait(shard is not None)
                started = time.perf_counter()
                student.run(model, inputs, learn)
                for weight in model.parameters() if shard is not None else ():
                    if weight.grad is not None:
                        torch.distributed.all_reduce(weight.grad)
                self.wait()
                spent.append(time.perf_counter() - started)
        peak = peak_bytes(self.device) or 0
        grads = [None if weight.grad is None else weight.grad.cpu() for weight in model.parameters()]
        model.zero_grad(set_to_none=True)
        return {"seconds": min(spent), "first": spent[0], "peak": peak, "loss": total, "grads": grads}

    def wait(self, together: bool = False) -> None:
        """Until this GPU is idle, and the other process is here."""
        if GPU:
            torch.cuda.synchronize(self.device)
        if together:
            torch.distributed.barrier()

    @property
    def late(self) -> bool:
        """Whether there is no time for one more row, in both processes alike."""
        spent = torch.tensor(time.time() - self.begun, device=self.device)
        torch.distributed.all_reduce(spent, torch.distributed.ReduceOp.MAX)
        return float(spent) > 0.75 * LIMIT["context"] and not self.options.small

    def compared(self, name: str, targets: tuple[Any, ...], length: int, layers: int, low: torch.dtype | None) -> None:
        """A row: one GPU beside two."""
        part, times = part_of_sequence(length, 2), 2 if low is not None else 1
        model = self.model(targets, layers, torch.float32).requires_grad_(True).train()
        both = self.passes(model, length, part, low, times)
        numbers = torch.tensor([both["seconds"], both["first"], float(both["peak"])], device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(both["loss"])
        seconds, first, peak = numbers.tolist()
        alone, wrong = None, None
        if self.rank == 0:
            try:
                alone = self.passes(model, length, None, low, times)
            except torch.OutOfMemoryError as error:
                wrong = str(error)
        self.wait(together=True)
        form = "float32" if low is None else "bfloat16"
        head = f"{name}, {length:,} tokens, {layers} layers, {form}"
        if alone is None:
            self.told(f"{head}: one GPU: {wrong}; two: {seconds:.3f} s, {peak / 1e9:.2f} GB", name=name)
            return
        pairs = [
            (one.to(self.device).double(), two.to(self.device).double())
            for one, two in zip(alone["grads"], both["grads"], strict=True)
            if one is not None
        ]
        gap = sum(float((one - two).square().sum()) for one, two in pairs)
        gap = (gap / sum(float(one.square().sum()) for one, _ in pairs)) ** 0.5
        expected = f", {PREDICTED[name]:.2f} predicted" if low is not None else ""
        ratio, share = seconds / alone["seconds"], peak / max(alone["peak"], 1)
        ok = gap < (1e-5 if low is None else 0.02)
        self.told(
            f"{head}: {alone['seconds']:.3f} s on one GPU, {seconds:.3f} s on two ({ratio:.2f}{expected}); at most "
            f"{alone['peak'] / 1e9:.2f} GB held on one, {peak / 1e9:.2f} GB on each of two ({share:.2f}); loss "
            f"{float(alone['loss']):.5f} and {float(both['loss']):.5f}, gradients differ by {gap:.1e} of their norm"
            f"{mark(ok)} (first pass, with compiling: {first:.0f} s)",
            name=name, length=length, layers=layers, dtype=form, seconds=[alone["seconds"], seconds],
            peak=[alone["peak"], peak], ratio=ratio, share=share, gradient_error=gap,
        )  # fmt: skip

    def beside_torch(self, length: int) -> None:
        """A row: attention of one full layer, shared as here, and by torch's context parallel."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental import context_parallel
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.manual_seed(0)
        heads = [torch.randn(1, 9, length, 64, device=self.device, dtype=torch.bfloat16) for _ in range(3)]
        part = part_of_sequence(length, 2)
        found: dict[str, float] = {}

        def ours() -> None:
            here = part.positions(self.device)
            query, key, value = (x[:, :, here].requires_grad_() for x in heads)
            views = part.views(torch.cat([key, value], -1), (FULL,) * 9)
            parts = zip(part.split(query, 2), views, strict=True)
            torch.cat([attend_view("auto", own, view, both) for own, (view, both) in parts], 2).sum().backward()

        def torchs() -> None:
            own = [x.clone() for x in heads]
            mesh = init_device_mesh("cuda", (2,))
            with context_parallel(mesh, buffers=own, buffer_seq_dims=[2] * 3), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                query, key, value = (x.detach().requires_grad_() for x in own)  # the context resizes its buffers
                torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

        for name, run in (("ours", ours), ("torch", torchs)):
            for _ in range(3):
                self.wait(together=True)
                started = time.perf_counter()
                run()
                self.wait()
                found[name] = min(found.get(name, float("inf")), time.perf_counter() - started)
        self.told(
            f"attention of one full layer of 9 heads, {length:,} tokens, forward and backward on two GPUs: "
            f"{found['ours'] * 1e3:.1f} ms, by torch's context_parallel {found['torch'] * 1e3:.1f} ms",
            **found,
        )


def context_child(options: argparse.Namespace) -> None:
    """One of the two processes that share a sequence."""
    child = ContextChild(options)
    long, layers = (1024, 2) if options.small else (131072, 8)
    short = 512 if options.small else 4096
    plans = context_plans()
    work = [functools.partial(child.compared, "mixed", plans["mixed"], short, 2, None)]
    work += [functools.partial(child.compared, name, plans[name], long, layers, torch.bfloat16) for name in plans]
    work += [functools.partial(child.beside_torch, long)] if GPU else []
    for each in work:
        try:
            if child.late:
                child.told("no time was left for the other rows")
                break
            each()
        except Exception:  # told; the rows after it run all the same, unless the other process waits in vain
            child.told(f"a row FAILED in process {child.rank}: {traceback.format_exc()[-1500:]}")
    write_json(Path(options.work) / f"{options.child}-{child.rank}.json", {"rank": child.rank})
    torch.distributed.destroy_process_group()


# --- layer by layer ----------------------------------------------------------------------------------------------


def streamed(options: argparse.Namespace, facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """A 70B shape with random weights, forward and backward, of which one layer at a time is in memory.

    Weights are drawn on the GPU when a layer is wanted, so that neither a disk nor a bus is measured.
    """
    values = shape(options, "llama-3-70b")
    device = torch.device(place())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype(options)).eval()
    whole = sum(weight.nbytes for weight in model.parameters())
    stream = Stream(model, RandomWeights(0.02, device), device)
    one = max(sum(weight.nbytes for weight in layer.parameters()) for layer in stream.layers)
    beside = sum(weight.nbytes for weight in model.parameters() if not weight.is_meta)
    loaded: Any = LoadedModel(model, None, "random")
    release(device)
    started = time.time()
    loaded.shape  # noqa: B018  # the fingerprint reads all weights
    marked, read = time.time() - started, stream.read
    count, length = (2, 128) if options.small else (2, 4096)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        asked = [Influence(), Attention(sink=4), Amp()]
        made = run_profile(loaded, documents(count, length, 96), asked, Path(scratch) / "profile", seed=0)
    synchronize()
    spent = time.time() - started
    peak = peak_bytes(device) if GPU else None
    layers = len(stream.layers)
    facts |= {"bytes": whole, "layer_bytes": one, "beside_bytes": beside, "peak_bytes": peak, "seconds": spent}
    facts |= {"layers": layers, "fingerprint_seconds": marked, "read_bytes": stream.read - read, "count": count}
    finite = all(bool(torch.isfinite(values).all()) for values in made.tensors.values())
    ok = finite and (peak is None or peak < 70e9)
    say(
        f"{layers} layers, {whole / 1e9:.1f} GB of weights: {count} documents of {length:,} tokens, forward, backward "
        f"and for importance, in {spent:.0f} s ({marked:.0f} s before for the fingerprint)"
    )
    told = "not known" if peak is None else f"{peak / 1e9:.1f} GB"
    say(f"  {beside / 1e9:.2f} GB beside the layers and {one / 1e9:.2f} GB a layer; at most {told} held{mark(ok)}")


# --- sections --------------------------------------------------------------------------------------------------------

SECTIONS: Mapping[str, Callable[..., None]] = {
    "spread": spread,
    "heads": heads,
    "profile": profile,
    "recover": recovery,
    "context": context,
    "stream": streamed,
}
CHILDREN: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "heads_one": heads_one,
    "heads_map": heads_map,
    "heads_split": heads_split,
    "profile_child": profile_child,
    "context_child": context_child,
}


def mark(ok: bool) -> str:
    """What is said behind a figure."""
    return "" if ok else "  <-- NOT AS EXPECTED"


def synchronize() -> None:
    """Until all GPUs are idle."""
    for number in range(torch.cuda.device_count() if GPU else 0):
        torch.cuda.synchronize(number)


def command_of(options: argparse.Namespace, processes: int) -> list[str]:
    """This script in some processes, with the options that it was given."""
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(processes)] if processes > 1 else []
    own = ["--small"] if options.small else []
    return [*start, "-m", MODULE, str(options.folder), *own, "--layers", str(options.layers)]


def run_child(options: argparse.Namespace, name: str, work: Path, processes: int) -> dict[str, Any]:
    """Run a function of `CHILDREN` in so many processes; what each wrote, as lists by name.

    Raises:
        RuntimeError: one failed; with the end of what it said.
    """
    work.mkdir(parents=True, exist_ok=True)
    command = [*command_of(options, processes), "--child", name, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} in {processes} processes: {done.stderr.strip()[-3000:]}")
    rows = [json.loads((work / f"{name}-{rank}.json").read_text()) for rank in range(processes)]
    whole: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    return whole | {key: max(whole[key]) for key in ("seconds_a_token", "load_seconds") if key in whole}


def run_section(options: argparse.Namespace) -> None:
    """One section, in this process: its lines and what it found."""
    lines: list[str] = []
    facts: dict[str, Any] = {"table": lines}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    try:
        SECTIONS[options.section](options, facts, say)
    except Exception:  # told; the sections after it run all the same
        say(f"{options.section} FAILED: {traceback.format_exc()[-3000:]}")
    write_json(options.folder / f"{options.section}.json", facts)


def main() -> None:
    """The sections that are named, each in a process of its own, and the table of all that they said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sections", nargs="*", help=f"by default all: {', '.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to see on any machine that it runs")
    parser.add_argument("--layers", type=int, default=0, help="of the shape of `heads`; 0 for all")
    for hidden in ("--child", "--work", "--section"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.child:
        CHILDREN[options.child](options)
        return
    if options.section:
        run_section(options)
        return
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        sys.exit(f"no section {', '.join(sorted(unknown))}; sections are {', '.join(SECTIONS)}")
    name = torch.cuda.get_device_name() if GPU else "CPU"
    head = f"{max(1, torch.cuda.device_count())} x {name}, torch {torch.__version__}"
    print(head, flush=True)
    table, begun = [head], time.time()
    asked = options.sections or [*SECTIONS]
    for group in TOGETHER:
        sections, started = [section for section in group if section in asked], time.time()
        running = {}
        for section in sections:
            (options.folder / f"{section}.json").unlink(missing_ok=True)
            command = [*command_of(options, 1), "--section", section]
            running[section] = subprocess.Popen(command, start_new_session=True)
        for section, process in running.items():
            limit = LIMIT[section] * (5 if options.small else 1)
            try:
                process.wait(timeout=max(1.0, started + limit - time.time()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
                print(f"{section} FAILED: more than {limit} s", flush=True)
            path = options.folder / f"{section}.json"
            lines = json.loads(path.read_text())["table"] if path.is_file() else [f"{section} FAILED: it left nothing"]
            table += [f"-- {section}, {time.time() - started:.0f} s", *lines]
            (options.folder / "table.txt").write_text("\n".join(table) + "\n", encoding="utf-8")
    print(f"\n{'=' * 40} the table, {time.time() - begun:.0f} s")
    print("\n".join(table), flush=True)


if __name__ == "__main__":
    main()
