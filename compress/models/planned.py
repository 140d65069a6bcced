"""Turns a dense model into a planned one in memory: same weight tensors, the plan's attention and cache."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import TypeAdapter
from safetensors import safe_open
from transformers import GenerationConfig

from compress.errors import UserError
from compress.models.families import attentions_of, family_of, layers_of
from compress.models.order import reorder
from compress.models.placement import placement_of, put_like
from compress.models.prepared import attach, fill, found_for, prepared_for
from compress.models.pruning import Kept, add_output_biases, prune
from compress.models.upcycled import upcycled_for
from compress.models.weights import weight_files
from compress.plan import Group, LayerPlan, Plan
from compress.runtime import modeling_compress
from compress.runtime.families import Family, head_size_of
from compress.runtime.mixer import Mixer
from compress.runtime.mlps import PlannedMlp
from compress.runtime.rope import carry_over, undo_refusal
from compress.runtime.widths import Width, width_of
from compress.targets.target import Target, load_runtime

_GROUP: TypeAdapter[Target] = TypeAdapter(Group)


def runtime_plan(plan: Plan) -> dict[str, Any]:
    """The part of a plan that the runtime needs and a checkpoint's configuration carries."""
    return {"schema": 1, "layers": plan.runtime_layers()}


def planned_model(model: Any, plan: Plan, *, untrained: bool = False) -> Any:
    """A model that runs the plan on the very tensors of `model`, or on slices of them; `model` stays usable as it is.

    A plan that only removes the same numbers in every layer gives a stock model, of the same class or of its twin
    (`Family.twin`), since there is nothing left for the runtime to do. What the plan's mixers have of their own is what
    was prepared for `model` (`prepared.attach`), or what their targets convert from its weights (`Target.initial`).
    An upcycled model is of the weights that its seed carries (`upcycled.attach_upcycled`).

    Args:
        untrained: take the converted tensors also for targets that have to be trained.

    Raises:
        UserError: the architecture is not supported, or cannot be pruned so, or does with its scores what a target
            cannot do; or it makes the norms of queries alike, which a target goes by; or a target that has to be
            trained was not prepared, or experts' weights are missing.
        ValueError: the plan's layers or groups are not this model's.
    """
    if plan.upcycle is not None:
        planned = with_runtime_plan(model, runtime_plan(plan), upcycled_for(model, plan))
        _check_scores(planned, plan, family_of(model.config))
        return planned
    prepared = () if untrained else prepared_for(model)
    _check_closed(plan)
    if plan.prunes or plan.reordered_layers:
        model = sliced_model(model, plan)
    if plan.prunes and not has_own_widths(model) and plan.as_built:
        return model
    _check_rope(model, plan)
    check_norms(model.config, plan)
    planned = with_runtime_plan(model, runtime_plan(plan))
    _check_scores(planned, plan, family_of(model.config))
    attach(planned, prepared)
    _fill_mixers(planned, plan, untrained=untrained)
    return planned


def _check_rope(model: Any, plan: Plan) -> None:
    """Raise UserError where head groups take back RoPE, and it is not known how the model turns queries and keys."""
    undoing = [
        (number, group)
        for number, layer in enumerate(plan.layers)
        for group, target in enumerate(layer.groups)
        if target.undoes_rope
    ]
    reason = undo_refusal(model.config)
    if undoing and reason is not None:
        raise UserError(
            f"RoPE cannot be taken back: {reason}",
            where="layer {} group {}".format(*undoing[0]),
            fix="take `rope: keep`",
        )


def _check_closed(plan: Plan) -> None:
    """Raise UserError where a plan leaves open what only a search fills in."""
    for number, layer in enumerate(plan.layers):
        for group, target in enumerate(layer.groups):
            if target.open:
                raise UserError(
                    "the plan does not say which tokens a head group keeps",
                    where=f"layer {number} group {group}: {target.words()}",
                    expected="a number as `threshold`",
                    found=f"`threshold: {target.model_dump()['threshold']}`, an option of a search",
                    fix="search with this target among what is priced: each head group gets the threshold that keeps "
                    "its share",
                )


def check_norms(config: Any, plan: Plan) -> None:
    """Raise UserError where head groups go by the norms of queries that a model with this configuration makes alike."""
    family = family_of(config)
    if not family.norms_queries(config):
        return
    for number, layer in enumerate(plan.layers):
        for group, target in enumerate(layer.groups):
            if target.reads_norms:
                raise UserError(
                    f"a {family.architecture} normalises every query head, so the norms of queries cannot say which "
                    "heads a token needs",
                    where=f"layer {number} group {group}: {target.words()}",
                    expected="a router with weights",
                    fix="take `router: two_stage`",
                )


def _check_scores(planned: Any, plan: Plan, family: Family) -> None:
    """Raise UserError where layers do more with their scores than a softmax, and the mixer of a head group does not."""
    if family.scores is None:
        return
    for number, (kinds, layer) in enumerate(zip(planned.base_model.compress_kinds, plan.layers, strict=True)):
        for mixer, members in zip(kinds.mixers, kinds.members, strict=True):
            if not mixer.knows_scores:
                group = layer.kept_groups[members[0]]
                raise UserError(
                    f"head groups of a {family.architecture} cannot become what the plan says: {family.scores}",
                    where=f"layer {number} group {group}: {layer.groups[group].words()}",
                    expected="a target whose heads do the same, such as a window or linear heads behind one",
                    fix="take another target for these groups",
                )


def mixers_of(model: Any) -> list[Mixer]:
    """The mixers of a planned model, whose parameters are those of its targets; none of a stock model."""
    return [mixer for kinds in getattr(model.base_model, "compress_kinds", ()) for mixer in kinds.mixers]


def own_weights(model: Any) -> list[torch.nn.Parameter]:
    """What a planned model has beside the weights of the dense one, or of its experts, and that learns: what its mixers
    have of their own, and what MLPs do."""
    of_mixers = [weight for mixer in mixers_of(model) if mixer.learns for weight in mixer.parameters()]
    of_mlps = [module.own_parameters() for module in model.modules() if isinstance(module, PlannedMlp)]
    return of_mixers + [weight for own in of_mlps for weight in own]


def has_routers(model: Any) -> bool:
    """Whether tokens choose in a layer of the model what they use of it, and say so (`Record`)."""
    return any(getattr(module, "chooses", False) for module in model.modules())


def keeps_tokens(model: Any) -> bool:
    """Whether heads of the model decide which tokens they keep, and say so (`Record`)."""
    return any(mixer.keeps for mixer in mixers_of(model))


def has_own_widths(model: Any) -> bool:
    """Whether a layer of the model has other widths than its configuration says."""
    return any(width_of(layer, model.config) != Width.of(model.config) for layer in layers_of(model))


def patched_model(model: Any, plan: Plan) -> Any:
    """What `planned_model` gave, in the form that carries its plan: a stock model gets it, any other has it."""
    return model if hasattr(model.config, "compress_plan") else with_runtime_plan(model, runtime_plan(plan))


def kept_units(plan: Plan, neurons: int) -> list[Kept]:
    """What stays of every layer, where the dense model has `neurons` in each."""
    return [
        Kept(
            tuple(sorted(layer.kept_groups)),
            tuple(range(neurons)) if layer.mlp is None else layer.mlp.indices(),
            layer.queries,
        )
        for layer in plan.layers
    ]


def sliced_model(model: Any, plan: Plan) -> Any:
    """A stock model without what the plan removes, its head groups in the plan's order; every tensor that is not sliced
    is that of `model`.

    It is of the same class, or of its twin where all layers have one width that only the twin's configuration takes.
    """
    made = on_weights_of(model, type(model), copy.deepcopy(model.config))
    uniform = not plan.prunes or prune(made, kept_units(plan, Width.of(model.config).neurons))
    reorder(made, [_places(layer) for layer in plan.layers])
    biases = [layer.bias.values() for layer in plan.layers if layer.bias is not None]
    if biases:
        add_output_biases(made, biases)
    return made if uniform else _as_twin(made)


def _places(layer: LayerPlan) -> tuple[int, ...] | None:
    """Of each head group that stays, in the plan's order, its place among them in the model's; None where the orders
    are one."""
    stay = sorted(layer.kept_groups)
    return None if layer.order is None else tuple(map(stay.index, layer.order))


def _as_twin(pruned: Any) -> Any:
    """The twin of a model whose layers have one width that its own configuration refuses; itself where none fits."""
    family, config = family_of(pruned.config), pruned.config
    widths = {width_of(layer, config) for layer in layers_of(pruned)}
    if family.twin is None or len(widths) > 1:
        return pruned
    twin = getattr(transformers, family.twin)
    known = set(twin.config_class().to_dict())
    fields = {key: value for key, value in config_fields(config).items() if key in known}
    fields |= {**widths.pop().fields(config), "head_dim": head_size_of(config), **family.twin_fields}
    try:
        return on_weights_of(pruned, twin, twin.config_class(**fields))
    except ValueError:  # biases, which the twin has no place for
        return pruned


def with_runtime_plan(model: Any, plan: dict[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> Any:
    """As `planned_model`, from the part of a plan that the runtime needs, which is bound to no weights.

    Layers of a model that `prune` left with different widths are given theirs by the plan, which lists the groups that
    stay, and the numbers of query heads and neurons.

    Args:
        tensors: all weights by name, where they are not those of `model`.
    """
    load_runtime(plan)
    family = family_of(model.config)
    config_class = getattr(modeling_compress, f"{family.planned}Config")
    model_class = getattr(modeling_compress, f"{family.planned}ForCausalLM")
    return on_weights_of(model, model_class, config_class(**config_fields(model.config), compress_plan=plan), tensors)


def carried_targets(planned: Any) -> list[list[Target]]:
    """The targets of the head groups that each layer of a planned model has."""
    return [
        [_GROUP.validate_python(group) for group in layer["groups"]] for layer in planned.config.compress_plan["layers"]
    ]


def all_on_model(planned: Any) -> Any | None:
    """A planned model's twin in which every token uses all that it chooses from (`Target.all_on`), on the same tensors;
    None where tokens choose nothing."""
    plan = getattr(planned.config, "compress_plan", None)
    if plan is None:
        return None
    layers = [
        {**layer, "groups": [group.all_on.model_dump(mode="json") for group in groups]}
        for layer, groups in zip(plan["layers"], carried_targets(planned), strict=True)
    ]
    if layers == plan["layers"]:
        return None
    made = with_runtime_plan(planned, {**plan, "layers": layers})
    made.config.compress_impl = planned.config.compress_impl
    return made


def config_fields(config: Any) -> dict[str, Any]:
    """A configuration's own fields, without what says which class it is or which plan it carries."""
    known = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "compress_plan", "compress_impl"):
        known.pop(key, None)
    return known


def on_weights_of(model: Any, model_class: Any, config: Any, weights: Mapping[str, torch.Tensor] | None = None) -> Any:
    """A model of another class on the very tensors of `model`, under the same names; RoPE and generation as there.

    What only the plan's mixers have starts with their first values.

    Args:
        weights: by name, in place of those of `model`.

    Raises:
        ValueError: a weight has no place in the class or another shape there, or the class has one that `model` lacks.
    """
    with torch.device("meta"):
        made = model_class(config)
    tensors, places = dict(model.state_dict() if weights is None else weights), made.state_dict()
    for name, tensor in tensors.items():
        if name in places and places[name].shape != tensor.shape:
            size, expected = tuple(tensor.shape), tuple(places[name].shape)
            raise ValueError(f"weights do not fit: {name} is {size}, and {expected} is expected")
    missing, unexpected = made.load_state_dict(tensors, assign=True, strict=False)
    tied = set(getattr(made, "all_tied_weights_keys", {}) or {})
    lacking = sorted(set(missing) - tied - _start_mixers(made, model))
    if lacking or unexpected:
        raise ValueError(f"weights do not fit: missing {lacking[:4]}, unexpected {unexpected[:4]}")
    made.tie_weights()
    carry_over(model, made)
    made.generation_config = GenerationConfig.from_dict(model.generation_config.to_dict())
    return put_like(model, made).train(model.training)


def _start_mixers(made: Any, model: Any) -> set[str]:
    """Give mixers whose parameters lie nowhere yet memory beside the weights of `model`, and their first values.

    Returns:
        The names of those parameters.
    """
    names, dtype = set[str](), next(model.parameters()).dtype
    layers = {id(mixer): mixer.facts.index for mixer in mixers_of(made)}
    places = placement_of(model).layers
    for path, module in made.named_modules():
        parameters = dict(module.named_parameters()) if id(module) in layers else {}
        if parameters and all(tensor.is_meta for tensor in parameters.values()):
            module.to_empty(device=places[layers[id(module)]]).to(dtype).reset_parameters()
            names.update(f"{path}.{name}" for name in parameters)
    return names


def _fill_mixers(planned: Any, plan: Plan, kept: Collection[Mixer] = (), untrained: bool = False) -> None:
    """Give the mixers' parameters what was prepared for their targets, or what these make of the model's attention.

    Args:
        kept: mixers that keep what they have.
        untrained: convert also what has to be trained.
    """
    options = found_for(prepared_for(planned))
    for number, (attention, layer) in enumerate(zip(attentions_of(planned), plan.layers, strict=True)):
        for mixer, members in zip(attention.compress_kinds.mixers, attention.compress_kinds.members, strict=True):
            if mixer in kept or next(mixer.parameters(), None) is None:
                continue
            rows = []
            for member in members:
                group = layer.kept_groups[member]
                target = layer.groups[group]
                option = options(target)
                if option is not None:
                    trained = option.of(number, group)
                    if layer.queries is not None:
                        group_size = plan.model.group_size
                        stay = [query % group_size for query in layer.queries if query // group_size == group]
                        for name in trained.keys() & set(mixer.by_query):
                            trained[name] = trained[name].view(group_size, -1)[stay].flatten()
                    rows.append(trained)
                elif untrained or not target.has_to_be_prepared:
                    rows.append(target.initial(attention, member))
                else:
                    raise _unprepared(number, group, target)
            fill(mixer, rows)


def _unprepared(layer: int, group: int, target: Target) -> UserError:
    return UserError(
        "the tensors of a trained target of the plan are missing",
        where=f"layer {layer} group {group}: {target.words()}",
        expected=f"tensors of `{target.target}`, as `compress prepare` leaves them in the run folder",
        fix="use the checkpoint that was exported with this plan, or the recipe that made it",
    )


def set_plan(planned: Any, plan: Plan) -> None:
    """Switch a planned model to another plan of the same model, in place; mixers that stay keep their parameters.

    Raises:
        UserError: a target that has to be trained was not prepared.
    """
    before = set(mixers_of(planned))
    load_runtime(runtime_plan(plan))
    planned.set_plan(runtime_plan(plan))
    _fill_mixers(planned, plan, before)


def change_entries(planned: Any, plan: dict[str, Any]) -> None:
    """Give a planned model other entries for the same targets, in place: all mixers keep their parameters.

    Args:
        plan: the part that the runtime needs, whose mixers have the parameters of those that are there.
    """
    tensors = {
        f"{path}.{name}": weight.detach()
        for path, module in planned.named_modules()
        if module in set(mixers_of(planned))
        for name, weight in module.named_parameters()
    }
    planned.set_plan(plan)
    planned.load_state_dict(tensors, strict=False)
    planned.train(planned.training)


def read_mixers(planned: Any, folder: Path) -> None:
    """Give the mixers of a planned model the parameters that a checkpoint with this plan has for them.

    Raises:
        ValueError: it lacks some.
    """
    mixers = set(mixers_of(planned))
    names = {
        f"{path}.{name}"
        for path, module in planned.named_modules()
        if module in mixers
        for name, _ in module.named_parameters()
    }
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder) if names else ():
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in names.intersection(file.keys())}
    if lacking := sorted(names - set(tensors)):
        raise ValueError(f"the checkpoint lacks {', '.join(lacking[:4])}")
    planned.load_state_dict(tensors, strict=False)
