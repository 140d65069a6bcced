"""A model that is read layer by layer: the profile of a whole one to the bit, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data.calibration import calibration_documents
from compress.data.continuation import Continuation
from compress.data.text import EmbeddedText
from compress.errors import UserError
from compress.models import stream as streaming
from compress.models.families import layers_of
from compress.models.load import LoadedModel, load_model, load_streamed
from compress.models.placement import placement_of
from compress.models.stream import LayerByLayer, RandomWeights, Stream, stream_of
from compress.profile.heads.ar_loss import ArLoss
from compress.profile.heads.attention import Attention
from compress.profile.heads.gates import Gates
from compress.profile.heads.influence import Influence
from compress.profile.heads.output_error import OutputError
from compress.profile.run import run_profile
from compress.profile.units.amp import Amp
from compress.profile.units.flap import Flap
from compress.profile.units.magnitude import Magnitude
from compress.profile.units.taylor import Taylor
from tests.profile.common import GRID, documents, tensor_bytes
from tests.tiny import CONFIGS, tiny_model, tiny_tokenizer

FAMILIES = ["gemma3", "llama-mha"]  # two kinds of layers with tables of their own; an embedding that is the head, too


def written(family: str, path: Path) -> Path:
    """The folder of a model."""
    tiny_model(family).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def statistics() -> list[Any]:
    """Of heads with and without gradients, of projections, and of weights alone."""
    return [
        Influence(grid=GRID),
        Attention(sink=4),
        OutputError(sink=4, window=16),
        ArLoss(sink=4, window=16),
        Amp(),
        Flap(),
        Taylor(),
        Magnitude(),
    ]


def there(model: Any) -> int:
    """Bytes of the weights that are in memory."""
    return sum(weight.nbytes for weight in model.parameters() if not weight.is_meta)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Layers that are read meanwhile, each with the bytes of the weights that are there then."""
    seen: list[tuple[int, int]] = []
    holding = Stream.holding

    @contextmanager
    def noted(self: Stream, number: int) -> Iterator[None]:
        fresh = self._held != number
        with holding(self, number):
            if fresh:
                seen.append((number, there(self.model)))
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "holding", noted)
        yield seen


@pytest.mark.parametrize("family", FAMILIES)
def test_the_profile_is_that_of_the_whole_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(family, tmp_path / "model")
    whole, streamed = load_model(str(folder)), load_streamed(str(folder))
    assert streamed.shape == whole.shape and placement_of(streamed.model).layers == (torch.device("cpu"),) * 3
    run_profile(whole, documents(), statistics(), tmp_path / "whole", seed=0, checkpointing=False)
    with watched(monkeypatch) as seen:
        made = run_profile(streamed, documents(), statistics(), tmp_path / "streamed", seed=0)
    assert tensor_bytes(tmp_path / "streamed") == tensor_bytes(tmp_path / "whole")
    assert made.header.loss and there(streamed.model) == there(whole.model) - sum(map(there, layers_of(whole.model)))
    # One layer at a time, each read once forward and once backward for all documents of a pass.
    one = max(there(layer) for layer in layers_of(whole.model))
    assert max(held for _, held in seen) == there(streamed.model) + one
    both = [0, 1, 2, 2, 1, 0]
    assert [number for number, _ in seen][:12] == both * 2


def test_groups_that_fit_in_memory_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written("llama-gqa", tmp_path / "model")
    streamed, asked = load_streamed(str(folder)), [Attention(sink=4), Influence(grid=GRID)]
    run_profile(streamed, documents(), asked, tmp_path / "all", seed=0)
    rows = [2 * sample.length * 4 * 48 * 4 for group in documents().values() for sample in group]
    monkeypatch.setattr(streaming, "available_bytes", lambda _: rows[0] + rows[1])
    samples = [sample for group in documents().values() for sample in group]
    assert LayerByLayer(streamed.model).group(samples, gradient=True) == 2
    assert LayerByLayer(streamed.model).group(samples, gradient=False) == 3
    run_profile(streamed, documents(), asked, tmp_path / "few", seed=0)
    assert tensor_bytes(tmp_path / "few") == tensor_bytes(tmp_path / "all")


def test_what_needs_the_whole_model_is_refused(tmp_path: Path) -> None:
    streamed = load_streamed(str(written("llama-gqa", tmp_path / "model")))
    with pytest.raises(UserError, match="`gates` needs the whole model"):
        run_profile(streamed, documents(), [Gates()], tmp_path / "profile", seed=0)
    with pytest.raises(UserError, match="the dense model's own answer needs the whole model"):
        asked = [Continuation(length=64, count=1, answer_tokens=8)]
        calibration_documents(streamed, asked, EmbeddedText(), "calibration", 0, tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("up_proj", "gate_up"): value for name, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be read layer by layer") as error:
        load_streamed(str(tmp_path / "model"))
    assert "without model.layers.0.mlp.up_proj.weight" in str(error.value)


def test_a_shape_without_weights_is_read_alike_every_time() -> None:
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_config(CONFIGS["llama-gqa"]())
    stream = Stream(model, RandomWeights(0.02, torch.device("cpu")), torch.device("cpu"))
    loaded: Any = LoadedModel(model.eval(), None, "random")
    assert (
        stream_of(model) is stream and loaded.shape.fingerprint == LoadedModel(model, None, "again").shape.fingerprint
    )
    with stream.holding(1):
        weight = model.model.layers[1].self_attn.q_proj.weight
        assert 0.015 < float(weight.std()) < 0.025
        assert bool((model.model.layers[1].input_layernorm.weight == 1).all())
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
