"""The time that `validate` foresees, at given speeds, beside what runs took; and that speeds are measured quickly."""

import dataclasses
import math
import time
from pathlib import Path

import pytest
import torch

from compress.plan import ModelShape
from compress.recipe.defaults import Situation
from compress.recipe.load import load_recipe
from compress.stages.estimate import EXPORT, READ, Estimate, memory, seconds
from compress.stages.speeds import Speeds, measure_speeds

RECIPES = Path(__file__).parents[2] / "recipes"
SMOLLM2 = ModelShape(
    architecture="LlamaForCausalLM",
    layers=30,
    query_heads=9,
    kv_heads=3,
    head_dim=64,
    native_windows=(None,) * 30,
    fingerprint="",
)
KEPT = 1_543_680  # bytes a token that its training keeps
HERE = Situation(False, 2, 16 << 30, 8192, 134_515_008, 98_304, SMOLLM2, 576, 1536, KEPT, 49_152)
ONE_CORE = Speeds(products=98e9, elements=1.2e9, bandwidth=11.5e9, dispatch=1.5e-6)  # an AMD EPYC, idle
SHORT = {
    "search.budget.lengths": "[512]",
    "evaluate.recall": "[{task: facts, length: 512, count: 4}]",
    "evaluate.perplexity": "{length: 512, windows: 4}",
}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(Situation, "of", classmethod(lambda cls, model, device: HERE))


def foreseen(name, speeds=ONE_CORE, **settings):
    recipe = load_recipe(RECIPES / name, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
    return seconds(recipe, HERE, speeds, "cpu")


@pytest.mark.parametrize(
    ("name", "settings", "took"),
    [
        # Seconds of each stage, and of whole runs, that were measured on one core of that machine.
        ("smollm2-quickstart.yaml", SHORT, {"profile": 35.5, "search": 74.3, "export": 43.7, "evaluate": 48.2}),
        ("smollm2-quickstart.yaml", {"search.budget.lengths": "[2048]"}, 18 * 60 + 57),
        ("smollm2-influence.yaml", {}, 20 * 60 + 8),
    ],
)
def test_what_is_foreseen_is_within_a_factor_of_two_of_what_runs_took(name, settings, took):
    stages = foreseen(name, **settings)
    pairs = (
        [(stages[stage], took[stage]) for stage in took] if isinstance(took, dict) else [(sum(stages.values()), took)]
    )
    for expected, measured in pairs:
        assert measured / 2 < expected < 2 * measured, (expected, measured)


def test_a_machine_twice_as_fast_takes_half():
    fast = Speeds(ONE_CORE.products * 2, ONE_CORE.elements * 2, ONE_CORE.bandwidth * 2, ONE_CORE.dispatch / 2)
    slow, quick = (foreseen("smollm2-influence.yaml", speeds) for speeds in (ONE_CORE, fast))
    for stage in ("profile", "search", "evaluate"):
        assert quick[stage] == pytest.approx(slow[stage] / 2)
    assert quick["export"] == slow["export"] == pytest.approx(EXPORT + 4 * HERE.parameters / READ)


def test_every_speed_counts_in_what_it_does():
    stages = foreseen("smollm2-influence.yaml")
    for field, slower in (("products", 0.5), ("elements", 0.5), ("bandwidth", 0.5), ("dispatch", 2.0)):
        speeds = dataclasses.replace(ONE_CORE, **{field: getattr(ONE_CORE, field) * slower})
        assert foreseen("smollm2-influence.yaml", speeds)["profile"] > stages["profile"]


def test_more_work_takes_longer_in_the_stage_that_does_it():
    plain = foreseen("smollm2-influence.yaml")
    for stage, settings in {
        "profile": {"profile.statistics": "[{name: influence}, {name: attention}, {name: retrieval}, {name: amp}]"},
        "search": {"search.refine": "{minutes: 60}"},
        "recover": {"recover": "{steps: 2}"},
        "evaluate": {"evaluate.agreement": "{length: 512}"},
        "text": {"calibration.text": "{source: generated, tokens: 100000}"},
    }.items():
        more = foreseen("smollm2-influence.yaml", **settings)
        assert more[stage] > plain.get(stage, 0), stage
        # A recovery adds rows to the evaluation, too.
        assert all(more[other] == plain[other] for other in plain if other not in (stage, "evaluate")), stage


def test_longer_documents_take_the_model_longer_and_a_graph_saves_the_host():
    core = Estimate(HERE, ONE_CORE, "cpu", 4)
    assert core.writing(8192, 16, "cpu") > 2 * core.writing(1024, 16, "cpu") > 0
    h100 = Estimate(HERE, Speeds(products=700e12, elements=1e13, bandwidth=3e12, dispatch=5e-6), "cuda", 2)
    took = 95 / 4e6  # seconds a token, measured
    assert took / 2 < h100.writing(2048, 512, "cuda") < took < 2 * h100.writing(8192, 512, "cuda")


def test_speeds_are_measured_in_a_moment():
    started = time.process_time()
    speeds = measure_speeds("cpu", torch.float32, 64, 128)
    assert all(math.isfinite(value) and value > 0 for value in dataclasses.astuple(speeds))
    assert time.process_time() - started < 5
    assert "GFLOP/s" in speeds.words() and "GB/s" in speeds.words()


def test_what_is_measured_after_a_preparation_takes_time():
    prepare = "{{targets: [{{target: linear}}, {{target: linear, map: elu}}], steps: 2, effect: {}}}"
    priced, plain = (
        foreseen("smollm2-quickstart.yaml", prepare=prepare.format(word), **SHORT) for word in ("true", "false")
    )
    assert "effect" not in plain and priced.pop("effect") > priced["profile"] / 4
    assert priced == plain
    routers = "{targets: [{target: routed, active: 2, of: 3}], steps: 2}"
    lighter = foreseen("smollm2-quickstart.yaml", prepare=routers, **SHORT)
    assert 0 < lighter["prepare"] < plain["prepare"] / 3
    looked_up = foreseen(
        "smollm2-quickstart.yaml",
        profile__statistics="[{name: hidden_mass}, {name: retrieval}, {name: ar_loss}]",
        **SHORT,
    )
    assert looked_up["profile"] > plain["profile"]


@pytest.mark.parametrize(
    ("name", "length", "took"),
    # Peaks of whole recoveries in float32 on one core, steps of two sequences.
    [("smollm2-hedgehog.yaml", 256, 5.16 * 2**30), ("smollm2-moh.yaml", 128, 3.80 * 2**30)],
)
def test_a_training_counts_in_the_memory_within_a_factor_of_two(name, length, took):
    def held(**settings):
        settings = {"recover__length": length, "recover__batch_size": 2, "recover__micro_batch": "null"} | settings
        given = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return memory(load_recipe(RECIPES / name, ["dtype=float32", "prepare.batch_size=1", *given]), HERE)

    assert took / 2 < held() < 2 * took
    assert held(recover__train="lora") < held() - 3 * 4 * HERE.parameters + 1
    assert held(recover__length=4 * length) > held() + 3 * length * KEPT
    assert held(recover__batch_size=8, recover__micro_batch=2) == held()
    long = {"recover__length": 8192, "recover__batch_size": 1}  # layers are computed again where they do not fit
    assert held(**long) == held(**long, recover__checkpointing="true") < held(**long, recover__checkpointing="false")


def foreseen_profile(*added):
    names = ", ".join(f"{{name: {name}}}" for name in ("influence", "retrieval", *added))
    return foreseen("smollm2-influence.yaml", profile__statistics=f"[{names}]")["profile"]


@pytest.mark.parametrize("added", ["ar_loss", "reconstruction", "amp", "taylor"])
def test_a_pass_over_documents_takes_time(added):
    assert foreseen_profile(added) > foreseen_profile()


@pytest.mark.parametrize("added", ["attention", "magnitude"])
def test_a_pass_that_is_taken_already_and_weights_alone_take_none(added):
    assert foreseen_profile(added) == foreseen_profile()
