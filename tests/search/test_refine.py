"""Refinement: the divergence, the predicted changes, the exchange within a budget, and the whole loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data.document import Document
from compress.errors import UserError
from compress.models.replaced import replaced_attention
from compress.runtime.reference import prefill
from compress.runtime.span import FULL, Span
from compress.search.budget import Budget
from compress.search.divergence import Divergence
from compress.search.problem import CandidatePlan, Decision, SearchProblem, uniform_decision
from compress.search.refine import Loss, Refine, exchange, refine, rules_of
from compress.search.response_change import predicted_changes
from compress.search.search import make_problem, run_search
from compress.targets.apply import planned_model
from tests.search.synthetic import random_profile
from tests.search.test_search import Section
from tests.tiny import random_ids, shape_of, tiny_loaded, tiny_model


def document(length: int, seed: int, answer: int = 9, task: str = "passkey") -> Document:
    return Document(tuple(random_ids(1, length, seed)[0].tolist()), (length - answer, length), task=task)


DOCUMENTS = [
    document(320, 1),
    document(320, 2, answer=30, task="text"),
    document(448, 3),
    document(448, 4, task="text"),
]
QUICK = Refine(minutes=5, documents_per_step=3, radius=1.0, patience=2)


def setting(family: str = "llama-gqa", kv: float = 0.5) -> tuple[Any, SearchProblem, Decision]:
    """Dense model, problem and the uniform plan of the budget."""
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    problem = make_problem(shape, random_profile(shape, (320, 448)), Budget(kv=kv, lengths=(448,)), 4)
    window = next(
        Span(64, alpha, 0.0)
        for alpha in range(448, 0, -64)
        if problem.fits(uniform_decision(shape, Span(64, alpha, 0)))
    )
    return loaded, problem, uniform_decision(shape, window)


def test_divergence_is_zero_for_the_dense_model_and_below_that_of_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("compress.search.divergence.LIKELIEST", 16)
    model = tiny_model("llama-gqa")
    divergence = Divergence(model, DOCUMENTS)
    assert all(abs(value) < 1e-5 for value in divergence.measure(model).values())
    _, problem, uniform = setting()
    planned = planned_model(model, CandidatePlan(uniform).to_plan(problem, {}))
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
def test_predicted_change_is_the_derivative_towards_the_other_rule(family: str) -> None:
    """Against a finite difference: one group's output moved by a thousandth of the way to the other rule's."""
    loaded, problem, _ = setting(family, 0.9)
    model, shape = loaded.model.double(), problem.shape
    decision = uniform_decision(shape, Span(8, 100, 0.0))
    rules = [[list(row), [Span(8, 20, 0.0)] * len(row), [FULL] * len(row)] for row in decision]
    divergence = Divergence(model, DOCUMENTS[:2])
    layer = next(number for number, native in enumerate(shape.native_windows) if native is None)

    def loss(m: Any, **inputs: Any) -> torch.Tensor:
        return torch.stack(
            [divergence.of_rows(n, rows) for n, rows in divergence.answer_logits(m, [0, 1], **inputs)]
        ).sum()

    def backward(m: Any) -> None:
        embedded = m.get_input_embeddings()(divergence.tokens([0, 1])).detach().requires_grad_()
        loss(m, inputs_embeds=embedded).backward()

    changes = predicted_changes(model, shape, decision, rules, backward)
    assert bool((changes[:, :, 0] == 0).all())
    for number, native in enumerate(shape.native_windows):
        assert bool((changes[number] == 0).all()) == (native is not None)

    def moved(step: float, rule: int, group: int) -> float:
        def attention(m: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
            native = shape.native_windows[m.layer_idx]
            spans = list(decision[m.layer_idx]) if native is None else [Span(0, native, 0.0)] * shape.kv_heads
            out = prefill(q, k, v, spans, scale=scaling)
            if m.layer_idx == layer:
                other = list(spans)
                other[group] = rules[layer][rule][group]
                out = out + step * (prefill(q, k, v, other, scale=scaling) - out)
            return out.transpose(1, 2), None

        with replaced_attention(model, "test_change", attention), torch.no_grad():
            return float(loss(model, input_ids=divergence.tokens([0, 1])))

    for rule in (1, 2):
        for group in range(shape.kv_heads):
            slope = (moved(1e-2, rule, group) - moved(-1e-2, rule, group)) / 2e-2
            assert float(changes[layer, group, rule]) == pytest.approx(slope, rel=0.05, abs=2e-5)


def test_an_exchange_keeps_budget_and_radius_and_takes_the_best() -> None:
    _, problem, uniform = setting()
    rules = rules_of(problem, uniform)
    changes = torch.zeros(problem.shape.layers, problem.shape.kv_heads, len(rules[0]), dtype=torch.float64)
    assert exchange(problem, uniform, rules, changes, 4) == (uniform, 0.0)
    changes[0, 0, 0] = -1.0  # full would help the first group most
    changes[1, 0, 0] = -0.4
    narrow = 1  # the narrowest window, which costs the others a little
    changes[:, :, narrow] += 0.01
    for radius in (2, 4):
        found, predicted = exchange(problem, uniform, rules, changes, radius)
        assert problem.fits(found) and found[0][0] == FULL
        changed = sum(a != b for row in zip(uniform, found, strict=True) for a, b in zip(*row, strict=True))
        assert 2 <= changed <= radius and predicted < -0.9
    found, predicted = exchange(problem, uniform, rules, changes, 1)
    assert (found, predicted) == (uniform, 0.0)  # nobody else may give up pages


def starts(problem: SearchProblem, uniform: Decision) -> dict[str, Decision]:
    narrow = uniform_decision(problem.shape, Span(64, 64, 0.0))
    return {"narrow": narrow, "uniform": uniform}


def run(folder: Path, settings: Refine = QUICK, **given: Any) -> Any:
    loaded, problem, uniform = setting()
    return refine(
        loaded.model, problem, settings, starts(problem, uniform), uniform, DOCUMENTS, folder, seed=0, **given
    ), problem


def test_refinement_lowers_the_measured_loss_within_the_budget(tmp_path: Path) -> None:
    state, problem = run(tmp_path)
    assert state.start in ("narrow", "uniform") and problem.fits(state.spans())
    assert state.loss < state.first <= 1.0 + 1e-9
    loaded, _, uniform = setting()
    loss = Loss(loaded.model, problem, DOCUMENTS, QUICK, uniform)
    assert loss.total(loss.by_task(uniform)) == pytest.approx(1.0)
    assert loss.total(loss.by_task(state.spans())) == pytest.approx(state.loss, rel=1e-4)
    kept = [row["loss"] for row in state.history if row.get("kept")]
    assert kept == sorted(kept, reverse=True) and kept[-1] == state.loss


def test_an_interrupted_refinement_continues_and_ends_the_same(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    assert whole.step >= 3
    steps: list[str] = []

    def stop(done: int, total: int, what: str) -> None:
        steps.append(what)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", progress=stop)
    left = json.loads((tmp_path / "parts" / "refine.json").read_text())
    assert left["step"] == 2
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
    section = Section({"name": "moa", "points": 0}, Budget(kv=0.5, lengths=(448,)), QUICK)
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
