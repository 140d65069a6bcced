"""Model folders with damaged files end in one clear error, in `validate`, in `eval` and when they are loaded.

The files of `tests/damaged` named config, config-eval, tokenizer, tokenizer-config, gguf and ckpt-plan were made by
seeded mutation, and each once ended in a traceback: of `validate`, config-eval and ckpt-plan of `eval`.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.cli.evaluate import _variants
from compress.errors import UserError
from compress.models.load import check_model, load_model, load_tokenizer
from compress.models.planned import patched_model, planned_model
from compress.models.shape import shape_of
from compress.models.source import ModelSource
from compress.plan import read_plan
from tests.tiny import mixed_plan, tiny_model, tiny_tokenizer

DAMAGED = Path(__file__).parents[1] / "damaged"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched") / "checkpoint"
    model = tiny_model("llama-gqa")
    plan = mixed_plan(shape_of(model))
    patched_model(planned_model(model, plan), plan).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_file(folder, tmp_path, name, content):
    made = tmp_path / "damaged"
    if made.exists():
        shutil.rmtree(made)
    shutil.copytree(folder, made)
    (made / name).write_bytes(content)
    return made


def inputs(*kinds):
    found = [path for path in sorted(DAMAGED.iterdir()) if path.stem.rstrip("0123456789").rstrip("-") in kinds]
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.stem)


def refused(action):
    """The message of the UserError that an action ends in; it is of whole lines without a traceback."""
    with pytest.raises(UserError) as caught:
        action()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@inputs("config-validate")
def test_configurations_of_a_model(path, dense, tmp_path):
    folder = with_file(dense, tmp_path, "config.json", path.read_bytes())
    for action in (check_model, load_model, ModelSource):
        assert "config" in refused(lambda action=action: action(str(folder)))


@inputs("config-eval")
def test_configurations_of_a_checkpoint(path, patched, tmp_path):
    folder = with_file(patched, tmp_path, "config.json", path.read_bytes())
    message = refused(lambda: _variants([str(folder)], "float32", "cpu"))
    assert "config" in message
    refused(lambda: check_model(str(folder)))


@inputs("tokenizer", "tokenizer-config")
def test_tokenizers(path, dense, tmp_path):
    name = "tokenizer_config.json" if "config" in path.stem else "tokenizer.json"
    folder = with_file(dense, tmp_path, name, path.read_bytes())
    for action in (check_model, load_tokenizer):
        assert "tokenizer" in refused(lambda action=action: action(str(folder)))


@inputs("gguf")
def test_gguf_files(path):
    assert "GGUF" in refused(lambda: check_model(str(path)))


@inputs("ckpt-plan")
def test_plans_of_a_checkpoint(path):
    assert path.name in refused(lambda: read_plan(path))


def survives(folder):
    """Whether a folder loads; False after a UserError, and any other exception is a failure of the test."""
    try:
        load_model(str(folder))
    except UserError as error:
        assert str(error)
        return False
    return True


VALUES: tuple[Any, ...] = (
    [[[]]],
    {"a": {"b": 1}},
    "1e5",
    "",
    None,
    True,
    -1,
    0,
    1.5,
    1e300,
    10**19,
    10**9,
    float("nan"),
    [],
    {},
    "llama",
    "\ud800",
)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_no_value_of_any_key_ends_in_a_traceback(name, dense, tmp_path):
    folder = with_file(dense, tmp_path, "mark", b"")
    before = json.loads((dense / name).read_text())
    rng = random.Random(name)
    for key in before:
        for value in rng.sample(VALUES, 4):
            (folder / name).write_text(json.dumps(before | {key: value}))
            survives(folder)
    (folder / name).write_text(json.dumps(before))
    assert survives(folder)


BYTES = (
    b"",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"num_hidden_layers": ' + b"9" * 4400 + b"}",
    b"\xff\xfe{}",
    b"\xef\xbb\xbf{}",
    b"null",
    b'"config"',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", BYTES, ids=range(len(BYTES)))
def test_no_content_of_any_file_ends_in_a_traceback(name, content, dense, tmp_path):
    folder = with_file(dense, tmp_path, name, content)
    message = refused(lambda: check_model(str(folder)))
    assert name.split(".")[0].split("_")[0] in message
    if content.startswith(b"version"):
        assert "Git LFS pointer" in message


def small_gguf():
    """A GGUF file of a tiny Llama with a tokenizer of its own, as its format describes it."""
    gguf = pytest.importorskip("gguf")
    import io
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_block_count(1)
        writer.add_context_length(256)
        writer.add_embedding_length(8)
        writer.add_feed_forward_length(16)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(8)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "c", "Ġ", "ab", "e", "f", "<s>"])
        writer.add_token_types([1] * 7 + [3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(7)
        writer.add_eos_token_id(7)
        numbers = torch.Generator().manual_seed(0)
        shapes = {
            "token_embd.weight": (8, 8),
            "output_norm.weight": (8,),
            "blk.0.attn_norm.weight": (8,),
            "blk.0.ffn_norm.weight": (8,),
            "blk.0.attn_q.weight": (8, 8),
            "blk.0.attn_k.weight": (4, 8),
            "blk.0.attn_v.weight": (4, 8),
            "blk.0.attn_output.weight": (8, 8),
            "blk.0.ffn_gate.weight": (16, 8),
            "blk.0.ffn_up.weight": (16, 8),
            "blk.0.ffn_down.weight": (8, 16),
        }
        for name, shape in shapes.items():
            writer.add_tensor(name, torch.randn(shape, generator=numbers).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return io.BytesIO(path.read_bytes()).getvalue()


def test_damaged_gguf_files(tmp_path):
    whole = small_gguf()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    assert survives(path)
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 1200))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
        survives(path)


def test_a_gguf_file_that_promises_a_billion_layers(tmp_path):
    data = small_gguf()
    key = b"llama.block_count"
    place = data.index(key) + len(key) + 4
    path = tmp_path / "model.gguf"
    path.write_bytes(data[:place] + (10**9).to_bytes(4, "little") + data[place + 4 :])
    assert "more layers" in refused(lambda: load_model(str(path)))
