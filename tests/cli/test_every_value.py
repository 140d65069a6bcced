"""Every value that a recipe can name, a choice or the name of a method, is run by the pipeline somewhere in the tests.

The recipes below run most of them on a tiny model. `ELSEWHERE` says which tests run the others, and is held to it. A
statistic, solver or measure that neither names is run as its matrix tries it: a new one needs no line here.
"""

import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from compress import registry
from compress.cli.app import app
from compress.evaluate.measure import asked_for
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe
from compress.search.budget.budget import Budget
from compress.search.refine.refine import Refine
from compress.train.settings import RecoverSettings
from tests.cli.recipes import make_recipe
from tests.evaluate.test_measures import MATRIX
from tests.profile.test_matrix import STATISTICS
from tests.test_house import shipped

Value = tuple[str, str, Any]  # module and class, key, value

HEAD = """\
model: {folder}/model
output: {folder}/{run}
device: cpu
"""
SPANS = """\
calibration:
  text: &text {{source: file, path: {folder}/text.txt}}
  documents:
    - {{task: continuation, length: 192, count: 1, answer_tokens: 4}}
    - {{task: continuation, length: 192, count: 1, answer_tokens: 4, decoding: greedy, answer: text}}
    - {{task: passkey, length: 192, count: 1}}
    - {{task: passkey, length: 192, count: 1, haystack: filler, answer: text}}
    - {{task: facts, length: 192, count: 1, facts: 1}}
    - {{task: facts, length: 192, count: 1, facts: 1, kinds: [word], haystack: filler, answer: text}}
    - {{task: key_value, length: 192, count: 1}}
    - {{task: key_value, length: 192, count: 1, haystack: filler, form: register, answer: text}}
  training:
    - {{task: passkeys, length: 192, count: 1, keys: 2, words: 2}}
    - {{task: passkeys, length: 192, count: 1, keys: 2, words: 2, haystack: filler}}
profile:
  statistics:
    - {{name: influence, grid: &grid {{sinks: [4]}}}}
    - {{name: attention, sink: 4}}
    - {{name: retrieval, grid: *grid}}
    - {{name: hidden_mass, grid: *grid}}
    - {{name: output_error, sink: 4, window: 64}}
    - {{name: gates, sink: 4, recent: 64, steps: 2}}
    - {{name: effect, targets: [{{target: window, sink: 4, alpha: 64, beta: 0.0}}]}}
    - {{name: state_rank, block: 32}}
    - {{name: query_constancy}}
    - {{name: lse_spread}}
    - {{name: ar_loss, sink: 4, window: 64}}
    - {{name: reconstruction, chunk: 128}}
{statistics}search:
  solver: {solver}
  budget: {{kv: 0.8, lengths: [192, 256]}}
evaluate:
  compare: [plan, uniform, uniform-at-longest, streaming]
  perplexity: {{text: *text, length: 64, windows: 1}}
  recall:
    - {{task: passkey, length: 192, count: 2}}
    - {{task: facts, length: 192, count: 2, wordings: evaluation, facts: 1, kinds: [place, time]}}
  agreement: {{length: 64, windows: 1}}
  flops: {{}}
{measures}  batch_size: 2
"""
SOLVERS = (
    "{name: moa, points: 0}",
    "{name: moa, points: 0, influence: signed}",
    "{name: moa, points: 0, influence: joint}",
    "{name: moa, points: 0, influence: none, tables: {hidden_mass: 1}, retrieval: 1.0, rule: length}",
    "{name: heads, score: {gates: 1, output_error: 1}, sink: 4, window: 64}",
    "{name: layers, score: retrieval, window: 64}",
    "{name: layers, order: first, window: 64}",
    "{name: layers, order: last, window: 64}",
    "{name: layers, order: spread, window: 64}",
    "{name: uniform, sink: 4}",
    "{name: uniform, sink: 4, elastic: false}",
    "{name: streaming}",
)
PREPARED = (
    ("{name: keep, statistic: ar_loss, share: 0.5}", "effect: false, precision: float32"),
    ("{name: priced, points: 0, level: model}", "effect: true, precision: bfloat16"),
    ("{name: priced, points: 0, level: group}", "effect: true"),
    ("{name: priced, part: error, level: layer}", "effect: true"),
    ("{name: keep, statistic: {error: 1, state_rank: 1}, share: 0.5, level: layer}", "effect: true"),
)
PREPARE = """\
prepare: {{targets: [{{target: linear}}], length: 64, batch_size: 1, steps: 1, {more}}}
recover: {{length: 64, batch_size: 1, steps: 1, window_control: true}}
"""
PRUNING = """\
calibration:
  text: {{source: file, path: {folder}/text.txt}}
  documents:
    - {{task: continuation, length: 64, count: 1, answer: text, answer_tokens: 16}}
profile:
  statistics:
    - {{name: amp, neurons: {neurons}}}
    - {{name: flap}}
    - {{name: wanda_sp}}
    - {{name: taylor}}
    - {{name: magnitude}}
    - {{name: random}}
search:
  solver: {solver}
  budget: {{parameters: 0.8}}
evaluate:
  compare: [random]
  perplexity: {{length: 64, windows: 1}}
"""
PRUNERS = (
    ("activation", "{name: amp, group_score: sum}"),
    ("activation", "{name: amp, importance: [wanda_sp, taylor], group_score: mean, unit: query}"),
    ("activation", "{name: amp, importance: flap, group_score: max, compensate: true}"),
    ("activation", "{name: allocated, importance: [random, magnitude], normalise: none, group_score: sum}"),
    ("activation", "{name: allocated, normalise: standard, group_score: max, unit: query}"),
    ("contribution", "{name: allocated, importance: flap, normalise: layer, group_score: mean, compensate: true}"),
)
HALF = """\
dtype: {dtype}
calibration:
  text: {{source: dataset, id: some/texts}}
  documents:
    - {{task: continuation, length: 128, count: 1, answer: text, answer_tokens: 4}}
profile:
  stream: true
  statistics:
    - {{name: hidden_mass, grid: {{sinks: [4]}}}}
search:
  solver: {{name: uniform, sink: 4}}
  budget: {{kv: 0.8, lengths: [256]}}
evaluate: {{}}
"""
TRAININGS = (
    "recover: {steps: 1, length: 32, batch_size: 1, checkpointing: false, keep_noise: false}",
    "recover: {steps: 1, length: 32, train: full, loss: distill, precision: float32, checkpointing: true}",
    "recover: {steps: 1, length: 32, batch_size: 1, loss: both, precision: bfloat16, control: true}",
)
OWN, BRANCHES = "data.generated.GeneratedText", "evaluate.measures.branches.BranchesMeasure"
UPCYCLED = "recipe.schema.UpcycleSection"
SETTINGS, SECTION = "train.settings.RecoverSettings", "recipe.schema.ExportSection"
# What takes processes of its own: spread weights, and the verification of a checkpoint. File, and words in it.
ELSEWHERE: dict[Value, tuple[str, str]] = {
    (SETTINGS, "train", "mixers"): ("tests/train/test_prepare.py", r'"mixers"'),
    (SETTINGS, "shard", True): ("tests/train/test_resume.py", r'"shard": True'),
    (SECTION, "form", "patched"): ("tests/export/test_native.py", r'form="auto"[\s\S]*"form patched" in lines'),
    (SECTION, "form", "native"): ("tests/export/test_native.py", r'form="native"'),
    (SECTION, "form", "auto"): ("tests/export/test_native.py", r'form="auto"'),
    (SECTION, "dtype", "float32"): ("tests/export/test_export.py", r"loaded.model.dtype == torch.float32"),
    (SECTION, "dtype", "bfloat16"): ("tests/export/test_export.py", r'"dtype", \["bfloat16"'),
    (SECTION, "dtype", "float16"): ("tests/export/test_export.py", r'"dtype", \["bfloat16", "float16"\]'),
    ("evaluate.measures.lm_eval.LmEval", "", ""): ("tests/evaluate/test_harness.py", r"run_task\("),
    ("evaluate.measures.latency.Latency", "", ""): ("tests/cli/test_pruned_run.py", r"latency: \{\{length"),
    **dict.fromkeys(((OWN, "", ""), (OWN, "source", "generated")), ("tests/cli/test_run.py", "{source: generated")),
    **dict.fromkeys(
        (("data.text.UndividedText", "", ""), ("data.text.UndividedText", "source", "undivided")),
        ("tests/data/test_text.py", r'"source": "undivided"'),
    ),
    (BRANCHES, "", ""): ("tests/evaluate/test_branches.py", r'measured\("branches"'),
    **{
        (BRANCHES, "by", unit): ("tests/evaluate/test_branches.py", f'by="{unit}"')
        for unit in ("group", "layer", "model")
    },
    ("evaluate.measures.distance.Distance", "", ""): ("tests/evaluate/test_branches.py", r'measured\("distance"'),
    ("evaluate.measures.load.Load", "", ""): ("tests/evaluate/test_load.py", r'measures\["load"\]\('),
    ("evaluate.measures.drift.Drift", "", ""): ("tests/evaluate/test_branches.py", r'measured\("drift"'),
    **{
        (UPCYCLED, key, value): ("tests/cli/test_upcycle_run.py", f'"{key}": {shown}')
        for key, value, shown in (
            *(("attention", each, f'"{each}"') for each in ("soft", "base")),
            *(("kv", each, f'"{each}"') for each in ("expert", "shared")),
            *(("rest", each, f'"{each}"') for each in ("average", "seed")),
            *(("start", each, f'"{each}"') for each in ("random", "zero")),
            ("seed", True, "True"),
        )
    },
    (UPCYCLED, "seed", False): ("tests/cli/test_upcycle_run.py", r"upcycle:\n  experts: .*\n  texts"),
    ("plan.schema.MlpRouting", "top", "all"): ("tests/cli/test_upcycle_run.py", r'"top": "all"'),
    **{
        ("plan.schema.MlpRouting", "weight", each): ("tests/cli/test_upcycle_run.py", f'"weight": "{each}"')
        for each in ("one", "p")
    },
    ("search.refine.refine.Refine", "", ""): ("tests/golden/make.py", r"refine: \{minutes"),
    ("search.solvers.priced.Priced", "part", "signed"): ("tests/search/test_mixed.py", r"part: signed"),
    ("search.solvers.priced.Priced", "force", True): ("tests/search/test_routed.py", r"Priced\(.*force=True"),
    ("search.solvers.even.Even", "force", True): ("tests/search/test_routed.py", r"Even\(.*force=True"),
    **dict.fromkeys(
        (("search.solvers.even.Even", "", ""), ("search.solvers.even.Even", "force", False)),
        ("tests/search/test_routed_run.py", r"\{name: even, option: \{option: routed"),
    ),
    ("profile.heads.removal.RemovalEffect", "", ""): ("tests/search/test_routed_run.py", r"\{name: removal\}"),
    **{
        ("recipe.schema.EvaluateSection", "compare", name): ("tests/search/test_routed_run.py", f"compare: .*{name}")
        for name in ("even", "random-routing", "static-pruning")
    },
    **{
        ("recipe.schema.EvaluateSection", "compare", name): ("tests/search/test_retain_run.py", f"compare: .*{name}")
        for name in ("uniform-share", "global-threshold")
    },
    **dict.fromkeys(
        (
            ("search.solvers.shares.Shares", "", ""),
            ("search.solvers.shares.Shares", "same", "share"),
            ("search.solvers.shares.Shares", "same", "score"),
        ),
        ("tests/search/test_retain.py", r"\"share\".*\"score\"[\s\S]*Shares\(same=same"),
    ),
    **{
        ("train.settings.RecoverSettings", "compile", value): ("tests/train/test_compiled.py", f"compile={value}")
        for value in (True, False)
    },
    ("search.serve.Serve", "engine", "vllm"): ("tests/search/test_serve.py", r"Serve\("),
    ("search.serve.Serve", "permute", True): (
        "tests/search/test_serve.py",
        r"run\([\s\S]*Serve\(slot=1, spans=2, ranks=2\)",
    ),
    ("search.serve.Serve", "permute", False): ("tests/search/test_serve.py", r"Serve\(.*permute=False\)"),
    ("search.solvers.shares.Shares", "same", "threshold"): ("tests/search/test_retain.py", r'Shares\(same="threshold"'),
}


def call(command: str, recipe: Path) -> None:
    result = CliRunner().invoke(app, [command, str(recipe)])
    assert result.exit_code == 0, result.output


def class_name(schema: type[BaseModel]) -> str:
    return f"{schema.__module__.removeprefix('compress.')}.{schema.__qualname__}"


def unnamed(table: registry.Registry[Any], tried: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of a kind no recipe above names, in its written form, with the fields that its matrix gives it."""
    texts = " ".join((SPANS, PRUNING, HALF, *SOLVERS, *(part for pair in (*PREPARED, *PRUNERS) for part in pair)))
    left = {name: kind for name, kind in shipped(table).items() if not re.search(rf"\b{name}\b", texts)}
    return [
        table.written(kind(**tried.get(name, {})))
        for name, kind in left.items()
        if (class_name(kind), "", "") not in ELSEWHERE
    ]


def spans(solver: str, behind: str = "", **facts: Any) -> str:
    """A recipe that searches spans."""
    measured = unnamed(registry.measures, {name: keys for name, (keys, _) in MATRIX.items()})
    asked = {each.pop("name"): each for each in measured if not registry.measures[each["name"]].always}
    return (HEAD + SPANS + behind).format(
        solver=solver,
        statistics="".join(f"    - {json.dumps(each)}\n" for each in unnamed(registry.statistics, STATISTICS)),
        measures="".join(f"  {name}: {json.dumps(keys)}\n" for name, keys in asked.items()),
        **facts,
    )


def choices(schema: type[BaseModel], seen: set[type]) -> Iterator[Value]:
    """Every value of a `Literal` and of a switch in a schema."""
    if schema not in seen:
        seen.add(schema)
        for key, field in schema.model_fields.items():
            yield from _choices(field.annotation, class_name(schema), key, seen)


def _choices(annotation: Any, owner: str, key: str, seen: set[type]) -> Iterator[Value]:
    if typing.get_origin(annotation) is Literal:
        yield from ((owner, key, value) for value in typing.get_args(annotation))
    elif annotation is bool:
        yield from ((owner, key, value) for value in (True, False))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from choices(annotation, seen)
    else:
        for inner in typing.get_args(annotation):
            yield from _choices(inner, owner, key, seen)


def named(value: Any) -> Iterator[Value]:
    """The values that a recipe has, methods by their class."""
    if isinstance(value, BaseModel):
        yield class_name(type(value)), "", ""
        for key in type(value).model_fields:
            inner = getattr(value, key)
            yield from named(inner)
            for each in inner if isinstance(inner, tuple) else [inner]:
                if isinstance(each, str | bool | int):
                    yield class_name(type(value)), key, each
    elif isinstance(value, tuple):
        for inner in value:
            yield from named(inner)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots have tests of their own, and take longer than everything here."""
    monkeypatch.setattr("compress.stages.stage.draw", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text."""
    return make_recipe(tmp_path_factory.mktemp("values")).parent


RAN: set[Value] = set()
DONE: set[str] = set()  # run folders of the tests in this process that have passed


def run(folder: Path, text: str, *commands: str) -> None:
    recipe = folder / "values.yaml"
    recipe.write_text(text)
    for command in commands:
        call(command, recipe)
    found: Recipe = load_recipe(recipe)
    unread = {class_name(type(found.export))}  # no command here exports
    RAN.update(value for value in named(found) if value[0] not in unread)
    RAN.update((class_name(type(measure)), "", "") for measure in asked_for(found.evaluate))


def test_spans(folder: Path) -> None:
    others = [json.dumps(each) for each in unnamed(registry.solvers, {}) if registry.solvers.parse(each).spans]
    for number, solver in enumerate((*SOLVERS, *others)):
        text = spans(solver, folder=folder, run="spans")
        run(folder, text, *(["profile"] if number == 0 else []), "search", *(["eval"] if number == 0 else []))
    DONE.add("spans")


def test_prepared(folder: Path) -> None:
    for number, (solver, more) in enumerate(PREPARED):
        text = spans(solver, PREPARE, folder=folder, run="prepared", more=more)
        text = text.replace("{kv: 0.8,", "{kv: 0.95,").replace(
            "[plan, uniform, uniform-at-longest, streaming]", "[plan, random, interleaved]"
        )
        run(folder, text, *(["profile"] if number == 0 else []), "prepare", "search")
    call("recover", folder / "values.yaml")
    DONE.add("prepared")


def test_pruning(folder: Path) -> None:
    before = ""
    others = [json.dumps(each) for each in unnamed(registry.solvers, {}) if not registry.solvers.parse(each).spans]
    for neurons, solver in (*PRUNERS, *(("contribution", each) for each in others)):
        text = (HEAD + PRUNING).format(folder=folder, run="pruned", solver=solver, neurons=neurons)
        run(folder, text, *(["profile"] if neurons != before else []), "search")
        before = neurons
    for training in TRAININGS:
        run(folder, f"{text}{training}\n", "recover")
    call("eval", folder / "values.yaml")
    DONE.add("pruned")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_and_a_dataset(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    module: Any = types.ModuleType("datasets")
    module.__version__ = "5.0.0"
    module.load_dataset = lambda *args, **options: Rows([{"text": (folder / "text.txt").read_text()}])
    monkeypatch.setitem(sys.modules, "datasets", module)
    run(folder, (HEAD + HALF).format(folder=folder, run=dtype, dtype=dtype), "profile", "search")
    DONE.add(dtype)


def test_every_value_is_run_somewhere() -> None:
    many = (registry.statistics, registry.solvers, registry.tasks, registry.sources, registry.measures)
    classes: list[Any] = [method for table in many for _, method in table.items()]
    classes += [Budget, Refine, RecoverSettings]
    seen: set[type] = {base for method in classes for base in method.__mro__[1:]}  # nobody names a base class
    wanted = {value for schema in [Recipe, *classes] for value in choices(schema, seen)}
    wanted |= {(class_name(schema), "", "") for schema in classes}
    root = Path(__file__).parents[2]
    for value, (path, words) in ELSEWHERE.items():
        assert re.search(words, (root / path).read_text(encoding="utf-8")), f"{path} does not run {value}"
    assert not ELSEWHERE.keys() - wanted
    if {"spans", "prepared", "pruned", "bfloat16", "float16"} <= DONE:
        assert not ELSEWHERE.keys() & RAN
        left = sorted(map(str, wanted - RAN - ELSEWHERE.keys()))
        assert not left, left
