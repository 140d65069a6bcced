"""Position frequencies that change with the length: one input gives one result, whatever the model saw before it."""

from __future__ import annotations

import copy
import logging as stdlib_logging
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

from compress.errors import UserError
from compress.models.planned import planned_model, sliced_model
from compress.models.replaced import AttentionCall, replaced_attention
from compress.plan import uniform_plan
from compress.runtime.rope import HALVES, crosses, rope_change, steady, turned_back, turns, undo_refusal
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from tests.tiny import SIZES, random_ids, shape_of, tiny_model

CONTEXT = 64
NTK = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [4.0] * 6,
    "short_factor": [1.0] * 6,
    "original_max_position_embeddings": CONTEXT,
}
SHORT = SIZES | {"max_position_embeddings": CONTEXT}


def two_types() -> Any:
    """Gemma 3, whose types of layer have frequencies of their own."""
    return transformers.Gemma3TextConfig(
        **SHORT,
        head_dim=12,
        sliding_window=200,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": NTK,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )


CONFIGS = {
    "dynamic": lambda: transformers.LlamaConfig(**SHORT, rope_parameters=NTK),
    "dynamic of some layers": two_types,
    "longrope": lambda: transformers.Phi3Config(
        **SIZES | {"max_position_embeddings": 4 * CONTEXT},
        original_max_position_embeddings=CONTEXT,
        rope_parameters=LONG,
    ),
}


def stock(kind: str) -> Any:
    """A dense model that has seen nothing, as it comes from a file."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).float().eval()


def full_plan(model: Any) -> Any:
    return planned_model(model, uniform_plan(shape_of(model), FullGroup()))


@torch.no_grad()
def logits(model: Any, length: int) -> torch.Tensor:
    return model(random_ids(1, 200)[:, :length], use_cache=False).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_was_used_beyond_its_context_is_planned_as_a_fresh_one(kind: str) -> None:
    used = stock(kind)
    logits(used, 200)
    made = {
        "planned": full_plan(used),
        "stock": sliced_model(used, uniform_plan(shape_of(used), FullGroup())),
        "copy of the planned": copy.deepcopy(full_plan(used)),
    }
    for name, model in made.items():
        for length in (40, 100, 200, 80, 40, 150):
            expected = logits(stock(kind), length)
            torch.testing.assert_close(logits(model, length), expected, rtol=1e-4, atol=1e-4, msg=f"{name} {length}")


@pytest.mark.parametrize("kind", CONFIGS)
def test_planning_leaves_the_model_as_it_was(kind: str) -> None:
    model = stock(kind)
    planned = full_plan(model)
    before = logits(model, 200)
    logits(planned, 100)  # its frequencies are its own
    torch.testing.assert_close(logits(model, 200), before, rtol=0, atol=0)


def test_a_loaded_dense_model_forgets_what_it_saw_and_one_of_transformers_does_not() -> None:
    fresh, used = stock("dynamic"), stock("dynamic")
    logits(used, 200)
    assert not torch.allclose(logits(used, 100), logits(fresh, 100), atol=1e-3)
    steady(used)
    steady(used)  # once is enough
    assert sum(len(module._forward_pre_hooks) for module in used.modules()) == 1
    torch.testing.assert_close(logits(used, 100), logits(stock("dynamic"), 100), rtol=0, atol=0)
    assert not any(module._forward_pre_hooks for module in full_plan(stock("longrope")).modules())


@pytest.fixture
def told() -> Any:
    """Lines that the runtime warned of."""
    lines: list[str] = []

    class Keep(stdlib_logging.Handler):
        def emit(self, record: stdlib_logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger: Any = logging.get_logger("compress.runtime.modeling_compress")
    handler = Keep()
    logger.warning_once.cache_clear()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pass_that_crosses_the_switch_with_a_cache_says_so_once(kind: str, told: list[str]) -> None:
    model, dense = full_plan(stock(kind)), stock(kind)
    ids = random_ids(1, 100)
    parts = {}
    for name, one in (("planned", model), ("stock", dense)):
        cache = DynamicCache()
        with torch.no_grad():
            pieces = [one(ids[:, start:stop], past_key_values=cache).logits for start, stop in ((0, 50), (50, 100))]
        parts[name] = torch.cat(pieces, dim=1)
    # Both differ from one pass, and from each other not at all.
    torch.testing.assert_close(parts["planned"], parts["stock"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(parts["planned"], logits(model, 100), atol=1e-3)
    assert len(told) == 1 and "change beyond 64 tokens" in told[0] and "nor is it in the stock model" in told[0]
    logits(model, 100)
    assert len(told) == 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_pass_on_one_side_of_the_switch_says_nothing(kind: str, told: list[str]) -> None:
    model = full_plan(stock(kind))
    with torch.no_grad():
        cache = model(random_ids(1, 40)).past_key_values
        model(random_ids(1, 24), past_key_values=cache)
        model(random_ids(1, 200))
    assert told == []


def test_generation_across_the_switch_of_longrope_fills_a_new_cache() -> None:
    """Phi-3's own `generate` drops the cache there; a reserved one and the caller's own are dropped as well."""
    model, dense = full_plan(stock("longrope")), stock("longrope")
    ids = random_ids(1, 60)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    expected = dense.generate(ids, use_cache=False, **arguments)
    if not torch.equal(dense.generate(ids, **arguments), expected):
        # Older versions, as 5.17, forget the prompt there in silence; a planned model does not.
        with pytest.raises(ValueError, match="No tokens are cached"):
            model.generate(ids, **arguments)
        return
    assert torch.equal(model.generate(ids, **arguments), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **arguments), expected)


def test_the_change_is_read_from_the_configuration() -> None:
    assert rope_change(CONFIGS["dynamic"]()) == rope_change(two_types()) == ("dynamic", CONTEXT)
    assert rope_change(CONFIGS["longrope"]()) == ("longrope", CONTEXT)
    assert rope_change(transformers.LlamaConfig(**SHORT)) is None
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": CONTEXT}
    assert rope_change(transformers.LlamaConfig(**SIZES, rope_parameters=yarn)) is None
    assert crosses(("longrope", 64), 64, 1) and not crosses(("longrope", 64), 65, 1)
    assert crosses(("dynamic", 64), 65, 1) and not crosses(("dynamic", 64), 0, 200)


@pytest.mark.parametrize("family", HALVES)
def test_rope_can_be_taken_back(family: str) -> None:
    """Of tokens that are all the same, the first layer's queries and keys differ by their turns alone."""
    model = tiny_model({"gemma3_text": "gemma3", "llama": "llama-gqa"}.get(family, family))
    assert undo_refusal(model.config) is None
    seen: list[AttentionCall] = []

    def attend(call: AttentionCall) -> torch.Tensor:
        seen.append(call)
        return call.dense()

    with torch.no_grad(), replaced_attention(model, "compress_test_turns", attend):
        model(torch.full((1, 40), 5), use_cache=False)
    frequencies = torch.tensor(turns(model.model, 0))
    for x in (seen[0].query, seen[0].key):
        back = turned_back(x, torch.arange(40), frequencies)
        torch.testing.assert_close(back, back[:, :, :1].expand_as(back), rtol=1e-4, atol=1e-4)
        assert float((x - back).abs().max()) > 0.1


def test_rope_that_nobody_knows_how_to_take_back_is_refused() -> None:
    model = tiny_model("gptj")
    plan = uniform_plan(shape_of(model), LinearGroup(rope="undo"))
    with pytest.raises(UserError, match="how gptj models turn"):
        planned_model(model, plan, untrained=True)
