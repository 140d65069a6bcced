"""What would run and be wrong is refused by its name: arguments of attention, ways to split a model, other caches."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

from compress.bench.model import DENSE, NONE
from compress.data.sample import TextSample
from compress.errors import UserError
from compress.models.planned import planned_model
from compress.profile.passes.capture import Capture
from compress.runtime.attention import changing_arguments
from compress.runtime.mixer import Kinds
from compress.runtime.span import Span
from compress.search.refine.divergence import Divergence
from compress.search.refine.effects import sampled_effects
from compress.targets.window import WindowGroup
from compress.train.gates import Mixture
from tests.tiny import mixed_plan, random_ids, shape_of, tiny_model

CHANGING: dict[str, Any] = {
    "softcap": 30.0,
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 20, 20),
    "head_mask": torch.ones(3, 4),
    "is_causal": False,
    "cu_seq_lens_q": torch.tensor([0, 5, 20]),
    "cu_seq_lens_k": torch.tensor([0, 5, 20]),
    "max_length_q": 15,
    "seq_idx": torch.zeros(1, 20),
    "block_table": torch.zeros(1, 1),
    "past_key_value": (),
}
HARMLESS: dict[str, Any] = {
    "sliding_window": 50,
    "is_causal": True,
    "softcap": None,
    "output_attentions": False,
    "cache_position": torch.arange(20),
    "num_items_in_batch": torch.tensor(4),
    "output_hidden_states": False,
}
IDS = random_ids(1, 20)


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model("llama-gqa")


@pytest.fixture(scope="module")
def model(dense: Any) -> Any:
    return planned_model(dense, mixed_plan(shape_of(dense)))


@pytest.mark.parametrize("name", CHANGING)
def test_the_planned_model_refuses_what_would_change_attention(model: Any, name: str) -> None:
    cache = model.new_cache()
    with pytest.raises(ValueError, match=rf"^{name}: "):
        model(IDS, past_key_values=cache, **{name: CHANGING[name]})
    assert cache.get_seq_length() == 0


def test_it_takes_what_does_not(model: Any) -> None:
    assert changing_arguments(HARMLESS) == []
    with torch.no_grad():
        assert torch.equal(model(IDS, **HARMLESS).logits, model(IDS).logits)


class Hands:
    """An attention module that hands an argument of its own to its attention function, as other families' do."""

    def __init__(self, dense: Any, given: dict[str, Any]) -> None:
        self.hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, **given}), with_kwargs=True
            )
            for layer in dense.model.layers
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["position_bias", "head_mask"])
def test_every_attention_function_refuses_what_a_layer_hands_it(dense: Any, model: Any, name: str) -> None:
    shape, given = shape_of(dense), {name: CHANGING[name]}
    with Hands(model, given), pytest.raises(ValueError, match=f"^{name}: "):
        model(IDS)
    says = rf"attention with `{name}` is not supported"
    sample = TextSample(tuple(IDS[0].tolist()), (10, 12))
    divergence = Divergence(dense, [sample])
    with Hands(dense, given):
        for gradient in (False, True):
            with (
                pytest.raises(UserError, match=says),
                Capture(dense, lambda tensors: None, gradient=gradient) as capture,
            ):
                capture.run(sample)
        with pytest.raises(UserError, match=says), Mixture(dense, shape, Span(4, 8, 0.0)).mixed_attention():
            dense(IDS)
        with pytest.raises(UserError, match=says):
            narrow = WindowGroup(sink=4, alpha=8, beta=0.0)
            sampled_effects(dense, shape, divergence, [[[narrow] * 2]] * 3, {}, samples=1, seed=0)
        for bench in (DENSE, NONE):
            dense.set_attn_implementation(bench)
            dense.config.bench_backend = []
            with pytest.raises(UserError, match=says):
                dense(IDS)
            dense.set_attn_implementation("sdpa")


def keywords_of_attention_calls() -> set[str]:
    """What the layers of this transformers hand to their attention functions by name, a line each as they write it."""
    found: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for call in path.read_text(encoding="utf-8").split(" attention_interface(\n")[1:]:
            lines = itertools.takewhile(lambda line: not line.lstrip().startswith(")"), call.splitlines())
            found |= {match[1] for line in lines if (match := re.fullmatch(r" {12}(\w+)=.*", line))}
    return found


def test_every_argument_that_a_layer_of_transformers_hands_on_is_known() -> None:
    """A new one in a later transformers has to be judged: here, or in the list of what changes attention."""
    handled = {"scaling", "dropout", "attention_mask", "sliding_window", "is_causal"}
    harmless = {"position_ids", "position_embeddings", "use_cache", "cache", "hidden_states", "deterministic"}
    own = {"query", "key", "value", "module"}
    given = keywords_of_attention_calls()
    assert "softcap" in given and "s_aux" in given
    unknown = {name for name in given - handled - harmless - own if changing_arguments({name: 1}) != [name]}
    assert unknown == set()


@pytest.mark.parametrize("config", [DistributedConfig(pp_size=2), {"pp_size": 2}], ids=["object", "dictionary"])
def test_splitting_a_model_by_layers_is_refused_before_it_loads(model: Any, config: Any) -> None:
    for kind in (type(model), type(model.model)):
        with pytest.raises(ValueError, match="a planned model cannot be split over processes by layers"):
            kind.from_pretrained("/nowhere", distributed_config=config)


def test_a_layer_with_a_part_of_the_heads_says_so(model: Any) -> None:
    layer = model.model.layers[1].self_attn
    kept, one = layer.compress_kinds, model.config.compress_plan["layers"][1]["groups"][:1]
    layer.compress_kinds = Kinds(one, kept.only.facts)
    with pytest.raises(ValueError, match=r"layer 1 has 2 key/value heads here, and the plan 1: .*tensor parallel"):
        model(IDS)
    layer.compress_kinds = kept


def test_continuous_batching_is_refused_by_name(model: Any) -> None:
    with pytest.raises(ValueError, match="continuous batching keeps its own pages"):
        model.generate_batch([IDS[0].tolist()], max_new_tokens=2)
    with pytest.raises(ValueError, match="continuous batching keeps its own pages"):
        model.generate(IDS, cache_implementation="paged", max_new_tokens=2)


@pytest.mark.parametrize("kind", ["offloaded", "quantized", "offloaded_static", "sliding_window", "hybrid_chunked"])
def test_cache_implementations_that_a_plan_has_not_are_refused(model: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"cache_implementation='{kind}': a planned model brings its own paged cache"):
        model.generate(IDS, cache_implementation=kind, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_implementations_that_it_has_are_taken(model: Any, kind: str) -> None:
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, cache_implementation=kind), expected)
    with pytest.raises(ValueError, match="were both given; give one of them"):
        model.generate(IDS, cache_implementation=kind, past_key_values=model.new_cache(), max_new_tokens=2)


def test_masks_of_other_forms_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="got a dict"):
        model(IDS, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match=r"got \(1, 1, 20, 20\)"):
        model(IDS, attention_mask=torch.ones(1, 1, 20, 20))
    with pytest.raises(ValueError, match=r"got \(1, 21\). No tokens are cached: pass the cache of the passes before"):
        model(IDS, attention_mask=torch.ones(1, 21))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(IDS, inputs_embeds=torch.zeros(1, 20, 48))
