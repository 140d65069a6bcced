"""The conformance matrix: what a plan makes of a model does what the dense model's users expect.

One axis is every registered target on three models (`<model>, <target>`), the other every family with one plan that
mixes spans; a family that can be pruned also with a plan that windows some groups and removes others, and heads and
neurons in every layer differently (`<family>, pruned`).
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.export.export import export_checkpoint
from compress.export.verify import verify_checkpoint
from compress.models.load import LoadedModel
from compress.models.planned import planned_model
from compress.plan import Plan, uniform_plan
from compress.registry import targets
from compress.runtime.pages import PagedState
from compress.runtime.span import PAGE
from compress.targets.aaren import AarenGroup
from compress.targets.expert import ExpertGroup
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.score import ScoreGroup
from compress.targets.target import Target
from compress.targets.window import WindowGroup
from tests.examples.strided import StridedGroup
from tests.processes import run
from tests.pruned import PRUNED, uneven_plan, with_biases
from tests.tiny import (
    FAMILIES,
    MIXED,
    attach_as_they_start,
    mixed_plan,
    random_ids,
    shape_of,
    tiny_model,
    tiny_tokenizer,
)
from tests.upcycled import upcycled_model

LENGTH = 301
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


# Two targets in one cell.
SCORED: tuple[Target, ...] = (
    ScoreGroup(score="sigmoid", sink=4, alpha=60, beta=0.0),
    AarenGroup(),
    ScoreGroup(score="ssmax", reference=256, alpha=20, beta=0.5),
    FullGroup(),
    ScoreGroup(score="lssar", power=3),
)

# Two models side by side, whose plan is made with them (`upcycled_model`).
EXPERTS: tuple[Target, ...] = (ExpertGroup(experts=2, expert=0), ExpertGroup(experts=2, expert=1))

# Two entries are a layer of the model with grouped heads.
ROUTED: tuple[Target, ...] = (
    *RoutedGroup.layer(2, 1, gates="one", sink=4, alpha=30, beta=0.25),
    *RoutedGroup.layer(2, 2, shared=(1,), group_size=2, unit="head"),
    *RoutedGroup.layer(2, 1, router="norm"),
)
# Of the pruned model's the second alone, both, and both with one query head each, as they stay of it.
ROUTED_PRUNED: tuple[Target, ...] = (
    FullGroup(),
    *RoutedGroup.layer(1, 1),
    *RoutedGroup.layer(2, 2, shared=(1,), group_size=2, unit="head", router="random"),
    *RoutedGroup.layer(2, 1, unit="head", sink=4, alpha=30, beta=0.25),
)

# Half of the values' norms are above the thresholds, and with each cap some of those tokens are left out.
RETAIN: tuple[Target, ...] = (
    FullGroup(),
    RetainGroup(sink=4, alpha=40, beta=0.125, scorer="value_norm", threshold=1.77, share=0.5, cap=(10, 0.125)),
    RetainGroup(sink=0, alpha=1, scorer="value_norm", threshold=1.77, share=0.5),
    RetainGroup(sink=70, alpha=64, scorer="key_norm", threshold=-1.8, share=0.5, cap=(40, 0.0)),
    RetainGroup(sink=0, alpha=20, scorer="gate", threshold=-3.0, share=0.5),
)

# The groups that the layers of a plan cycle through to try each registered target. Three models stand for all: one with
# grouped heads, one with sliding layers of its own, and one where some groups, query heads and neurons are removed.
TARGETS: dict[str, tuple[Target, ...]] = {
    "aaren": SCORED,
    "expert": EXPERTS,
    "full": MIXED,
    "linear": (
        LinearGroup(alpha=1),
        LinearGroup(map="elu", alone=True, decay="token", rope="undo"),
        LinearGroup(sink=4, alpha=20, beta=0.25, map="relu", decay="fixed", slope=0.01),
        FullGroup(),
        LinearGroup(rule="delta", alone=True),
        LinearGroup(rule="delta", decay="token", sink=70, alpha=40),
    ),
    "pruned": MIXED,
    "retain": RETAIN,
    "routed": ROUTED,
    "score": SCORED,
    "strided": (StridedGroup(window=20, stride=4), FullGroup(), StridedGroup(window=70, stride=7)),
    "window": MIXED,
}
BASES = ("llama-gqa", "gemma3", "phi3, pruned")
OTHERS = {groups: target for target, groups in TARGETS.items() if groups is not MIXED}
# What has tests of every way to the end of its own (test_score.py, test_aaren.py and test_retain.py of runtime/) needs
# the last model alone.
BASES_OF: dict[tuple[Target, ...], tuple[str, ...]] = {
    SCORED: BASES[-1:],
    RETAIN: BASES[-1:],
    EXPERTS: ("llama-gqa, upcycled",),
    ROUTED: BASES[:1],
}
CELLS = {
    f"{base}, {target}": (base, groups) for groups, target in OTHERS.items() for base in BASES_OF.get(groups, BASES)
}
CELLS[f"{BASES[-1]}, routed"] = BASES[-1], ROUTED_PRUNED
# One plan of many kinds: those of a layer run side by side, chosen heads beside a window among them.
KINDS: tuple[Target, ...] = (
    WindowGroup(sink=4, alpha=30, beta=0.25),
    LinearGroup(alpha=1),
    RetainGroup(sink=4, alpha=40, beta=0.125, scorer="value_norm", threshold=1.77, share=0.5, cap=(10, 0.125)),
    ScoreGroup(score="ssmax", reference=256, alpha=20, beta=0.5),
    *RoutedGroup.layer(3, 1, shared=(2,), sink=4, alpha=60, beta=0.0),
    WindowGroup(sink=64, alpha=70, beta=0.0),
    LinearGroup(rule="delta", decay="token", alone=True),
    RetainGroup(sink=0, alpha=20, scorer="gate", threshold=-3.0, share=0.5),
    FullGroup(),
    AarenGroup(),
)
CELLS["llama-mha, many kinds"] = "llama-mha", KINDS
MODELS = [*FAMILIES, *(f"{family}, pruned" for family in PRUNED), *CELLS]


def test_every_registered_target_is_in_the_matrix() -> None:
    tried = {group.target for groups in TARGETS.values() for group in groups} | {"pruned"}
    assert tried == set(TARGETS) >= set(targets) and set(BASES) <= set(MODELS)


# Kernels see queries, keys and values, and never a family. Triton's interpreter takes a minute a model on a CPU: there
# it runs a usual model, one with a scale, a head size and sliding layers of its own, and one of uneven widths.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_MODELS = MODELS if DEVICE == "cuda" else BASES


# Caches and mixers see no family either: where every token takes a pass of its own, these models take as many as a
# page has, and those that differ from them by their family alone as many as lead to the next page.
LONG = {*BASES, *CELLS}


def fresh(name: str) -> tuple[Any, Any, Any]:
    """Dense model, its shape and the planned model; on the same weights where it is not pruned."""
    loaded, plan = planned_from(name)
    return loaded.model, loaded.shape, planned_model(loaded.model, plan)


def planned_from(name: str) -> tuple[LoadedModel, Plan]:
    """The dense model with its tokenizer, and the plan."""
    base, groups = CELLS.get(name, (name, MIXED))
    family, _, form = base.partition(", ")
    if form == "upcycled":
        model, plan = upcycled_model(family)
        return LoadedModel(model, tiny_tokenizer(), f"tiny/{family}"), plan
    model = with_biases(family) if form else tiny_model(family)
    attach_as_they_start(model, groups)
    plan = uneven_plan(model, groups) if form else mixed_plan(shape_of(model), groups)
    return LoadedModel(model, tiny_tokenizer(), f"tiny/{family}"), plan


@functools.cache
def known(name: str) -> tuple[LoadedModel, Plan]:
    """As `planned_from`, the same objects every time."""
    return planned_from(name)


@functools.cache
def planned(name: str) -> tuple[Any, Any, Any]:
    """As `fresh`, the same objects every time."""
    loaded, plan = known(name)
    return loaded.model, loaded.shape, planned_model(loaded.model, plan)


def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **kwargs).logits


def spans_differ(family: str) -> bool:
    """Whether the mixed plan changes anything: not where every layer slides already."""
    return any(native is None for native in planned(family)[1].native_windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_plan_is_the_dense_model(family: str) -> None:
    dense, shape, _ = planned(family)
    ids = random_ids(2, LENGTH)
    same = planned_model(dense, uniform_plan(shape, FullGroup()))
    torch.testing.assert_close(logits(same, ids), logits(dense, ids), **CLOSE)
    generated = [
        model.generate(ids[:, :100], max_new_tokens=20, do_sample=False, attention_mask=torch.ones(2, 100))
        for model in (dense, same)
    ]
    assert torch.equal(*generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_in_effect(family: str) -> None:
    dense, _, model = planned(family)
    ids = random_ids(1, LENGTH)
    difference = (logits(model, ids) - logits(dense, ids)).abs().max()
    assert (difference > 0.1) == spans_differ(family)


@pytest.mark.parametrize("family", MODELS)
def test_generation_with_cache_is_generation_without(family: str) -> None:
    model = planned(family)[2]
    length, new = 184, 24  # a page begins behind another 8
    ids = random_ids(2, length)
    arguments = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    cached = model.generate(ids, attention_mask=torch.ones(2, length), **arguments)
    # One pass over all of it says of every position what comes next, as a pass for each without a cache would.
    scores = logits(model, cached)[:, length - 1 : -1].clone()
    scores[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(cached[:, length:], scores.argmax(-1))
    # Models that repeat one token would prove nothing.
    assert max(len(set(row.tolist())) for row in cached[:, length:]) > 3


@pytest.mark.parametrize("family", MODELS)
def test_beams_and_samples_with_cache_are_those_without(family: str) -> None:
    model = planned(family)[2]
    ids = random_ids(2, 2 * PAGE - 4)  # what is generated begins a page
    ways: tuple[dict[str, Any], ...] = (
        {"num_beams": 3, "do_sample": False, "max_new_tokens": 7},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 0, "max_new_tokens": 7},
    )
    for way in ways:
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            drawn.append(model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **way))
        assert torch.equal(*drawn)


@pytest.mark.parametrize("family", MODELS)
def test_chunks_and_turns_are_one_prefill(family: str) -> None:
    model = planned(family)[2]
    ids = random_ids(2, LENGTH)
    whole = logits(model, ids)
    cache = model.new_cache()
    parts = [
        logits(model, ids[:, start:stop], past_key_values=cache)
        for start, stop in ((0, 90), (90, 91), (91, 92), (92, 240), (240, 256), (256, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)
    # A second turn through generate: first answer, then more prompt, on one cache.
    cache = model.new_cache()
    first = model.generate(ids[:1, :80], past_key_values=cache, max_new_tokens=10, do_sample=False)
    prompt = torch.cat([first, ids[:1, 80:200]], dim=1)
    second = model.generate(prompt, past_key_values=cache, max_new_tokens=10, do_sample=False)
    assert torch.equal(second, model.generate(prompt, max_new_tokens=10, do_sample=False))
    chunked = model.generate(ids[:1], prefill_chunk_size=64, max_new_tokens=10, do_sample=False)
    assert torch.equal(chunked, model.generate(ids[:1], max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize("family", [*BASES, *CELLS])
def test_what_is_taken_back_was_never_given(family: str) -> None:
    plan, model = known(family)[1], planned(family)[2]
    one_way = {group.target for row in plan.groups_that_stay() for group, _ in row if not group.takes_back}
    if one_way:
        with pytest.raises(
            ValueError, match=f"taken back from the `({'|'.join(one_way)})` groups of layer .* would need"
        ):
            model.new_cache(slack=16)
        return
    ids, others, cache = random_ids(1, 170), random_ids(1, 16, seed=3), model.new_cache(slack=16)
    logits(model, ids[:, :130], past_key_values=cache)
    logits(model, others, past_key_values=cache)
    cache.crop(-14)
    rest = logits(model, torch.cat([others[:, 2:3], ids[:, 133:]], dim=1), past_key_values=cache)
    whole = logits(model, torch.cat([ids[:, :130], others[:, :3], ids[:, 133:]], dim=1))
    torch.testing.assert_close(rest, whole[:, 132:], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODELS)
def test_a_padded_batch_is_each_sequence_alone(family: str, side: str) -> None:
    model = planned(family)[2]
    lengths, width = (189, 58, 122), 189  # each of them begins a page within eight tokens
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = random_ids(3, width)[row, :length], 1
    cache = model.new_cache()
    batched = logits(model, ids, attention_mask=mask, past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = logits(model, random_ids(3, width)[row : row + 1, :length])
        torch.testing.assert_close(batched[row : row + 1, mask[row].bool()], alone, **CLOSE)
    # The next tokens, one by one, on the cache of the padded batch. Where padding lies, shows in the first of them;
    # within seventy every window leaves a page.
    more = random_ids(3, 70 if side == "left" and family in LONG else 8, seed=2)
    for step in range(more.shape[1]):
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        last = logits(model, more[:, step : step + 1], attention_mask=mask, past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = torch.cat([random_ids(3, width)[row : row + 1, :length], more[row : row + 1]], dim=1)
        torch.testing.assert_close(last[row : row + 1], logits(model, alone)[:, -1:], **CLOSE)
    if side == "left":
        arguments = {"max_new_tokens": 12, "do_sample": False}
        together = model.generate(ids, attention_mask=mask[:, :width], **arguments)[:, width:]
        for row, length in enumerate(lengths):
            alone_ids = random_ids(3, width)[row : row + 1, :length]
            single = model.generate(alone_ids, attention_mask=torch.ones(1, length), **arguments)[0, length:]
            kept = single.tolist().index(2) + 1 if 2 in single.tolist() else len(single)  # 2 ends a sequence
            assert together[row, :kept].tolist() == single[:kept].tolist()


@pytest.mark.parametrize("family", MODELS)
def test_allocated_bytes_are_what_the_plan_predicts(family: str) -> None:
    _, shape, model = planned(family)
    plan = known(family)[1]
    slack = 2 * sum(plan.kept_heads) * PAGE * 2 * shape.head_dim * 4
    for length in (1, 63, 64, 65, 200, 700):
        cache = model.new_cache()
        logits(model, random_ids(1, 760)[:, :length], past_key_values=cache)
        assert cache.allocated_bytes() == cache.held_bytes()
        assert plan.in_expectation or cache.held_bytes() == plan.cost(length, 4, form="patched").held_bytes
    # Growing token by token, a window can be astride one page more.
    for length in range(700, 760 if family in LONG else 710):
        logits(model, random_ids(1, 760)[:, length : length + 1], past_key_values=cache)
        predicted = cache.held_bytes()
        assert plan.in_expectation or predicted == plan.cost(length + 1, 4, form="patched").held_bytes
        assert predicted <= cache.allocated_bytes() <= predicted + slack


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model exported, where each export verifies itself in a process of its own, most by a short probe."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = {}
    for name in MODELS:
        loaded, plan = planned_from(name)
        folders[name] = root / name
        with pytest.MonkeyPatch.context() as patch:
            if name not in BASES:
                patch.setattr("compress.export.export.verify_checkpoint", partial(verify_checkpoint, length=130))
            report = export_checkpoint(loaded, plan, folders[name], recipe_text="schema: 1\n")
        assert report.checks.logit_difference <= report.checks.tolerance
        assert report.checks.cache_bytes == report.checks.predicted_bytes
    return folders


@pytest.fixture(scope="module")
def reloaded(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one fresh process without `compress` found in all checkpoints and in their re-saved copies."""
    scratch = tmp_path_factory.mktemp("reloaded")
    child = Path(__file__).with_name("reload_child.py")
    folders = [str(checkpoints[family]) for family in MODELS]
    done = run("file", str(child), scratch, *folders, env=os.environ | {"HF_MODULES_CACHE": str(scratch / "modules")})
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        family: (load_file(scratch / f"{family}.safetensors"), json.loads((scratch / f"{family}.json").read_text()))
        for family in MODELS
    }


@pytest.mark.parametrize("family", MODELS)
def test_a_fresh_process_without_compress_gets_the_same_logits(family: str, reloaded: dict[str, Any]) -> None:
    tensors, facts = reloaded[family]
    model = planned(family)[2]
    torch.testing.assert_close(tensors["logits"], logits(model, random_ids(1, LENGTH)), **CLOSE)
    assert not facts["compress_importable"]
    assert facts["class"].startswith("Compress") and facts["config_is_models"]
    assert "trust_remote_code" in facts["without_flag"]
    assert facts["body_class"] == facts["class"].replace("ForCausalLM", "Model")


@pytest.mark.parametrize("family", MODELS)
def test_saved_again_it_loads_again(family: str, reloaded: dict[str, Any]) -> None:
    tensors, facts = reloaded[family]
    assert torch.equal(tensors["logits"], tensors["saved_again"])
    assert set(facts["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize("family", KERNEL_MODELS)
def test_the_kernels_are_the_reference(family: str) -> None:
    model = fresh(family)[2].to(DEVICE)
    model.config.compress_impl = "reference"
    length = 141 if DEVICE == "cuda" else 93  # the interpreter is slow
    ids, mask = random_ids(3, length).to(DEVICE), torch.ones(3, length, dtype=torch.long, device=DEVICE)
    mask[0, :30] = mask[1, length - 21 :] = 0
    expected = logits(model, ids, attention_mask=mask)
    expected_tokens = model.generate(ids[2:], max_new_tokens=4, do_sample=False)
    gradients = []
    for impl in ("reference", "triton"):
        model.config.compress_impl = impl
        model.zero_grad()
        model(ids[:, :70], attention_mask=mask[:, :70], use_cache=False).logits[2].square().mean().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)
    found = logits(model, ids, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    assert torch.equal(model.generate(ids[2:], max_new_tokens=4, do_sample=False), expected_tokens)
    if family == KERNEL_MODELS[0]:
        static = model.generate(ids[2:], max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(static, expected_tokens)


@pytest.mark.parametrize("family", MODELS)
def test_a_reserved_cache_is_a_growing_one(family: str) -> None:
    model = planned(family)[2]
    ids, mask = random_ids(2, 150), torch.ones(2, 150, dtype=torch.long)
    mask[0, :40] = 0
    outs = []
    for cache in (model.new_cache(), model.new_cache(max_length=160)):
        parts = [logits(model, ids[:, :130], attention_mask=mask[:, :130], past_key_values=cache)]
        places = places_of(cache)
        parts += [
            logits(model, ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            for t in range(130, 150)
        ]
        outs.append(torch.cat(parts, dim=1)[mask.bool()])
    torch.testing.assert_close(outs[1], outs[0], **CLOSE)
    assert cache.lengths.tolist() == [110, 150]
    assert places and places_of(cache) == places  # what is reserved stays where a CUDA graph knows it


def places_of(cache: Any) -> list[int]:
    """Where the memory of a cache lies: of what states keep, and of their pages."""
    states = [state for layer in cache.paged for state in layer.states]
    held = [{**state.tensors, **(state.pools() if isinstance(state, PagedState) else {})} for state in states]
    return [tensor.data_ptr() for tensors in held for tensor in tensors.values()]


def test_a_compiled_model_is_the_model(traced: Callable[..., Any]) -> None:
    """Of two layers of different widths, for tracing takes its time; of usual ones in runtime/test_mixers.py."""
    model = copy.deepcopy(planned("phi3, pruned")[2])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    model.set_plan({"layers": model.config.compress_plan["layers"][:2]})
    start, length = 2 * PAGE - 2, 2 * PAGE + 2  # a page begins among the steps
    ids = random_ids(2, length)
    expected = logits(model, ids)[:, start:]
    compiled = torch.compile(model, backend=traced)  # what is traced and guarded, without a compiler's minutes
    for first, cache in ((compiled, model.new_cache()), (model, model.new_cache(max_length=length))):
        logits(first, ids[:, :start], past_key_values=cache)
        steps = [logits(compiled, ids[:, t : t + 1], past_key_values=cache) for t in range(start, length)]
        torch.testing.assert_close(torch.cat(steps, dim=1), expected, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "groups", [MIXED, TARGETS["linear"], RETAIN, ROUTED], ids=["windows", "linear", "retain", "routed"]
)
def test_a_decode_step_lives_in_a_cuda_graph(groups: tuple[Target, ...]) -> None:
    from compress.models.graph import graph_of

    dense = tiny_model("llama-gqa").cuda()
    attach_as_they_start(dense, groups)
    model = planned_model(dense, mixed_plan(shape_of(dense), groups))
    ids = random_ids(2, 140).cuda()
    with torch.inference_mode():
        cache = model.new_cache(max_length=150)
        model(ids[:, :40], past_key_values=cache)
        token = ids[:, 40:41].clone()
        held: dict[str, torch.Tensor] = {}
        replay = graph_of(lambda: held.update(out=model(token, past_key_values=cache).logits))
        cache.assume(40)  # what the warm-up and the capture stored is written again
        for t in range(40, 140):  # pages go into states on the way
            token.copy_(ids[:, t : t + 1])
            replay()
            torch.testing.assert_close(held["out"][:, 0], model(ids[:, : t + 1]).logits[:, -1], rtol=1e-3, atol=1e-3)
        cache.synchronize()
        assert cache.get_seq_length() == 140
