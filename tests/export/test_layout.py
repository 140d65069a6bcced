"""The code in a checkpoint: every version of transformers copies all of it, and needs only its own architecture."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.dynamic_module_utils import get_relative_imports

from compress.export.layout import MODELING, RUNTIME, runtime_files
from compress.models.families import family_of
from compress.models.planned import planned_model
from compress.runtime import modeling_compress
from compress.runtime.families import FAMILIES
from tests.tiny import CONFIGS, mixed_plan, random_ids, shape_of, tiny_model

PLAN = {"layers": [{"groups": [{"target": "full"}]}]}


def test_a_checkpoint_has_the_runtime_as_it_stands(tmp_path: Path) -> None:
    """But for the modeling file, which names the others."""
    files = runtime_files(PLAN)
    for name, text in files.items():
        here = (RUNTIME / name).read_text(encoding="utf-8")
        assert text.startswith(here) if name == f"{MODELING}.py" else text == here


# Of kinds of heads and MLPs, what the names of their files have in them.
PARTS = ("aaren", "expert", "linear", "maps", "merge", "retain", "rout", "score_functions", "scorer")
KINDS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("full", {}, set()),
    ("window", {}, set()),
    ("pruned", {"kept": 10}, set()),
    ("linear", {}, {"linear", "maps", "merge"}),
    ("retain", {}, {"retain", "scorer"}),
    ("routed", {}, {"rout"}),
    ("score", {}, {"score_functions"}),
    ("aaren", {}, {"aaren", "merge"}),
    ("expert", {}, {"expert", "rout"}),
    ("full", {"experts": 2, "top": 1, "weight": "one"}, {"expert", "rout"}),
]


@pytest.mark.parametrize(("target", "mlp", "parts"), KINDS)
def test_a_checkpoint_carries_the_files_of_its_own_kinds(target: str, mlp: dict[str, Any], parts: set[str]) -> None:
    files = runtime_files({"layers": [{"groups": [{"target": target}], "mlp": mlp}]})
    assert {part for part in PARTS if any(part in name for name in files)} == parts
    assert parts or len(files) < 30


def test_a_plan_of_several_kinds_brings_the_files_of_each() -> None:
    plans = [{"groups": [{"target": target}], "mlp": mlp} for target, mlp, _ in KINDS]
    together = runtime_files({"layers": plans})
    assert set(together) == set.union(*(set(runtime_files({"layers": [plan]})) for plan in plans))


def test_the_modeling_file_names_every_other_file_itself(tmp_path: Path) -> None:
    """transformers up to 5.8 copies what the first file names, and no further."""
    files = runtime_files(PLAN)
    (tmp_path / f"{MODELING}.py").write_text(files[f"{MODELING}.py"])
    named = {f"{name}.py" for name in get_relative_imports(tmp_path / f"{MODELING}.py")}
    assert named | {f"{MODELING}.py"} == set(files)


def test_the_files_that_an_older_version_copies_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "copied_checkpoint"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in runtime_files(PLAN).items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        module = importlib.import_module(f"copied_checkpoint.{MODELING}")
        assert issubclass(module.CompressLlamaForCausalLM, transformers.LlamaForCausalLM)
        assert module.CompressLlamaForCausalLM.__module__ == module.__name__
    finally:
        for name in [name for name in sys.modules if name.startswith("copied_checkpoint")]:
            del sys.modules[name]


def test_every_family_has_its_classes() -> None:
    for family in FAMILIES.values():
        config = getattr(modeling_compress, f"{family.planned}Config")
        causal = getattr(modeling_compress, f"{family.planned}ForCausalLM")
        assert config.model_type == f"compress_{family.model_type}" and causal.config_class is config
        assert issubclass(causal, getattr(transformers, family.architecture))
        assert causal is getattr(modeling_compress, f"{family.planned}ForCausalLM")
    for name in ("CompressMambaConfig", "CompressLlamaTokenizer", "Llama"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_compress, name)


@pytest.mark.parametrize("lacking", ["Gemma3", "Ministral"])
def test_a_family_that_transformers_lacks_is_in_nobody_elses_way(monkeypatch: Any, lacking: str) -> None:
    there = {
        name: getattr(transformers, name, None)
        for family in FAMILIES.values()
        if family.name != lacking
        for name in family.classes()
    }
    monkeypatch.setattr(modeling_compress, "transformers", SimpleNamespace(__version__="5.0.0", **there))
    modeling_compress._trio.cache_clear()
    try:
        assert modeling_compress.CompressLlamaForCausalLM.__name__ == "CompressLlamaForCausalLM"
        with pytest.raises(ImportError, match=f"a {lacking} model, and transformers 5.0.0 has no {lacking}"):
            getattr(modeling_compress, f"Compress{lacking}Config")
    finally:
        modeling_compress._trio.cache_clear()


def test_a_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    spec: Any = importlib.util.spec_from_file_location("compress.runtime.again", RUNTIME / f"{MODELING}.py")
    with pytest.raises(ImportError, match=r"needs transformers 5\.0 or later, and 4\.57\.6 is installed: pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3", "stablelm"])
def test_a_model_is_copied_and_pickled(family: str) -> None:
    dense = tiny_model(family)
    model, ids = planned_model(dense, mixed_plan(shape_of(dense))), random_ids(1, 90)
    with torch.inference_mode():
        expected = model(ids).logits
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is type(model) and again.config.compress_plan == model.config.compress_plan
            assert torch.equal(again(ids).logits, expected)


def test_a_configuration_of_every_family_comes_back_from_its_file(tmp_path: Path) -> None:
    for name, make in CONFIGS.items():
        stock = make()
        config_class = getattr(modeling_compress, f"{family_of(stock).planned}Config")
        fields = {key: value for key, value in stock.to_dict().items() if key != "model_type"}
        config = config_class(**fields, compress_plan={"layers": []}, compress_impl="reference")
        config.save_pretrained(tmp_path / name)
        again = config_class.from_pretrained(tmp_path / name)
        assert again.compress_plan == {"layers": []} and again.compress_impl == "reference"
        assert again._attn_implementation.startswith("compress_")
        assert copy.deepcopy(again).to_dict() == again.to_dict()
