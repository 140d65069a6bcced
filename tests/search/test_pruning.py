"""Pruned plans: budgets in exact parameters, what is picked, and the model that a plan gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.models.planned import planned_model, pruned_model
from compress.models.pruning import Kept, block_parameters
from compress.models.shape import shape_of
from compress.plan import Mlp, read_plan
from compress.search.budget.budget import Budget
from compress.search.prune import pruning_problem, random_candidate
from compress.search.removal import PruningSolver
from compress.search.response import response_loss
from compress.search.run import run_search
from compress.search.solvers.allocated import Allocated
from compress.search.solvers.amp import Amp
from tests.profile.common import document
from tests.tiny import random_ids, tiny_loaded, tiny_model


class Scored:
    """A profile of drawn scores."""

    lengths = (64,)
    grid = None

    def __init__(self, model: Any, name: str = "amp") -> None:
        shape = shape_of(model)
        generator = torch.Generator().manual_seed(0)
        share = shape.query_heads // shape.kv_heads
        size = model.config.intermediate_size
        self.tensors = {
            f"{name}.heads": torch.rand(shape.layers, shape.kv_heads, share, generator=generator),
            f"{name}.neurons": torch.rand(shape.layers, size, generator=generator),
            f"{name}.head_means": torch.randn(shape.layers, shape.kv_heads, share, shape.head_dim, generator=generator),
            f"{name}.neuron_means": torch.randn(shape.layers, size, generator=generator),
        }

    def tensor(self, key: str) -> torch.Tensor:
        return self.tensors[key]


class Section:
    """A recipe's search section."""

    refine = None

    def __init__(self, solver: Any, budget: Budget) -> None:
        self.solver, self.budget = solver, budget


SOLVERS = [
    Amp(multiple=1),
    Amp(multiple=1, unit="query"),
    Amp(multiple=1, attention=(0.0,)),
    Amp(multiple=1, protect=(-1,)),
    Allocated(multiple=1),
    Allocated(multiple=1, unit="query", normalise="standard"),
    Allocated(multiple=1, normalise="none", protect=(1,)),
]


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("share", [0.9, 0.7])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_parameters_are_those_of_the_model_and_within_the_budget(
    family: str, share: float, solver: PruningSolver
) -> None:
    model = tiny_model(family)
    problem = pruning_problem(model, Scored(model), Budget(parameters=share))
    for candidate in solver.solve(problem):
        plan = candidate.to_plan(problem, {})
        pruned = pruned_model(model, plan)
        left = block_parameters(pruned)
        assert plan.predicted.parameters == left
        assert left <= problem.most
        # A neuron of every layer is the step where all layers have one width; otherwise a head may be.
        heads = 0 if isinstance(solver, Amp) else problem.shape.kv_heads * problem.sizes[0].query
        step = sum(sizes.neuron for sizes in problem.sizes) + heads
        assert problem.most - left < step
        alone = solver.protected(3)
        for layer in alone:
            assert not plan.layers[layer].prunes
        if isinstance(solver, Amp) and not alone:
            assert type(planned_model(model, plan)) is type(model)
            assert pruned.config.intermediate_size == pruned.model.layers[0].mlp.up_proj.out_features


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha"])
@pytest.mark.parametrize("solver", [Amp, Allocated])
def test_biases_of_a_compensation_count(family: str, solver: type[PruningSolver]) -> None:
    model = tiny_model(family)
    problem = pruning_problem(model, Scored(model), Budget(parameters=0.8))
    (candidate,) = solver(compensate=True, multiple=1).solve(problem)
    plan = candidate.to_plan(problem, {})
    left = block_parameters(pruned_model(model, plan))
    assert plan.predicted.parameters == left <= problem.most
    assert plan.predicted.dense_parameters == block_parameters(model)
    (plain,) = solver(multiple=1).solve(problem)
    assert sum(len(layer.neurons) for layer in candidate.kept) < sum(len(layer.neurons) for layer in plain.kept)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.5])
@pytest.mark.parametrize("attention", [0.0, 0.3])
def test_widths_of_a_real_model_meet_the_budget(share: float, attention: float) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=576, intermediate_size=1536, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 9, 3, 64
    model = LlamaForCausalLM(config)
    problem = pruning_problem(model, Scored(model), Budget(parameters=share))
    widths = Amp().widths(problem, round(attention * 3))
    assert widths is not None and widths.neurons % 4 == 0
    kept = Kept(tuple(range(widths.groups)), tuple(range(widths.neurons)))
    assert 0 <= problem.most - problem.parameters([kept] * 2) <= 0.005 * problem.most


def test_the_highest_scores_stay_by_the_score_that_was_asked_for() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model)
    profile.tensors["amp.heads"] = torch.tensor([[[0.0, 9.0], [4.0, 4.5]]] * 3)
    problem = pruning_problem(model, profile, Budget(parameters=0.7))
    kept = {
        score: Amp(group_score=score, attention=(0.5,), multiple=1).solve(problem)[0].kept[0].groups
        for score in ("sum", "mean", "max")
    }
    profile.tensors["amp.heads"] = torch.tensor([[[0.0, 8.0], [4.0, 4.5]]] * 3)
    assert kept == {"sum": (0,), "mean": (0,), "max": (0,)}
    by_sum = Amp(group_score="sum", attention=(0.5,), multiple=1).solve(problem)[0].kept[0].groups
    by_max = Amp(group_score="max", attention=(0.5,), multiple=1).solve(problem)[0].kept[0].groups
    assert (by_sum, by_max) == ((1,), (0,))
    queries = Amp(unit="query", attention=(0.5,), multiple=1).solve(problem)[0].kept[0]
    assert (queries.groups, queries.queries) == ((0, 1), (1, 3))
    neurons = profile.tensors["amp.neurons"][0]
    stay = list(queries.neurons)
    gone = sorted(set(range(64)) - set(stay))
    assert float(neurons[stay].min()) > float(neurons[gone].max())


def test_allocation_is_the_smallest_loss_of_all_widths() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model)
    profile.tensors["amp.neurons"][1] *= 100
    problem = pruning_problem(model, profile, Budget(parameters=0.6))
    (free,) = Allocated(normalise="none", multiple=8, gap=0.0).solve(problem)
    (equal,) = Amp(multiple=8).solve(problem)

    def removed(kept: Any) -> float:
        heads, neurons = profile.tensors["amp.heads"].double().mean(-1), profile.tensors["amp.neurons"].double()
        stay = sum(
            float(heads[i, list(k.groups)].sum() + neurons[i, list(k.neurons)].sum()) for i, k in enumerate(kept)
        )
        return float(heads.sum() + neurons.sum()) - stay

    assert free.loss == pytest.approx(removed(free.kept), rel=1e-5)
    assert removed(free.kept) < removed(equal.kept)
    assert len(free.kept[1].neurons) > len(free.kept[0].neurons)
    assert all(len(layer.neurons) % 8 == 0 for layer in free.kept)


def test_standardised_scores_are_cut_at_one_threshold() -> None:
    """FLAP's rule: of all heads and neurons of all layers, those below one standardised score go."""
    model = tiny_model("llama-mha")
    profile = Scored(model)
    for name in ("amp.heads", "amp.neurons"):
        profile.tensors[name][2] *= 50
    problem = pruning_problem(model, profile, Budget(parameters=0.8))
    (found,) = Allocated(normalise="standard", multiple=1, gap=0.0, floor=0.01).solve(problem)
    kept, gone = [], []
    for layer, stays in enumerate(found.kept):
        for name, chosen in (("amp.heads", stays.groups), ("amp.neurons", stays.neurons)):
            scores = profile.tensors[name][layer].flatten().double()
            standard = (scores - scores.mean()) / scores.std(correction=0)
            kept += [float(standard[unit]) for unit in chosen]
            gone += [float(standard[unit]) for unit in set(range(len(scores))) - set(chosen)]
    # Units are of different sizes, so a single one may lie on the other side to fill the budget.
    assert sum(score < max(gone) for score in kept) <= 1 or sum(score > min(kept) for score in gone) <= 1


def test_random_plan_has_the_same_widths_and_other_units() -> None:
    model = tiny_model("llama-gqa")
    problem = pruning_problem(model, Scored(model), Budget(parameters=0.7))
    (found,) = Allocated(multiple=1).solve(problem)
    drawn = random_candidate(problem, found.kept, seed=1)
    assert [layer.widths(2) for layer in drawn.kept] == [layer.widths(2) for layer in found.kept]
    assert drawn.kept != found.kept
    assert drawn.kept == random_candidate(problem, found.kept, seed=1).kept
    assert problem.parameters(drawn.kept) == problem.parameters(found.kept)


def test_compensation_adds_what_the_removed_units_gave_in_the_mean() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model, "flap")
    problem = pruning_problem(model, profile, Budget(parameters=0.7))
    (found,) = Amp(importance="flap", compensate=True, multiple=1).solve(problem)
    plan = found.to_plan(problem, {})
    pruned = planned_model(model, plan)
    layer = 1
    means = profile.tensors["flap.neuron_means"][layer]
    whole = model.model.layers[layer].mlp.down_proj(means)
    stay = pruned.model.layers[layer].mlp.down_proj(means[list(found.kept[layer].neurons)])
    torch.testing.assert_close(stay, whole, rtol=1e-4, atol=1e-5)
    inputs = profile.tensors["flap.head_means"][layer].flatten(0, 1)
    whole = model.model.layers[layer].self_attn.o_proj(inputs.flatten())
    queries = list(found.kept[layer].query_heads(2))
    stay = pruned.model.layers[layer].self_attn.o_proj(inputs[queries].flatten())
    torch.testing.assert_close(stay, whole, rtol=1e-4, atol=1e-5)


def test_search_writes_a_plan_that_reads_back(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    result = run_search(loaded, Scored(loaded.model), [], Section(Amp(), Budget(parameters=0.8)), tmp_path)
    plan = read_plan(tmp_path / "plan.json", shape_of(loaded.model))
    assert plan == result.plan and plan.prunes
    drawn = read_plan(tmp_path / "search" / "random.json", shape_of(loaded.model))
    assert drawn.predicted.parameters == plan.predicted.parameters
    with torch.no_grad():
        assert planned_model(loaded.model, plan)(random_ids(1, 9)).logits.isfinite().all()


def test_held_out_loss_decides_how_many_heads_go(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    section = Section(Amp(attention=(0.0, 0.5), multiple=1), Budget(parameters=0.7))
    texts = [document(60, answer=40, seed=seed) for seed in (1, 2)]
    result = run_search(loaded, Scored(loaded.model), texts, section, tmp_path)
    rows = {row["name"]: row for row in result.report["plans"]}
    assert len(rows) == 2 and {row["question"][:6] for row in rows.values()} == {"0 of 2", "1 of 2"}
    losses = {name: row["response_loss"] for name, row in rows.items()}
    for name, loss in losses.items():
        plan = read_plan(tmp_path / "search" / "plans" / f"{name}.json")
        assert loss == pytest.approx(response_loss(planned_model(loaded.model, plan), texts))
    assert result.report["chosen"] == min(losses, key=lambda name: losses[name])
    (drawn,) = result.report["baselines"]
    assert drawn["response_loss"] > 0 and f"{drawn['response_loss']:.4f}" in result.report["why"]


def test_several_scores_are_several_plans(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    profile = Scored(loaded.model)
    other = Scored(loaded.model, "wanda_sp").tensors
    profile.tensors |= {key: tensor.flip(-1) for key, tensor in other.items()}
    problem = pruning_problem(loaded.model, profile, Budget(parameters=0.7))
    both = Amp(importance=("amp", "wanda_sp"), attention=(0.0, 0.5))
    found = both.solve(problem)
    alone = [Amp(importance=name, attention=(0.0, 0.5)).solve(problem) for name in ("amp", "wanda_sp")]
    assert [each.kept for each in found] == [each.kept for each in (*alone[0], *alone[1])]
    assert [each.note for each in found[2:]] == [f"wanda_sp: {each.note}" for each in alone[1]]
    assert found[0].kept != found[2].kept
    texts = [document(60, answer=40)]
    result = run_search(loaded, profile, texts, Section(both, Budget(parameters=0.7)), tmp_path)
    losses = {row["name"]: row["response_loss"] for row in result.report["plans"]}
    plans = [read_plan(tmp_path / "search" / "plans" / f"pruned-{number}.json") for number in range(4)]
    ranked = [plan.provenance["solver"]["importance"] for plan in plans]
    assert ranked == ["amp", "amp", "wanda_sp", "wanda_sp"] and result.plan in plans
    assert len(losses) == 4 and result.report["chosen"] == min(losses, key=lambda name: losses[name])


def test_what_does_not_belong_together_says_so(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    with pytest.raises(UserError, match="do not belong together"):
        run_search(loaded, Scored(loaded.model), [], Section(Amp(), Budget(kv=0.5)), tmp_path)
    with pytest.raises(UserError, match="do not belong together"):
        run_search(loaded, Scored(loaded.model), [], Section({"name": "moa"}, Budget(parameters=0.5)), tmp_path)
    with pytest.raises(ValueError, match="it stands alone"):
        Budget(parameters=0.5, kv=0.5)
    with pytest.raises(UserError, match="no equal widths"):
        Amp(floor=0.9, attention=(0.0,)).solve(
            pruning_problem(loaded.model, Scored(loaded.model), Budget(parameters=0.5))
        )
    with pytest.raises(UserError, match="no such layer"):
        Amp(protect=(3,)).solve(pruning_problem(loaded.model, Scored(loaded.model), Budget(parameters=0.8)))


def test_mask_of_neurons_round_trips() -> None:
    for indices in ((0,), (5,), (0, 3, 63), tuple(range(64)), (1, 130)):
        assert Mlp.of(indices).indices() == indices
    with pytest.raises(ValueError, match="mask of 3 neurons"):
        Mlp(kept=3, neurons="3")
