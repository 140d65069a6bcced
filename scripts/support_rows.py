"""What `scripts/support_table.py` tries on a checkpoint: each row uses it in one way and compares with a reference.

A row returns when what it computes is right, raises `Wrong` when it is not, and lets through what is raised by the
checkpoint or by the library that it is used with.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import json
import os
import pickle
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

LENGTH, NEW = 120, 12
PACKAGES = ("bitsandbytes", "torchao", "optimum-quanto", "trl", "fastapi")


class Wrong(Exception):
    """Something else was computed than the reference."""


def check(right: bool, words: str) -> None:
    """Raise `Wrong` with the words, unless it is right."""
    if not right:
        raise Wrong(words)


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Tokens that are the same."""
    check(torch.equal(found, expected), "other tokens than the reference")


def close(found: Any, expected: Any, atol: float = 1e-3) -> None:
    """Numbers that are the same up to rounding."""
    pairs = zip(found, expected, strict=True) if isinstance(expected, list) else [(found, expected)]
    for one, other in pairs:
        check(torch.allclose(one, other, rtol=1e-3, atol=atol), f"{float((one - other).abs().max()):.1e} apart")


@dataclass(frozen=True)
class Row:
    """One thing that users do; `cheap` ones take a fraction of a second and are run again by the tests.

    A name ends with the package that it needs beside this project's own, in brackets.
    """

    group: str
    name: str
    checked: str
    run: Callable[[Subject], None]
    cheap: bool

    @property
    def needs(self) -> str | None:
        """The package in brackets."""
        package = self.name.rpartition("(")[2].rstrip(")")
        return package if package in PACKAGES else None


@dataclass
class Subject:
    """A checkpoint on disk, and what it computes without a cache, which everything is compared with."""

    folder: Path
    remote: bool
    ids: torch.Tensor = field(init=False)  # [2, LENGTH]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        # No names that begin like those of the special tokens, w0 to w3: the tokenizer would find these in them.
        self.ids = torch.randint(40, 97, (2, LENGTH), generator=generator)

    def load(self, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
        """A model of its own from the folder."""
        return kind.from_pretrained(self.folder, trust_remote_code=self.remote, **options).eval()

    @functools.cached_property
    def model(self) -> Any:
        """A model that rows share, and leave as it is."""
        return self.load()

    @functools.cached_property
    def dense(self) -> Any:
        """The model that the checkpoint was made of: all layers see everything."""
        if self.remote:
            return self.load(attn_implementation="sdpa")
        config = AutoConfig.from_pretrained(self.folder)
        config.layer_types = ["full_attention"] * config.num_hidden_layers
        return self.load(config=config)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's."""
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.remote)

    @functools.cached_property
    def logits(self) -> torch.Tensor:
        """Of both rows in one pass, `[2, LENGTH, V]`."""
        return logits(self.model, self.ids)

    @functools.cached_property
    def text(self) -> torch.Tensor:
        """Both rows and what follows greedily, `[2, LENGTH + NEW]`."""
        return self.generate(use_cache=False)

    def generate(self, model: Any = None, ids: torch.Tensor | None = None, **options: Any) -> Any:
        """Greedy, unless said otherwise, and always of the same random state."""
        ids = self.ids if ids is None else ids
        given = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        torch.manual_seed(0)
        return (model or self.model).generate(ids, **given | options)

    def same(self, model: Any, *, text: bool = True) -> None:
        """The model computes the checkpoint's logits, in one pass and then through its cache."""
        close(logits(model, self.ids), self.logits)
        if text:
            equal(self.generate(model), self.text)

    def same_both_ways(self, model: Any = None, **options: Any) -> None:
        """Generation with a cache is generation without."""
        found, expected = (self.generate(model, use_cache=cached, **options) for cached in (True, False))
        equal(found, expected)


def logits(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **options).logits.float()


ROWS: list[Row] = []
Options = dict[str, dict[str, Any]]


def add(group: str, name: str, checked: str, run: Callable[[Subject], None], *, cheap: bool = True) -> None:
    """Enter a row into the table."""
    ROWS.append(Row(group, name, checked, run, cheap))


def row(group: str, name: str, checked: str, *, cheap: bool = True) -> Callable[[Any], Any]:
    """Enter a function into the table."""

    def enter(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        add(group, name, checked, run, cheap=cheap)
        return run

    return enter


# Caches that the caller makes and keeps

CACHES = "a loop with the caller's own cache"
LOOP = "text = that without a cache"


def loop(subject: Subject, cache: Any, *, chunk: int = LENGTH) -> None:
    """A greedy loop as people write it: one cache object, passed again at every step."""
    said = subject.ids[:1]
    with torch.no_grad():
        for start in range(0, LENGTH, chunk):
            found = subject.model(said[:, start : start + chunk], past_key_values=cache, use_cache=True)
        for _ in range(NEW):
            token = found.logits[:, -1:].argmax(-1)
            said = torch.cat([said, token], dim=1)
            found = subject.model(token, past_key_values=cache, attention_mask=torch.ones_like(said), use_cache=True)
    equal(said, subject.text[:1])
    check(cache.get_seq_length() == LENGTH + NEW, f"the cache says {cache.get_seq_length()} tokens")


def quantized(config: Any) -> Any:
    return transformers.QuantizedCache("quanto", config, nbits=4)


def kept(make: Callable[[Any], Any]) -> Callable[[Subject], None]:
    """The loop with a cache that is made of the model's configuration."""
    return lambda subject: loop(subject, make(subject.model.config))


MADE: dict[str, Callable[[Any], Any]] = {
    "`DynamicCache()`": lambda config: DynamicCache(),
    "`DynamicCache(config=...)`": lambda config: DynamicCache(config=config),
    "`StaticCache`": lambda config: StaticCache(config=config, max_cache_len=LENGTH + NEW),
    "`DynamicCache(offloading=True)`": lambda config: DynamicCache(config=config, offloading=True),
    "`StaticCache(offloading=True)`": lambda config: StaticCache(
        config=config, max_cache_len=LENGTH + NEW, offloading=True
    ),
    "`QuantizedCache` (optimum-quanto)": quantized,
    "`EncoderDecoderCache`": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "a tuple of tuples": lambda config: tuple((torch.zeros(1, 2, 0, 12),) * 2 for _ in range(3)),
}
for _name, _make in MADE.items():
    add(CACHES, _name, LOOP, kept(_make))


@row(CACHES, "the cache that a pass returns", LOOP)
def returned(subject: Subject) -> None:
    with torch.no_grad():
        first = subject.model(subject.ids[:1, :50], use_cache=True).past_key_values
        rest = subject.model(subject.ids[:1, 50:], past_key_values=first).logits
    close(rest, subject.logits[:1, 50:])


@row(CACHES, "chunks of a prompt, 32 tokens each", LOOP)
def chunks(subject: Subject) -> None:
    loop(subject, DynamicCache(config=subject.model.config), chunk=32)


@row(CACHES, "`copy.deepcopy` of a cache, two answers to one prompt", "both = without a cache")
def prefix(subject: Subject) -> None:
    with torch.no_grad():
        first = subject.model(subject.ids[:1, :50], use_cache=True).past_key_values
        for cache in (copy.deepcopy(first), first):
            rest = subject.model(subject.ids[:1, 50:], past_key_values=cache).logits
            close(rest, subject.logits[:1, 50:])


@row(CACHES, "two turns through `generate` on one `DynamicCache`", "second answer = that of the whole prompt")
def turns(subject: Subject) -> None:
    cache = DynamicCache(config=subject.model.config)
    first = subject.generate(ids=subject.ids[:1, :60], past_key_values=cache, max_new_tokens=6)
    prompt = torch.cat([first, subject.ids[:1, 60:]], dim=1)
    second = subject.generate(ids=prompt, past_key_values=cache)
    equal(second, subject.generate(ids=prompt, use_cache=False))


WITHOUT = "logits = those without the tokens"


@row(CACHES, "`cache.crop` to take tokens back from a short text", WITHOUT)
def crop(subject: Subject) -> None:
    cache = DynamicCache(config=subject.model.config)
    with torch.no_grad():
        subject.model(subject.ids[:1, :40], past_key_values=cache)
        cache.crop(-20)
        rest = subject.model(subject.ids[:1, 20:60], past_key_values=cache).logits
    close(rest, subject.logits[:1, 20:60])


@row(CACHES, "the same behind freed pages, with `model.new_cache(slack=20)` or `activate_past_recording`", WITHOUT)
def crop_within_slack(subject: Subject) -> None:
    if subject.remote:
        cache = subject.model.new_cache(slack=20)
    else:
        cache = DynamicCache(config=subject.model.config)
        cache.activate_past_recording()
    with torch.no_grad():
        subject.model(subject.ids[:1, :110], past_key_values=cache)
        cache.crop(-20)
        rest = subject.model(subject.ids[:1, 90:], past_key_values=cache).logits
    close(rest, subject.logits[:1, 90:])


# Generation

GENERATE = "`generate`"
BOTH = "tokens with a cache = without"

MODES: Options = {
    "greedy": {},
    "sampling, two answers a prompt": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "sampling with temperature, top-p, min-p": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    "`guidance_scale`": {"guidance_scale": 1.5},
    "beams": {"num_beams": 3},
    "beams that are sampled": {"num_beams": 3, "do_sample": True},
    "repetition penalty, no repeated n-grams": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "diverse beam groups (code from the hub)": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search (code from the hub)": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa (code from the hub)": {"dola_layers": "low"},
}
for _name, _options in MODES.items():
    add(GENERATE, _name, BOTH, functools.partial(Subject.same_both_ways, **_options))

PLAIN = "tokens = greedy without a cache"
GREEDY: Options = {
    "`prefill_chunk_size`": {"prefill_chunk_size": 32},
    '`cache_implementation="static"`': {"cache_implementation": "static"},
    '`cache_implementation="offloaded"`': {"cache_implementation": "offloaded"},
    '`cache_implementation="quantized"` (optimum-quanto)': {"cache_implementation": "quantized"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    'prompt lookup, `cache_implementation="static"`': {
        "prompt_lookup_num_tokens": 3,
        "cache_implementation": "static",
    },
    "`assistant_early_exit`": {"assistant_early_exit": 1},
}


def plain(subject: Subject, **options: Any) -> None:
    """The same text, whatever the options."""
    equal(subject.generate(ids=subject.ids[:1], **options), subject.text[:1])


for _name, _options in GREEDY.items():
    add(GENERATE, _name, PLAIN, functools.partial(plain, **_options))


@row(GENERATE, "an assistant model", PLAIN)
def assisted(subject: Subject) -> None:
    equal(subject.generate(ids=subject.ids[:1], assistant_model=subject.load()), subject.text[:1])


@row(GENERATE, "as the assistant of its dense model", "tokens = the dense model's alone")
def drafting(subject: Subject) -> None:
    expected = subject.generate(subject.dense, subject.ids[:1])
    equal(subject.generate(subject.dense, subject.ids[:1], assistant_model=subject.load()), expected)


def padded(subject: Subject, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both rows of the ids, the second with its first 40 tokens only; ids and mask."""
    ids, mask = subject.ids.clone(), torch.ones_like(subject.ids)
    blank = slice(0, LENGTH - 40) if side == "left" else slice(40, LENGTH)
    ids[1] = 0
    ids[1, LENGTH - 40 :] = subject.ids[1, :40]
    if side == "right":
        ids[1] = ids[1].roll(40)
    mask[1, blank] = 0
    return ids, mask


@row(GENERATE, "a batch with padding on the left", "each row = alone")
def left(subject: Subject) -> None:
    ids, mask = padded(subject, "left")
    found = subject.generate(ids=ids, attention_mask=mask)
    equal(found[:1], subject.text[:1])
    equal(found[1:, LENGTH:], subject.generate(ids=subject.ids[1:, :40], use_cache=False)[:, 40:])


@row(GENERATE, "a batch with padding on the right, one pass", "each row = alone")
def right(subject: Subject) -> None:
    ids, mask = padded(subject, "right")
    found = logits(subject.model, ids, attention_mask=mask)
    close(found[0], subject.logits[0])
    close(found[1, :40], logits(subject.model, subject.ids[1:, :40])[0])


@row(GENERATE, "`inputs_embeds`", PLAIN)
def embeddings(subject: Subject) -> None:
    inputs = subject.model.get_input_embeddings()(subject.ids)
    torch.manual_seed(0)
    found = subject.model.generate(inputs_embeds=inputs.detach(), max_new_tokens=NEW, do_sample=False)
    equal(found, subject.text[:, LENGTH:])


@row(GENERATE, "`TextStreamer`, `TextIteratorStreamer`", "text = greedy")
def streamer(subject: Subject) -> None:
    streams = transformers.TextIteratorStreamer(subject.tokenizer, skip_prompt=True)
    thread = threading.Thread(target=lambda: subject.generate(ids=subject.ids[:1], streamer=streams))
    thread.start()
    said = "".join(streams)
    thread.join()
    check(said == subject.tokenizer.decode(subject.text[0, LENGTH:]), f"other text: {said}")


@row(GENERATE, "`return_dict_in_generate`, scores and hidden states", "scores = logits of one pass")
def scores(subject: Subject) -> None:
    found = subject.generate(return_dict_in_generate=True, output_logits=True, output_hidden_states=True)
    expected = logits(subject.model, found.sequences)[:, LENGTH - 1 : -1]
    close(torch.stack(found.logits, dim=1), expected)
    check(len(found.hidden_states) == NEW, f"hidden states of {len(found.hidden_states)} steps")


@row(GENERATE, "`output_attentions`", "weights are returned, and sum to 1")
def attentions(subject: Subject) -> None:
    model = subject.load(attn_implementation="eager") if not subject.remote else subject.model
    found = model(subject.ids, output_attentions=True, use_cache=False).attentions
    close(found[0].sum(-1), torch.ones_like(found[0].sum(-1)))


@row(GENERATE, "stopping criteria and logits processors of one's own", PLAIN)
def processors(subject: Subject) -> None:
    seen: list[int] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return scores

    processor = transformers.LogitsProcessorList([note])
    stop = transformers.StoppingCriteriaList([lambda ids, scores: torch.full((2,), ids.shape[1] >= LENGTH + 5)])
    found = subject.generate(logits_processor=processor, stopping_criteria=stop)
    equal(found, subject.text[:, : LENGTH + 5])
    check(seen == list(range(LENGTH, LENGTH + 5)), f"the processor saw {seen}")


@row(GENERATE, "`generate_batch` (continuous batching)", PLAIN, cheap=False)
def batched(subject: Subject) -> None:
    model = subject.load()
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    found = model.generate_batch(inputs=subject.ids.tolist(), generation_config=config)
    check(len(found) == 2, f"{len(found)} of 2 requests came back")
    for expected, done in zip(subject.text, found.values(), strict=True):
        equal(torch.tensor(done.generated_tokens), expected[LENGTH:])


@row(GENERATE, "packed sequences by `position_ids`", "each = alone")
def packed(subject: Subject) -> None:
    positions = torch.cat([torch.arange(70), torch.arange(50)])[None]
    found = logits(subject.model, subject.ids[:1], position_ids=positions, use_cache=False)
    close(found[:, 70:], logits(subject.model, subject.ids[:1, 70:]))


@row(GENERATE, "packed sequences of `DataCollatorWithFlattening`, with `cu_seq_lens`", "each = alone")
def flattened(subject: Subject) -> None:
    rows = [{"input_ids": ids.tolist()} for ids in (subject.ids[0, :70], subject.ids[0, 70:])]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    packed_rows = collate(rows)
    del packed_rows["labels"]
    found = logits(subject.model, packed_rows.pop("input_ids"), use_cache=False, **packed_rows)
    close(found[:, 70:], logits(subject.model, subject.ids[:1, 70:]))


# Pipelines and evaluation

TOOLS = "pipelines and tools"


def said(subject: Subject, pipe: Any, **options: Any) -> None:
    prompts = subject.tokenizer.batch_decode(subject.ids)
    found = pipe(prompts, max_new_tokens=NEW, do_sample=False, return_full_text=False, **options)
    expected = subject.tokenizer.batch_decode(subject.text[:, LENGTH:], skip_special_tokens=True)
    texts = [each[0]["generated_text"].split() for each in found]
    check(texts == [each.split() for each in expected], "other text than the reference")


@row(TOOLS, '`pipeline("text-generation", model=path)`', "text = greedy")
def pipeline_of_path(subject: Subject) -> None:
    options: dict[str, Any] = {"trust_remote_code": subject.remote}
    said(subject, transformers.pipeline("text-generation", model=str(subject.folder), device="cpu", **options))


@row(TOOLS, "`pipeline` with a loaded model, `batch_size=2`", "text = greedy")
def pipeline_of_model(subject: Subject) -> None:
    options: dict[str, Any] = {"model": subject.model, "tokenizer": subject.tokenizer}
    said(subject, transformers.pipeline("text-generation", **options), batch_size=2)


@row(TOOLS, "`transformers serve --trust-remote-code`, a completion (fastapi)", "text = greedy", cheap=False)
def served(subject: Subject) -> None:
    from transformers.cli.serve import Serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        force_model=str(subject.folder),
        device="cpu",
        trust_remote_code=subject.remote,
        host="127.0.0.1",
        port=port,
        non_blocking=True,
    )
    prompt = subject.tokenizer.decode(subject.ids[0])
    body = {"model": str(subject.folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        for wait in range(60):
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    text = json.load(answer)["choices"][0]["text"]
                break
            except urllib.error.URLError as error:
                if wait == 59 or not isinstance(error.reason, ConnectionError):
                    raise
                time.sleep(1)
    finally:
        server.kill_server()
    expected = subject.tokenizer.decode(subject.text[0, LENGTH:], skip_special_tokens=True)
    check(text.split() == expected.split(), f"other text: {text}")


@row(TOOLS, "lm-eval, `HFLM`", "log-likelihood = that of the logits", cheap=False)
def lm_eval(subject: Subject) -> None:
    from lm_eval.models.huggingface import HFLM

    tested: Any = HFLM(pretrained=str(subject.folder), trust_remote_code=subject.remote, device="cpu", batch_size=2)
    ids = subject.ids[0].tolist()
    found = tested._loglikelihood_tokens([(("", ""), ids[:100], ids[100:])], disable_tqdm=True)[0][0]
    logp = subject.logits[0, 99:-1].log_softmax(-1)
    expected = logp.gather(1, subject.ids[0, 100:, None]).sum()
    close(torch.tensor(found), expected)


# Training

TRAINING = "training"
FINITE = "the loss falls, and the weights move"


@contextmanager
def accelerate_of_its_own() -> Iterator[None]:
    """accelerate keeps the precision of the first trainer for all later ones of a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


TRAINER_OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def losses_of(trainer: Any) -> list[float]:
    """The losses of all steps of a training."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(subject: Subject, model: Any = None, **options: Any) -> None:
    """Eight steps of the Trainer on the same two rows."""
    model = subject.load(dtype=torch.float32) if model is None else model
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in subject.ids]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    with TemporaryDirectory() as folder, accelerate_of_its_own():
        arguments = transformers.TrainingArguments(folder, max_steps=8, **{**TRAINER_OPTIONS, **options})
        losses = losses_of(transformers.Trainer(model, arguments, train_dataset=rows))
    check(losses[-1] < losses[0], f"losses {losses}")
    after = dict(model.named_parameters())
    check(any(not torch.equal(after[name], weight) for name, weight in before.items()), "no weight has moved")


TRAINERS: Options = {
    "`Trainer` in float32": {},
    "`Trainer(bf16=True)`": {"bf16": True},
    "`Trainer(fp16=True)` on a CPU": {"fp16": True},
    "`Trainer` with gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    "`Trainer` with gradient checkpointing, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "`Trainer` with gradient checkpointing, not reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "`Trainer(torch_compile=True)` (eager back end)": {"torch_compile": True, "torch_compile_backend": "eager"},
}
for _name, _options in TRAINERS.items():
    add(TRAINING, _name, FINITE, functools.partial(trained, **_options), cheap=False)


def gradients(subject: Subject, model: Any, forward: Any = None) -> list[torch.Tensor]:
    """Of a loop's pass with labels, the cache left as it is by default."""
    model.train()
    (forward or model)(input_ids=subject.ids, labels=subject.ids).loss.backward()
    return [weight.grad for weight in model.parameters()]


def expected_gradients(subject: Subject) -> list[torch.Tensor]:
    return gradients(subject, subject.load(dtype=torch.float32))


GRADIENTS = "gradients = those of a plain pass"


@row(TRAINING, "a loop of one's own, `gradient_checkpointing_enable()`, the default cache", GRADIENTS)
def checkpointed(subject: Subject) -> None:
    model = subject.load(dtype=torch.float32)
    model.gradient_checkpointing_enable()
    close(gradients(subject, model), expected_gradients(subject), 1e-5)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@row(TRAINING, "`DistributedDataParallel` (one process)", GRADIENTS, cheap=False)
def ddp(subject: Subject) -> None:
    model = subject.load(dtype=torch.float32)
    with process_group():
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        close(gradients(subject, model, wrapped), expected_gradients(subject), 1e-5)


@row(TRAINING, "FSDP2, `fully_shard` (one process)", GRADIENTS, cheap=False)
def fsdp(subject: Subject) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = subject.load(dtype=torch.float32)
    with process_group():
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = [gradient.full_tensor() for gradient in gradients(subject, model)]  # type: ignore[attr-defined]
    close(found, expected_gradients(subject), 1e-5)


# TRL

TRL = "TRL"
MOVES = "the loss is a number, and the weights move"


def tuned(subject: Subject, kind: str, rows: list[dict[str, str]], given: dict[str, Any], **options: Any) -> None:
    """Two steps of a trainer of TRL, with its own defaults: gradient checkpointing is on.

    Args:
        given: arguments of the trainer, made anew from the model by the caller.
        options: of its configuration.
    """
    from datasets import Dataset

    trl = importlib.import_module("trl")

    arguments = {"model": subject.load(dtype=torch.float32)} | given
    model = arguments["model"]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with TemporaryDirectory() as folder, accelerate_of_its_own():
        config = getattr(trl, f"{kind}Config")(folder, bf16=False, max_steps=2, **{**TRAINER_OPTIONS, **options})
        trainer = getattr(trl, f"{kind}Trainer")(
            args=config, train_dataset=Dataset.from_list(rows), processing_class=subject.tokenizer, **arguments
        )
        losses = losses_of(trainer)
        after = {name.replace("base_model.model.", ""): weight for name, weight in trainer.model.named_parameters()}
    check(len(losses) == 2 and all(abs(loss) < float("inf") for loss in losses), f"losses {losses}")
    moved = [name for name, weight in before.items() if name in after and not torch.equal(after[name], weight)]
    check(bool(moved) or any("lora_B" in name and bool(weight.any()) for name, weight in after.items()), "none moved")


def texts(subject: Subject) -> list[str]:
    """Four texts of 60 tokens."""
    return [subject.tokenizer.decode(ids) for ids in subject.ids.reshape(4, -1)]


def sft(subject: Subject, **options: Any) -> None:
    tuned(subject, "SFT", [{"text": text} for text in texts(subject)], {}, **{"max_length": 64, **options})


def dpo(subject: Subject, given: Callable[[], dict[str, Any]], **options: Any) -> None:
    one, two, *_ = texts(subject)
    rows = [{"prompt": "w50 w51", "chosen": chosen, "rejected": other} for chosen, other in ((one, two), (two, one))]
    tuned(subject, "DPO", rows, given(), max_length=70, **options)


def grpo(subject: Subject) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    rows = [{"prompt": text} for text in texts(subject)]
    lengths = {"num_generations": 2, "max_completion_length": 6, "temperature": 2.0}
    tuned(subject, "GRPO", rows, {"reward_funcs": reward}, **lengths)


def add_trl(name: str, run: Callable[[Subject], None]) -> None:
    add(TRL, f"{name} (trl)", MOVES, run, cheap=False)


add_trl("`SFTTrainer`", sft)
add_trl("`SFTTrainer(packing=True)`", functools.partial(sft, packing=True))
add_trl("`SFTTrainer(padding_free=True)`", functools.partial(sft, padding_free=True, max_length=None))
add_trl("`DPOTrainer`, the reference loaded by name", lambda subject: dpo(subject, dict))
add_trl(
    "the same, `DPOConfig(trust_remote_code=True)`",
    lambda subject: dpo(subject, dict, trust_remote_code=subject.remote),
)
add_trl("`DPOTrainer(ref_model=...)`", lambda subject: dpo(subject, lambda: {"ref_model": subject.load()}))
add_trl("`DPOTrainer(peft_config=...)`", lambda subject: dpo(subject, lambda: {"peft_config": lora_config()}))
add_trl("`GRPOTrainer`", grpo)


# Precision, compilation

PRECISION = "precision and compilation"


def stepped(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the rows with the last tokens one by one through a cache, `[B, LENGTH, V]`."""
    with torch.no_grad():
        found = [model(ids[:, :-NEW], use_cache=True)]
        for place in range(LENGTH - NEW, LENGTH):
            found.append(model(ids[:, place : place + 1], past_key_values=found[-1].past_key_values, use_cache=True))
    return torch.cat([each.logits.float() for each in found], dim=1)


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Within a share of the largest logit."""
    difference = float((found - expected).abs().max() / expected.abs().max())
    check(difference < tolerance, f"{difference:.3f} of the largest logit apart")


for _dtype, _tolerance in ((torch.bfloat16, 0.2), (torch.float16, 0.05)):
    _word = str(_dtype).removeprefix("torch.")

    def autocast(subject: Subject, dtype: Any = _dtype, tolerance: float = _tolerance) -> None:
        with torch.autocast("cpu", dtype):
            near(logits(subject.model, subject.ids), subject.logits, tolerance)
            near(stepped(subject.model, subject.ids), subject.logits, tolerance)

    def converted(subject: Subject, dtype: Any = _dtype, tolerance: float = _tolerance) -> None:
        for model in (subject.load().to(dtype), subject.load(dtype=dtype)):
            near(logits(model, subject.ids), subject.logits, tolerance)
            near(stepped(model, subject.ids), subject.logits, tolerance)

    _told = f"logits in one pass and step by step within {_tolerance:.0%} of the largest"
    add(PRECISION, f"`torch.autocast({_word})`", _told, autocast)
    add(PRECISION, f"`.to({_word})`, `dtype={_word}`", _told, converted)


@row(PRECISION, "`torch.compile` (eager back end)", "logits and text = not compiled", cheap=False)
def compiled(subject: Subject) -> None:
    torch.compiler.reset()
    model = subject.load()
    close(logits(torch.compile(model, backend="eager"), subject.ids), subject.logits)
    model.forward = torch.compile(model.forward, backend="eager")
    equal(subject.generate(model), subject.text)


@row(PRECISION, "`torch.compile(fullgraph=True)`", "logits = not compiled", cheap=False)
def whole_graph(subject: Subject) -> None:
    torch.compiler.reset()
    model = torch.compile(subject.load(), backend="eager", fullgraph=True)
    close(logits(model, subject.ids, use_cache=False), subject.logits)


@row(PRECISION, "`torch.export`", "logits = the model's")
def exported(subject: Subject) -> None:
    program = torch.export.export(subject.load(), (), {"input_ids": subject.ids, "use_cache": False}, strict=False)
    close(program.module()(input_ids=subject.ids, use_cache=False).logits, subject.logits)


@row(PRECISION, "`torch.jit.trace`", "logits = the model's")
def traced(subject: Subject) -> None:
    model = subject.load(use_cache=False)

    class Logits(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return model(ids).logits

    with torch.no_grad():
        program = torch.jit.trace(Logits(), subject.ids, check_trace=False)
        close(program(subject.ids), subject.logits)


# PEFT

PEFT = "PEFT"


def adapted(subject: Subject, config: Any) -> Any:
    """A model with adapters that are not those they begin as."""
    import peft

    model = peft.get_peft_model(subject.load(), config)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "prompt" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return model.eval()


def differ(found: torch.Tensor, base: torch.Tensor) -> None:
    """Adapters that do something."""
    check(not torch.allclose(found, base, atol=1e-2), "the logits are those of the base")


def lora_config() -> Any:
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@row(PEFT, "LoRA on top", f"other logits than the base; {BOTH}", cheap=False)
def lora(subject: Subject) -> None:
    model = adapted(subject, lora_config())
    differ(logits(model, subject.ids), subject.logits)
    subject.same_both_ways(model)
    with model.disable_adapter():
        subject.same(model)


@row(PEFT, "LoRA trained by `Trainer(bf16=True)`", FINITE, cheap=False)
def lora_trained(subject: Subject) -> None:
    trained(subject, adapted(subject, lora_config()), bf16=True)


@row(PEFT, "LoRA saved, loaded, merged, saved again", "logits = unmerged", cheap=False)
def lora_merged(subject: Subject) -> None:
    import peft

    model = adapted(subject, lora_config())
    expected = logits(model, subject.ids)
    with TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        again = peft.PeftModel.from_pretrained(subject.load(), f"{folder}/adapter").eval()
        close(logits(again, subject.ids), expected)
        merged = again.merge_and_unload()
        close(logits(merged, subject.ids), expected)
        merged.save_pretrained(f"{folder}/merged")
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/merged", trust_remote_code=subject.remote).eval()
        close(logits(loaded, subject.ids), expected)


@row(PEFT, "prefix tuning", BOTH, cheap=False)
def prefix_tuning(subject: Subject) -> None:
    import peft

    model = adapted(subject, peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    differ(logits(model, subject.ids), subject.logits)
    gradients(subject, model)


@row(PEFT, "prompt tuning", "other logits than the base, gradients reach the prompt", cheap=False)
def prompt_tuning(subject: Subject) -> None:
    import peft

    model = adapted(subject, peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    differ(logits(model, subject.ids)[:, -LENGTH:], subject.logits)
    come = [gradient for gradient in gradients(subject, model) if gradient is not None]
    check(any(bool(gradient.abs().sum() > 0) for gradient in come), "no gradient has come")


# Quantised loading

QUANTISED = "quantised loading"


def quantised(subject: Subject, make: Callable[[], Any]) -> None:
    """The quantised model is like the checkpoint, and through its cache like itself."""
    model = subject.load(quantization_config=make())
    found = logits(model, subject.ids)
    near(stepped(model, subject.ids), found, 0.1)
    alike = float(torch.corrcoef(torch.stack([found.flatten(), subject.logits.flatten()]))[0, 1])
    check(alike > 0.6, f"a correlation of {alike:.2f} with the logits of the checkpoint")


def bits_and_bytes(**options: Any) -> Any:
    return transformers.BitsAndBytesConfig(**options)


def torch_ao() -> Any:
    config = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    return transformers.TorchAoConfig(config)


QUANTISERS: dict[str, Callable[[], Any]] = {
    "8 bits (bitsandbytes)": lambda: bits_and_bytes(load_in_8bit=True),
    "4 bits (bitsandbytes)": lambda: bits_and_bytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "int8 weights (torchao)": torch_ao,
    "int8 weights (optimum-quanto)": lambda: transformers.QuantoConfig(weights="int8"),
}
LIKE = "logits step by step = in one pass, and like those of the checkpoint"
for _name, _config in QUANTISERS.items():
    add(QUANTISED, _name, LIKE, functools.partial(quantised, make=_config), cheap=False)


# Loading and devices

LOADING = "loading"
SAME = "logits and text = the checkpoint's"

LOADED: Options = {
    '`device_map="cpu"`': {"device_map": "cpu"},
    '`device_map="auto"`': {"device_map": "auto"},
    "`dtype=float32`, `low_cpu_mem_usage=True`": {"dtype": torch.float32, "low_cpu_mem_usage": True},
    "`attn_implementation=None`": {"attn_implementation": None},
}


def loaded(subject: Subject, **options: Any) -> None:
    """The checkpoint, whatever the options."""
    subject.same(subject.load(**options))


for _name, _options in LOADED.items():
    add(LOADING, _name, SAME, functools.partial(loaded, **_options))


@row(LOADING, '`attn_implementation="sdpa"` (a patched model runs dense, and says so)', BOTH)
def dense(subject: Subject) -> None:
    subject.same_both_ways(subject.load(attn_implementation="sdpa"))


@row(LOADING, "`device_map` with layers on the disk", SAME, cheap=False)
def on_disk(subject: Subject) -> None:
    places: dict[str, Any] = {"model.layers.1": "disk", "model.layers.2": "disk", "model.layers.0": "cpu"}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    with TemporaryDirectory() as folder:
        subject.same(subject.load(device_map=places, offload_folder=folder))


@row(LOADING, '`tp_plan="auto"` (one process)', SAME, cheap=False)
def tensor_parallel(subject: Subject) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    before = dict(os.environ)
    os.environ.update(place)
    try:
        subject.same(subject.load(tp_plan="auto"))
    finally:
        os.environ.clear()
        os.environ.update(before)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@row(LOADING, "`AutoModel`", "hidden states = the whole model's")
def body(subject: Subject) -> None:
    with torch.no_grad():
        found = subject.load(AutoModel)(subject.ids).last_hidden_state
        expected = subject.model.model(subject.ids).last_hidden_state
    close(found, expected)


@row(LOADING, "`AutoModelForSequenceClassification`", "it loads")
def classifier(subject: Subject) -> None:
    subject.load(transformers.AutoModelForSequenceClassification)


# Copies

COPIES = "copies and files"


@row(COPIES, "`copy.deepcopy`", SAME)
def deepcopied(subject: Subject) -> None:
    subject.same(copy.deepcopy(subject.model))


@row(COPIES, "`pickle`", SAME)
def pickled(subject: Subject) -> None:
    subject.same(pickle.loads(pickle.dumps(subject.load())))


@row(COPIES, "`torch.save` and `torch.load` of the model", SAME)
def torch_saved(subject: Subject) -> None:
    file = io.BytesIO()
    torch.save(subject.load(), file)
    file.seek(0)
    subject.same(torch.load(file, weights_only=False))


@row(COPIES, "`state_dict` into another model", SAME)
def state(subject: Subject) -> None:
    model = subject.load()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    told = model.load_state_dict(subject.model.state_dict())
    check(not told.missing_keys and not told.unexpected_keys, str(told))
    subject.same(model)


@row(COPIES, "`save_pretrained`, and loaded again, in shards", SAME)
def saved(subject: Subject) -> None:
    with TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder, max_shard_size="20KB")
        check(len(list(Path(folder).glob("*.safetensors"))) > 1, "one file only")
        subject.same(Subject(Path(folder), subject.remote).load())


@row(COPIES, "`resize_token_embeddings`", "logits of the old tokens = the checkpoint's")
def resized(subject: Subject) -> None:
    model = subject.load()
    model.resize_token_embeddings(105, mean_resizing=False)
    close(logits(model, subject.ids)[..., :97], subject.logits)
    more = torch.full((1, 3), 104)
    check(logits(model, more).shape == (1, 3, 105), "no logits of the new tokens")


@row(COPIES, "`set_attn_implementation` there and back", SAME)
def switched(subject: Subject) -> None:
    model = subject.load()
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model(subject.ids)
    model.set_attn_implementation(own)
    subject.same(model)
