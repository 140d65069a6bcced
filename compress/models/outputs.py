"""What the head groups of a dense layer would put out under other targets, by the runtime's own mixers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from compress.errors import Problem, UserError
from compress.models.families import family_of
from compress.models.prepared import Prepared, fill, found_for
from compress.runtime.mixer import MIXERS, Kinds, LayerFacts, Mixer, heads_of, take
from compress.runtime.reference import Rows
from compress.runtime.scores import Scores
from compress.runtime.step import Step
from compress.targets.full import FullGroup
from compress.targets.target import Target, load_mixers

FULL = FullGroup()
Inputs = tuple[torch.Tensor | None, tuple[torch.Tensor, torch.Tensor] | None]  # `Step.hidden` and `Step.rotary`


def check_priced(targets: Sequence[Target], where: str, prepared: Prepared = (), config: Any = None) -> None:
    """Refuse targets whose outputs cannot be had.

    Args:
        where: key of the recipe that names them.
        prepared: where the tensors of targets are that were trained before.
        config: of the model; None where nothing depends on it.

    Raises:
        UserError: names each, and why.
    """
    load_mixers(target.target for target in targets)
    problems: dict[tuple[str, str], Problem] = {}  # of many alike, as the options of a grid are, the first
    for target in targets:
        if (why := _refusal(target, prepared, config)) is not None:
            what = f"the target `{target.target}` cannot be priced by its output"
            problems.setdefault((target.target, why), Problem(what, where, found=f"{target.words()}: {why}"))
    if problems:
        raise UserError(list(problems.values()))


def _refusal(target: Target, prepared: Prepared, config: Any) -> str | None:
    if target.removes:
        return None
    if target.reads_norms and config is not None and family_of(config).norms_queries(config):
        return "the model normalises every query head, so the norms of queries say nothing; take `router: two_stage`"
    if target.has_to_be_prepared and found_for(prepared)(target) is None:
        return "it has to be trained before it is useful: name it under `prepare.targets`, with `prepare.effect: true`"
    if target.open and getattr(found_for(prepared)(target), "retention", None) is None:
        return "no preparation says which threshold keeps its share: prepare its scorer under `prepare.targets`"
    if target.undoes_rope:
        return "it needs queries and keys before RoPE, which this statistic does not have"
    if target.target not in MIXERS:
        return "the runtime has no mixer for it"
    return None


def reads_inputs(targets: Iterable[Target]) -> bool:
    """Whether the mixer of a target reads the input of its layer, or the layer's rotary tables."""
    names = {target.target for target in targets if not target.removes}
    load_mixers(names)
    return any(MIXERS[name].needs_inputs for name in names if name in MIXERS)


def facts_of(
    layer: int, query: torch.Tensor, key: torch.Tensor, window: int | None, hidden: torch.Tensor | None = None
) -> LayerFacts:
    """What mixers may ask about a layer.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, G, T, D]`.
        window: sliding window of the architecture in tokens; None without one.
        hidden: `[..., hidden size]` input of the layer, for mixers that read it.
    """
    return LayerFacts(
        index=layer,
        head_dim=query.shape[-1],
        hidden_size=0 if hidden is None else hidden.shape[-1],
        group_size=query.shape[1] // key.shape[1],
        native_window=window,
    )


class Alternatives:
    """Outputs of one layer where its groups have other targets.

    Args:
        facts: about the layer.
        plans: each names one target a group.
        prepared: where the tensors of targets are that were trained before.

    Raises:
        UserError: a target has tensors of its own, and they were not prepared.
    """

    def __init__(self, facts: LayerFacts, plans: Sequence[Sequence[Target]], prepared: Prepared = ()) -> None:
        load_mixers({target.target for plan in plans for target in plan} | {FULL.target})
        self.facts = facts
        self.plans = [_Plan(facts, plan, prepared) for plan in plans]
        self.dense = _Plan(facts, [FULL] * len(plans[0])) if plans else None

    def changes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        dense: torch.Tensor | None = None,
        scores: Scores | None = None,
        inputs: Inputs = (None, None),
    ) -> Iterator[torch.Tensor]:
        """O_alternative - O_full for every plan, `[B, H, T, D]` in the dtype of the queries.

        Both come from the same code, so that a target which hides nothing changes nothing but rounding.

        Args:
            query: `[B, H, T, D]` after RoPE, of sequences without padding.
            key, value: `[B, G, T, D]`.
            scale: factor on the scores.
            dense: O_full as `full` gives it, where it is known already.
            scores: what else the layer does to its scores.
            inputs: of the layer, for mixers that read them.
        """
        if self.dense is None:
            return
        dense = self.full(query, key, value, scale, scores) if dense is None else dense
        for plan in self.plans:
            yield plan.output(query, key, value, scale, scores, inputs).sub_(dense)

    def full(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        scores: Scores | None = None,
    ) -> torch.Tensor:
        """O_full, `[B, H, T, D]`; arguments as in `changes`."""
        assert self.dense is not None
        return self.dense.output(query, key, value, scale, scores)


class _Plan:
    """One target for every group of a layer."""

    def __init__(self, facts: LayerFacts, targets: Sequence[Target], prepared: Prepared = ()) -> None:
        self.stays = [group for group, target in enumerate(targets) if not target.removes]
        self.heads = heads_of(self.stays, facts.group_size)
        entries: list[Mapping[str, Any]] = [targets[group].model_dump(mode="json") for group in self.stays]
        self.kinds = Kinds(entries, facts) if entries else None
        option_of = found_for(prepared)
        for mixer, members in zip(self.kinds.mixers, self.kinds.members, strict=True) if self.kinds else ():
            if next(mixer.parameters(), None) is not None:
                groups = [self.stays[member] for member in members]
                known = [option_of(targets[group]) for group in groups]
                lacking = [targets[group] for group, option in zip(groups, known, strict=True) if option is None]
                if missing := [target for target in lacking if not target.untrained]:
                    raise UserError(
                        f"the target `{missing[0].target}` cannot be priced by its output",
                        where=f"layer {facts.index}",
                        found="the target has trained tensors, and they were not prepared",
                        fix="name it under `prepare.targets`",
                    )
                fill(
                    mixer,
                    [
                        option.of(facts.index, group) if option else {}
                        for option, group in zip(known, groups, strict=True)
                    ],
                )
                mixer.requires_grad_(False)

    def output(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        scores: Scores | None,
        inputs: Inputs = (None, None),
    ) -> torch.Tensor:
        """`[B, H, T, D]`, new memory; zero where a group is removed."""
        batch, _, tokens, _ = query.shape
        if self.kinds is None:
            return torch.zeros_like(query[..., : value.shape[-1]])
        rows = Rows.whole(batch, tokens)
        step = Step(None, rows, None, None, list(rows.count), tokens, input_length=tokens)
        step.hidden, step.rotary = inputs
        if scores is not None:
            self.kinds.check_scores()
            step.scores = scores.of(self.heads)

        def run(mixer: Mixer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any) -> torch.Tensor:
            mixer.to(q.device)
            return mixer.prefill(q, k, v, None, step, scale=scale, dropout=0.0)

        q, k, v = take(query, self.heads, 1), take(key, self.stays, 1), take(value, self.stays, 1)
        alone = self.kinds.only
        part = self.kinds.mix(q, k, v, None, run) if alone is None else run(alone, q, k, v, None)
        part = part.transpose(1, 2)
        if len(self.heads) == query.shape[1]:
            return part
        out = torch.zeros_like(query[..., : value.shape[-1]])
        out[:, self.heads] = part
        return out
