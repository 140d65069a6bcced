"""What `validate` lets pass does not fail later for a reason that it could have seen in the model's files."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from compress.cli.app import app
from tests.cli.recipes import make_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_recipe(tmp_path)


def validated(recipe: Path):
    return CliRunner().invoke(app, ["validate", str(recipe)])


def edit(path: Path, **values) -> None:
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))


def test_a_generation_config_that_cannot_be_saved_as_it_is_gets_a_line(recipe: Path) -> None:
    edit(
        recipe.parent / "model" / "generation_config.json", temperature=0.9, top_p=0.6, cache_implementation="quantized"
    )
    edit(recipe.parent / "model" / "config.json", use_cache=False)
    result = validated(recipe)
    assert result.exit_code == 0, result.output
    for word in ("`temperature: 0.9` is left out", "`top_p: 0.6`", "`cache_implementation:", "`use_cache: false`"):
        assert word in result.stderr
    assert "[transformers]" not in result.stderr


def more_tokens(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)


def fewer_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (more_tokens, "no embedding for"),
        (fewer_weights, "more weights than the weight files hold"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "an adapter lies beside the model"),
        (lambda folder: edit(folder / "generation_config.json", num_return_sequences=4), "num_return_sequences"),
        (lambda folder: edit(folder / "config.json", max_position_embeddings=16), "max_position_embeddings"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=10**9), "more layers than the weights"),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 9999), "tokenizer.json"),
    ],
    ids=["tokens", "weights", "adapter", "generation", "context", "layers", "tokenizer"],
)
def test_what_would_fail_later_fails_here(recipe: Path, damage, word: str) -> None:
    damage(recipe.parent / "model")
    result = validated(recipe)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert word in result.stderr and not result.stdout
