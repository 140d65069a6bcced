"""A source's generation config reaches the checkpoint, or a line says what does not; before anything is profiled."""

import copy
import json
from typing import Any

import pytest
from transformers import GenerationConfig

from compress.errors import UserError
from compress.export.export import export_checkpoint
from compress.models.generation import repaired
from compress.models.load import check_model, load_model
from compress.plan import uniform_plan
from compress.targets.window import WindowGroup
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_model("llama-gqa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A model folder whose JSON files a test may change; the weights are a link."""
    made = tmp_path / "model"
    made.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            (made / path.name).symlink_to(path)
        else:
            (made / path.name).write_bytes(path.read_bytes())
    return made


def set_values(path, **values):
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | values))


# What is asked, what is left of it, and a word of the line that says so.
SCORES = {"output_scores": True, "return_dict_in_generate": True}
CASES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"temperature": 0.9, "top_p": 0.6}, {}, "do_sample"),
    (
        {"temperature": 0.9, "top_p": 0.6, "do_sample": True},
        {"temperature": 0.9, "top_p": 0.6, "do_sample": True},
        None,
    ),
    ({"top_k": 20, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 1e-4}, {}, "do_sample"),
    ({"cache_implementation": "quantized", "cache_config": {"nbits": 4}}, {}, "makes its own cache"),
    ({"cache_implementation": "static"}, {}, "makes its own cache"),
    ({"output_attentions": True}, {}, "no attention weights"),
    ({"output_scores": True}, {}, "return_dict_in_generate"),
    (
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        None,
    ),
    ({"use_cache": False}, {}, "stays on"),
    ({"prompt_lookup_num_tokens": 3}, {}, "drafted"),
    ({"num_assistant_tokens": 7, "is_assistant": False}, {"num_assistant_tokens": 7, "is_assistant": False}, None),
    ({"length_penalty": 0.8, "early_stopping": True}, {}, "num_beams"),
    ({"num_beams": 2, "length_penalty": 0.8}, {"num_beams": 2, "length_penalty": 0.8}, None),
    ({"forced_eos_token_id": 2, "suppress_tokens": [5]}, {"forced_eos_token_id": 2, "suppress_tokens": [5]}, None),
    ({"repetition_penalty": 1.1, "stop_strings": ["w5"]}, {"repetition_penalty": 1.1, "stop_strings": ["w5"]}, None),
    ({"eos_token_id": [2, 5], "pad_token_id": 4}, {"eos_token_id": [2, 5], "pad_token_id": 4}, None),
    ({"pad_token_id": [4, 5]}, {"pad_token_id": 4}, "is a list"),
    ({"pad_token_id": -1}, {"pad_token_id": None}, "no token has this number"),
    ({"a_publishers_own_key": {"deep": [1]}}, {"a_publishers_own_key": {"deep": [1]}}, None),
    ({"validate": "x", "save_pretrained": 1}, {}, "it is not a setting"),
    ({"max_length": 4096, "max_new_tokens": 7}, {"max_length": 4096, "max_new_tokens": 7}, None),
]


@pytest.mark.parametrize(("asked", "left", "word"), CASES, ids=[",".join(case[0]) for case in CASES])
def test_every_setting_is_carried_or_told(asked, left, word, tmp_path):
    made, lines = repaired(asked, "generation_config.json")
    made.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    copy.deepcopy(again).save_pretrained(tmp_path / "again")  # as a trainer does at every checkpoint
    for key, value in left.items():
        assert getattr(again, key) == value
    changed = [key for key in asked if asked[key] != left.get(key)]
    assert sorted(line.split("`")[1].split(":")[0] for line in lines) == sorted(changed)
    assert all(word in line for line in lines) if word else not lines
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert not {key for key in changed if left.get(key) is None} & saved.keys()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"stop_strings": ["w7"]}, "substring not found"),  # what transformers makes of this tokenizer's vocabulary
        ({"sequence_bias": [[[500], 1.0]]}, "vocabulary size"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"temperature": "hot", "do_sample": True, "early_stopping": "later"}, "early_stopping"),
        ({"streamer": "x"}, "streamer"),
        ({"watermarking_config": 5}, "generation config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_transformers_refuses_is_told_before_anything_runs(folder, values, found):
    set_values(folder / "generation_config.json", **values)
    for action in (check_model, load_model):
        with pytest.raises(UserError, match=found) as caught:
            action(str(folder))
        assert "generation_config.json" in str(caught.value)


def test_settings_in_an_old_config_json_count_where_there_is_no_other_file(folder):
    (folder / "generation_config.json").unlink()
    set_values(folder / "config.json", temperature=0.7, repetition_penalty=1.2)
    checked = check_model(str(folder))
    assert checked.generation.repetition_penalty == 1.2 and checked.generation.eos_token_id == 2
    assert any("temperature" in line for line in checked.notes)


def test_a_source_that_says_everything_gives_a_checkpoint_that_runs(folder, tmp_path):
    """The export itself proves logits and text in a fresh process; the settings are those of the source."""
    set_values(
        folder / "generation_config.json",
        temperature=0.9,
        top_p=0.6,
        cache_implementation="quantized",
        repetition_penalty=1.3,
        eos_token_id=[2, 5],
        suppress_tokens=[9],
        forced_eos_token_id=2,
        return_dict_in_generate=True,
        output_attentions=True,
        own_key="kept",
    )
    set_values(folder / "config.json", return_dict=False, output_attentions=True, use_cache=False)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left", "own": [1]}))
    loaded = load_model(str(folder))
    assert loaded.notes == check_model(str(folder)).notes
    for word in ("return_dict", "use_cache", "temperature", "top_p", "cache_implementation", "output_attentions"):
        assert any(f"`{word}:" in note for note in loaded.notes), word
    # Nothing that is measured depends on what the publisher set.
    assert loaded.model.generation_config.repetition_penalty is None
    assert loaded.model.generation_config.eos_token_id == [2, 5]
    plan = uniform_plan(loaded.shape, WindowGroup(sink=4, alpha=8, beta=0.0))
    export_checkpoint(loaded, plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.3 and written["eos_token_id"] == [2, 5]
    assert written["suppress_tokens"] == [9] and written["forced_eos_token_id"] == 2 and written["own_key"] == "kept"
    assert not {"temperature", "top_p", "cache_implementation", "output_attentions"} & written.keys()
    for name in ("tokenizer.json", "tokenizer_config.json"):  # no token for padding is made up
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told.get("return_dict", True) and told["use_cache"] and not told.get("output_attentions")


@pytest.mark.parametrize("context", [1, 16, 31])
def test_a_context_too_short_to_verify_is_told_at_once(folder, context):
    set_values(folder / "config.json", max_position_embeddings=context)
    with pytest.raises(UserError, match="max_position_embeddings"):
        check_model(str(folder))
