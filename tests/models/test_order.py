"""Head groups in another order: the same outputs, and the plan and the weights of a checkpoint in that order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models.families import check_reordering
from compress.models.order import reorder
from compress.models.planned import planned_model, runtime_plan
from compress.plan import LayerPlan, Mlp, Plan, plan_of_layers, read_plan
from compress.runtime.families import FAMILIES
from compress.runtime.modeling_compress import CACHE
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.pruned import PrunedGroup
from compress.targets.window import WindowGroup
from tests.tiny import attach_as_they_start, mixed_plan, random_ids, shape_of, tiny_model

LENGTH = 90
ONE, TWO = WindowGroup(sink=4, alpha=30, beta=0.0), WindowGroup(sink=0, alpha=5, beta=0.5)
# Fused, by group, with biases, with norms of their own for every head, as a list of modules, with logits; experts.
IN_FLOAT32 = ["bitnet", "olmo2"]  # norms over all heads together, which transformers computes in float32
EXPERTS = ["gpt_oss", "qwen3_moe"]  # which PyTorch does not multiply by in float64
KINDS = ["bitnet", "cohere", "gpt_neox", "gpt_oss", "olmo2", "phi3", "qwen2", "qwen3_moe", "stablelm"]


def turned(plan: Plan) -> Plan:
    """The plan with the head groups of every second layer the other way round."""
    layers = [
        layer if number % 2 else layer.model_copy(update={"order": layer.kept_groups[::-1]})
        for number, layer in enumerate(plan.layers)
    ]
    return plan.model_copy(update={"layers": tuple(layers)})


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt, and of a step behind it."""
    with torch.inference_mode():
        first = model(ids[:, :-1], use_cache=True)
        return torch.cat([first.logits, model(ids[:, -1:], **{CACHE: getattr(first, CACHE)}).logits], 1)


def with_norms(model: Any) -> Any:
    """What each head has of its own, which starts alike for all, made to differ."""
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "norm" in name or "sinks" in name:
            weight.data += 0.5 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", ["llama-mha", *KINDS])
def test_the_outputs_are_the_same_in_any_order(family: str) -> None:
    """To the rounding of float64, of float32 where that is in between, against the same plan in the model's order."""
    dtype = torch.float32 if family in EXPERTS else torch.float64
    dense = with_norms(tiny_model(family)).to(dtype)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    plan = mixed_plan(shape_of(dense), (FullGroup(), ONE, TWO))
    other = turned(plan)
    ids = random_ids(1, LENGTH)
    wanted, found = logits(planned_model(dense, plan), ids), logits(planned_model(dense, other), ids)
    assert found.dtype == dtype
    rounding = 1e-5 if family in IN_FLOAT32 + EXPERTS else 1e-9
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounding * float(wanted.abs().max()))
    # It is the order that does it: under the plan of the new order the old weights compute something else.
    wrong = plan.model_copy(
        update={
            "layers": tuple(
                LayerPlan(groups=tuple(layer.groups[group] for group in layer.kept_groups)) for layer in other.layers
            )
        }
    )
    assert runtime_plan(wrong) == runtime_plan(other)
    assert float((logits(planned_model(dense, wrong), ids) - wanted).abs().max()) > 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


def test_what_stays_and_what_is_trained_changes_places_too() -> None:
    """Removed groups, query heads and neurons, layers of other widths, and tensors of linear heads."""
    dense = tiny_model("llama-mha").double()
    linear = LinearGroup(map="hedgehog", sink=4, alpha=20)
    attach_as_they_start(dense, [linear])
    for option in dense.compress_prepared:
        for weight in option.tensors.values():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    layers = [
        LayerPlan(groups=(ONE, PrunedGroup(), linear, FullGroup()), mlp=Mlp.of(range(40))),
        LayerPlan(groups=(linear, TWO, PrunedGroup(), linear)),
        LayerPlan(groups=(TWO, linear, ONE, linear)),
    ]
    plan = plan_of_layers(shape_of(dense), layers)
    ordered = [layer.model_copy(update={"order": order}) for layer, order in zip(layers, ORDERS, strict=True)]
    other = plan_of_layers(shape_of(dense), ordered)
    assert [row["groups"][0]["target"] for row in runtime_plan(other)["layers"]] == ["full", "linear", "window"]
    ids = random_ids(1, LENGTH)
    wanted, found = logits(planned_model(dense, plan), ids), logits(planned_model(dense, other), ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_a_checkpoint_has_plan_and_weights_in_the_order(tmp_path: Path) -> None:
    dense = tiny_model("llama-mha")
    plan = turned(mixed_plan(shape_of(dense), (FullGroup(), ONE, TWO)))
    planned = planned_model(dense, plan)
    planned.save_pretrained(tmp_path)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json", shape_of(dense)) == plan
    targets = [[group["target"] for group in layer["groups"]] for layer in plan.runtime_layers()]
    assert targets[0] == ["full", "window", "window", "full"] and plan.reordered_layers == 2
    loaded = type(planned).from_pretrained(tmp_path).eval()
    assert loaded.config.compress_plan == runtime_plan(plan)
    ids = random_ids(1, LENGTH)
    wanted = logits(planned_model(dense, mixed_plan(shape_of(dense), (FullGroup(), ONE, TWO))), ids)
    torch.testing.assert_close(logits(loaded, ids), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


ORDERS = [(3, 0, 2), (3, 1, 0), (2, 3, 0, 1)]


def test_what_is_no_order_and_what_has_none_is_refused() -> None:
    for order in ((0, 1), (0, 0, 1), (0, 1, 2)):
        with pytest.raises(ValueError, match="each of the groups that stay once"):
            LayerPlan(groups=(ONE, TWO, PrunedGroup(), FullGroup()), order=order)
    with pytest.raises(ValueError, match="layer 1"):
        reorder(tiny_model("llama-mha"), [None, (0, 1, 2), None])
    gpt2 = tiny_model("gpt2")
    with pytest.raises(UserError, match="a GPT2LMHeadModel cannot be put in another order: its projections"):
        planned_model(gpt2, turned(mixed_plan(shape_of(gpt2))))
    with pytest.raises(UserError, match="permute: false"):
        check_reordering(gpt2.config, "search.serve.permute", "write `permute: false`")
    assert [name for name, row in FAMILIES.items() if not row.projections] == ["gpt2"]
