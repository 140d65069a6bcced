"""Refinement: the divergence, its quadratic model, the exchange within a budget, and the whole loop."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.data.sample import TextSample
from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.replaced import AttentionCall, replaced_attention
from compress.runtime.reference import prefill
from compress.runtime.span import Span
from compress.search.budget.budget import Budget
from compress.search.choice.options import layers_of
from compress.search.dense import Dense
from compress.search.problem import FULL_GROUP, Candidate, Layers, Problem
from compress.search.refine.divergence import Divergence
from compress.search.refine.effects import drawn, sampled_effects
from compress.search.refine.exchange import exchange
from compress.search.refine.moves import Moves
from compress.search.refine.refine import Loss, Refine, refine
from compress.search.run import make_problem, run_search, too_short
from compress.search.solvers.moa import Moa
from compress.search.solvers.uniform import Uniform
from compress.stages.search import NO_STEPS
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup
from tests.search.synthetic import random_profile
from tests.search.test_search import Section
from tests.tiny import random_ids, shape_of, tiny_loaded, tiny_model


def document(length: int, seed: int, answer: int = 9, task: str = "passkey") -> TextSample:
    return TextSample(tuple(random_ids(1, length, seed)[0].tolist()), (length - answer, length), task=task)


DOCUMENTS = [
    document(320, 1),
    document(320, 2, answer=30, task="text"),
    document(448, 3),
    document(448, 4, task="text"),
]
QUICK = Refine(minutes=5, samples=2)


def setting(family: str = "llama-gqa", kv: float = 0.5) -> tuple[Any, Problem, Layers]:
    """Dense model, problem and the uniform plan of the budget."""
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    budget = Budget(kv=kv, lengths=(448,))
    problem = make_problem(Dense(shape, 4, loaded.model), random_profile(shape, (320, 448)), budget, Moa())
    (uniform,) = Uniform(elastic=False).solve(problem)
    return loaded, problem, uniform.layers


def test_divergence_is_zero_for_the_dense_model_and_below_that_of_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.search.refine.divergence.LIKELIEST", 16)
    model = tiny_model("llama-gqa")
    divergence = Divergence(model, DOCUMENTS)
    assert all(abs(value) < 1e-5 for value in divergence.measure(model).values())
    _, problem, uniform = setting()
    planned = planned_model(model, Candidate(uniform).to_plan(problem, {}))
    found = divergence.measure(planned)
    for number, each in enumerate(DOCUMENTS):
        tokens = torch.tensor([each.tokens])
        rows = slice(each.answer[0] - 1, each.answer[1] - 1)
        with torch.no_grad():
            p, q = (m(input_ids=tokens).logits[0, rows].log_softmax(-1).double() for m in (model, planned))
        whole = float((p.exp() * (p - q)).sum(-1).mean())
        kept = p.topk(16).indices
        coarse_p, coarse_q = (
            torch.cat([each.gather(-1, kept), (1 - each.gather(-1, kept).exp().sum(-1, keepdim=True)).log()], -1)
            for each in (p, q)
        )
        coarse = float((coarse_p.exp() * (coarse_p - coarse_q)).sum(-1).mean())
        assert 0 < found[number] <= whole * (1 + 1e-3) + 1e-6
        assert found[number] == pytest.approx(coarse, rel=1e-3, abs=1e-6)
    by_task = divergence.by_task(found)
    assert by_task == {"passkey": (found[0] + found[2]) / 2, "text": (found[1] + found[3]) / 2}


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-part-sliding"])
def test_an_effect_is_the_derivative_towards_the_rule(family: str) -> None:
    """Against a finite difference: one group's output moved by a thousandth of the way from full to the rule's."""
    loaded, problem, _ = setting(family, 0.9)
    model, shape = loaded.model.double(), problem.shape
    narrow = [WindowGroup(sink=8, alpha=alpha, beta=0.0) for alpha in (20, 60)]
    rules: Any = [[[FULL_GROUP] * shape.kv_heads, narrow] for _ in range(shape.layers)]
    divergence = Divergence(model, DOCUMENTS[:2])
    layer = next(number for number, native in enumerate(shape.native_windows) if native is None)
    effects = sampled_effects(model, shape, divergence, rules, {}, 1, seed=3)[0][0]
    assert bool((effects[..., 0] == 0).all())
    for number, native in enumerate(shape.native_windows):
        assert bool((effects[:, number] == 0).all()) == (native is not None)
    with torch.no_grad():
        dense = dict(divergence.answer_logits(model, [0, 1]))

    def moved(step: float, group: int, number: int) -> float:
        def attention(call: AttentionCall) -> torch.Tensor:
            q, k, v = call.query, call.key, call.value
            own = Span() if call.window is None else Span(0, call.window, 0.0)
            out = prefill(q, k, v, [own] * shape.kv_heads, scale=call.scaling)
            if call.layer == layer:
                other = [own] * shape.kv_heads
                other[group] = narrow[group].span()  # type: ignore[assignment]
                out = out + step * (prefill(q, k, v, other, scale=call.scaling) - out)
            return out

        with replaced_attention(model, "test_change", attention), torch.no_grad():
            rows = dict(divergence.answer_logits(model, [number]))[number]
        labels = drawn(dense[number], f"3/0/{number}")
        return float(torch.nn.functional.cross_entropy(rows, labels, reduction="sum")) / len(labels) ** 0.5

    for group in range(shape.kv_heads):
        for number in (0, 1):
            slope = (moved(1e-3, group, number) - moved(-1e-3, group, number)) / 2e-3
            assert float(effects[number, layer, group, 1]) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_the_effect_of_removed_units_is_the_derivative_towards_nothing() -> None:
    """Of neurons and of a head group, against a finite difference: their outputs shrink by a thousandth."""
    loaded, problem, _ = setting()
    model, shape = loaded.model.double(), problem.shape
    divergence, layer = Divergence(model, DOCUMENTS[:1]), 1
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[1, 10:40] = True
    rules: Any = [[[FULL_GROUP, PrunedGroup()]]] * shape.layers
    groups, neurons = sampled_effects(model, shape, divergence, rules, {layer: mask}, 1, seed=3)
    assert float(neurons[0, 0, layer, 0]) == 0 and not neurons[0, 0, [0, 2]].any()
    with torch.no_grad():
        labels = drawn(dict(divergence.answer_logits(model, [0]))[0], "3/0/0")

    def moved(module: Any, units: slice, step: float) -> float:
        def shrink(_: Any, inputs: Any) -> Any:
            hidden = inputs[0].clone()
            hidden[..., units] *= 1 - step
            return (hidden, *inputs[1:])

        handle = module.register_forward_pre_hook(shrink)
        with torch.no_grad():
            rows = dict(divergence.answer_logits(model, [0]))[0]
        handle.remove()
        return float(torch.nn.functional.cross_entropy(rows, labels, reduction="sum")) / len(labels) ** 0.5

    block = model.model.layers[layer]
    half = shape.head_dim * shape.query_heads // 2
    for module, units, effect in [
        (block.mlp.down_proj, slice(10, 40), neurons[0, 0, layer, 1]),
        (block.self_attn.o_proj, slice(half, 2 * half), groups[0, 0, layer, 1, 0]),
    ]:
        slope = (moved(module, units, 1e-3) - moved(module, units, -1e-3)) / 2e-3
        assert float(effect) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_labels_are_drawn_from_the_predictions() -> None:
    logits = torch.log(torch.tensor([0.5, 0.2, 0.3])).expand(4000, 3)
    counts = torch.bincount(drawn(logits, "a"), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.2, 0.3]), atol=0.04, rtol=0)
    assert torch.equal(drawn(logits, "a"), drawn(logits, "a")) and not torch.equal(
        drawn(logits, "a"), drawn(logits, "b")
    )


def test_the_quadratic_model_is_the_divergence_of_small_changes() -> None:
    """A plan that hides little, against many samples: the model's loss is the measured one to within its noise."""
    loaded, problem, uniform = setting()
    # Longer than the window, and long answers: many predictions to draw labels from in one pass.
    documents = [document(448, 3, answer=60), document(448, 4, answer=60, task="text")]
    loss = Loss(loaded.model, problem, documents, QUICK, uniform)
    little = problem.with_targets(lambda p: FULL_GROUP if p[1] else WindowGroup(sink=64, alpha=320, beta=0.0))
    moves = Moves.of(problem, little)
    effects = loss.quadratic(loss.passes(moves, samples=10, seed=0))
    columns = np.cumsum([0, *(len(unit.choices) for unit in moves.units[:-1])]) + moves.options_of(little)
    modelled = float(effects[:, columns].sum(1).square().sum())
    measured = loss.total(loss.by_task(little))
    assert modelled == pytest.approx(measured, rel=0.5)


def cost(effects: np.ndarray, columns: np.ndarray, believed: float) -> float:
    """The model's loss of a choice, term by term."""
    chosen = effects[:, columns]
    gram = chosen.T @ chosen
    return float(believed * gram.sum() + (1 - believed) * gram.diagonal().sum())


@pytest.mark.parametrize("believed", [0.0, 0.5, 1.0])
def test_an_exchange_lowers_the_model_within_budget_and_radius(believed: float) -> None:
    _, problem, uniform = setting()
    moves = Moves.of(problem, uniform)
    sizes = [len(unit.choices) for unit in moves.units]
    start = np.cumsum([0, *sizes[:-1]])
    effects = np.random.default_rng(0).normal(size=(30, sum(sizes)))
    for first, unit in zip(start, moves.units, strict=True):  # a rule that stands twice is one rule
        effects[:, first + len(unit.choices) - 1] = effects[:, first + unit.choices.index(unit.choices[-1])]
    now, lasts = moves.options_of(uniform), []
    assert layers_of(moves.problem, moves.units, now) == uniform
    for radius in (1, 2, len(moves.units)):
        choice, before, after = exchange(moves.problem, moves.units, now, effects, radius, believed)
        assert problem.fits(layers_of(moves.problem, moves.units, choice))
        assert sum(a != b for a, b in zip(choice, now, strict=True)) <= radius and after <= before
        assert before == pytest.approx(cost(effects, start + now, believed), rel=1e-4)
        assert after == pytest.approx(cost(effects, start + choice, believed), rel=1e-4)
        lasts.append(after)
    assert lasts == sorted(lasts, reverse=True) and lasts[-1] < lasts[0]


def test_an_exchange_doubts_what_only_some_samples_say() -> None:
    """One group loses the same in all samples, another ten times as much in one of them: the first gets the pages."""
    _, problem, uniform = setting()
    moves = Moves.of(problem, uniform)
    start = np.cumsum([0, *(len(unit.choices) for unit in moves.units)])
    effects = np.zeros((20, start[-1]))
    for number, values in ((0, np.full(20, 1.0)), (1, np.eye(20)[3] * 10)):
        full = start[number] + moves.units[number].choices.index(FULL_GROUP)
        effects[:, start[number] : start[number + 1]] = values[:, None]
        effects[:, full] = 0
    now = moves.options_of(uniform)
    full_of = [
        [number for number in (0, 1) if moves.units[number].choices[choice[number]] == FULL_GROUP]
        for doubt in (0.0, 1.5)
        for choice, _, _ in [exchange(moves.problem, moves.units, now, effects, 2, 0.5, doubt)]
    ]
    assert full_of == [[1], [0]]


def test_an_exchange_takes_from_one_group_to_give_to_another() -> None:
    _, problem, uniform = setting()
    moves = Moves.of(problem, uniform)
    effects = np.zeros((1, sum(len(unit.choices) for unit in moves.units)))
    effects[0, 1 : len(moves.units[0].choices)] = 1.0  # the first group needs to be full; nobody else needs anything
    now = moves.options_of(uniform)
    choice, before, after = exchange(moves.problem, moves.units, now, effects, 4, 1.0)
    layers = layers_of(moves.problem, moves.units, choice)
    assert layers[0].groups[0] == FULL_GROUP and problem.fits(layers) and before == 1 and after == 0
    assert exchange(moves.problem, moves.units, now, effects, 1, 1.0) == (now, 1.0, 1.0)  # nobody may give up pages


def starts(problem: Problem, uniform: Layers) -> dict[str, Layers]:
    return {"narrow": problem.uniform(WindowGroup(sink=64, alpha=64, beta=0.0)), "uniform": uniform}


def run(folder: Path, settings: Refine = QUICK, **given: Any) -> Any:
    loaded, problem, uniform = setting()
    return refine(
        loaded.model, problem, settings, starts(problem, uniform), uniform, DOCUMENTS, folder, seed=0, **given
    ), problem


def test_refinement_lowers_the_measured_loss_within_the_budget(tmp_path: Path) -> None:
    state, problem = run(tmp_path)
    assert state.start in ("narrow", "uniform") and problem.fits(state.layers())
    assert state.loss < state.first <= 1.0 + 1e-9
    loaded, _, uniform = setting()
    loss = Loss(loaded.model, problem, DOCUMENTS, QUICK, uniform)
    assert loss.total(loss.by_task(uniform)) == pytest.approx(1.0)
    assert loss.total(loss.by_task(state.layers())) == pytest.approx(state.loss, rel=1e-4)
    assert all(value <= state.most[task] for task, value in state.tasks.items())
    kept = [row["loss"] for row in state.history if row.get("kept")]
    assert kept == sorted(kept, reverse=True) and kept[-1] == state.loss and state.radius < 1


def test_no_task_pays_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement in which one task always gets worse keeps nothing, and makes that task count for more."""
    measured = Loss.by_task

    _, problem, uniform = setting()

    def paying(self: Loss, layers: Layers) -> dict[str, float]:
        found = measured(self, layers)
        return found if layers in starts(problem, uniform).values() else {**found, "text": 1e3, "passkey": 0.0}

    monkeypatch.setattr(Loss, "by_task", paying)
    state, _ = run(tmp_path, Refine(minutes=5, samples=1, weights={"text": 1e-6}))
    assert state.loss == state.first and not any(row.get("kept") for row in state.history)
    assert state.stress["passkey"] == 1 and state.stress["text"] == 2**state.step > 1


def test_later_rounds_add_passes_and_may_try_again(tmp_path: Path) -> None:
    """What is measured of a plan goes on where the first round ended; a later call of one round finds it done."""
    once, _ = run(tmp_path / "once")
    told: list[str] = []
    more, problem = run(
        tmp_path / "more", QUICK.model_copy(update={"rounds": 3}), progress=lambda *of: told.append(of[2])
    )
    assert more.history[: len(once.history)] == once.history and len(more.history) > len(once.history)
    assert more.round == 3 and more.exhausted and more.loss <= once.loss and problem.fits(more.layers())
    assert [word for word in told if "pass" in word] == [
        f"making the quadratic model, pass {number} of {count}"
        for count, numbers in ((2, (1, 2)), (4, (3, 4)), (6, (5, 6)))
        for number in numbers
    ]
    assert {row["round"] for row in more.history[len(once.history) :]} == {2, 3}
    assert {"rounds", "doubt", "spare"}.isdisjoint(QUICK.model_dump())


def test_no_round_begins_whose_passes_would_outlast_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass takes 100 of the 300 seconds, and there is no exchange."""
    now, passes = [0.0], Loss.passes

    def slow(self: Loss, *args: Any, **given: Any) -> torch.Tensor:
        now[0] += 100.0
        return passes(self, *args, **given)

    monkeypatch.setattr(Loss, "passes", slow)
    monkeypatch.setattr("compress.search.refine.refine.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("compress.search.refine.refine.exchange", lambda problem, units, now, *_: (now, 1.0, 1.0))
    for samples, rounds in ((1, 2), (2, 1)):
        state, _ = run(tmp_path / str(samples), Refine(minutes=5, samples=samples, rounds=9))
        assert state.exhausted and state.round == rounds and state.seconds == 100.0 * samples * rounds
        now[0] = 0.0


def test_a_task_may_lose_what_is_spared(tmp_path: Path) -> None:
    loaded, problem, uniform = setting()
    settings = Refine(minutes=1e-9, samples=1, spare=0.9)
    dense = {"dense": problem.uniform(FULL_GROUP), "uniform": uniform}
    state = refine(loaded.model, problem, settings, dense, uniform, DOCUMENTS, tmp_path, seed=0)
    lost = Loss(loaded.model, problem, DOCUMENTS, settings, uniform).uniform
    assert state.start == "dense" and state.most == {task: pytest.approx(0.9 * lost[task]) for task in lost}


def test_a_refinement_on_documents_shorter_than_the_budget_says_so() -> None:
    _, problem, _ = setting()
    assert too_short(problem, DOCUMENTS) is None and too_short(problem, []) is None
    said = too_short(problem, DOCUMENTS[:2])
    assert said is not None and "at most 320 tokens, the budget is for 448" in said


def test_an_interrupted_refinement_continues_and_ends_the_same(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    assert len(whole.history) >= 2 + 3
    steps: list[str] = []

    def stop(done: int, total: int, what: str) -> None:
        steps.append(what)
        if sum(each.startswith("refining") for each in steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", progress=stop)
    left = json.loads((tmp_path / "parts" / "refine.json").read_text())
    assert len(left["history"]) == 2 + 2
    continued, _ = run(tmp_path / "parts")
    assert (continued.decision, continued.loss, continued.step) == (whole.decision, whole.loss, whole.step)
    again, _ = run(tmp_path / "parts", Refine(**{**QUICK.model_dump(), "minutes": 50}))
    assert again.step == whole.step and again.decision == whole.decision
    other, _ = run(tmp_path / "parts", Refine(**{**QUICK.model_dump(), "weights": {"text": 3.0}}))
    assert other.key != whole.key


def test_a_weight_of_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents of task pass_key"):
        run(tmp_path, Refine(weights={"pass_key": 2.0}))


def test_a_search_refines_and_says_so(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    section = Section(Moa(points=0), Budget(kv=0.5, lengths=(448,)), QUICK)
    profile = random_profile(shape_of(loaded.model), (320, 448))
    result = run_search(loaded, profile, [], section, tmp_path, refine_documents=DOCUMENTS)
    assert result.report["chosen"] == "refined" and "uniform plan's" in result.report["why"]
    told = result.report["refine"]
    assert told["loss"] <= told["start_loss"] and told["steps"] >= 1
    assert (tmp_path / "search" / "plans" / "refined.json").is_file() and (
        tmp_path / "search" / "refine.json"
    ).is_file()
    held_out = [document(512, 7)]
    chosen = run_search(loaded, profile, held_out, section, tmp_path, refine_documents=DOCUMENTS).report
    rows = {row["name"]: row["response_loss"] for row in chosen["plans"]}
    assert "refined" in rows and rows[chosen["chosen"]] == min(rows.values())


def test_a_refinement_says_whether_the_time_or_the_tries_ended(tmp_path: Path) -> None:
    ended, _ = run(tmp_path / "time", Refine(minutes=1e-9, samples=1))
    assert ended.step == 0 and not ended.exhausted
    # Where the model likes nothing better there is no exchange to measure, and time is left.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.search.refine.refine.exchange", lambda problem, units, now, *_: (now, 1.0, 1.0))
        tried, _ = run(tmp_path / "tries", Refine(minutes=5, samples=1))
    assert tried.step == 0 and tried.exhausted and tried.seconds < 300
    assert "no exchange within the budget" in NO_STEPS[tried.exhausted] and "time ended" in NO_STEPS[ended.exhausted]
