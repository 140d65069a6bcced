"""The card: metadata that the hub accepts, provenance that a person reads, engines that were tried."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData

import compress.export.card as card_module
from compress.export import metadata
from compress.export.card import render_card, tried
from compress.export.metadata import hub_id, source_metadata
from compress.export.provenance import provenance_lines
from compress.export.verify import Checks
from compress.plan import Mlp, Plan, make_plan
from compress.plan.skipped import STORED, Skipped, skipped
from compress.plan.states import states_of
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from compress.targets.retain import RetainGroup
from compress.targets.routed import RoutedGroup
from compress.targets.window import WindowGroup
from tests.tiny import mixed_plan, shape_of, tiny_model

PROVENANCE: dict[str, Any] = {
    "solver": {"name": "moa", "alphas": [64, 128], "beta": None, "exact": True},
    "budget": {"kv": 0.5, "lengths": [2048, 4096]},
    "held_out_documents": 12,
    "response_loss": 0.0123456789,
    "dense_response_loss": None,
    "decode_time": {"rows": [{"length": 2048, "batch": 1, "ms": 3.25}, {"length": 4096, "batch": 1, "ms": 4.5}]},
    "note": "a | b\nand `c` *d* <script>",
    "nothing": {},
}


def checks(loaded_as: str, native: bool) -> Checks:
    return Checks(1008, 1e-6, 1e-4, "", 1000, 1000, 2000, loaded_as, native)


def card(name: str, plan: Plan | None = None, *, native: bool = False, **kwargs: Any) -> str:
    plan = plan or mixed_plan(shape_of(tiny_model("llama-gqa")))
    made: dict[str, Any] = {
        "name": name,
        "source": source_metadata(name),
        "dtype": "float32",
        "itemsize": 4,
        "context": 1024,
        "checks": checks(kwargs.pop("loaded_as", "CompressLlamaForCausalLM"), native),
        "versions": {"compress": "0.1.0", "transformers": "5.24.0", "torch": "2.13.0"},
    }
    return render_card(plan, **made | kwargs)


def of_card(text: str) -> dict[str, Any]:
    """The metadata as the hub's own library reads it."""
    return ModelCard(text).data.to_dict()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise metadata.UNREACHABLE[0]("no address")

    monkeypatch.setattr(HfApi, "model_info", unreachable)


def test_only_a_name_that_the_hub_has_is_a_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "checkpoint").mkdir(parents=True)
    local = (
        "demo/smollm2-135m",
        "runs/checkpoint",
        str(tmp_path / "runs"),
        "models/x.gguf",
        "a: b/c",
        "no/such/folder",
    )
    for name in local:
        assert hub_id(name) is None
        assert "base_model" not in of_card(card(name))
    for name in ("org/Model-7B_v0.1", "gpt2"):
        text = card(name)
        assert of_card(text)["base_model"] == name and f"# {name}, " in text
    assert str(tmp_path) not in card(str(tmp_path / "runs"))


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    (tmp_path / "it's: a #model").mkdir()
    text = card(str(tmp_path / "it's: a #model"))
    found = of_card(text)
    assert found == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["compress", "sparse-attention", "kv-cache"],
    }
    assert yaml.safe_load(text.split("---\n")[1]) == found


@pytest.mark.parametrize(
    ("theirs", "taken"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: https://x.org/l\n---\n",
            {"license": "other", "license_name": "own", "license_link": "https://x.org/l"},
        ),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "own"},
        ),
        ("---\nbase_model: someone/else\n---\n", {}),
        ("# no metadata\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("---\n{broken: [\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        (None, {}),
    ],
)
def test_the_license_is_that_of_the_source(tmp_path: Path, theirs: str | None, taken: dict[str, str]) -> None:
    if theirs is not None:
        (tmp_path / "README.md").write_text(theirs)
    assert source_metadata(str(tmp_path)) == taken
    found = of_card(card(str(tmp_path)))
    assert {key: found.get(key) for key in taken} == taken and ("license" in found) == ("license" in taken)


def test_a_license_of_the_hub_and_a_link_beside_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SimpleNamespace(card_data=ModelCardData(license="other", license_link="LICENSE.md"))
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: theirs)
    assert source_metadata("org/model") == {
        "license": "other",
        "license_link": "https://huggingface.co/org/model/blob/main/LICENSE.md",
        "base_model": "org/model",
    }


def test_a_checkpoint_of_ours_hands_on_what_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/model\nlicense: mit\n---\n")
    assert source_metadata(str(tmp_path), ours=True) == {"license": "mit", "base_model": "org/model"}
    assert "# org/model, " in card(str(tmp_path), source=source_metadata(str(tmp_path), ours=True))


def test_provenance_is_words() -> None:
    assert provenance_lines(PROVENANCE) == [
        "- solver:",
        "  - name: `moa`",
        "  - alphas: 64, 128",
        "  - exact: yes",
        "- budget:",
        "  - kv: 0.5",
        "  - lengths: 2,048, 4,096",
        "- held out documents: 12",
        "- response loss: 0.0123457",
        "- decode time:",
        "  - rows:",
        "    - length 2,048, batch 1, ms 3.25",
        "    - length 4,096, batch 1, ms 4.5",
        "- note: a \\| b and \\`c\\` \\*d\\* \\<script\\>",
    ]
    plan = mixed_plan(shape_of(tiny_model("llama-gqa"))).model_copy(update={"provenance": PROVENANCE})
    text = card("org/model", plan)
    assert "{'" not in text and "None" not in text and "{" not in text.split("## Provenance")[1]
    assert f"weights `{plan.model.fingerprint}`" in text and "compress 0.1.0, transformers 5.24.0" in text


@pytest.mark.parametrize("solver", [None, "amp", {}, {"name": "amp"}, {"importance": "amp"}])
def test_the_card_of_a_pruned_plan_takes_any_provenance(solver: Any) -> None:
    plan = mixed_plan(shape_of(tiny_model("llama-gqa")))
    layers = [layer.model_copy(update={"mlp": Mlp.of(range(32))}) for layer in plan.layers]
    provenance = {} if solver is None else {"solver": solver}
    text = card("org/model", plan.model_copy(update={"layers": tuple(layers), "provenance": provenance}))
    assert ("ranked by `amp`" in text) == (isinstance(solver, dict) and "importance" in solver)


def test_a_recipe_cannot_end_its_own_block() -> None:
    recipe = "a: 1  # ```\n```\n# not a heading\n"
    assert f"````yaml\n{recipe.strip()}\n````" in card("org/model", recipe=recipe)


def test_the_card_says_which_versions_were_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(version: str, same: bool, message: str = "", name: str = "CompressLlamaForCausalLM") -> dict[str, Any]:
        return {"transformers": version, "architecture": name, "same": same, "message": message}

    rows = [row("5.0.0", True), row("5.0.0", False, "OSError: no"), row("5.8.1", True), row("5.24.0", True)]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": [*rows, row("5.1.0", True, name="Other")]}))
    monkeypatch.setattr(card_module, "VERSIONS", table)
    assert tried("CompressLlamaForCausalLM", besides="5.24.0") == {
        "same": ["5.8.1"],
        "other": [("5.0.0", "OSError: no")],
    }
    text = card("org/model")
    assert (
        "| transformers 5.8.1 | a small CompressLlamaForCausalLM of this form gave the same logits and greedy tokens |"
        in text
    )
    assert "| transformers 5.0.0 | OSError: no |" in text and "| transformers 5.24.0 | the plan, by Triton" in text


def test_the_card_says_whether_the_plugin_for_vllm_serves_the_plan() -> None:
    shape = shape_of(tiny_model("llama-gqa"))

    def row(*targets: Any) -> str:
        plan = make_plan(shape, [targets] * shape.layers)
        return next(line for line in card("org/model", plan).splitlines() if "plugin compress-vllm" in line)

    windows = FullGroup(), WindowGroup(sink=4, alpha=30, beta=0.5)
    assert "the plan, with the memory that it saves; needs no" in row(*windows)
    without = [
        next(
            line
            for line in card("org/model", make_plan(shape, [windows] * 3), trained=trained).splitlines()
            if "without it" in line
        )
        for trained in (False, True)
    ]
    assert ["another model" in line for line in without] == [False, True] and "a line at load says so" in without[0]
    for other in (LinearGroup(alpha=64), WindowGroup(sink=4, alpha=30, beta=0.5, rule="length")):
        assert "refuses, and says which" in row(FullGroup(), other)


def test_the_card_says_which_plans_decode_with_assistance() -> None:
    """As a checkpoint does: `test_what_is_taken_back_was_never_given` holds the caches to `Target.takes_back`."""
    shape = shape_of(tiny_model("llama-gqa"))

    def said(*targets: Any) -> str:
        return " ".join(card("org/model", make_plan(shape, [targets] * shape.layers)).split())

    works = "and assisted decoding, by a draft model or by looking up the prompt, writes the greedy text. Refused, with"
    refused = "assisted decoding, as `linear`, `retain` groups take no token back; quantised caches"
    state = LinearGroup(alpha=64)
    lists = RetainGroup(scorer="value_norm", threshold=0.0, share=0.5)
    assert works in said(FullGroup(), WindowGroup(sink=4, alpha=30, beta=0.5))
    assert works in said(*RoutedGroup.layer(2, 1))
    assert refused in said(state, lists) and works not in said(state, FullGroup())
    length = "Refused, with an error that says so: chunked prefill"
    assert length in said(FullGroup(), WindowGroup(sink=4, alpha=30, beta=0.5, rule="length"))


def test_the_card_says_that_head_groups_changed_places() -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    window = WindowGroup(sink=4, alpha=30, beta=0.0)
    plan = make_plan(shape, [(window, FullGroup())] * 3)
    turned = plan.layers[0].model_copy(update={"order": (1, 0)})
    other = plan.model_copy(update={"layers": (turned, *plan.layers[1:])})
    assert "The head groups of 1 layer have other places" in card("org/model", other)
    assert "other places" not in card("org/model", plan)


@pytest.mark.parametrize(("family", "words"), [("qwen3", "--model-impl transformers"), ("llama-gqa", "by itself")])
def test_the_card_says_what_vllm_does_with_native_windows(family: str, words: str) -> None:
    shape = shape_of(tiny_model(family))
    slides = WindowGroup(sink=0, alpha=50, beta=0.0)
    plan = make_plan(shape, [[target] * shape.kv_heads for target in (slides, FullGroup(), slides)])
    name = {"qwen3": "Qwen3ForCausalLM", "llama-gqa": "MinistralForCausalLM"}[family]
    text = card("org/model", plan, native=True, loaded_as=name)
    assert words in next(line for line in text.splitlines() if line.startswith("| vLLM"))
    assert "trust_remote_code" not in text


def test_the_table_of_versions_is_whole() -> None:
    table = json.loads(card_module.VERSIONS.read_text(encoding="utf-8"))
    assert table["rows"] and all(row["same"] or row["message"] for row in table["rows"])


def test_the_card_of_linear_heads_says_what_the_state_is_and_who_cannot_serve_it() -> None:
    linear = LinearGroup(alpha=64)
    plan = make_plan(shape_of(tiny_model("llama-gqa")), [[linear, FullGroup()], [linear] * 2, [FullGroup()] * 2])
    text = " ".join(card("tiny", plan, trained=True).split())
    states = states_of(plan, 4)
    assert states is not None and states.words in text and f"{states.pays_from} tokens on" in text
    assert "A state is a matrix in float32" in text and "summed up in a state of constant size" in text
    assert "cannot serve it: its attention has no such states" in text and "another model" in text
    assert "linear-attention" in of_card(card("tiny", plan))["tags"]
    assert "another model" not in card("tiny", plan)
    plain = card("tiny")
    assert "linear-attention" not in plain and "state" not in plain.partition("## What runs it")[0]


def test_the_card_of_routed_heads_says_what_is_skipped_and_where_nothing_is() -> None:
    shape = shape_of(tiny_model("llama-gqa"))
    plan = make_plan(shape, [RoutedGroup.layer(2, 1), [FullGroup()] * 2, RoutedGroup.layer(2, 1)])
    text = " ".join(card("tiny", plan, trained=True, weights=1000).split())
    last = Skipped.total(skipped(plan, 1024, 4), 1000)
    assert f"| 1024 | {100 * last.of_attention:.1f}% | {100 * last.of_prefill:.1f}% | 33.3% |" in text
    assert STORED in text and "routers that choose heads for every token" in text
    assert "every token chooses which heads it uses" in text and "which keys each head group sees" not in text
    assert "it knows no routers" in text and "another model" in text and "next to nothing" not in text
    assert "mixture-of-heads" in of_card(card("tiny", plan))["tags"]
    assert "So next to nothing is saved" in card("tiny", plan, weights=10**10)
    assert "router" not in card("tiny")


def test_another_attention_is_the_dense_model_on_its_own_weights_alone() -> None:
    kept = " ".join(card("tiny").split())
    trained = " ".join(card("tiny", trained=True).split())
    assert "another one runs the dense model." in kept
    assert "another one runs dense attention, which these weights were not trained with." in trained
