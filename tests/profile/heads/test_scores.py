"""Hidden mass and output error against sums over whole attention matrices, and the training of gates."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import UserError
from compress.models.planned import planned_model
from compress.models.shape import shape_of
from compress.plan import uniform_plan
from compress.profile.heads.gates import Gates
from compress.profile.heads.hidden_mass import HiddenMass
from compress.profile.heads.output_error import OutputError
from compress.profile.key import Key
from compress.profile.passes.tiles import LayerTensors
from compress.profile.run import run_profile
from compress.runtime.span import Span
from compress.targets.window import WindowGroup
from compress.train import gates as module
from compress.train.gates import Mixture
from compress.train.schedule import Schedule
from compress.train.state import Partial
from tests.processes import spawn
from tests.profile.common import GRID, document, documents, join, take_layer, tensor_bytes
from tests.tiny import random_ids, tiny_loaded, tiny_model


def layer(length: int = 133, window: int | None = None) -> LayerTensors:
    """Random queries of two groups of three heads."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, length, 8) for heads in (6, 2, 2))
    return LayerTensors(0, q * 2, k, v, 8**-0.5, window)


def attention_of(tensors: LayerTensors) -> torch.Tensor:
    """`[2, 3, T, T]` float64 probabilities."""
    length = tensors.query.shape[1]
    key = tensors.key.double().repeat_interleave(3, 0)
    scores = tensors.query.double() @ key.transpose(1, 2) * tensors.scaling
    t, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= t) & (t - j < (tensors.window or length))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).view(2, 3, length, length)


def take(statistic: Any, tensors: LayerTensors) -> dict[str, torch.Tensor]:
    """Results over one document that is this one layer; strips of a few rows."""
    shape = shape_of(tiny_model("llama-gqa")).model_copy(update={"layers": 1, "kv_heads": 2})
    return take_layer(statistic, tensors, shape, strip_bytes=20_000)


def test_hidden_mass_is_the_sum_over_hidden_keys() -> None:
    tensors = layer()
    table = take(HiddenMass(grid=GRID), tensors)["hidden_mass.133"][0]
    attention = attention_of(tensors)
    t, j = torch.arange(133)[:, None], torch.arange(133)
    for rule in GRID.rules(133)[1:]:
        assert rule.index is not None
        hidden = (j <= t) & ~rule.span.visible(t, j)
        expected = (attention * hidden).sum(-1).mean((1, 2))
        torch.testing.assert_close(table[:, *rule.index].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("window", [None, 40])
def test_output_error_is_that_of_windowed_attention(window: int | None) -> None:
    tensors = layer(window=window)
    found = take(OutputError(sink=4, window=16), tensors)["output_error.133"][0]
    attention = attention_of(tensors)
    t, j = torch.arange(133)[:, None], torch.arange(133)
    kept = attention * Span(4, 16, 0.0).visible(t, j)
    value = tensors.value.double()[:, None]
    whole, part = attention @ value, kept / kept.sum(-1, keepdim=True) @ value
    expected = (part - whole).square().sum((1, 2, 3)) / whole.square().sum((1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return out


def test_a_gate_mixes_full_and_streaming_attention() -> None:
    model = tiny_model("llama-gqa")
    shape, tokens = shape_of(model), random_ids(1, 90)
    span = Span(4, 16, 0.0)
    dense = logits(model, tokens)
    streaming = logits(planned_model(model, uniform_plan(shape, WindowGroup(sink=4, alpha=16, beta=0.0))), tokens)
    found = []
    for value in (0.0, 0.5, 1.0):
        mixture = Mixture(model, shape, span)
        torch.nn.init.constant_(mixture.gates, value)
        with mixture.mixed_attention():
            found.append(logits(model, tokens))
    torch.testing.assert_close(found[0], streaming)
    torch.testing.assert_close(found[2], dense)
    assert not torch.allclose(found[1], dense, atol=1e-3) and not torch.allclose(found[1], streaming, atol=1e-3)


def test_gates_fall_where_streaming_sees_all_and_stay_where_the_loss_says_so(tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    blind = Gates(sink=4, recent=2, task=None, steps=12, rate=0.05, penalty=0.0)
    kept = run_profile(loaded, documents(), [blind], tmp_path / "blind", seed=0).tensor(Key("gates", length=133))
    wide = Gates(sink=4, recent=4096, task=None, steps=12, rate=0.05, penalty=0.05)
    fallen = run_profile(loaded, documents(), [wide], tmp_path / "wide", seed=0).tensor(Key("gates", length=133))
    assert bool((kept > 0.9).all()) and bool((fallen < 0.75).all())


def test_an_interrupted_training_ends_with_the_same_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    loaded = tiny_loaded("llama-gqa")
    settings = Gates(sink=4, recent=8, task=None, steps=7, rate=0.1)
    run_profile(loaded, documents(), [settings], tmp_path / "whole", seed=0)

    def stop(done: int, total: int, message: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_profile(loaded, documents(), [settings], tmp_path / "parts", seed=0, progress=stop)
    seen: list[int] = []
    run_profile(
        loaded, documents(), [settings], tmp_path / "parts", seed=0, progress=lambda done, *_: seen.append(done)
    )
    assert seen == [5, 6, 7]
    assert tensor_bytes(tmp_path / "parts") == tensor_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob("*/*.partial"))


def test_another_seed_trains_other_gates(tmp_path: Path) -> None:
    loaded, settings = tiny_loaded("llama-gqa"), Gates(sink=4, recent=8, task=None, steps=3, rate=0.1)
    for seed in (0, 1):
        run_profile(loaded, documents(), [settings], tmp_path / str(seed), seed=seed)
    assert tensor_bytes(tmp_path / "0") != tensor_bytes(tmp_path / "1")


def test_gates_without_documents_of_their_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no documents of task `passkeys`"):
        run_profile(tiny_loaded("llama-gqa"), documents(), [Gates()], tmp_path, seed=0)


def test_the_rate_rises_and_falls() -> None:
    factors = [Schedule.trapezoid(1.0, 100)(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[19] == 1 and factors[50] == 1 and factors[99] == 0.1
    assert max(factors) == 1 and min(factors) == 0.1


def _six_steps(model: Any, queue: list[Any], folder: Path) -> torch.Tensor:
    """Gates after six steps."""
    span, schedule = Span(4, 16, 0.0), Schedule.trapezoid(0.05, 6)
    store = Partial(folder, "key")
    return module.train_gates(model, shape_of(model), queue, span, schedule, 0.05, store, 0, lambda *_: None)


def _train_in_process(rank: int, folder: str) -> None:
    """One of two processes that train the same gates."""
    join(rank, 2, f"{folder}/store")
    model = tiny_model("llama-gqa")
    queue = [document(96, seed=number) for number in range(6)]
    torch.save(_six_steps(model, queue, Path(folder)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_one_set_of_gates(tmp_path: Path) -> None:
    spawn(_train_in_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    model = tiny_model("llama-gqa")
    queue = [document(96, seed=number) for number in range(6)]
    alone = _six_steps(model, queue, tmp_path)
    # Alone, a step sees one document instead of two: near, and not the same.
    assert not torch.equal(first, alone)
    torch.testing.assert_close(first, alone, rtol=0, atol=0.1)
