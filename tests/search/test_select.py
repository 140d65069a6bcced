"""Selection by measurement: resumes from its log, survives a torn line, breaks ties by bytes."""

from pathlib import Path

import pytest

from compress.data.sample import Sample, TextSample
from compress.plan import Plan, uniform_plan
from compress.search.measure import LossLog, best_plan, measure, plan_key
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from tests.search.synthetic import make_shape
from tests.tiny import spans_of

DOCUMENTS = [TextSample(tuple(range(10 + extra)), (8, 10)) for extra in range(3)]


def plan(alpha: int, **fields: object) -> Plan:
    return uniform_plan(make_shape(), WindowGroup(sink=64, alpha=alpha, beta=0.0), **fields)


class Meter:
    """A loss that counts its calls, and can be interrupted."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.calls = 0
        self.stop_after = stop_after

    def __call__(self, plan: Plan | None, document: Sample) -> float:
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        alpha = 1000 if plan is None else spans_of(plan)[0][0].alpha
        return document.length / alpha


def test_an_interrupted_selection_continues(tmp_path: Path) -> None:
    plans = {"dense": None, "a": plan(64), "b": plan(128)}
    path = tmp_path / "search" / "response.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure(plans, DOCUMENTS, Meter(stop_after=4), LossLog(path, "model"))
    with path.open("a") as file:
        file.write('{"context": "model", "plan": "tor')
    meter = Meter()
    seen: list[tuple[int, int, str]] = []
    losses = measure(plans, DOCUMENTS, meter, LossLog(path, "model"), lambda *step: seen.append(step))
    assert meter.calls == 5
    assert losses == {"dense": pytest.approx(0.011), "a": pytest.approx(11 / 64), "b": pytest.approx(11 / 128)}
    assert seen[0] == (1, 9, "dense") and seen[-1] == (9, 9, "b")
    again = Meter()
    assert measure(plans, DOCUMENTS, again, LossLog(path, "model")) == losses
    assert again.calls == 0


def test_losses_of_another_model_are_not_used(tmp_path: Path) -> None:
    path = tmp_path / "response.jsonl"
    measure({"a": plan(64)}, DOCUMENTS, Meter(), LossLog(path, "one"))
    meter = Meter()
    measure({"a": plan(64)}, DOCUMENTS, meter, LossLog(path, "two"))
    assert meter.calls == 3


def test_keys_follow_what_matters() -> None:
    assert plan_key(plan(64)) == plan_key(plan(64, provenance={"name": "other"})) != plan_key(plan(128))
    assert plan_key(uniform_plan(make_shape(), FullGroup())) != plan_key(None) == "dense"
    tokens = DOCUMENTS[0].tokens
    assert DOCUMENTS[0].key == TextSample(tokens, (8, 10), task="other").key
    assert DOCUMENTS[0].key != TextSample(tokens, (7, 10)).key


def test_ties_go_to_fewer_bytes() -> None:
    losses = {"a": 0.5, "b": 0.5, "c": 0.6}
    assert best_plan(losses, {"a": 20, "b": 10, "c": 1}) == "b"
    assert best_plan(losses, {"a": 10, "b": 10, "c": 1}) == "a"
