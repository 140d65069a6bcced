"""What a model folder can be that is no plain model: named for what it is, with what to do about it."""

import json
import pickle
import shlex
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import UserError
from compress.models.families import text_part_line
from compress.models.folder import merge_line
from compress.models.load import check_model, load_config, load_model, load_tokenizer
from compress.models.planned import patched_model, planned_model
from compress.models.source import ModelSource
from compress.models.weights import INDEX, SINGLE
from compress.plan import uniform_plan
from compress.runtime.families import FAMILIES
from compress.targets.full import FullGroup
from tests.tiny import CONFIGS, SIZES, tiny_loaded, tiny_model, tiny_tokenizer

READERS = (check_model, load_config, load_model, ModelSource)


@pytest.fixture
def shards(tmp_path):
    tiny_model("llama-gqa").save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    """Any unpickling fails the test, the restricted kind of torch.load, too."""

    def opened(*_, **__):
        pytest.fail("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)
    monkeypatch.setattr(pickle, "load", opened)


def refused(spec, *words, readers=READERS):
    for reader in readers:
        with pytest.raises(UserError) as caught:
            reader(str(spec))
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "check the name" not in message
    return message


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 134\n"


def test_shards_load_and_links_out_of_the_folder_are_read(shards, tmp_path):
    elsewhere = tmp_path / "blobs"
    elsewhere.mkdir()
    for path in list(shards.glob("*.safetensors")):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    assert all(bool(weight.isfinite().all()) for weight in load_model(str(shards)).model.parameters())


def test_a_missing_shard(shards):
    sorted(shards.glob("*.safetensors"))[1].unlink()
    refused(shards, "weight files are missing", "model-00002-of", "goes on where it stopped")


def test_a_shard_that_is_a_git_lfs_pointer(shards):
    path = sorted(shards.glob("*.safetensors"))[0]
    path.write_bytes(POINTER)
    refused(shards, "Git LFS pointer", path.name, "lfs pull")


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "generation_config.json"])
def test_any_file_that_is_a_git_lfs_pointer(folder, name):
    (folder / name).write_bytes(POINTER)
    refused(folder, "Git LFS pointer", name, "lfs pull", readers=(check_model, load_model))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evil.bin", ("never read", "evil.bin")),
        ("pytorch_model.pt", ("never read",)),
        ("../outside.safetensors", ("outside the model's folder",)),
        ("deep/../../outside.safetensors", ("outside the model's folder",)),
        ("..\\outside.safetensors", ("outside the model's folder",)),
        ("/etc/passwd.safetensors", ("outside the model's folder",)),
        ("not-there.safetensors", ("are missing",)),
        (["a", "list"], ("not the name of a file",)),
        (7, ("not the name of a file",)),
    ],
    ids=str,
)
def test_an_index_that_names_other_files(shards, tmp_path, name, words):
    (shards / "evil.bin").write_bytes(b"\x80\x04.")
    save_file({"x": torch.zeros(2)}, tmp_path / "outside.safetensors")
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (shards / INDEX).write_text(json.dumps(index))
    refused(shards, *words)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 9999])
def test_a_damaged_index(shards, content):
    (shards / INDEX).write_bytes(content)
    refused(shards, INDEX, "damaged")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../x.safetensors", 5])
def test_a_configuration_that_names_its_weights(folder, name):
    edit(folder / "config.json", transformers_weights=name)
    refused(folder, "transformers_weights")


def test_only_pickles(folder):
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(folder, "no safetensors weights", "never read", "save_pretrained", "pytorch_model.bin")


def test_a_patched_checkpoint_of_pickles(tmp_path):
    loaded = tiny_loaded("llama-gqa")
    plan = uniform_plan(loaded.shape, FullGroup())
    patched_model(planned_model(loaded.model, plan), plan).save_pretrained(tmp_path)
    weights = tmp_path / SINGLE
    weights.rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "no safetensors weights", readers=(ModelSource,))


@pytest.mark.parametrize("cut", [4, 100, -100])
def test_weights_that_are_cut_short(folder, cut):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:cut])
    refused(folder, "weight file is damaged", SINGLE, "download the file again")


def test_a_header_that_is_no_header(folder):
    for header in (b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"{" * 90):
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
        refused(folder, "weight file is damaged", readers=(check_model,))
    (folder / SINGLE).write_bytes(struct.pack("<Q", 1 << 60))
    refused(folder, "a header of", readers=(check_model,))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", None, 7])
def test_quantised_weights(folder, method):
    edit(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    named = method if isinstance(method, str) else "an unnamed method"
    refused(folder, f"quantised by {named}", "quantised from")


def test_whole_numbers_without_a_word_about_them(folder):
    tensors = load_file(folder / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / SINGLE, {"format": "pt"})
    refused(folder, "quantised", name, "I8")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_hidden_layers": 10**9}, ("more layers than the weights", "num_hidden_layers: 3")),
        ({"num_hidden_layers": 4}, ("more layers than the weights",)),
        ({"hidden_size": 1 << 24, "head_dim": 12}, ("more weights than the weight files",)),
        ({"intermediate_size": 10**9}, ("more weights than the weight files", "58")),
        ({"vocab_size": 2**31 - 1}, ("more weights than the weight files",)),
        ({"num_attention_heads": 2**30, "num_key_value_heads": 2**30}, ("config",)),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, ("config",)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "a divisor of the 4 heads")),
        ({"dtype": "int8"}, ("dtype", "bfloat16")),
        ({"torch_dtype": "float99"}, ("torch_dtype", "bfloat16")),
        ({"model_type": "llamma"}, ("`llamma` is not supported", "did you mean `llama`")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_configurations_that_do_not_fit_the_weights_take_no_memory(folder, values, words):
    edit(folder / "config.json", **values)
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(folder, *words, readers=(check_model, load_model))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("other", ["LlamaForSequenceClassification", "LlamaForRewardModel"])
def test_a_head_that_gives_something_else_is_not_dropped_silently(folder, other):
    edit(folder / "config.json", architectures=[other])
    refused(folder, "something else than the next token", other, "trained from", readers=READERS[:3])


@pytest.mark.parametrize(("kind", "architecture"), [("bert", "BertForMaskedLM"), ("mamba", "MambaForCausalLM")])
def test_an_architecture_that_transformers_knows_is_no_slip_of_the_pen(folder, kind, architecture):
    edit(folder / "config.json", model_type=kind, architectures=[architecture])
    message = refused(folder, f"`{kind}` is not supported", architecture, readers=READERS[:3])
    assert "did you mean" not in message
    assert ("no language model that writes token after token" in message) == (kind == "bert")


def test_a_folder_without_a_tokenizer_says_so(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "no tokenizer", "tokenizer.json", readers=(load_tokenizer,))


def execute(line, folder, monkeypatch):
    """Run the Python of a printed command here, in a folder; a process of its own would import torch again."""
    words = shlex.split(line)
    assert words[:2] == ["python", "-c"]
    monkeypatch.chdir(folder)
    exec(compile(words[2], "<printed>", "exec"), {})


@pytest.fixture
def adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapter_alone_is_named_and_the_printed_command_merges_it(folder, adapter, tmp_path, monkeypatch):
    message = refused(adapter, "holds an adapter, not a model", str(folder))
    line = merge_line(str(folder), str(adapter))
    assert line in message
    execute(line, tmp_path, monkeypatch)
    merged, before = load_model(str(tmp_path / "merged")), load_model(str(folder))
    assert merged.shape.differing(before.shape.model_dump()) == ["fingerprint"]
    assert not torch.equal(
        merged.model.model.layers[0].self_attn.q_proj.weight, before.model.model.layers[0].self_attn.q_proj.weight
    )


def test_an_adapter_beside_a_model_is_named_and_is_not_loaded_into_it(folder, adapter):
    for path in adapter.iterdir():
        if path.name.startswith("adapter"):
            path.rename(folder / path.name)
    message = refused(folder, "an adapter lies beside the model", "adapter_config.json", "move")
    assert merge_line(str(folder), str(folder / "adapter")) in message
    (folder / "adapter").mkdir()
    for path in list(folder.glob("adapter_*")):
        path.rename(folder / "adapter" / path.name)
    load_model(str(folder))


@pytest.mark.parametrize(
    "content", [b'{"base_model_name_or_path": "meta/some-8b"}', b"{}", b'{"base_model_name_or_path": 7}']
)
def test_an_adapter_of_a_model_on_the_hub_or_of_none(tmp_path, content):
    (tmp_path / "adapter_config.json").write_bytes(content)
    message = refused(tmp_path, "holds an adapter, not a model")
    assert merge_line("meta/some-8b" if b"meta" in content else "BASE", str(tmp_path)) in message


def wrappers():
    sizes = {key: value for key, value in SIZES.items() if key != "attn_implementation"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    gemma = CONFIGS["gemma3"]().to_dict()
    return {
        "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
            transformers.Gemma3Config(
                text_config=gemma,
                vision_config={"model_type": "siglip_vision_model", **vision},
                mm_tokens_per_image=4,
                image_token_index=90,
                boi_token_index=91,
                eoi_token_index=92,
            )
        ),
        "llava": lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config={"model_type": "llama", **sizes},
                vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **vision},
                image_token_index=90,
            )
        ),
    }


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_a_wrapper_is_named_and_the_printed_command_takes_its_text_model_out(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    whole = wrappers()[name]().eval()
    whole.save_pretrained(tmp_path / "whole")
    tiny_tokenizer().save_pretrained(tmp_path / "whole")
    text = "gemma3_text" if name == "gemma3" else "llama"
    message = refused(tmp_path / "whole", f"`{name}` wraps a text model, `{text}`", readers=(check_model, load_model))
    line = text_part_line(str(tmp_path / "whole"))
    assert line in message and "did you mean" not in message
    execute(line, tmp_path, monkeypatch)
    part = load_model(str(tmp_path / "text-part"))
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        assert torch.allclose(part.model(ids).logits, whole(input_ids=ids).logits, atol=1e-5)


def test_a_wrapper_of_a_text_model_that_is_not_supported(tmp_path):
    config = transformers.LlavaConfig(text_config={"model_type": "opt"})
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / SINGLE, {"format": "pt"})
    message = refused(tmp_path, "`opt` is not supported either", readers=(check_model, load_model))
    assert all(family in message for family in FAMILIES) and "text-part" not in message


def test_a_run_folder_is_told_apart_and_its_checkpoint_only_where_it_is_taken(tmp_path):
    loaded = tiny_loaded("llama-gqa")
    run, plan = tmp_path / "run", uniform_plan(loaded.shape, FullGroup())
    patched_model(planned_model(loaded.model, plan), plan).save_pretrained(run / "checkpoint")
    (run / "model.json").write_text(json.dumps({"model": "models/tiny"}))
    message = refused(run, "this is a run folder", "`models/tiny` is its dense model", "`compress eval`")
    assert f"its checkpoint is `{run / 'checkpoint'}`" in message and "a recipe does not" in message
    message = refused(
        run / "checkpoint", "already carries a plan", "`compress eval`", readers=(check_model, load_model)
    )
    assert ModelSource(str(run / "checkpoint")).carries_plan
    loaded.model.save_pretrained(run / "checkpoint")  # as a native checkpoint
    assert "a recipe does not" not in refused(run, "this is a run folder", str(run / "checkpoint"))


def test_a_folder_with_a_gguf_file_in_it(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path, f"name the file: {tmp_path / 'model.gguf'}")


@pytest.mark.parametrize("spec", ["", " ", "a\0b"])
def test_what_is_no_name(spec):
    with pytest.raises(UserError, match="not the name of a model"):
        load_config(spec)


def test_a_hub_model_is_checked_like_a_folder(folder, tmp_path, monkeypatch):
    """Of the hub's cache only named files are taken: what an index says is checked before transformers sees it."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / ("0" * 40)
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    folder.rename(tmp_path / "moved")
    snapshot.parent.mkdir()
    (tmp_path / "moved").rename(snapshot)
    for module in ("huggingface_hub.constants", "huggingface_hub._snapshot_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache), raising=False)
    loaded = load_model("some/model")
    assert loaded.folder == snapshot and loaded.name == "some/model"
    (snapshot / SINGLE).unlink()
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "evil.bin"}}))
    (snapshot / "evil.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"evil\.bin"):
        load_model("some/model")
