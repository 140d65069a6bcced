"""A capture computes what the model computes, hands layers out in order, and leaves no trace."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models import backward, replaced
from compress.models.shape import shape_of
from compress.profile.passes.capture import Capture
from compress.profile.passes.tiles import LayerTensors, strips
from compress.runtime.impl import IMPLS
from tests.profile.common import document
from tests.profile.naive import model_layers
from tests.tiny import FAMILIES, tiny_model
from tests.train.common import model_of, pruned_model

DOC = document(143)


def state_of(model: Any) -> list[Any]:
    return [
        model.config._attn_implementation,
        [module.training for module in model.modules()],
        [weight.requires_grad for weight in model.parameters()],
        [weight.grad for weight in model.parameters()],
        [sorted(vars(module)) for module in model.modules()],
        [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
    ]


def capture_of(model: Any, consume: Any, **options: Any) -> Capture:
    return Capture(model, consume, **{"gradient": True, "checkpointing": False} | options)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_model_and_layers_come_backwards(family: str, checkpointing: bool) -> None:
    model = tiny_model(family)
    seen: list[LayerTensors] = []
    with capture_of(model, seen.append, checkpointing=checkpointing) as capture:
        loss = capture.run(DOC)
    assert [layer.layer for layer in seen] == [2, 1, 0]
    with torch.no_grad():
        logits = model(torch.tensor([DOC.tokens])).logits[0, DOC.answer[0] - 1 : DOC.answer[1] - 1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(DOC.tokens[DOC.answer[0] :]))
    assert loss == pytest.approx(float(expected), rel=1e-4)
    _, naive_loss = model_layers(model.double(), shape_of(model), DOC)
    assert loss == pytest.approx(naive_loss, rel=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "ministral"])
def test_the_kernels_whose_gradients_repeat_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny_model(family), list[torch.Tensor]()
    doc, kernels = document(70), IMPLS["triton"]

    def prefill(query: torch.Tensor, *given: Any, **options: Any) -> Any:
        asked.append(query)
        return kernels.prefill(query, *given, **options)

    def run() -> tuple[list[LayerTensors], float | None]:
        seen: list[LayerTensors] = []
        with capture_of(model, seen.append) as capture:
            return seen, capture.run(doc)

    expected, loss = run()
    monkeypatch.setattr(replaced, "repeatable_impl", lambda query: replace(kernels, prefill=prefill))
    found, same = run()
    assert len(asked) == len(found) == 3
    assert same == pytest.approx(loss, rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert one.output_gradient is not None and other.output_gradient is not None
        torch.testing.assert_close(one.output_gradient, other.output_gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.query, other.query, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_on_a_gpu_are_the_same_in_every_run(dtype: torch.dtype) -> None:
    model = tiny_model("llama-gqa").to("cuda", dtype)

    def run() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        with capture_of(model, lambda layer: seen.append(layer.output_gradient.clone())) as capture:
            capture.run(document(1500))
        return seen

    first = run()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


def test_on_a_cpu_attention_is_pytorchs() -> None:
    assert replaced.repeatable_impl(torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)) is None


def test_without_gradient_layers_come_forwards() -> None:
    seen: list[LayerTensors] = []
    with capture_of(tiny_model("qwen3"), seen.append, gradient=False) as capture:
        assert capture.run(DOC) is None
    assert [layer.layer for layer in seen] == [0, 1, 2]
    assert all(layer.output_gradient is None for layer in seen)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_model("llama-gqa").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)

    def consume(layer: LayerTensors) -> None:
        if fails:
            raise KeyboardInterrupt

    def run() -> None:
        with capture_of(model, consume, checkpointing=True) as capture:
            assert not any(module.training for module in model.modules())
            capture.run(DOC)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert state_of(model) == before


def test_dropout_is_off_under_checkpointing() -> None:
    model = tiny_model("llama-gqa")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    losses = []
    for checkpointing in (False, True):
        with capture_of(model, lambda _: None, checkpointing=checkpointing) as capture:
            losses.append(capture.run(DOC))
    assert losses[0] == losses[1]


def test_nan_names_the_layer() -> None:
    model = tiny_model("llama-gqa")
    model.model.layers[1].self_attn.v_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match="attention output of layer 1"), capture_of(model, lambda _: None) as capture:
        capture.run(DOC)


def test_checkpointing_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    estimate = backward.activation_bytes(model, 1000, 4)
    for free, expected in ((estimate * 5, False), (estimate * 3, True), (None, False)):
        monkeypatch.setattr(backward, "free_bytes", lambda _, free=free: free)
        with backward.recomputed(model, 1000) as found:
            assert found is expected and model.model.layers[0].training is expected
        assert not model.model.layers[0].training


def test_what_was_measured_is_taken_in_place_of_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    for free, expected in ((1001, False), (999, True), (None, False)):
        monkeypatch.setattr(backward, "free_bytes", lambda _, free=free: free)
        with backward.recomputed(model, 10**9, needs=lambda: int(1000 * backward.ROOM)) as found:
            assert found is expected


def test_the_activations_of_a_pruned_model_are_fewer() -> None:
    dense, pruned = model_of(), pruned_model()
    assert backward.activation_bytes(pruned, 100, 4) < 0.9 * backward.activation_bytes(dense, 100, 4)


@pytest.mark.parametrize("family", ["gemma3", "llama-gqa", "llama-mha", "qwen3"])
def test_the_activation_estimate_is_no_less_than_what_autograd_keeps(family: str) -> None:
    model = tiny_model(family)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keep, capture_of(model, lambda _: None) as capture:
        capture.run(DOC)
    estimate = backward.activation_bytes(model, DOC.length, 4)
    # Besides the layers autograd keeps one copy of the embeddings, cosines, final norm and answer logits.
    outside = 4 * DOC.length * 48 * 6
    assert sum(kept.values()) - outside <= estimate <= 2 * sum(kept.values())


def test_strips_cover_all_rows_within_the_budget() -> None:
    for window in (None, 1, 300):
        end = 0
        for start, stop, first in strips(1000, 6, window, 200_000):
            assert start == end and first == (0 if window is None else max(0, start - window + 1))
            assert stop - start <= 4 or 4 * 6 * (stop - start) * (stop - first) <= 200_000
            end = stop
        assert end == 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_the_activation_estimate_is_within_a_third(trained: bool, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    model = model_of(**sizes, head_dim=64, num_hidden_layers=1).to(dtype).requires_grad_(trained)

    def layers(tokens: int) -> int:
        """What autograd keeps with the layer less what it keeps without."""
        states = torch.randn(1, tokens, 576, dtype=dtype, requires_grad=True)

        def run() -> None:
            model.model(inputs_embeds=states, use_cache=False)

        whole, found = backward.kept_bytes(run, model), list(model.model.layers)
        model.model.layers = torch.nn.ModuleList()
        alone = backward.kept_bytes(run, model)
        model.model.layers = torch.nn.ModuleList(found)
        return whole - alone

    estimate = backward.activation_bytes(model, 64, dtype.itemsize, trained=trained)
    assert 1 <= estimate / (layers(128) - layers(64)) <= 1.3
