"""What a search refuses whatever the profile says: found from the sizes of the model, before anything is measured.

The model is built without weights, and where a profile would be asked for scores, zeros stand in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from compress.errors import UserError
from compress.limits import LONGEST
from compress.models.families import check_pruning, check_reading, context_of
from compress.models.load import DTYPES
from compress.models.planned import check_norms
from compress.models.shape import shape_without_weights
from compress.plan import LayerPlan, ModelShape, plan_of_layers
from compress.profile.checks import grid_of
from compress.profile.key import Key
from compress.runtime.widths import Width
from compress.search.baselines import baselines_of
from compress.search.budget.budget import check_lengths
from compress.search.dense import Dense
from compress.search.run import SearchSection, make_problem, no_start
from compress.targets.full import FullGroup
from compress.train.settings import PrepareSettings

if TYPE_CHECKING:
    from compress.targets.layer_option import LayerOption
    from compress.targets.target import Target
    from compress.targets.window import SpanGrid

ANY_BANDWIDTH = 1e12  # bytes per second; shares do not depend on it


@dataclass(frozen=True)
class _Zeros:
    """A profile of a model that was not measured."""

    shape: ModelShape
    neurons: int
    lengths: Sequence[int]
    grid: SpanGrid | None
    priced: Sequence[Target]
    priced_layers: Sequence[LayerOption] = ()
    by_head: frozenset[str] = frozenset()

    def effect(self, target: Target, length: int, part: str = "absolute") -> torch.Tensor:
        """Zeros, for a target that is to be priced."""
        return torch.zeros(self.shape.layers, self.shape.kv_heads)

    def find(self, key: Key) -> torch.Tensor | None:
        """As `tensor`: all that a solver asks for is there, but scores of heads where a statistic has none."""
        return None if key.part == "heads" and key.statistic not in self.by_head else self.tensor(key)

    def tensor(self, key: Key) -> torch.Tensor:
        """Zeros in the shape that a solver expects under this key."""
        shape = self.shape
        heads = (shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads)
        sizes = {
            "heads": heads,
            "neurons": (shape.layers, self.neurons),
            "head_means": (*heads, shape.head_dim),
            "neuron_means": (shape.layers, self.neurons),
        }
        return torch.zeros(sizes.get(key.part, (shape.layers, shape.kv_heads)))


@dataclass(frozen=True)
class _Untrained:
    """A target that is to be prepared; `retention` stands for what a preparation says of thresholds."""

    target: Target
    errors: torch.Tensor
    retention: Any = None


def check_search(
    config: Any,
    dtype: str,
    section: SearchSection,
    statistics: Sequence[Any],
    lengths: set[int],
    prepare: PrepareSettings | None = None,
) -> None:
    """Whether a search of this model can end with a plan, as far as that does not depend on what is measured.

    Args:
        config: of the model.
        dtype: of its weights in memory.
        section: the recipe's search section.
        statistics: what the recipe measures.
        lengths: that it profiles, in tokens.
        prepare: what it trains before the search.

    Raises:
        UserError: a budget that cannot be met or is beyond the model's context, a cost table that cannot be used,
            widths that the architecture cannot have, or head groups that cannot become what a plan says.
    """
    solver, budget = section.solver, section.budget
    check_lengths(budget, context_of(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    shape = shape_without_weights(model)
    statistics = [statistic.resolved(shape, sorted(lengths)) for statistic in statistics]
    for statistic in statistics:
        statistic.check_ahead(config)
    priced = [target for statistic in statistics for target in statistic.priced]
    layers = [option for statistic in statistics for option in statistic.priced_layers]
    by_head = frozenset(one.registered for one in statistics if one.scores_heads(shape))
    profile = _Zeros(shape, Width.of(config).neurons, sorted(lengths), grid_of(statistics), priced, layers, by_head)
    if solver.removes:
        check_pruning(config)
        check_reading(config, [statistic.registered for statistic in statistics if statistic.reads_inputs])
    dense = Dense(shape, DTYPES[dtype].itemsize, model, bandwidth=lambda: ANY_BANDWIDTH)
    trained = () if prepare is None else prepare.targets
    zeros = torch.zeros(shape.layers, shape.kv_heads)
    prepared = [_Untrained(target, zeros) for target in trained]
    effects = None
    if prepare is not None and prepare.effect:
        after = prepare.pricing().resolved(shape, sorted(lengths))
        stand_ins: Any = tuple(_Untrained(target, zeros, retention=zeros) for target in trained)
        after.check_ahead(config, stand_ins, "prepare")
        effects = replace(profile, priced=after.priced, priced_layers=after.priced_layers)
    problem = make_problem(dense, profile, budget, solver, prepared=prepared, effects=effects, serve=section.serve)
    for candidate in solver.check(problem):
        _check_plan(config, shape, candidate.layers)
    if section.refine is not None and "uniform" not in baselines_of(solver, problem):
        raise no_start()


def check_prepare(config: Any, prepare: PrepareSettings) -> None:
    """Whether all head groups of this model can become the targets that a recipe prepares, and whether texts that
    thresholds are measured on fit it. Raises UserError."""
    context = context_of(config)
    for objective in prepare.objectives:
        objective.check(context)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_without_weights(model)
    for number, target in enumerate(prepare.targets):
        layer = LayerPlan(groups=(target,) * shape.kv_heads)
        free = [native is None or target.fits_native for native in shape.native_windows]
        full = LayerPlan(groups=(FullGroup(),) * shape.kv_heads)
        try:
            _check_plan(config, shape, [layer if own else full for own in free])
        except UserError as error:
            for problem in error.problems:
                problem.where = f"prepare.targets[{number}]"
            raise


def unlearnt(config: Any, prepare: PrepareSettings, recover: int | None, lengths: set[int]) -> list[str]:
    """A line for each of the two trainings whose sequences are too short to learn from: see `untaught` and
    `untrainable`.

    Args:
        recover: tokens of a sequence of the joint training; None without one.
        lengths: that the recipe profiles, in tokens.
    """
    lines = [untaught(config, prepare), None if recover is None else untrainable(config, recover, prepare, lengths)]
    return [line for line in lines if line is not None]


def untrainable(config: Any, length: int, prepare: PrepareSettings | None, lengths: set[int]) -> str | None:
    """A line where training sequences of `length` tokens leave the windows of none of the heads that a recipe offers
    and that keep tokens by a scorer: a plan with such heads is refused by the training, once all before it is done.

    Args:
        lengths: that the recipe profiles, in tokens.
    """
    if prepare is None or not any(target.in_expectation for target in prepare.targets):
        return None
    with torch.device("meta"):
        shape = shape_without_weights(AutoModelForCausalLM.from_config(config))
    offered: Sequence[Target] = prepare.targets
    if prepare.effect:
        offered = prepare.pricing().resolved(shape, sorted(lengths)).priced
    unit = shape.free_unit
    keeping = [target.with_share(0.5) for target in offered if target.in_expectation and not target.idle]
    if not keeping or any(target.cost(unit, length).keys < length for target in keeping):
        return None
    return (
        f"recover.length: sequences of {length:,} tokens leave no window of the heads that keep tokens (prepare), so "
        "that a plan with such heads cannot be trained; raise it, or leave them out"
    )


def untaught(config: Any, prepare: PrepareSettings) -> str | None:
    """A line where the sequences of a preparation are so short that a target hides nothing of them: what stands for
    what it hides then learns nothing, and its loss is 0 from the first step on."""
    with torch.device("meta"):
        shape = shape_without_weights(AutoModelForCausalLM.from_config(config))
    unit = shape.free_unit
    for target in prepare.targets:
        if target.learns_from_all or target.cost(unit, LONGEST).keys == LONGEST:
            continue
        if target.cost(unit, prepare.length).keys >= prepare.length:
            return (
                f"prepare.length: in sequences of {prepare.length:,} tokens `{target.words()}` hides nothing, so that "
                "what stands for hidden tokens learns nothing; raise it beyond the window"
            )
    return None


def _check_plan(config: Any, shape: ModelShape, layers: Sequence[LayerPlan]) -> None:
    """Whether a model can have these layers; what is wrong with several of them is told of the first."""
    try:
        plan = plan_of_layers(shape.unbound(), layers)
    except UserError as error:
        different = {(problem.what, problem.expected, problem.found): problem for problem in reversed(error.problems)}
        raise UserError(list(different.values())[::-1]) from None
    check_norms(config, plan)
