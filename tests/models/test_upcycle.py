"""Several models as one: identity where all are equal, one of them under a one-hot router, caches, padding."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models.expert_routers import RIDGE, SHARPNESS, fitted_routers, random_routers, routers_of
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.models.upcycle import average, check_configs, check_tokenizers, check_upcyclable, check_weights, upcycle
from compress.models.upcycled import attach_upcycled
from compress.plan import MlpRouting
from compress.runtime import mixer_expert, mlp_experts, mlps
from compress.runtime.families import ROWS
from compress.runtime.span import PAGE
from compress.runtime.step import Record
from compress.train.curve import Curve
from compress.train.objectives.routing import balance_loss
from compress.train.recovery import recover
from compress.train.settings import RecoverSettings
from tests.tiny import random_ids, tiny_model, tiny_tokenizer
from tests.upcycled import varied, with_random_routers

# Of the families whose norms are multiplied into projections: how each is called among the tiny models.
GAINED = sorted({"llama": "llama-gqa"}.get(row.model_type, row.model_type) for row in ROWS if row.gains)


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


@pytest.fixture(scope="module")
def seed() -> Any:
    return tiny_model("llama-gqa")


@pytest.fixture(scope="module")
def experts(seed: Any) -> dict[str, Any]:
    return {f"expert {number}": varied(seed, number) for number in range(2)}


@pytest.fixture(params=["expert", "shared"])
def made(request: pytest.FixtureRequest, seed: Any, experts: dict[str, Any]) -> tuple[Any, Any]:
    """A model with random routers, and its plan; one with one MLP a token, the other with both."""
    routing = MlpRouting(top=1) if request.param == "expert" else MlpRouting()
    model, plan, _ = upcycle(seed, experts, kv=request.param, mlp=routing)
    return with_random_routers(model), plan


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("routing", [MlpRouting(), MlpRouting(top=2), MlpRouting(top=1)])
def test_equal_experts_are_the_dense_model_whatever_the_routers_say(seed: Any, kv: Any, routing: MlpRouting) -> None:
    model, _, averaged = upcycle(seed, {"a": seed, "b": seed, "c": seed}, kv=kv, mlp=routing)
    ids = random_ids(2, 70)
    torch.testing.assert_close(logits(with_random_routers(model), ids), logits(seed, ids), rtol=1e-4, atol=1e-4)
    assert not averaged.differing and averaged.distance == 0


def test_a_weight_with_two_names_is_averaged_once() -> None:
    seed, other = (tiny_model("llama-gqa", number) for number in (0, 1))
    for model in (seed, other):
        model.lm_head.weight = model.model.embed_tokens.weight
    assert seed.lm_head.weight is seed.model.embed_tokens.weight
    names = upcycle(seed, {"a": seed, "b": other})[2].names
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_the_published_weight_of_an_mlp_is_no_identity(seed: Any) -> None:
    """Equal experts give p times the MLP: half of it with two experts and equal routers."""
    model, _, _ = upcycle(seed, {"a": seed, "b": seed}, mlp=MlpRouting(top=1, weight="p"))
    ids = random_ids(1, 20)
    halved = copy.deepcopy(seed)
    for layer in halved.model.layers:
        layer.mlp.down_proj.weight.data /= 2
    torch.testing.assert_close(logits(model, ids), logits(halved, ids), rtol=1e-4, atol=1e-4)
    assert (logits(model, ids) - logits(seed, ids)).abs().max() > 0.1


@pytest.mark.parametrize("family", GAINED)
def test_a_one_hot_router_is_that_expert(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of their own are multiplied into projections; what a family has besides is the same in both experts."""
    seed = tiny_model(family)
    several = [varied(seed, number) for number in range(2)]
    model, _, averaged = upcycle(seed, {"a": several[0], "b": several[1]})
    several[1].load_state_dict({name: model.state_dict()[name] for name in averaged.differing}, strict=False)
    assert not [name for name in averaged.differing if ".input_layernorm." in name or "_attention_layernorm." in name]

    def second(hidden: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 1e4]).expand(*hidden.shape[:-1], 2)

    monkeypatch.setattr(mixer_expert, "router_logits", second)
    monkeypatch.setattr(mlp_experts, "router_logits", second)
    ids = random_ids(2, 40)
    torch.testing.assert_close(logits(model, ids), logits(several[1], ids), rtol=1e-4, atol=1e-4)


def test_the_layers_are_the_published_formulas(seed: Any, experts: dict[str, Any]) -> None:
    """y = sum_j softmax(W_a x)_j Attention_j(x), then p_i-weighted MLP_i of the highest i, written out in float64."""
    kinds = {name: model.double() for name, model in copy.deepcopy(experts).items()}
    model, _, _ = upcycle(copy.deepcopy(seed).double(), kinds, mlp=MlpRouting(top=1, weight="p"))
    with_random_routers(model)
    ids, layer = random_ids(1, 30), model.model.layers[0]
    first = [expert.model.layers[0] for expert in kinds.values()]
    with torch.inference_mode():
        x = model.model.embed_tokens(ids)
        positions = torch.arange(30)[None]
        rotary = model.model.rotary_emb(x, positions)
        mask = torch.full((30, 30), -math.inf, dtype=x.dtype).triu(1)[None, None]
        normed = layer.input_layernorm(x)  # without a weight of its own
        gates = (normed @ layer.self_attn.mixers["expert_2"].router.T).softmax(-1)
        outs = [
            expert.self_attn(expert.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
            for expert in first
        ]
        x = x + sum(gates[..., n, None] * out for n, out in enumerate(outs))
        shares = (layer.post_attention_layernorm(x) @ layer.mlp.router.T).softmax(-1)
        both = torch.stack([expert.mlp(expert.post_attention_layernorm(x)) for expert in first], -2)
        best = shares.argmax(-1)[..., None, None]
        x = x + (both * shares[..., None]).take_along_dim(best, -2)[..., 0, :]
        found = model(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)  # norms are float32 in transformers


def test_shared_keys_and_values_are_cached_once(seed: Any, experts: dict[str, Any]) -> None:
    """The cache of one model, and steps that are those of one pass. With keys of each: tests/test_conformance.py."""
    model, plan, _ = upcycle(seed, experts, kv="shared")
    with_random_routers(model)
    ids, mask = random_ids(2, 80), torch.ones(2, 80, dtype=torch.long)
    mask[0, :25] = mask[1, 40:47] = 0
    whole, cache = logits(model, ids, attention_mask=mask), model.new_cache()
    parts = [logits(model, ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache)]
    parts += [
        logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache) for t in range(70, 80)
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)
    lengths = [int(row) for row in mask.sum(1)]
    assert cache.held_bytes() == sum(plan.cost(length, 4).held_bytes for length in lengths)
    pages = sum(-(-length // PAGE) for length in lengths)
    assert cache.held_bytes() == pages * PAGE * 3 * 2 * plan.source.unit(0, 4).token_bytes


def test_only_real_tokens_are_recorded(made: tuple[Any, Any]) -> None:
    model, plan = made
    ids = random_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :10] = mask[1, 12:17] = 0
    padded, alone = Record(), [Record(), Record()]
    model(ids, attention_mask=mask, compress_record=padded)
    for row, record in enumerate(alone):
        model(ids[row : row + 1, mask[row].bool()], compress_record=record)
    for layer in range(3):
        expected = torch.cat([record.expert_gates[layer] for record in alone])
        torch.testing.assert_close(padded.expert_gates[layer], expected, rtol=1e-4, atol=1e-5)
        chosen = torch.cat([record.mlp_routing[layer].chosen for record in alone])
        assert torch.equal(padded.mlp_routing[layer].chosen, chosen)
        assert chosen.sum(1).eq(plan.upcycle.mlps).all()
        assert padded.mlp_routing[layer].tokens == (20, 25)
        assert (float(balance_loss(padded.mlp_routing[layer]).detach()) == 0) == (
            plan.upcycle.mlps == 2
        )  # mixed: no load
        assert len(chosen) == int(mask.sum())


def test_gradients_reach_every_router_and_expert(made: tuple[Any, Any]) -> None:
    model, _ = made
    model.zero_grad()
    model(random_ids(2, 60), use_cache=False).logits.square().mean().backward()
    lacking = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not lacking
    routers = [weight.grad.abs().max() for name, weight in model.named_parameters() if name.endswith(".router")]
    assert len(routers) == 6 and all(routers)
    model.zero_grad()


def test_routers_start_with_what_tells_texts_apart(seed: Any, experts: dict[str, Any]) -> None:
    """On other tokens of the same two kinds every gate names the expert whose text they are like."""
    model, _, _ = upcycle(seed, experts, mlp=MlpRouting(top=1))
    halves = [random_ids(20, 64, seed=number) % 40 + 5 + 45 * number for number in range(2)]
    fitted_routers(model, [ids[:16] for ids in halves])
    for number, ids in enumerate(halves):
        record = Record()
        logits(model, ids[16:], compress_record=record)
        gates = [record.expert_gates[layer].mean(0)[number] for layer in range(3)]
        chosen = [record.mlp_routing[layer].chosen.double().mean(0)[number] for layer in range(3)]
        assert gates[0] > 0.7 < chosen[0] and sum(gates) > 3 * 0.6 < sum(chosen)


def test_a_fitted_router_is_the_ridge_regression_on_the_texts_numbers(seed: Any, experts: dict[str, Any]) -> None:
    """Of the first layer's attention, whose inputs no router changes; a text counts the same however long it is."""
    model, _, _ = upcycle(seed, experts)
    texts, inputs = [random_ids(2, 40, seed=5), random_ids(1, 30, seed=6)], []
    attention, router = next(routers_of(model))
    fitted_routers(model, texts)
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(kwargs["hidden_states"].flatten(0, 1).double()), with_kwargs=True
    )
    for text in texts:
        logits(model, text)
    hook.remove()
    square = torch.stack([x.T @ x / len(x) for x in inputs]).mean(0)
    # Logits are SHARPNESS apart: plus and minus half of it, by the text.
    slope = torch.stack([x.mean(0) * (-1) ** number for number, x in enumerate(inputs)]).mean(0) * SHARPNESS / 2
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    expected = torch.linalg.solve(square + ridge, slope)
    for row, sign in zip(router.detach().double(), (1, -1), strict=True):
        torch.testing.assert_close(row, sign * expected, rtol=1e-3, atol=1e-4)


def test_random_routers_are_those_of_their_seed(seed: Any, experts: dict[str, Any]) -> None:
    drawn = []
    for number in (0, 0, 1):
        model, _, _ = upcycle(seed, experts)
        random_routers(model, number)
        drawn.append(torch.cat([router.detach().flatten() for _, router in routers_of(model)]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].numel() == 2 * 3 * 2 * 48 and drawn[0].std() < 0.03


@pytest.mark.parametrize("train", ["mixers", "lora"])
def test_training_has_the_balance_of_mlps_among_its_losses(
    train: Any, seed: Any, experts: dict[str, Any], tmp_path: Path
) -> None:
    model, _, _ = upcycle(seed, experts, mlp=MlpRouting(top=1))
    random_routers(model, 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    settings = RecoverSettings(
        train=train, steps=2, length=32, batch_size=2, rate=0.01, router_z=0.001, checkpointing=train == "lora"
    )
    recover(model, settings, random_ids(1, 300)[0].tolist(), tmp_path)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    routers = {name for name in before if name.endswith(".router")}
    assert routers <= changed and (changed == routers) == (train == "mixers")
    assert (train == "mixers") or "model.layers.2.mlp.experts.1.up_proj.weight" in changed
    steps = Curve(tmp_path / "loss.jsonl").steps()
    layers = len(model.model.layers)  # the loss is their sum, 1 each where loads are even
    assert all(
        0.9 * layers < step["balance_loss"] < 2 * layers and step["router_z_loss"] > 0 < step["text_loss"]
        for step in steps
    )


def test_all_mlps_are_mixed_as_attentions_are() -> None:
    """sum_i p_i MLP_i(x) of all, with gradients of every p, whatever `weight` says."""
    for weight in ("one", "p"):
        mlp = mlp_experts.MlpExperts(torch.nn.Linear(6, 6), 3, 3, weight, 6, 0).double()
        for parameter in mlp.parameters():
            torch.nn.init.normal_(parameter)
        rows = torch.randn(2, 7, 6, dtype=torch.float64)
        shares = (rows @ mlp.router.T).softmax(-1)
        expected = sum(shares[..., n, None] * expert(rows) for n, expert in enumerate(mlp.experts))
        torch.testing.assert_close(mlp(rows), expected)
        found, due = (torch.autograd.grad(x.square().sum(), mlp.router)[0] for x in (mlp(rows), expected))
        torch.testing.assert_close(found, due)


def test_all_experts_on_few_rows_are_each_on_its_own() -> None:
    """What a GPU does without waiting is what gathering does."""
    torch.manual_seed(0)
    mlp = mlp_experts.MlpExperts(torch.nn.Linear(6, 6), 3, 2, "one", 6, 0)
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
    rows = torch.randn(7, 6)
    with torch.no_grad():
        found = mlp.everywhere(rows, *mlp.routed(rows)[1:])
        torch.testing.assert_close(found, mlp(rows))


def test_an_mlp_that_the_runtime_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlps, "INSTALLERS", {})
    mlps.install_mlp(None, None, {"kept": 3}, 6, 0)
    with pytest.raises(ValueError, match="layer 4: this runtime has no MLP of experts, top"):
        mlps.install_mlp(None, None, {"experts": 2, "top": 1}, 6, 4)


def test_attention_of_the_base_leaves_one_attention(seed: Any, experts: dict[str, Any]) -> None:
    for rest, source in (("seed", seed), ("average", average(list(experts.values())))):
        model, plan, averaged = upcycle(seed, experts, attention="base", rest=rest)  # type: ignore[arg-type]
        assert plan.model.kv_heads == 2 and plan.layers[0].groups[0].stock(None) is not None
        ours = model.model.layers[1].self_attn.q_proj.weight
        torch.testing.assert_close(ours, source.model.layers[1].self_attn.q_proj.weight)
        assert "model.layers.1.self_attn.q_proj.weight" in averaged.differing


def test_the_plan_says_what_it_adds_and_where_its_weights_are(seed: Any, made: tuple[Any, Any]) -> None:
    model, plan = made
    shared = plan.upcycle.kv == "shared"
    assert plan.source == shape_of(seed) and plan.stock() is None and plan.form == "patched"
    assert plan.cost(640, 2).held_bytes == plan.dense_cost(640, 2).held_bytes * (1 if shared else 2)
    assert plan.cost(640).flops == plan.dense_cost(640).flops * 2
    with pytest.raises(UserError, match="the weights of the upcycled experts are missing"):
        planned_model(copy.deepcopy(seed), plan)
    carrying = copy.deepcopy(seed)
    attach_upcycled(carrying, plan.model.fingerprint, model.state_dict)
    ids = random_ids(1, 20)
    assert torch.equal(logits(planned_model(carrying, plan), ids), logits(model, ids))
    damaged = plan.model_dump(mode="json", by_alias=True)
    damaged["model"]["query_heads"] = 4
    with pytest.raises(ValueError, match="the sizes of the upcycled experts together"):
        type(plan).model_validate(damaged)


def test_models_of_other_shapes_and_tokenizers_are_refused(seed: Any) -> None:
    wider = copy.deepcopy(seed)
    wider.config.intermediate_size, wider.config.rms_norm_eps = 96, 1e-3
    with pytest.raises(UserError) as caught:
        check_configs(seed.config, wider.config, "wider")
    assert [problem.where for problem in caught.value.problems] == ["wider", "wider"]
    wider.lm_head.bias = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"of another shape: `lm_head.bias`"):
        check_weights(seed, wider, "wider")
    other = tiny_tokenizer()
    other.add_tokens(["w200"])
    with pytest.raises(UserError, match="another tokenizer"):
        check_tokenizers(tiny_tokenizer(), other, "other")
    check_configs(seed.config, copy.deepcopy(seed.config), "same")
    check_tokenizers(tiny_tokenizer(), tiny_tokenizer(), "same")
    for family, kv, reason in (
        ("mixtral", "expert", "experts already"),
        ("olmo2", "expert", "weights of their own for every head"),
        ("gpt_neox", "shared", "its own key and value"),
    ):
        with pytest.raises(UserError, match=reason):
            check_upcyclable(tiny_model(family).config, kv)
