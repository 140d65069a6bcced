"""Several dense models of one shape become one (BAM, arXiv 2408.08274): checks, and the weights of all side by side.

The attentions of the experts lie in one layer: their heads beside each other, their output projections one behind
another along the inputs, so that the layer's output is the sum of theirs, each times its gate. Their MLPs are modules
beside each other. A norm before them has a weight of each expert's own: where these differ, they are multiplied into
the projections that read the norm (`Family.gains`), which changes nothing, and the layer's norm keeps 1. What is left,
the embeddings, the final norm, the output head and what a family has besides, is averaged or taken from the seed.

The paper has attention and MLP in parallel; the formulas are the same where one follows the other, as in Llama.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from compress.errors import Problem, UserError
from compress.models.families import family_of, layers_of
from compress.models.fingerprint import fingerprint_of
from compress.models.planned import runtime_plan, with_runtime_plan
from compress.models.shape import shape_of
from compress.plan import Expert, LayerPlan, MlpRouting, ModelShape, Plan, Upcycle, plan_of_layers
from compress.runtime.families import Projection, head_size_of
from compress.runtime.widths import Width

PROBE = "Tokenizers of one vocabulary may still differ: 1,024 (in numbers),\n  or in spaces."
# What a configuration says that changes nothing of what is computed.
NAMES = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class Averaged:
    """Weights that the experts do not have side by side.

    Attributes:
        names: of all of them.
        differing: names of those in which the experts differ.
        distance: the largest, over these, of an expert's distance to what was taken, relative to the norm of that.
    """

    names: tuple[str, ...]
    differing: tuple[str, ...]
    distance: float


def check_upcyclable(config: Any, kv: str) -> None:
    """Raise UserError where models of an architecture cannot be put side by side."""
    family, reason = family_of(config), None
    if family.has_experts:
        reason = "its layers have experts already"
    elif not family.prunes(config) or not family.projections:
        reason = family.whole
    elif kv == "shared" and family.groups == "num_attention_heads":
        reason = "every query head has its own key and value there, so that no `kv: shared` has a place"
    if reason is not None:
        raise UserError(
            f"models of the architecture {family.architecture} cannot be upcycled so: {reason}",
            where="upcycle",
            expected="an architecture whose heads and MLPs can be put side by side, such as Llama's",
        )


def check_configs(seed: Any, expert: Any, name: str) -> None:
    """Refuse an expert that is not of the seed's shape, by its configuration.

    Args:
        name: what the user called the expert.

    Raises:
        UserError: every field that differs and changes what is computed.
    """
    ours, theirs = _rules(seed), _rules(expert)
    _refuse(
        Problem(f"an expert is of another shape: `{key}` differs", name, _short(ours.get(key)), _short(theirs.get(key)))
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    )


def check_weights(seed: Any, expert: Any, name: str) -> None:
    """Refuse an expert, a model, with other names or shapes of weights than the seed. Raises UserError."""
    shapes = [{key: tuple(weight.shape) for key, weight in model.state_dict().items()} for model in (seed, expert)]
    _refuse(
        Problem(f"an expert is of another shape: `{key}`", name, *(_short(each.get(key)) for each in shapes))
        for key in sorted(shapes[0].keys() | shapes[1].keys())
        if shapes[0].get(key) != shapes[1].get(key)
    )


def check_tokenizers(seed: Any, expert: Any, name: str) -> None:
    """Refuse an expert that reads texts in another way than the seed. Raises UserError."""
    if not same_tokenizer(seed, expert):
        _refuse([Problem("an expert has another tokenizer", name, "the seed's", "other tokens for the same text")])


def _refuse(problems: Iterable[Problem]) -> None:
    """Raise UserError where there are problems of an expert."""
    found = list(problems)
    if found:
        found[-1].fix = "take models that were trained from the seed, with its tokenizer"
        raise UserError(found)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers have one vocabulary, and divide a text alike."""
    return bool(one.get_vocab() == other.get_vocab() and one(PROBE)["input_ids"] == other(PROBE)["input_ids"])


def average(models: Sequence[Any]) -> Any:
    """A model of the mean of every weight, of the class of the first, whose own stay as they are."""
    made = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    made.load_state_dict({name: _mean([state[name] for state in states]) for name in states[0]})
    return made


def upcycle(
    seed: Any,
    experts: Mapping[str, Any],
    *,
    attention: Literal["soft", "base"] = "soft",
    kv: Literal["expert", "shared"] = "expert",
    mlp: MlpRouting | None = None,
    rest: Literal["average", "seed"] = "average",
    provenance: dict[str, Any] | None = None,
) -> tuple[Any, Plan, Averaged]:
    """One model of the experts, its plan, and what of them is not side by side in it. Routers start at 0.

    Args:
        seed: a dense model; it stays as it is.
        experts: models of the seed's shape (`check_configs`), by what the user calls them; all are in memory, and so is
            the result.
        attention, kv, mlp, rest: as of `plan.Upcycle`.

    Returns:
        The model on the seed's device in its dtype, its plan, and what was averaged or taken from the seed.

    Raises:
        UserError: see `check_upcyclable`.
    """
    check_upcyclable(seed.config, kv)
    shape = shape_of(seed)
    marks = [Expert(name=name, fingerprint=shape_of(model).fingerprint) for name, model in experts.items()]
    made = Upcycle(seed=shape, experts=tuple(marks), attention=attention, kv=kv, mlp=mlp or MlpRouting(), rest=rest)
    tensors, averaged = _Sides(seed, list(experts.values()), made).tensors()
    nobody = made.shape(shape.fingerprint)
    plan = plan_of_layers(nobody, [LayerPlan(groups=made.groups())] * shape.layers, provenance=provenance, upcycle=made)
    model = with_runtime_plan(seed, runtime_plan(plan), tensors)
    return model, named(model, plan), averaged


def named(model: Any, plan: Plan) -> Plan:
    """The plan of an upcycled model, with the fingerprint of the weights that it has now."""
    sizes = plan.model.model_dump(exclude={"fingerprint"})
    mark = fingerprint_of(model, sizes)
    return plan.model_copy(update={"model": ModelShape(**sizes, fingerprint=mark)})


class _Sides:
    """Puts the weights of experts side by side, in the seed's dtype and on its device.

    Args:
        made: what the model is to be.
    """

    def __init__(self, seed: Any, models: Sequence[Any], made: Upcycle) -> None:
        self.made, self.config, self.family = made, seed.config, family_of(seed.config)
        self.like = next(seed.parameters())
        self.seed = dict(seed.state_dict())
        # A weight with two names, as that of embeddings which are the output head as well, counts once.
        self.again = {name for name, _ in seed.named_parameters(remove_duplicate=False)}
        self.again -= {name for name, _ in seed.named_parameters()}
        self.states = [dict(model.state_dict()) for model in models]
        start = f"{seed.base_model_prefix}.{self.family.layers}"
        self.prefixes = [f"{start}.{number}." for number in range(len(layers_of(seed)))]
        self.head_dim, self.width = head_size_of(seed.config), Width.of(seed.config)

    @torch.no_grad()
    def tensors(self) -> tuple[dict[str, torch.Tensor], Averaged]:
        """All weights of the model but routers of attention, which start by themselves, and what was averaged."""
        soft = self.made.attention == "soft"
        beside = {name for name in self.family.projections if soft or name.startswith("mlp.")}
        made: dict[str, torch.Tensor] = {}
        for each_layer in self.prefixes:
            self._fold(each_layer, beside, made)
        rest: list[str] = []
        for name in self.seed:
            prefix = next((prefix for prefix in self.prefixes if name.startswith(prefix)), None)
            inner = name.removeprefix(prefix or "")
            projection, _, kind = inner.rpartition(".")
            each = [state[name] for state in self.states]
            if name in made:
                continue
            if prefix is not None and inner.startswith("mlp."):
                for number, weight in enumerate(each):
                    made[f"{prefix}mlp.experts.{number}.{inner.removeprefix('mlp.')}"] = self._placed(weight)
            elif prefix is not None and projection in beside and (kind == "weight" or self._computes(projection)):
                made[name] = self._placed(self._beside(each, projection, kind))
            else:
                rest += [] if name in self.again else [name]
                made[name] = self._placed(self.seed[name] if self.made.rest == "seed" else _mean(each))
        for each_layer in self.prefixes:
            made[f"{each_layer}mlp.router"] = self.like.new_zeros(self.made.count, self.config.hidden_size)
        return made, self._averaged(rest, made)

    def _fold(self, prefix: str, beside: set[str], made: dict[str, torch.Tensor]) -> None:
        """Multiply norms in which the experts differ into what reads them, and note the norm that is left."""
        for norm, readers in self.family.gains.items():
            name = f"{prefix}{norm}.weight"
            if not beside.issuperset(readers):
                continue
            weights = [state[name] for state in self.states]
            if all(torch.equal(weight, weights[0]) for weight in weights):
                made[name] = self._placed(weights[0])
                continue
            made[name] = torch.ones_like(self.seed[name])
            for state in self.states:
                for reader in readers:
                    weight = state[f"{prefix}{reader}.weight"]
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    state[f"{prefix}{reader}.weight"] = (weight.to(wide) * state[name].to(wide)).to(weight.dtype)

    def _computes(self, projection: str) -> bool:
        """Whether heads are the outputs of a projection, whose bias is then theirs, too."""
        return self.family.projections[projection].axis == -2

    def _beside(self, each: Sequence[torch.Tensor], projection: str, kind: str) -> torch.Tensor:
        """The weights or biases of one projection of all experts as one."""
        row = self.family.projections[projection]
        axis = row.axis if kind == "weight" else -1
        lines = [weight.movedim(axis, 0) for weight in each]
        return beside(lines, row, self.width, self.head_dim, shared=self.made.kv == "shared").movedim(0, axis)

    def _placed(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.like.device, self.like.dtype if weight.is_floating_point() else None).contiguous()

    def _averaged(self, names: Sequence[str], made: Mapping[str, torch.Tensor]) -> Averaged:
        """What experts have no weights of their own for."""
        differing, farthest = [], 0.0
        for name in names:
            taken = made[name].float()
            distance = max(float((state[name].to(taken.device).float() - taken).norm()) for state in self.states)
            if distance > 0:
                differing.append(name)
                farthest = max(farthest, distance / max(float(taken.norm()), 1e-12))
        return Averaged(tuple(names), tuple(differing), farthest)


def beside(each: Sequence[torch.Tensor], row: Projection, width: Width, head_dim: int, *, shared: bool) -> torch.Tensor:
    """The heads of several layers in one, `[lines, ...]` of each: expert by expert; or, where keys and values are
    shared, group by group, with the query heads of all experts beside the mean of their keys and values."""
    if not shared:
        if row.by_group:
            return torch.cat(list(each))
        parts = zip(*(_parts(lines, row, width, head_dim) for lines in each), strict=True)
        return torch.cat([lines for part in parts for lines in part])
    groups = width.groups
    if row.by_group:
        sizes = [width.size((part,), head_dim) // groups for part in row.parts]
        split = [x.unflatten(0, (groups, -1)).split(sizes, 1) for x in each]
    else:
        split = [tuple(part.unflatten(0, (groups, -1)) for part in _parts(x, row, width, head_dim)) for x in each]
    merged = [
        torch.cat(parts, 1) if kind == "query" else _mean(parts)
        for kind, parts in zip(row.parts, zip(*split, strict=True), strict=True)
    ]
    if row.by_group:
        return torch.cat(merged, 1).flatten(0, 1)
    return torch.cat([part.flatten(0, 1) for part in merged])


def _parts(lines: torch.Tensor, row: Projection, width: Width, head_dim: int) -> tuple[torch.Tensor, ...]:
    """What a side of a projection is made of, part behind part."""
    return lines.split([width.size((part,), head_dim) for part in row.parts])


def _mean(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of the experts' weights, in their dtype; what all agree on stays as it is to the bit."""
    first = weights[0]
    if not first.is_floating_point() or all(torch.equal(weight, first) for weight in weights[1:]):
        return first
    return torch.stack([weight.double() for weight in weights]).mean(0).to(first.dtype)


def _rules(config: Any) -> dict[str, Any]:
    """A configuration without what changes nothing of what is computed."""
    return {key: value for key, value in config.to_dict().items() if key not in NAMES}


def _short(value: Any) -> str:
    return "nothing" if value is None else str(value)[:80]
