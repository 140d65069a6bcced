"""What every registered statistic must do. A new statistic is one more entry in STATISTICS."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from compress.data.sample import Sample
from compress.models.shape import shape_of
from compress.profile.key import Key
from compress.profile.run import run_profile
from compress.profile.statistic import Statistic
from compress.profile.store import Profile
from compress.registry import statistics
from tests.profile.common import GRID, documents, tensor_bytes
from tests.tiny import random_ids, tiny_loaded

STATISTICS: dict[str, dict[str, Any]] = {
    "amp": {"neurons": "contribution"},
    "ar_loss": {"sink": 4, "window": 16},
    "attention": {"sink": 8},
    "effect": {"targets": [{"target": "pruned"}]},
    "flap": {},
    "gates": {"sink": 4, "recent": 8, "task": None, "steps": 4, "rate": 0.1},
    "hidden_mass": {"grid": GRID},
    "influence": {"grid": GRID},
    "lse_spread": {},
    "magnitude": {},
    "output_error": {"sink": 4, "window": 16},
    "query_constancy": {},
    "random": {"seed": 3},
    "reconstruction": {"chunk": 40},
    "removal": {},
    "retrieval": {"grid": GRID},
    "state_rank": {"window": 4, "block": 24},
    "taylor": {},
    "wanda_sp": {},
}
UNITS = [name for name in sorted(STATISTICS) if statistics[name].reads in ("projections", "weights")]
GROUPS = [name for name in sorted(STATISTICS) if name not in UNITS]

every = pytest.mark.parametrize("name", sorted(STATISTICS))


def make(name: str) -> Any:
    statistic = statistics[name](**STATISTICS[name])
    assert isinstance(statistic, Statistic)
    return statistic


@every
def test_parameters_and_class_are_documented(name: str) -> None:
    method = statistics[name]
    assert method.__doc__ and isinstance(method.needs_gradient, bool) and method.unit
    assert all(field.description for field in method.model_fields.values())
    statistic = make(name)
    assert type(statistic).model_validate(statistic.parameters()) == statistic


families = pytest.mark.parametrize("family", ["gemma3", "llama-gqa", "llama-mha", "mistral-sliding", "qwen2", "qwen3"])


@pytest.mark.parametrize("name", GROUPS)
@families
def test_results_are_finite_and_as_declared(name: str, family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    statistic = make(name)
    profile = run_profile(loaded, documents(), [statistic], tmp_path, seed=0)
    assert {key.length for key in profile.tensors} == ({133} if name == "gates" else {70, 133})
    for key, values in profile.tensors.items():
        entry = profile.entry(key)
        assert key.statistic == name and Key.parse(str(key)) == key
        assert tuple(values.shape) == entry.shape and values.shape[:2] == (shape.layers, shape.kv_heads)
        assert entry.axes[:2] == ("layer", "group") and entry.unit
        slides = all(shape.native_windows) and name in ("ar_loss", "reconstruction")  # no layer can have another window
        assert bool(torch.isfinite(values).all()) and bool(values.any()) is not slides
    for given in statistic.gives:
        assert any(key.name == given for key in profile.tensors), given


@pytest.mark.parametrize("name", UNITS)
@families
def test_scores_of_units_are_finite_and_one_a_unit(name: str, family: str, tmp_path: Path) -> None:
    loaded = tiny_loaded(family)
    shape = shape_of(loaded.model)
    profile = run_profile(loaded, documents(), [make(name)], tmp_path, seed=0)
    entries = profile.header.statistics[name].tensors
    heads = entries[f"{name}.heads"]
    assert {key.statistic for key in profile.tensors} == {name}
    assert heads.axes == ("layer", "group", "query")
    assert heads.shape == (shape.layers, shape.kv_heads, shape.query_heads // shape.kv_heads)
    assert entries[f"{name}.neurons"].axes == ("layer", "neuron")
    assert entries[f"{name}.neurons"].shape == (shape.layers, loaded.model.config.intermediate_size)
    assert all(bool((profile.tensor(Key(name, part)) > 0).all()) for part in ("heads", "neurons"))


@pytest.mark.parametrize("name", [name for name in sorted(STATISTICS) if statistics[name].reads != "weights"])
def test_interrupted_run_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    loaded = tiny_loaded("llama-gqa")
    run_profile(loaded, documents(), [make(name)], tmp_path / "whole", seed=0)

    def stop(done: int, total: int, message: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_profile(loaded, documents(), [make(name)], tmp_path / "parts", seed=0, progress=stop)
    seen: list[int] = []
    run_profile(
        loaded, documents(), [make(name)], tmp_path / "parts", seed=0, progress=lambda done, *_: seen.append(done)
    )
    if statistics[name].reads != "training":
        assert seen == [2, 3]
    assert not list(tmp_path.glob("*/*.partial"))
    assert tensor_bytes(tmp_path / "parts") == tensor_bytes(tmp_path / "whole")


@dataclass(frozen=True)
class Picture(Sample):
    """What is no text to a profile: one class to tell from an input of patches, which stand in the place of tokens."""

    patches: tuple[int, ...]
    label: int
    evidence: tuple[tuple[int, int], ...] = ((3, 9),)
    task: str = "pictures"
    noun: ClassVar[str] = "picture"
    unit: ClassVar[str] = "patches"

    @property
    def length(self) -> int:
        return len(self.patches)

    @property
    def rows(self) -> tuple[int, int]:
        return self.length - 1, self.length

    @property
    def facts(self) -> list[Any]:
        return [self.patches, self.label]

    def body(self, device: torch.device) -> dict[str, Any]:
        return {"input_ids": torch.tensor([self.patches], device=device), "use_cache": False}

    def inputs(self, device: torch.device) -> dict[str, Any]:
        return self.body(device)

    def logits(self, output: Any) -> torch.Tensor:
        last: torch.Tensor = output.logits[0, -1:, :10]
        return last

    def targets(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([self.label], device=device)

    @classmethod
    def together(cls, samples: Sequence[Any], device: torch.device) -> dict[str, Any]:
        raise NotImplementedError

    logits_of = together  # type: ignore[assignment]


def test_nothing_asks_for_tokens(tmp_path: Path) -> None:
    pictures = {64: [Picture(tuple(random_ids(1, 64, seed)[0].tolist()), seed) for seed in (1, 2)]}
    seen: list[str] = []
    profile = run_profile(
        tiny_loaded("llama-gqa"),
        pictures,
        [make(name) for name in STATISTICS],
        tmp_path,
        seed=0,
        progress=lambda done, total, message: seen.append(message),
    )
    assert {key.statistic for key in profile.tensors} == set(STATISTICS) and set(profile.header.loss) == {64}
    assert any(message.startswith("picture 2 of 64 patches, loss ") for message in seen)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """All statistics of one model, taken together."""
    folder = tmp_path_factory.mktemp("joint")
    return run_profile(tiny_loaded("qwen2"), documents(), [make(other) for other in STATISTICS], folder, seed=0)


@every
def test_a_joint_pass_gives_what_a_pass_alone_gives(name: str, joint: Profile, tmp_path: Path) -> None:
    alone = run_profile(tiny_loaded("qwen2"), documents(), [make(name)], tmp_path, seed=0)
    for key, values in alone.tensors.items():
        torch.testing.assert_close(joint.tensor(key), values, rtol=1e-5, atol=1e-6)
