"""The upcycle stage: several models become one, with its plan, and what that adds in numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from compress.errors import UserError
from compress.files import write_json, write_text
from compress.limits import SHOWN_LENGTHS
from compress.models.expert_routers import fitted_routers, random_routers
from compress.models.families import context_of, layers_of
from compress.models.load import load_model
from compress.models.placement import input_device, placement_of, spread_map
from compress.models.pruning import block_parameters
from compress.models.trained import read_trained, write_trained
from compress.models.upcycle import (
    Averaged,
    check_configs,
    check_tokenizers,
    check_upcyclable,
    check_weights,
    named,
    upcycle,
)
from compress.models.upcycled import attach_upcycled
from compress.plan import Amount, Plan, Predicted, added, read_plan
from compress.recipe.schema import UpcycleSection
from compress.search.budget.flops import Flops
from compress.search.budget.kv import Kv
from compress.search.budget.parameters import Parameters
from compress.stages.session import Session
from compress.stages.stage import missing, require, timed
from compress.train.windows import check_windows
from compress.words import counted

FOLDER, RECORD = "upcycle", "upcycle/upcycle.json"
LENGTH = 512  # tokens of the windows in which the experts' texts are read


def upcycle_stage(session: Session, *, must_be_done: bool = False) -> Plan:
    """The plan of the recipe's upcycled model, made now or before; the session's seed then carries its weights.

    Args:
        must_be_done: only read what is there.

    Raises:
        UserError: not done although it must be, or experts that cannot be read or are of another shape.
    """
    run, recipe, say = session.run, session.recipe, session.reporter.say
    section = recipe.upcycle
    assert section is not None
    if must_be_done:
        require(session, "upcycle")
    folder = run.path / FOLDER
    if run.stage_done("upcycle", session.upcycle_key()):
        plan = read_plan(run.plan, session.shape)
        if plan.upcycle is not None:  # and not one that was searched in the same folder since
            if not must_be_done:
                say(f"upcycle: done before, {run.plan}")
            attach_upcycled(session.loaded.model, plan.model.fingerprint, partial(read_trained, folder))
            return plan
    if must_be_done:
        raise missing(session, "upcycle", run.plan)

    def work() -> tuple[Plan, Averaged]:
        seed = session.loaded
        if spread_map(seed.model) is not None:
            raise UserError(
                "models are not put side by side on several GPUs",
                where="device",
                expected="one device",
                found=" and ".join(map(str, placement_of(seed.model).devices)),
                fix="take `device: cpu` for `compress upcycle`, which needs no speed; later stages take any",
            )
        check_upcyclable(seed.model.config, section.kv)
        experts = {name: _expert(session, name) for name in section.names(recipe.model)}
        model, plan, averaged = upcycle(
            seed.model,
            experts,
            attention=section.attention,
            kv=section.kv,
            mlp=section.mlp,
            rest=section.rest,
            provenance={"upcycle": section.model_dump(mode="json", exclude={"texts"}), "seed": recipe.seed},
        )
        if section.texts:
            fitted_routers(model, [_windows(session, section, number) for number in range(len(section.texts))])
        elif section.start == "random":
            random_routers(model, recipe.seed)
        costs = tuple(_amounts(seed.model, model, plan))
        predicted = Predicted(form="patched", itemsize=model.dtype.itemsize, amounts=costs)
        plan = named(model, plan).model_copy(update={"predicted": predicted})
        write_trained(model, folder)
        write_json(run.path / RECORD, dataclasses.asdict(averaged))
        write_text(run.plan, plan.to_json())
        return plan, averaged

    run.forget("search")
    plan, averaged = timed(session, "upcycle", session.upcycle_key, [FOLDER, RECORD, "plan.json"], work)
    attach_upcycled(session.loaded.model, plan.model.fingerprint, partial(read_trained, folder))
    for line in (*added(plan), _averaged_line(averaged, section)):
        say(f"upcycle: {line}")
    return plan


def _expert(session: Session, name: str) -> Any:
    """One of the models, which has to be of the seed's shape and to have its tokenizer."""
    seed = session.loaded
    if name == session.recipe.model:
        return seed.model
    loaded = load_model(name, dtype=session.recipe.dtype, device=str(input_device(seed.model)))
    check_configs(seed.model.config, loaded.model.config, name)
    check_weights(seed.model, loaded.model, name)
    check_tokenizers(seed.tokenizer, loaded.tokenizer, name)
    return loaded.model


def _windows(session: Session, section: UpcycleSection, number: int) -> torch.Tensor:
    """The tokens `[windows, length]` of the text for one of the experts."""
    length = min(LENGTH, section.text_tokens, context_of(session.loaded.model.config) or LENGTH)
    with session.reporter.progress("upcycle") as report:
        tokens = session.reader(report).ids(section.texts[number], "calibration", section.text_tokens)
    check_windows(len(tokens), length, None, "upcycle", f"texts[{number}]", "text_tokens")
    count = min(section.text_tokens, len(tokens)) // length
    return torch.tensor(tokens[: count * length]).view(count, length)


def _amounts(seed: Any, model: Any, plan: Plan) -> Iterator[Amount]:
    """What the upcycled model costs beside its seed, by kind of budget and length.

    FLOPs are of the decoder layers in a prefill: 2 for every token and parameter that the token uses, all of the
    attentions and the MLPs that it chose, and those of attention itself.
    """
    assert plan.upcycle is not None
    itemsize, context = model.dtype.itemsize, context_of(seed.config) or SHOWN_LENGTHS[0]
    whole, own = block_parameters(model), block_parameters(seed)
    mlp = sum(weight.numel() for layer in layers_of(seed) for weight in layer.get_submodule("mlp").parameters())
    used = whole - (plan.upcycle.count - plan.upcycle.mlps) * mlp
    for length in [length for length in SHOWN_LENGTHS if length <= context] or [context]:
        cost, dense = plan.cost(length, itemsize), plan.dense_cost(length, itemsize)
        pairs = {"plan": cost.held_bytes, "dense": dense.held_bytes}
        yield Amount(kind=Kv.registered, unit=Kv.unit, of=Kv.of, length=length, **pairs)
        work = {"plan": cost.flops + 2 * length * used, "dense": dense.flops + 2 * length * own}
        yield Amount(kind=Flops.registered, unit=Flops.unit, of=Flops.of, length=length, **work)
    of = "the decoder layers' parameters"
    yield Amount(kind=Parameters.registered, unit="parameters", of=of, plan=whole, dense=own)


def _averaged_line(averaged: Averaged, section: UpcycleSection) -> str:
    """Which weights experts do not have of their own."""
    source = "the mean of the experts'" if section.rest == "average" else "the seed's"
    line = f"{counted(len(averaged.names), 'other weight')} are {source}"
    shared = section.attention == "soft" and section.kv == "shared"
    if not averaged.differing:
        agreed = f"{line}, in which the experts agree"
        return f"{agreed}; so are keys and values, in which they may differ" if shared else agreed
    few = ", ".join(averaged.differing[:3]) + (", ..." if len(averaged.differing) > 3 else "")
    return (
        f"{line}; experts differ in {len(averaged.differing)} of them ({few}), by up to {averaged.distance:.2%} of "
        "their norm"
    )
