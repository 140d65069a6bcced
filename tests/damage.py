"""Every file that the product reads, damaged, given to the commands that read it: the world, the cases, the verdict."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
from typer.testing import CliRunner

from compress.cli.app import app
from compress.cli.output import DEFECT
from compress.export.verify import Checks
from tests.forkserver import ForkServer, Outcome
from tests.mutation import damages
from tests.report.common import make_folder
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

SECONDS, BYTES = 20.0, 2 << 30
ADDRESSES = 16 << 30  # torch reserves far more than it uses, so that memory is measured and addresses hardly limited

HEAD = """\
model: ./model
output: run
device: cpu
calibration:
  text: &text {source: file, path: text.txt}
"""
SPAN = """\
  documents:
    - {task: continuation, length: 192, count: 2, answer_tokens: 16}
  held_out:
    - {task: continuation, length: 192, count: 1, answer_tokens: 16}
profile:
  statistics:
    - {name: influence, grid: {sinks: [4]}}
search:
  solver: {name: moa, points: 1}
  budget: {kv: 0.8, lengths: [192]}
recover: {length: 32, batch_size: 4, steps: 3, rate: 0.01, save_every: 1}
evaluate:
  compare: [plan, uniform]
  perplexity: {text: *text, length: 128, windows: 1}
"""
TIME = SPAN.replace(
    "budget: {kv: 0.8, lengths: [192]}", "budget: {decode_time: 0.9, lengths: [192], cost_table: bench.json}"
)
PRUNE = """\
  documents:
    - {task: continuation, length: 128, count: 2, answer: text, answer_tokens: 64}
profile:
  statistics:
    - {name: amp}
search:
  solver: {name: allocated, multiple: 1, protect: [0]}
  budget: {parameters: 0.7}
evaluate:
  compare: [plan]
  perplexity: {text: *text, length: 128, windows: 1}
"""


@dataclass(frozen=True)
class Reader:
    """A command that reads a file.

    Attributes:
        kind: what the file is, in the counts.
        world: the folder that a case gets a copy of.
        file: which file of it is damaged; form: how (`mutation.FORMS`).
        command: the words behind `compress`.
        outputs: files that must be what they are without damage if the command ends with 0: the damaged file has a
            checksum, so that it is refused, or made again.
        ends: the exit code without damage.
        slow: measures for seconds where the file survives, so that it gets few cases.
    """

    kind: str
    world: str
    file: str
    form: str
    command: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    slow: bool = False
    ends: int = 0

    @property
    def name(self) -> str:
        """Kind and command."""
        return f"{self.kind}: {' '.join(self.command)}"


TUNE = ("--device", "cpu", "--dtype", "float32")
MEASURE = ("--perplexity", "64", "--out", "out", *TUNE)
RECIPE = "recipe.yaml"
PLAN, PROFILE, STATES, CHECKPOINT = "run/plan.json", "run/profile", "run/recover", "run/checkpoint"
TENSORS, WEIGHTS = f"{PROFILE}/statistics.safetensors", f"{STATES}/model.safetensors"


def _results() -> Iterator[Reader]:
    """Files of a finished run, with windows and with removed heads."""
    for world in ("span", "prune"):
        kind = "plan" if world == "span" else "pruned plan"
        yield Reader(kind, world, PLAN, "sealed", ("inspect", "run"))
        yield Reader(kind, world, PLAN, "json", ("inspect", PLAN, "--json"))
        yield Reader(kind, world, PLAN, "sealed", ("report", "run"))
        yield Reader(kind, world, PLAN, "sealed", ("search", RECIPE))
        yield Reader(kind, world, PLAN, "sealed", ("export", RECIPE))
        yield Reader(kind, world, PLAN, "sealed", ("eval", RECIPE))
        yield Reader(
            "plan of a checkpoint", world, f"{CHECKPOINT}/compress_plan.json", "sealed", ("inspect", CHECKPOINT)
        )
        yield Reader("profile", world, f"{PROFILE}/profile.json", "sealed", ("inspect", PROFILE))
        yield Reader("profile", world, f"{PROFILE}/profile.json", "sealed", ("report", "run"))
        yield Reader("tensors of a profile", world, TENSORS, "safetensors", ("inspect", PROFILE))
        yield Reader("stages", world, "run/stages.json", "json", ("report", "run"))
        yield Reader("stages", world, "run/stages.json", "json", ("search", RECIPE))
        yield Reader("evaluation", world, "run/evaluation.json", "sealed", ("report", "run"))
        # Where heads were removed, the command says that it needs the dense model, after all has been read but weights.
        measured, ends = ("eval", CHECKPOINT, *MEASURE), 0 if world == "span" else 2
        yield Reader("config of a checkpoint", world, f"{CHECKPOINT}/config.json", "json", measured, ends=ends)
    yield Reader(
        "weights of a checkpoint",
        "span",
        f"{CHECKPOINT}/model.safetensors",
        "safetensors",
        ("eval", CHECKPOINT, *MEASURE),
    )
    yield Reader("evaluation", "span", "run/evaluation.json", "json", ("eval", RECIPE))
    yield Reader("verification", "span", f"{CHECKPOINT}/compress_checks.json", "json", ("inspect", CHECKPOINT))
    yield Reader("verification", "span", f"{CHECKPOINT}/compress_checks.json", "json", ("eval", RECIPE))
    yield Reader("model of a run", "span", "run/model.json", "json", ("search", RECIPE))
    yield Reader("inputs", "span", "run/inputs.json", "json", ("search", RECIPE))
    yield Reader("environment", "span", "run/environment.json", "json", ("report", "run"))
    yield Reader("record of a recovery", "span", f"{STATES}/recover.json", "sealed", ("export", RECIPE))
    yield Reader("record of a recovery", "span", f"{STATES}/recover.json", "sealed", ("eval", RECIPE))
    yield Reader("weights of a recovery", "span", WEIGHTS, "safetensors", ("export", RECIPE))
    yield Reader("bench", "bench", "results/bench.json", "sealed", ("report", "results"))


def _states() -> Iterator[Reader]:
    """Files that an interrupted or incomplete run goes on from; most have a checksum."""
    plan, tensors, weights = (PLAN,), (TENSORS,), (WEIGHTS,)
    yield Reader("profile", "unsearched", f"{PROFILE}/profile.json", "json", ("search", RECIPE), plan)
    yield Reader("tensors of a profile", "unsearched", TENSORS, "safetensors", ("search", RECIPE), plan)
    yield Reader("report of the search", "unplotted", "run/search/pareto.json", "json", ("search", RECIPE))
    yield Reader("losses of plans", "unsearched", "run/search/response.jsonl", "jsonl", ("search", RECIPE), plan)
    yield Reader("documents", "unprofiled", "run/calibration/DOCUMENTS", "jsonl", ("profile", RECIPE), tensors)
    yield Reader(
        "partial profile", "profile-cut", f"{PROFILE}/profile.partial", "partial", ("profile", RECIPE), tensors
    )
    recover = ("recover", RECIPE)
    yield Reader("state of a recovery", "recover-cut", f"{STATES}/partial.json", "json", recover, weights)
    yield Reader("state of a recovery", "recover-cut", f"{STATES}/partial-1-0", "partial", recover, weights)
    yield Reader("curve of a recovery", "recover-cut", f"{STATES}/loss.jsonl", "jsonl", recover, weights)
    yield Reader(
        "measurement", "unevaluated", "run/evaluation/MEASUREMENT", "json", ("eval", RECIPE), ("run/evaluation.json",)
    )
    yield Reader("cost table", "time", "bench.json", "sealed", ("search", RECIPE))


def _sources() -> Iterator[Reader]:
    """What a user brings: recipes, texts and models."""
    for world in ("fresh", "prune", "time"):
        yield Reader("recipe", world, RECIPE, "yaml", ("validate", RECIPE))
    yield Reader("recipe", "span", RECIPE, "yaml", ("search", RECIPE))
    yield Reader("recipe", "span", RECIPE, "yaml", ("run", RECIPE))
    yield Reader("text", "lines", "text.jsonl", "jsonl", ("validate", RECIPE))
    yield Reader("text", "fresh", "text.txt", "text", ("validate", RECIPE))
    yield Reader("text", "unprofiled", "text.txt", "text", ("profile", RECIPE))
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for words in (("validate", RECIPE), ("eval", "./model", *MEASURE)):
            yield Reader(file, "fresh", f"model/{file}", "json", words)
        yield Reader(file, "span", f"model/{file}", "json", ("export", RECIPE))
    for words in (("validate", RECIPE), ("eval", "./model", *MEASURE)):
        yield Reader("model.safetensors", "fresh", "model/model.safetensors", "safetensors", words)
        yield Reader("index of weights", "shards", "model/model.safetensors.index.json", "json", words)
    for words in (("validate", RECIPE), ("eval", "./model.gguf", *MEASURE)):
        yield Reader("GGUF", "gguf", "model.gguf", "gguf", words)
    kernel = ("bench", "model/config.json", "--mix", "A", "--what", "kernel", "--lengths", "64", *TUNE)
    yield Reader("config.json", "fresh", "model/config.json", "json", kernel, slow=True)
    whole = ("bench", "./model", "--plan", PLAN, "--what", "model", "--lengths", "64", *TUNE)
    yield Reader("plan", "span", PLAN, "sealed", whole, slow=True)


READERS = (*_results(), *_states(), *_sources())


def call(words: tuple[str, ...]) -> int:
    """One command in this process, without the fresh process of a verification; its exit status."""
    with _unverified():
        result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code not in (0, 130):
        print(result.output)
    return result.exit_code


@contextmanager
def _unverified() -> Iterator[None]:
    """Exports without their fresh process, which costs as much as a hundred cases and reads nothing of the user's."""
    checks = Checks(64, 0.0, 1e-4, "w4 w5", 1, 1, 1, "LlamaForCausalLM")
    with mock.patch("compress.export.export.verify_checkpoint", lambda *_, **__: checks):
        yield


def run_in(folder: str, words: tuple[str, ...]) -> None:
    """What a child does: the command, in the folder, as the console script runs it."""
    os.chdir(folder)
    with _unverified():
        app(list(words), prog_name="compress")


def make_world(root: Path) -> None:
    """All folders that cases copy, made by the product's own commands."""
    before = Path.cwd()
    try:
        _fresh(root / "fresh", SPAN)
        _finished(root, "span", SPAN)
        _finished(root, "prune", PRUNE)
        _derived(root)
    finally:
        os.chdir(before)


def _fresh(folder: Path, recipe: str) -> None:
    """A model, a text, and a recipe that was never run."""
    folder.mkdir(parents=True)
    tiny_model("llama-gqa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    words = numpy.random.default_rng(0).integers(4, VOCABULARY, 6000)
    (folder / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (folder / "recipe.yaml").write_text(HEAD + recipe)


def _finished(root: Path, name: str, recipe: str) -> None:
    _fresh(root / name, recipe)
    os.chdir(root / name)
    assert call(("run", "recipe.yaml")) == 0


def _derived(root: Path) -> None:
    """Runs that were interrupted or lack a stage, and models in other forms."""
    for name, gone in (
        ("unsearched", ("run/plan.json", "search")),
        ("unprofiled", ("run/profile", "profile")),
        ("unevaluated", ("run/evaluation.json", "evaluate")),
        ("unplotted", ("run/plots", None)),
        ("profile-cut", ("run/profile", "profile")),
        ("recover-cut", ("run/recover", "recover")),
    ):
        shutil.copytree(root / "span", root / name)
        _without(root / name, *gone)
    os.chdir(root / "profile-cut")
    with _cut("compress.profile.partial.Partial.save"):
        assert call(("profile", "recipe.yaml")) == 130
    os.chdir(root / "recover-cut")
    with _cut("compress.train.state.Partial.write"):
        assert call(("recover", "recipe.yaml")) == 130
    shutil.copytree(root / "unsearched", root / "time")
    (root / "time" / "recipe.yaml").write_text(HEAD + TIME)
    _cost_table(root / "time" / "bench.json")
    shutil.copytree(root / "fresh", root / "lines")
    words = (root / "lines" / "text.txt").read_text().split()
    rows = [json.dumps({"text": " ".join(words[start : start + 500])}) for start in range(0, len(words), 500)]
    (root / "lines" / "text.jsonl").write_text("\n".join(rows) + "\n")
    (root / "lines" / "recipe.yaml").write_text((HEAD + SPAN).replace("text.txt", "text.jsonl"))
    make_folder(root / "bench" / "results")
    (root / "bench" / "results" / "plan.json").unlink()
    shutil.copytree(root / "fresh", root / "shards")
    model: Any = tiny_model("llama-gqa")
    (root / "shards" / "model" / "model.safetensors").unlink()
    model.save_pretrained(root / "shards" / "model", max_shard_size="100KB")
    shutil.copytree(root / "fresh", root / "gguf")
    shutil.rmtree(root / "gguf" / "model")
    write_gguf(root / "gguf" / "model.gguf")
    recipe = (HEAD + SPAN).replace("./model", "./model.gguf")
    (root / "gguf" / "recipe.yaml").write_text(recipe)


def _without(folder: Path, gone: str, stage: str | None) -> None:
    path = folder / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if stage is not None:
        stages = folder / "run" / "stages.json"
        raw = json.loads(stages.read_text())
        del raw["stages"][stage]
        stages.write_text(json.dumps(raw))


@contextmanager
def _cut(name: str) -> Iterator[None]:
    """An interrupt right after the first call of what saves a state."""
    module, _, attribute = name.rpartition(".")
    real = _resolve(module, attribute)

    @functools.wraps(real)
    def once(*args: Any, **options: Any) -> Any:
        real(*args, **options)
        raise KeyboardInterrupt

    with mock.patch(name, once):
        yield


def _resolve(owner: str, attribute: str) -> Any:
    from pkgutil import resolve_name

    return getattr(resolve_name(owner), attribute)


def _cost_table(path: Path) -> None:
    token = 3 * 2 * 2 * 12  # cached numbers a token of the tiny model: layers, groups, keys and values, head size
    rows = []
    for length in (64, 512):
        for kept in (0.2, 1.0):
            size = (length + 1) * token * 4
            sides = {
                name: {"cache_bytes": held, "decode": {"median": 1.0 + 1e-5 * held}}
                for name, held in (("dense", size), ("plan", int(kept * size)))
            }
            rows.append({"shape": "m", "length": length, "batch": 1, "without_attention": {"median": 1.0}, **sides})
    path.write_text(json.dumps({"dtype": "float32", "environment": {"gpus": []}, "model_rows": rows}))


def write_gguf(path: Path) -> None:
    """The tiny Llama as a GGUF file with a tokenizer of a few letters."""
    import gguf

    model: Any = tiny_model("llama-gqa")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [*"0123456789w", "Ġ"]
    writer.add_token_list([f"w{number}" for number in range(VOCABULARY - len(letters))] + letters)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["w 4"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    for name, weight in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def place_of(world: Path, reader: Reader) -> str:
    """The damaged file of a reader; of files whose name holds a hash, the first."""
    folder, _, name = reader.file.rpartition("/")
    if name == "DOCUMENTS":
        return str(next(iter(sorted((world / folder).glob("calibration-*.jsonl")))).relative_to(world))
    if name == "MEASUREMENT":
        return str(next(iter(sorted((world / folder).glob("plan-perplexity-*.json")))).relative_to(world))
    return reader.file


@dataclass(frozen=True)
class Finding:
    """A damaged file that a command did not survive as it should."""

    reader: Reader
    seed: int
    mutator: str
    why: str
    place: str
    data: bytes
    outcome: Outcome


class Trials:
    """Runs cases of one world in children of one server.

    Args:
        server: has everything imported.
        base: its resident bytes, which every child shares.
    """

    def __init__(self, root: Path, server: ForkServer) -> None:
        self.root, self.server = root, server
        self.base = server.run(_nothing, memory_limit=ADDRESSES).maxrss
        self._expected: dict[Reader, list[str]] = {}

    def expected(self, reader: Reader) -> list[str]:
        """What the outputs are without damage; the command has to end with 0."""
        if reader not in self._expected:
            outcome, outputs = self._run(reader, None)
            assert outcome.code == reader.ends, f"{reader.name}\n{outcome.stdout}\n{outcome.stderr}"
            self._expected[reader] = outputs
        return self._expected[reader]

    def run(self, reader: Reader, seed: int, count: int) -> Iterator[tuple[str, Finding | None]]:
        """Cases of a reader, from a seed: how each ended, and what was wrong with that, if anything was."""
        place = place_of(self.root / reader.world, reader)
        good = (self.root / reader.world / place).read_bytes()
        for (mutator, data), _ in zip(damages(good, reader.form, seed), range(count), strict=False):
            why, outcome = self.one(reader, data, whole=not mutator.startswith("resealed"))
            finding = None if why is None else Finding(reader, seed, mutator, why, place, data, outcome)
            yield f"exit {outcome.code}", finding

    def one(self, reader: Reader, data: bytes, *, whole: bool = True) -> tuple[str | None, Outcome]:
        """One case: what is wrong, and how it ended; `whole`: whether a checksum can tell the damage."""
        expected = self.expected(reader) if reader.outputs else []
        outcome, outputs = self._run(reader, data)
        why = self.verdict(outcome)
        if why is None and outcome.code == 0 and whole and outputs != expected:
            why = "changed, silently"
        return why, outcome

    def _run(self, reader: Reader, data: bytes | None) -> tuple[Outcome, list[str]]:
        with tempfile.TemporaryDirectory(dir=scratch()) as held:
            folder = Path(held) / "case"
            shutil.copytree(self.root / reader.world, folder, symlinks=True)
            if data is not None:
                (folder / place_of(self.root / reader.world, reader)).write_bytes(data)
            outcome = self.server.run(run_in, str(folder), reader.command, timeout=SECONDS, memory_limit=ADDRESSES)
            return outcome, [_content(folder / name) for name in reader.outputs]

    def verdict(self, outcome: Outcome) -> str | None:
        """What is wrong with how a command ended; None where nothing is."""
        if outcome.timed_out:
            return "hang"
        if outcome.code < 0:
            return f"signal {-outcome.code}"
        if "Traceback (most recent call last)" in outcome.stdout + outcome.stderr or DEFECT in outcome.stderr:
            return "traceback"
        if outcome.code not in (0, 1, 2, 130):
            return f"exit {outcome.code}"
        if outcome.code and not outcome.stderr.strip():
            return "no message"
        if outcome.maxrss - self.base > BYTES:
            return "memory"
        return None


def _nothing() -> None:
    """What an idle child takes."""


def scratch() -> str | None:
    """A folder in memory, where there is one: a case is a copy of a world."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _content(path: Path) -> str:
    """A file without the times in it."""
    if not path.is_file():
        return ""
    text = path.read_bytes().decode("latin-1")
    return (
        re.sub(r'"(seconds|checksum|[a-z_]*_ms|response_seconds)": [^\n]*', "", text)
        if path.suffix == ".json"
        else text
    )


def last_line(outcome: Outcome) -> str:
    """The error of a traceback, or how the message begins."""
    lines = [line for line in outcome.stderr.splitlines() if line.strip()]
    return (lines[-1] if lines else "")[:160]
