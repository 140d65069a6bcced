"""Pruned plans: budgets in exact parameters, what is picked, and the model that a plan gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.models.families import family_of
from compress.models.planned import planned_model, sliced_model
from compress.models.pruning import block_parameters
from compress.models.shape import shape_of
from compress.plan import LayerPlan, Mlp, read_plan
from compress.profile.key import Key
from compress.search.budget.budget import Budget
from compress.search.choice.removal import drawn, pick, widths_of
from compress.search.dense import Dense
from compress.search.problem import Candidate, Problem
from compress.search.refine.moves import Moves
from compress.search.response import response_loss
from compress.search.run import make_problem, run_search
from compress.search.solvers.allocated import Allocated
from compress.search.solvers.amp import Amp
from compress.search.solvers.moa import Moa
from compress.search.solvers.ranked import Ranked
from compress.targets.target import Target
from tests.profile.common import document
from tests.tiny import random_ids, tiny_loaded, tiny_model


class Scored:
    """A profile of drawn scores."""

    lengths = (64,)
    grid = None
    priced = priced_layers = ()

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

    def find(self, key: Key) -> torch.Tensor | None:
        """The table of a key; None where there is none."""
        return self.tensors.get(str(key))

    def tensor(self, key: Key) -> torch.Tensor:
        return self.tensors[str(key)]

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        raise KeyError(target)


def problem_of(model: Any, profile: Any, share: float) -> Problem:
    """The problem of a model with a share of its parameters as budget."""
    return make_problem(Dense(shape_of(model), 4, model), profile, Budget(parameters=share), Amp())


class Section:
    """A recipe's search section."""

    refine = serve = None

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
def test_parameters_are_those_of_the_model_and_within_the_budget(family: str, share: float, solver: Ranked) -> None:
    model = tiny_model(family)
    problem = problem_of(model, Scored(model), share)
    for candidate in solver.solve(problem):
        plan = candidate.to_plan(problem, {})
        pruned = sliced_model(model, plan)
        left = block_parameters(pruned)
        assert plan.predicted.of("parameters")[None].plan == left
        assert left <= problem.parameters_limit
        # A neuron of every layer is the step where all layers have one width; otherwise a head may be.
        heads = 0 if isinstance(solver, Amp) else problem.shape.kv_heads * problem.sizes[0].query
        step = sum(sizes.neuron for sizes in problem.sizes) + heads
        assert problem.parameters_limit - left < step
        alone = solver.protected(3)
        for layer in alone:
            assert not plan.layers[layer].prunes
        if isinstance(solver, Amp) and not alone:
            assert type(planned_model(model, plan)) is type(model)
            assert pruned.config.intermediate_size == pruned.model.layers[0].mlp.up_proj.out_features


@pytest.mark.parametrize("solver", [Amp(), Amp(unit="query"), Allocated(), Moa(removal={})], ids=str)
@pytest.mark.parametrize("share", [0.93, 0.81, 0.5])
def test_experts_keep_whole_steps_of_neurons(solver: Any, share: float) -> None:
    """At shares where a smaller step would come nearer to the budget."""
    model = tiny_model("mixtral")
    assert family_of(model.config).neuron_step == 8
    if isinstance(solver, Ranked):
        problem = problem_of(model, Scored(model), share)
        plans = [candidate.to_plan(problem, {}) for candidate in solver.solve(problem)]
        for plan in [*plans, Candidate(solver.smallest(problem)).to_plan(problem, {})]:
            assert all(layer.mlp is None or layer.mlp.kept % 8 == 0 for layer in plan.layers)
            assert block_parameters(sliced_model(model, plan)) == plan.predicted.of("parameters")[None].plan
        with pytest.raises(UserError, match="cannot have such numbers of neurons"):
            solver.model_copy(update={"multiple": 4}).solve(problem)
    else:
        problem = problem_of(model, Scored(model, "taylor"), share)
        options = solver.removal.neuron_options(problem, torch.rand(3, 64))
        assert all(kept % 8 == 0 for unit in options for kept in unit.choices)
        layers = (LayerPlan(groups=problem.start[0].groups, mlp=Mlp.of(range(40))),) * 3
        steps = [unit.choices for unit in Moves.of(problem, layers, "taylor").units[-3:]]
        assert all(kept % 8 == 0 for choices in steps for kept in choices) and {32, 48} <= set(steps[0])


@pytest.mark.parametrize("family", ["llama-gqa", "llama-mha"])
@pytest.mark.parametrize("solver", [Amp, Allocated])
def test_biases_of_a_compensation_count(family: str, solver: type[Ranked]) -> None:
    model = tiny_model(family)
    problem = problem_of(model, Scored(model), 0.8)
    (candidate,) = solver(compensate=True, multiple=1).solve(problem)
    plan = candidate.to_plan(problem, {})
    left = block_parameters(sliced_model(model, plan))
    assert plan.predicted.of("parameters")[None].plan == left <= problem.parameters_limit
    assert plan.predicted.of("parameters")[None].dense == block_parameters(model)
    (plain,) = solver(multiple=1).solve(problem)
    kept = [sum(widths.neurons for widths in widths_of(problem, each.layers)) for each in (candidate, plain)]
    assert kept[0] < kept[1]


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.5])
@pytest.mark.parametrize("attention", [0.0, 0.3])
def test_widths_of_a_real_model_meet_the_budget(share: float, attention: float) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=576, intermediate_size=1536, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 9, 3, 64
    model = LlamaForCausalLM(config)
    problem = problem_of(model, Scored(model), share)
    widths = Amp().widths(problem, round(attention * 3))
    assert widths is not None and widths.neurons % 4 == 0
    layers = pick(problem, [widths] * 2, torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 1536))
    most = problem.parameters_limit
    assert 0 <= most - problem.total(layers)[0] <= 0.005 * most


def test_the_highest_scores_stay_by_the_score_that_was_asked_for() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model)
    profile.tensors["amp.heads"] = torch.tensor([[[0.0, 9.0], [4.0, 4.5]]] * 3)
    problem = problem_of(model, profile, 0.7)
    kept = {
        score: Amp(group_score=score, attention=(0.5,), multiple=1).solve(problem)[0].layers[0].kept_groups
        for score in ("sum", "mean", "max")
    }
    profile.tensors["amp.heads"] = torch.tensor([[[0.0, 8.0], [4.0, 4.5]]] * 3)
    assert kept == {"sum": (0,), "mean": (0,), "max": (0,)}
    by_sum = Amp(group_score="sum", attention=(0.5,), multiple=1).solve(problem)[0].layers[0].kept_groups
    by_max = Amp(group_score="max", attention=(0.5,), multiple=1).solve(problem)[0].layers[0].kept_groups
    assert (by_sum, by_max) == ((1,), (0,))
    queries = Amp(unit="query", attention=(0.5,), multiple=1).solve(problem)[0].layers[0]
    assert (queries.kept_groups, queries.queries) == ((0, 1), (1, 3))
    neurons = profile.tensors["amp.neurons"][0]
    assert queries.mlp is not None
    stay = list(queries.mlp.indices())
    gone = sorted(set(range(64)) - set(stay))
    assert float(neurons[stay].min()) > float(neurons[gone].max())


def test_allocation_is_the_smallest_loss_of_all_widths() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model)
    profile.tensors["amp.neurons"][1] *= 100
    problem = problem_of(model, profile, 0.6)
    (free,) = Allocated(normalise="none", multiple=8, gap=0.0).solve(problem)
    (equal,) = Amp(multiple=8).solve(problem)

    def removed(kept: Any) -> float:
        heads, neurons = profile.tensors["amp.heads"].double().mean(-1), profile.tensors["amp.neurons"].double()
        stay = sum(
            float(
                heads[i, list(k.kept_groups)].sum() + neurons[i, list(k.mlp.indices()) if k.mlp else slice(None)].sum()
            )
            for i, k in enumerate(kept)
        )
        return float(heads.sum() + neurons.sum()) - stay

    assert free.losses["removed"] == pytest.approx(removed(free.layers), rel=1e-5)
    assert removed(free.layers) < removed(equal.layers)
    widths = widths_of(problem, free.layers)
    assert widths[1].neurons > widths[0].neurons
    assert all(each.neurons % 8 == 0 for each in widths)


def test_standardised_scores_are_cut_at_one_threshold() -> None:
    """FLAP's rule: of all heads and neurons of all layers, those below one standardised score go."""
    model = tiny_model("llama-mha")
    profile = Scored(model)
    for name in ("amp.heads", "amp.neurons"):
        profile.tensors[name][2] *= 50
    problem = problem_of(model, profile, 0.8)
    (found,) = Allocated(normalise="standard", multiple=1, gap=0.0, floor=0.01).solve(problem)
    kept, gone = [], []
    for layer, stays in enumerate(found.layers):
        neurons = range(64) if stays.mlp is None else stays.mlp.indices()
        for name, chosen in (("amp.heads", stays.kept_groups), ("amp.neurons", neurons)):
            scores = profile.tensors[name][layer].flatten().double()
            standard = (scores - scores.mean()) / scores.std(correction=0)
            kept += [float(standard[unit]) for unit in chosen]
            gone += [float(standard[unit]) for unit in set(range(len(scores))) - set(chosen)]
    # Units are of different sizes, so a single one may lie on the other side to fill the budget.
    assert sum(score < max(gone) for score in kept) <= 1 or sum(score > min(kept) for score in gone) <= 1


def test_random_plan_has_the_same_widths_and_other_units() -> None:
    model = tiny_model("llama-gqa")
    problem = problem_of(model, Scored(model), 0.7)
    (found,) = Allocated(multiple=1).solve(problem)
    widths = widths_of(problem, found.layers)
    other = drawn(problem, widths, seed=1)
    assert widths_of(problem, other) == widths
    assert other != found.layers
    assert other == drawn(problem, widths, seed=1)
    assert problem.total(other).tolist() == problem.total(found.layers).tolist()


def test_compensation_adds_what_the_removed_units_gave_in_the_mean() -> None:
    model = tiny_model("llama-gqa")
    profile = Scored(model, "flap")
    problem = problem_of(model, profile, 0.7)
    (found,) = Amp(importance="flap", compensate=True, multiple=1).solve(problem)
    plan = found.to_plan(problem, {})
    pruned = planned_model(model, plan)
    layer = 1
    means, kept = profile.tensors["flap.neuron_means"][layer], found.layers[layer].mlp
    assert kept is not None
    whole = model.model.layers[layer].mlp.down_proj(means)
    stay = pruned.model.layers[layer].mlp.down_proj(means[list(kept.indices())])
    torch.testing.assert_close(stay, whole, rtol=1e-4, atol=1e-5)
    inputs = profile.tensors["flap.head_means"][layer].flatten(0, 1)
    whole = model.model.layers[layer].self_attn.o_proj(inputs.flatten())
    queries = [group * 2 + head for group in found.layers[layer].kept_groups for head in (0, 1)]
    stay = pruned.model.layers[layer].self_attn.o_proj(inputs[queries].flatten())
    torch.testing.assert_close(stay, whole, rtol=1e-4, atol=1e-5)


def test_search_writes_a_plan_that_reads_back(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    result = run_search(loaded, Scored(loaded.model), [], Section(Amp(), Budget(parameters=0.8)), tmp_path)
    plan = read_plan(tmp_path / "plan.json", shape_of(loaded.model))
    assert plan == result.plan and plan.prunes
    other = read_plan(tmp_path / "search" / "random.json", shape_of(loaded.model))
    assert other.predicted.of("parameters")[None].plan == plan.predicted.of("parameters")[None].plan
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
    (random,) = result.report["baselines"]
    assert random["response_loss"] > 0 and f"{random['response_loss']:.4f}" in result.report["why"]


def test_several_scores_are_several_plans(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    profile = Scored(loaded.model)
    other = Scored(loaded.model, "wanda_sp").tensors
    profile.tensors |= {key: tensor.flip(-1) for key, tensor in other.items()}
    problem = problem_of(loaded.model, profile, 0.7)
    both = Amp(importance=("amp", "wanda_sp"), attention=(0.0, 0.5))
    found = both.solve(problem)
    alone = [Amp(importance=name, attention=(0.0, 0.5)).solve(problem) for name in ("amp", "wanda_sp")]
    assert [each.layers for each in found] == [each.layers for each in (*alone[0], *alone[1])]
    assert [each.note for each in found[2:]] == [f"wanda_sp: {each.note}" for each in alone[1]]
    assert found[0].layers != found[2].layers
    texts = [document(60, answer=40)]
    result = run_search(loaded, profile, texts, Section(both, Budget(parameters=0.7)), tmp_path)
    losses = {row["name"]: row["response_loss"] for row in result.report["plans"]}
    plans = [read_plan(tmp_path / "search" / "plans" / f"pruned-{number}.json") for number in range(4)]
    ranked = [plan.provenance["solver"]["importance"] for plan in plans]
    assert ranked == ["amp", "amp", "wanda_sp", "wanda_sp"] and result.plan.layers in [each.layers for each in plans]
    assert len(losses) == 4 and result.report["chosen"] == min(losses, key=lambda name: losses[name])


def test_what_does_not_belong_together_says_so(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    for solver, budget, expected in [
        (Amp(), Budget(kv=0.5), "`parameters` for `amp`"),
        (Amp(), Budget(parameters=0.5, kv=0.5), "`parameters` for `amp`"),
        (Moa(), Budget(parameters=0.5), "`kv_bound` for `moa`"),
    ]:
        with pytest.raises(UserError, match="this solver cannot meet this kind of budget") as error:
            run_search(loaded, Scored(loaded.model), [], Section(solver, budget), tmp_path)
        assert expected in str(error.value)
    with pytest.raises(UserError, match="no equal widths"):
        Amp(floor=0.9, attention=(0.0,)).solve(problem_of(loaded.model, Scored(loaded.model), 0.5))
    with pytest.raises(UserError, match="names a layer that does not exist"):
        Amp(protect=(3,)).solve(problem_of(loaded.model, Scored(loaded.model), 0.8))


def test_mask_of_neurons_round_trips() -> None:
    for indices in ((0,), (5,), (0, 3, 63), tuple(range(64)), (1, 130)):
        assert Mlp.of(indices).indices() == indices
    with pytest.raises(ValueError, match="mask of 3 neurons"):
        Mlp(kept=3, neurons="3")
