"""Influence tables against their definition: autograd on materialised attention in float64, one mask per rule."""

import math

import pytest
import torch

from compress.models.shape import shape_of
from compress.plan import ModelShape
from compress.profile.heads.influence import Influence, row_influence
from compress.profile.passes.tiles import LayerTensors, Tile, Workspace, tiles
from compress.targets.window import SpanGrid
from tests.profile.common import GRID, document, measure, take_layer
from tests.profile.naive import NaiveLayer, model_layers, naive_attention, tables
from tests.tiny import tiny_model

KINDS = ("absolute", "signed", "joint")

# A float32 forward and backward pass of a sharp 3-layer model differs from float64 by about 1e-5 of a layer's largest
# gradient; sums over rows add such errors up. A key too many at one boundary of one row is a thousand times larger.
MODEL_TOLERANCE = 3e-4
# Raw attention: only the rounding of logits (about 6e-8 of their size) and of single float32 operations.
RAW_TOLERANCE = 2e-5


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest difference, relative to the largest entry of the table."""
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((found.double() - expected).abs().max()) <= tolerance * scale


def raw_layer(heads: int, groups: int, length: int, window: int | None = None, sharpness: float = 1.0) -> LayerTensors:
    size = 8
    query, slope = torch.randn(2, heads, length, size)
    key, value = torch.randn(2, groups, length, size)
    return LayerTensors(0, query * sharpness, key, value, size**-0.5, window, slope)


def raw_naive(layer: LayerTensors) -> NaiveLayer:
    """g by autograd of sum(dO * O) with respect to the attention matrix."""
    attention = naive_attention(layer.query.double(), layer.key.double(), layer.scaling, layer.window)
    attention.requires_grad_()
    values = layer.value.double().repeat_interleave(len(layer.query) // len(layer.value), 0)
    assert layer.output_gradient is not None
    ((attention @ values) * layer.output_gradient.double()).sum().backward()
    assert attention.grad is not None
    return NaiveLayer(attention.detach(), attention.grad)


def raw_tables(layer: LayerTensors, grid: SpanGrid, length: int, strip_bytes: int | None) -> dict[str, torch.Tensor]:
    heads, groups, size = len(layer.query), len(layer.key), layer.query.shape[-1]
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        layers=1,
        query_heads=heads,
        kv_heads=groups,
        head_dim=size,
        native_windows=(layer.window,),
        fingerprint="sha256:none",
    )
    found = take_layer(Influence(grid=grid), layer, shape, length=length, strip_bytes=strip_bytes)
    return {kind: found[f"influence.{kind}.{length}"][0] for kind in KINDS}


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("length", [1, 2, 63, 150])
def test_raw_attention_equals_autograd(heads: int, groups: int, length: int) -> None:
    layer = raw_layer(heads, groups, length)
    found = raw_tables(layer, GRID, 200, strip_bytes=None)
    expected = tables(raw_naive(layer), groups, GRID, 200)
    for kind in KINDS:
        if length == 1:
            assert not found[kind].any()
        else:
            # E_ij of the naive formula is 0/0 where a row has one key; such a key is never masked.
            assert_close(found[kind], expected[kind].nan_to_num(), RAW_TOLERANCE)


@pytest.mark.parametrize("window", [1, 17, 64])
def test_the_architectures_own_window_is_honoured(window: int) -> None:
    layer = raw_layer(4, 2, 131, window)
    found = raw_tables(layer, GRID, 131, strip_bytes=4 * 4 * 11 * 131)
    expected = tables(raw_naive(layer), 2, GRID, 131)
    for kind in KINDS:
        if window == 1:
            assert not found[kind].any()
        else:
            assert_close(found[kind], expected[kind].nan_to_num(), RAW_TOLERANCE)


def test_strip_height_changes_nothing() -> None:
    layer = raw_layer(4, 2, 203)
    whole = raw_tables(layer, GRID, 203, strip_bytes=1 << 30)
    for strip_bytes in (1, 40_000, 150_000):
        strips = raw_tables(layer, GRID, 203, strip_bytes)
        for kind in KINDS:
            # Only the order of the float32 products of a matrix multiplication may differ.
            assert_close(strips[kind], whole[kind].double(), 2e-6)


@pytest.mark.parametrize(
    "family", ["gemma3", "llama-gqa", "llama-mha", "mistral-sliding", "qwen2-part-sliding", "qwen3"]
)
def test_model_equals_autograd_on_the_attention_matrix(family: str) -> None:
    doc = document(149)
    model = tiny_model(family)
    found = measure(model, [Influence(grid=GRID)], doc, length=192, strip_bytes=20_000)
    shape = shape_of(model)
    layers, _ = model_layers(model.double(), shape, doc)
    for index, layer in enumerate(layers):
        expected = tables(layer, shape.kv_heads, GRID, 192)
        for kind in KINDS:
            assert_close(found[f"influence.{kind}.192"][index], expected[kind].nan_to_num(), MODEL_TOLERANCE)


def test_checkpointed_equals_kept_activations() -> None:
    model, doc = tiny_model("llama-gqa"), document(91)
    kept = measure(model, [Influence(grid=GRID)], doc, checkpointing=False)
    recomputed = measure(model, [Influence(grid=GRID)], doc, checkpointing=True)
    for key, values in kept.items():
        assert_close(recomputed[key], values.double(), 1e-6)


def test_bfloat16_model_is_close_to_the_float32_one() -> None:
    model, doc = tiny_model("llama-gqa"), document(91)
    for weight in model.parameters():
        weight.data.mul_(0.3)
    exact = measure(model, [Influence(grid=GRID)], doc)
    rounded = measure(model.bfloat16(), [Influence(grid=GRID)], doc)
    # bfloat16 has 8 bits: activations and gradients are off by a few parts in a hundred after three layers.
    assert_close(rounded["influence.absolute.91"], exact["influence.absolute.91"].double(), 0.1)


def naive_logits(layer: LayerTensors) -> torch.Tensor:
    logits = layer.query.double() @ layer.key.double().transpose(1, 2) * layer.scaling
    return logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)


def test_sharp_attention_loses_no_digits() -> None:
    """Rows whose largest probability is 1 - 1e-9: 1 - A and g - delta cancel completely in naive float32."""
    layer = raw_layer(2, 2, 40, sharpness=15.0)
    naive = raw_naive(layer)
    assert float((1 - naive.attention[:, 1:].amax(-1)).min()) < 1e-9
    logits = naive_logits(layer)
    before = (logits.softmax(-1) * naive.gradient).sum(-1)
    columns = []
    for key in range(40):
        without = logits.index_fill(2, torch.tensor(key), -torch.inf).softmax(-1)
        columns.append((without * naive.gradient).sum(-1) - before)
    expected = torch.stack(columns, -1)
    (tile,) = tiles(layer, Workspace())
    found, _ = row_influence(tile)
    lower = torch.ones(40, 40, dtype=torch.bool).tril()
    lower[0] = False
    # Logits up to 100 rounded in float32 give probabilities that are off by some 1e-5 of their value.
    error = (found[:, 0].double() - expected)[:, lower].abs() / (expected[:, lower].abs() + 1e-6)
    assert float(error.max()) < 1e-3


def test_underflow_leaves_the_diagonal() -> None:
    """When everything visible underflows, the renormalised attention is that of the diagonal, not 0/0."""
    layer = raw_layer(1, 1, 80)
    layer.query[:] = 0
    layer.query[..., 0] = 1000
    layer.key[:] = 0
    layer.key[:, 3, 0] = 1
    grid = SpanGrid(sinks=(0,), betas=(0.0,), alpha_min=-64)
    found = raw_tables(layer, grid, 80, strip_bytes=None)
    (tile,) = tiles(layer, Workspace())
    assert tile.gradient is not None
    gradient = tile.gradient[0, 0].double()
    expected = sum(abs(float(gradient[t, t] - gradient[t, : t + 1].mean())) for t in range(3))
    expected += sum(abs(float(gradient[t, t] - gradient[t, 3])) for t in range(4, 80))
    for kind in KINDS:
        assert torch.isfinite(found[kind]).all()
    assert math.isclose(float(found["joint"][0, 0, 0, 0]), expected, rel_tol=1e-4)


def test_joint_effect_where_next_to_nothing_stays_visible() -> None:
    """A visible mass of 1e-12 is far below what 1 - a can resolve, yet the effect is a mean over those keys."""
    layer = raw_layer(2, 1, 90)
    layer.key[:, 3] = layer.query[0].mean(0) * 0
    layer.query[..., 0] = 30
    layer.key[..., 0] *= 0.05
    layer.key[:, 3, 0] = 2.6
    naive = raw_naive(layer)
    assert 0 < float(naive.attention[:, 20:, 4:].sum(-1).min()) < 1e-9
    grid = SpanGrid(sinks=(0, 2), betas=(0.0, 0.125), alpha_min=-64)
    found = raw_tables(layer, grid, 90, strip_bytes=None)
    assert_close(found["joint"], tables(naive, 1, grid, 90)["joint"].nan_to_num(), RAW_TOLERANCE)


def test_joint_of_one_masked_key_is_the_absolute_influence() -> None:
    """With a window of all but one key in the last row both tables must agree."""
    layer = raw_layer(2, 1, 65)
    grid = SpanGrid(sinks=(0,), betas=(0.0,), alpha_min=64)
    found = raw_tables(layer, grid, 65, strip_bytes=None)
    torch.testing.assert_close(found["joint"], found["absolute"], rtol=1e-5, atol=0)
    assert float(found["joint"][0, 0, 0, 0]) > 0


def test_a_tile_without_gradient_is_refused() -> None:
    tile = Tile(0, 0, 0, torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1), Workspace())
    with pytest.raises(ValueError, match="gradient"):
        row_influence(tile)
