"""A checkpoint's tokenizer is its source's, file by file; nothing is added to it that nobody asked for."""

import copy
import json

import pytest
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.data.passkey import PassKey
from compress.data.prompt import Prompt
from compress.errors import UserError
from compress.evaluate.measures.recall import recall
from compress.models.load import check_model, load_model, load_tokenizer
from compress.models.tokenizer_files import same_tokenizer, write_tokenizer
from compress.models.vocabulary import check_tokens, check_vocabulary
from compress.runtime.modeling_compress import CompressLlamaConfig
from tests.tiny import CONFIGS, random_ids, tiny_tokenizer


def settings_of(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


def change(folder, **values):
    kept = {key: value for key, value in (settings_of(folder) | values).items() if value is not ...}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))


def carried(folder, tmp_path, config=None):
    """The files that a checkpoint of this folder gets, and the lines that are told."""
    out = tmp_path / "out"
    lines: list[str] = []
    out.mkdir()
    config = config or CompressLlamaConfig(**CONFIGS["llama-gqa"]().to_dict())
    write_tokenizer(folder, load_tokenizer(str(folder)), out, config, lines.append)
    return out, lines


def test_every_file_is_carried_as_it_is(folder, tmp_path):
    change(folder, pad_token=..., padding_side="left", model_max_length=77, legacy=False, own_key={"a": 1})
    (folder / "chat_template.jinja").write_text("{% for m in messages %}w4 {{ m.content }} {% endfor %}")
    (folder / "tokenizer.model").write_bytes(b"\x00\x01sentencepiece")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "w2"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages[0].content }}")
    out, lines = carried(folder, tmp_path)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "tokenizer.model",
        "special_tokens_map.json",
        "additional_chat_templates/tool.jinja",
    }
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in names) and not lines
    again = AutoTokenizer.from_pretrained(out, config=transformers.PreTrainedConfig())
    assert again.pad_token is None and again.padding_side == "left" and again.model_max_length == 77
    assert again.apply_chat_template([{"role": "user", "content": "w9"}], tokenize=False) == "w4 w9 "


def test_added_tokens_are_carried(folder, tmp_path):
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    out, lines = carried(folder, tmp_path)
    again = AutoTokenizer.from_pretrained(out, config=transformers.PreTrainedConfig())
    assert again.convert_tokens_to_ids("<tool>") == 97 and not lines


def test_a_class_that_the_source_left_to_its_config_is_noted(folder, tmp_path):
    """A checkpoint's architecture is none that AutoTokenizer knows a class for."""
    change(folder, tokenizer_class=...)
    out, lines = carried(folder, tmp_path)
    again = AutoTokenizer.from_pretrained(out, config=CompressLlamaConfig(**CONFIGS["llama-gqa"]().to_dict()))
    assert same_tokenizer(again, load_tokenizer(str(folder)))
    assert set(settings_of(out)) - set(settings_of(folder)) <= {"tokenizer_class"}
    assert all("tokenizer_class" in line or "class" in line for line in lines)


def test_code_of_the_tokenizer_is_not_named(folder, tmp_path):
    change(folder, auto_map={"AutoTokenizer": ["tok.Mine", None]})
    out, lines = carried(folder, tmp_path)
    assert "auto_map" not in settings_of(out) and any("auto_map" in line for line in lines)


def test_without_files_the_tokenizer_is_saved(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    write_tokenizer(None, tokenizer, out, CONFIGS["llama-gqa"](), pytest.fail)
    assert AutoTokenizer.from_pretrained(out, config=transformers.PreTrainedConfig()).pad_token is None


def test_a_model_without_a_token_for_padding_has_none_and_batches_work(folder):
    change(folder, pad_token=...)
    loaded = load_model(str(folder))
    assert loaded.tokenizer.pad_token is None
    task = PassKey(length=96, count=3)
    prompts = [
        Prompt(tuple(random_ids(1, size, seed=size)[0].tolist()), 6, (5,), expected="5", depth=0.5)
        for size in (80, 90, 60)
    ]
    alone = recall(loaded.model, loaded.tokenizer, task, prompts, batch_size=1)
    batched = recall(loaded.model, loaded.tokenizer, task, prompts, batch_size=3)
    assert [item.answer for item in batched.items] == [item.answer for item in alone.items]
    assert loaded.tokenizer.pad_token is None


def bigger(folder, *words, special=False):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(list(words), special_tokens=special)
    tokenizer.save_pretrained(folder)


def test_tokens_of_text_without_an_embedding_are_told_before_anything_runs(folder):
    bigger(folder, "zebra", "lion")
    for action in (check_model, load_model):
        with pytest.raises(UserError, match="2 tokens that the model has no embedding for") as caught:
            action(str(folder))
        assert "'zebra': 97" in str(caught.value) and "resize_token_embeddings" in str(caught.value)


def test_special_tokens_without_an_embedding_are_a_line_and_no_text_may_have_them(folder):
    bigger(folder, "<image>", special=True)
    checked = check_model(str(folder))
    assert any("<image>" in note for note in checked.notes) and load_model(str(folder)).notes == checked.notes
    ids = checked.tokenizer("w5 <image> w6", add_special_tokens=False)["input_ids"]
    with pytest.raises(UserError, match="no embedding for") as caught:
        check_tokens(ids, checked.config, "corpus.txt")
    assert "corpus.txt" in str(caught.value) and "97, at token 1" in str(caught.value)
    check_tokens(ids[:1], checked.config, "corpus.txt")
    check_tokens([], checked.config, "corpus.txt")


def test_more_rows_than_tokens_are_usual(folder):
    config = copy.deepcopy(load_model(str(folder)).model.config)
    config.vocab_size = 128
    assert check_vocabulary(tiny_tokenizer(), config, "x") == []
