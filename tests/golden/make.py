"""What the pipeline makes on tiny models, as plain values: the regression test of every change of structure.

Only what users see is read: run folders that the commands leave, and checkpoints. Tensors are kept as a hash and a few
numbers, so that a difference shows on one machine to the bit and on any other beyond rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from compress.files import text_key
from compress.models.load import load_model
from compress.models.planned import planned_model
from compress.plan.read import read_plan
from tests.calls import checked
from tests.cli.recipes import HEAD, make_recipe
from tests.tiny import FAMILIES, mixed_plan, random_ids, shape_of, tiny_model
from tests.train.common import model_of

WINDOWS = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 320, count: 2, answer_tokens: 16}}
    - {{task: continuation, length: 192, count: 2, answer_tokens: 16}}
  training:
    - {{task: continuation, length: 192, count: 4, answer_tokens: 16}}
  held_out:
    - {{task: continuation, length: 384, count: 1, answer_tokens: 16}}
profile:
  statistics:
    - {{name: influence, grid: {{sinks: [4]}}}}
    - {{name: attention, sink: 4}}
    - {{name: hidden_mass, grid: {{sinks: [4]}}}}
    - {{name: output_error, sink: 4, window: 64}}
    - {{name: gates, steps: 8, task: continuation, sink: 4, recent: 64}}
search:
  solver: {solver}
  budget: {budget}
{refine}
export: {{form: {form}}}
evaluate:
  compare: [plan, uniform]
  perplexity: {{text: *text, length: 256, windows: 2}}
"""
)

PRUNING = (
    HEAD
    + """\
  documents:
    - {{task: continuation, length: 128, count: 2, answer: text, answer_tokens: 64}}
  held_out:
    - {{task: continuation, length: 128, count: 1, answer: text, answer_tokens: 64}}
profile:
  statistics:
    - {{name: amp}}
    - {{name: wanda_sp}}
    - {{name: flap}}
    - {{name: taylor}}
    - {{name: magnitude}}
    - {{name: random}}
search:
  solver: {solver}
  budget: {budget}
{refine}
export: {{form: {form}}}
evaluate:
  compare: [plan, random]
  perplexity: {{text: *text, length: 128, windows: 2}}
"""
)

# As `WINDOWS`, on the demo model, with documents that a small model can answer.
DEMO = """\
model: demo/smollm2-135m
output: {output}
device: cpu
calibration:
  text: {{source: embedded}}
  documents:
    - {{task: passkey, length: 384, count: 2}}
    - {{task: continuation, length: 384, count: 2, answer: text, answer_tokens: 64}}
  held_out:
    - {{task: passkey, length: 512, count: 1}}
profile:
  statistics:
    - {{name: influence}}
    - {{name: attention}}
    - {{name: retrieval}}
    - {{name: hidden_mass}}
search:
  solver: {{name: moa, retrieval: 1, points: 1}}
  budget: {{kv: 0.6, lengths: [512]}}
evaluate:
  compare: [plan, uniform]
  perplexity: {{text: {{source: embedded}}, length: 512, windows: 2}}
  recall:
    - {{task: passkey, length: 512, count: 2}}
"""

KV = "{kv: 0.7, lengths: [320]}"
SOLVERS: dict[str, tuple[str, str]] = {
    "moa": ("{name: moa, points: 1}", KV),
    "moa, two lengths": ("{name: moa, points: 1}", "{kv: 0.75, lengths: [192, 320]}"),
    "moa, density": ("{name: moa, points: 0}", "{density: 0.7, lengths: [320]}"),
    "moa, length rule": ("{name: moa, points: 0, rule: length}", "{kv: 0.8, lengths: [320]}"),
    "moa, hidden mass": ("{name: moa, points: 0, influence: none, tables: {hidden_mass: 1}}", KV),
    "heads": ("{name: heads, score: gates, sink: 4, window: 64}", KV),
    "layers": ("{name: layers, order: spread, score: output_error, sink: 0, window: 64}", "{kv: 0.8, lengths: [320]}"),
    "uniform": ("{name: uniform, sink: 4}", KV),
    "streaming": ("{name: streaming, sink: 4}", KV),
}
PRUNERS: dict[str, tuple[str, str]] = {
    "amp": ("{name: amp, importance: [amp, wanda_sp], attention: [0.0, 0.3]}", "{parameters: 0.7}"),
    "amp by query head": ("{name: amp, importance: taylor, unit: query, attention: [0.5]}", "{parameters: 0.8}"),
    "allocated": ("{name: allocated, importance: magnitude}", "{parameters: 0.7}"),
    "flap": ("{name: allocated, importance: flap, normalise: standard, compensate: true}", "{parameters: 0.75}"),
}
TIMES = ("seconds", "time", "created", "versions", "tool", "version", "fingerprint", "checksum", "sha256")


def machine() -> dict[str, str]:
    """What the last bits of a result depend on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {"cpu": model, "torch": torch.__version__, "transformers": transformers.__version__}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def tensor_facts(tensor: torch.Tensor) -> dict[str, Any]:
    """Shape and dtype, sum and greatest magnitude in float64, and a hash of the bytes."""
    values = tensor.detach().cpu().contiguous()
    wide = values.double()
    digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"").hexdigest()
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype),
        "sum": float(wide.sum()),
        "most": float(wide.abs().max()) if values.numel() else 0.0,
        "bits": digest[:16],
    }


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    return {name: tensor_facts(tensor) for name, tensor in sorted(load_file(path).items())}


def plain(value: Any) -> Any:
    """JSON values without what differs between runs: times, versions, hashes of files, paths."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if not any(word in key for word in TIMES)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return "a path" if isinstance(value, str) and value.startswith("/") else value


def plan_facts(path: Path) -> dict[str, Any]:
    """The decision of a plan file and what it expects, without the model's fingerprint."""
    plan = json.loads(path.read_text(encoding="utf-8"))
    predicted = {"loss": plan["predicted"]["loss"], **named(plan["predicted"]["amounts"])}
    return {"layers": [{"mlp": None, **layer} for layer in plan["layers"]], "predicted": predicted}


def named(amounts: list[dict[str, Any]]) -> dict[str, Any]:
    """What plans cost, by the names that files had before they listed it by kind of budget."""
    held = {str(row["length"]): row for row in amounts if row["kind"] == "kv"}
    left = next((row for row in amounts if row["kind"] == "parameters"), {"plan": None, "dense": None})
    return {
        "kv_bytes": {length: row["plan"] for length, row in held.items()},
        "dense_kv_bytes": {length: row["dense"] for length, row in held.items()},
        "parameters": left["plan"],
        "dense_parameters": left["dense"],
    }


def row_facts(row: dict[str, Any]) -> dict[str, Any]:
    """One plan of `pareto.json`, likewise."""
    facts = named(row["amounts"])
    kept = {key: value for key, value in row.items() if key != "amounts"}
    kept["kv_bytes"] = facts["kv_bytes"]
    kept["kv_share"] = {length: size / facts["dense_kv_bytes"][length] for length, size in facts["kv_bytes"].items()}
    if facts["parameters"] is not None:
        kept["parameters"] = facts["parameters"]
        kept["parameters_share"] = facts["parameters"] / facts["dense_parameters"]
    return kept


def limits(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The constraints of a search, by length, as `pareto.json` had them before it listed them."""
    words = {"bytes": "share", "keys": "density"}
    found: dict[str, Any] = {}
    for row in rows:
        limit, dense, unit = row["limit"], row["dense"], row["unit"]
        if row["length"] is None:
            found |= {unit: limit, f"dense_{unit}": dense}
        else:
            shares = {f"limit_{words[unit]}": limit / dense, f"smallest_{words[unit]}": row["smallest"] / dense}
            found[str(row["length"])] = {f"dense_{unit}": dense, f"limit_{unit}": limit, **shares}
    return found


def evaluation_facts(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation in the form of the golden files: one field for each kind of measure."""

    def results(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
        own = [result for result in row["results"] if result["measure"] == name]
        return [{key: value for key, value in result.items() if key != "measure"} for result in own]

    def only(row: dict[str, Any], name: str) -> dict[str, Any] | None:
        return next(iter(results(row, name)), None)

    requests = {name: [part for part in evaluation["asked"] if part["measure"] == name] for name in MEASURES}
    asked: dict[str, Any] = {
        name: {key: value for key, value in part[0].items() if key != "measure"} if part else None
        for name, part in requests.items()
    }
    variants = []
    for row in evaluation["variants"]:
        kept = {"name": row["name"], "seconds": row["seconds"], "tasks": results(row, "lm_eval")}
        kept |= {name: only(row, name) for name in ("size", "latency", "perplexity")}
        held = only(row, "kv_bytes")
        variants.append(kept | {"recall": results(row, "recall"), "kv_bytes": held["held"] if held else {}})
    facts = {key: value for key, value in evaluation.items() if key != "asked"}
    return (
        facts
        | asked
        | {"schema": 1, "recall": [task for part in requests["recall"] for task in part["tasks"]], "variants": variants}
    )


MEASURES = ("perplexity", "recall", "lm_eval", "latency")


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Runs:
    """One model with one profile; searches and checkpoints beside it."""

    def __init__(self, folder: Path, template: str, dense: Any = None) -> None:
        self.recipe = make_recipe(folder, dense)
        self.template, self.folder, self.run = template, folder, folder / "run"

    def write(self, solver: str, budget: str, *, refine: str = "", form: str = "patched") -> Path:
        """The recipe with another solver."""
        self.recipe.write_text(
            self.template.format(
                model=self.folder / "model",
                text=self.folder / "text.txt",
                output=self.run,
                solver=solver,
                budget=budget,
                refine=refine,
                form=form,
            )
        )
        return self.recipe

    def profile(self) -> dict[str, Any]:
        """The profile's tensors."""
        checked("profile", self.recipe)
        return tensors(self.run / "profile" / "statistics.safetensors")

    def search(self) -> dict[str, Any]:
        """The chosen plan, every other, and what the search says of them."""
        checked("search", self.recipe)
        found = {path.stem: plan_facts(path) for path in sorted((self.run / "search" / "plans").glob("*.json"))}
        pareto = json.loads((self.run / "search" / "pareto.json").read_text(encoding="utf-8"))
        rows = [plain(row_facts(row)) for row in [*pareto["plans"], *pareto["baselines"]]]
        return {"chosen": pareto["chosen"], "limits": limits(pareto["limits"]), "rows": rows, "plans": found}

    def checkpoint(self) -> dict[str, Any]:
        """Weights, configuration and behaviour of the exported checkpoint, and its evaluation."""
        checked("export", self.recipe)
        checked("eval", self.recipe)
        folder = self.run / "checkpoint"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        checks = json.loads((folder / "compress_checks.json").read_text(encoding="utf-8"))
        evaluation = json.loads((self.run / "evaluation.json").read_text(encoding="utf-8"))
        weights: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= tensors(path)
        return {
            # Which code a checkpoint carries is in tests/export/test_layout.py.
            "files": sorted(path.name for path in folder.iterdir() if path.suffix != ".py"),
            "config": plain(config),
            "weights": weights,
            "checks": plain(checks),
            "evaluation": plain(evaluation_facts(evaluation)),
        }


def behaviour(model: Any) -> dict[str, Any]:
    """Logits, greedy text and cache bytes of a model."""
    ids = random_ids(2, 150)
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return {
        "logits": tensor_facts(out["logits"]),
        "last": [round(value, 4) for value in out["logits"][0, -1, :8].tolist()],
        "text": text[:, 150:].tolist(),
        "cache_bytes": cache.allocated_bytes(),
        "held_bytes": cache.held_bytes(),
    }


def families() -> dict[str, Any]:
    """Every family with a plan that mixes targets."""
    found = {}
    for family in FAMILIES:
        dense = tiny_model(family)
        found[family] = behaviour(planned_model(dense, mixed_plan(shape_of(dense))))
    return found


def windows(folder: Path) -> dict[str, Any]:
    """One profile of every statistic of head groups, every solver on it, a refinement, checkpoints of both forms."""
    runs = Runs(folder, WINDOWS)
    runs.write(*SOLVERS["moa"])
    found: dict[str, Any] = {"profile": runs.profile(), "search": {}}
    for name, asked in SOLVERS.items():
        runs.write(*asked, form="native" if name == "layers" else "patched")
        found["search"][name] = runs.search()
        if name in ("moa", "layers"):
            found[f"checkpoint, {name}"] = runs.checkpoint()
    runs.write(*SOLVERS["moa, hidden mass"], refine="  refine: {minutes: 5, samples: 8}")
    found["search"]["refined"] = runs.search()
    return found


def pruning(folder: Path) -> dict[str, Any]:
    """One profile of every importance, every pruning solver on it, checkpoints of both forms."""
    runs = Runs(folder, PRUNING, model_of())
    runs.write(*PRUNERS["amp"])
    found: dict[str, Any] = {"profile": runs.profile(), "search": {}}
    for name, asked in PRUNERS.items():
        runs.write(*asked, form="auto")
        found["search"][name] = runs.search()
        if name in ("amp", "flap"):
            found[f"checkpoint, {name}"] = runs.checkpoint()
    return found


def demo(folder: Path) -> dict[str, Any]:
    """The pipeline on the demo model: minutes on two cores, so it is for `scripts/golden.py demo` and not a test."""
    run, recipe = folder / "run", folder / "recipe.yaml"
    recipe.write_text(DEMO.format(output=run))
    checked("run", recipe)
    facts: dict[str, Any] = {
        "profile": tensors(run / "profile" / "statistics.safetensors"),
        "plan": plan_facts(run / "plan.json"),
        "evaluation": plain(evaluation_facts(json.loads((run / "evaluation.json").read_text(encoding="utf-8")))),
        "config": plain(json.loads((run / "checkpoint" / "config.json").read_text(encoding="utf-8"))),
    }
    weights: dict[str, Any] = {}
    for path in sorted((run / "checkpoint").glob("*.safetensors")):
        weights |= tensors(path)
    facts["weights"] = {"tensors": len(weights), "bits": text_key(json.dumps(weights, sort_keys=True))}
    dense = load_model("demo/smollm2-135m").model
    facts["behaviour"] = behaviour(planned_model(dense, read_plan(run / "plan.json")))
    return facts


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "families": lambda folder: families(),
    "windows": windows,
    "pruning": pruning,
}


SLOW: dict[str, Callable[[Path], dict[str, Any]]] = {"demo": demo}


def make_part(name: str, folder: Path) -> dict[str, Any]:
    """The values of one part; `folder` is empty."""
    with _one_thread():
        return (PARTS | SLOW)[name](folder)
