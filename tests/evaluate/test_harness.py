"""lm-eval as a library: its own figures to the last digit, nothing cut, kept results, and paired differences."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from compress.data.text import FileText
from compress.errors import UserError
from compress.evaluate import harness
from compress.evaluate.compare import compare
from compress.evaluate.harness import run_task, suite_config
from compress.evaluate.measure import Variant
from compress.evaluate.measures.lm_eval import LmEval
from compress.evaluate.paired import paired
from compress.evaluate.suites.documents import documents
from compress.evaluate.tables import tables
from compress.evaluate.task_result import TaskResult
from compress.models.planned import mixers_of, planned_model
from compress.plan import make_plan
from compress.targets.full import FullGroup
from compress.targets.linear import LinearGroup
from tests.data.language import byte_loaded, byte_model, byte_tokenizer, story


def ran(folder: Path, name: str = "local_choice", **changes: Any) -> TaskResult:
    request = LmEval(tasks=(name,), include=str(folder), **changes)
    return run_task(byte_model(), byte_tokenizer(), request, name, None, seed=0, text="")


def test_agrees_with_lm_evals_own_loading(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    byte_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    theirs: Any = simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},dtype=float32",
        device="cpu",
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    values = theirs["results"]["local_choice"]
    ours = ran(tasks)
    assert ours.metrics == {"acc": values["acc,none"], "acc_norm": values["acc_norm,none"]}
    assert ours.errors == {"acc": values["acc_stderr,none"], "acc_norm": values["acc_norm_stderr,none"]}
    assert len(ours.samples) == 8 and not ours.generates and ours.main() == "acc_norm"
    assert math.fsum(sample.metrics["acc"] for sample in ours.samples) / 8 == ours.metrics["acc"]


FILTERED = """
task: local_numbers
dataset_path: json
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
generation_kwargs: {max_gen_toks: 4, until: []}
filter_list:
  - {name: none-at-all, filter: [{function: regex, regex_pattern: "(qqq)"}, {function: take_first}]}
  - {name: as-it-is, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def test_filters_are_told_apart(tasks: Path) -> None:
    (tasks / "local_numbers.yaml").write_text(FILTERED, encoding="utf-8")
    found = ran(tasks, "local_numbers")
    names = {"exact_match (none-at-all)", "exact_match (as-it-is)"}
    assert set(found.metrics) == set(found.errors) == set(found.higher) == names
    assert len(found.samples) == 8 and all(set(sample.metrics) == names for sample in found.samples)


WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: data/items.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[1]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""


def test_nothing_is_printed_beside_the_result(tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tasks / "local_words.yaml").write_text(WORDS, encoding="utf-8")
    ran(tasks, "local_words")  # an aggregation that is no mean: lm-eval tells of its bootstrap on stdout
    assert capfd.readouterr().out == ""


def test_what_is_too_long_is_refused(tasks: Path) -> None:
    request = LmEval(tasks=("local_choice",), include=str(tasks))
    with pytest.raises(UserError, match="never shortened"):
        run_task(byte_model(context=4), byte_tokenizer(), request, "local_choice", None, seed=0, text="")
    with pytest.raises(UserError, match="never shortened"):
        run_task(byte_model(context=1024), byte_tokenizer(), LmEval(), "vt", 2000, seed=0, text=story())


def test_unknown_names_are_told(tasks: Path) -> None:
    with pytest.raises(UserError, match="local_choic"):
        ran(tasks, "local_choic")
    with pytest.raises(UserError, match="no such folder"):
        ran(tasks / "none")
    with pytest.raises(UserError, match="niah_single_1"):
        LmEval(suites=("niah_singel_1",)).check(None)
    with pytest.raises(UserError, match="context"):
        LmEval(suites=("vt",), lengths=(4096,)).check(2048)


def test_missing_data_is_told(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "items.jsonl").unlink()
    with pytest.raises(UserError, match="data files are missing"):
        ran(tasks)


def test_a_suite_runs_through_the_cache(tasks: Path) -> None:
    found = run_task(byte_model(), byte_tokenizer(), LmEval(count=2), "passkey", 600, seed=1, text=story())
    assert found.generates and found.length == 600 and set(found.metrics) == {"score"}
    assert len(found.samples) == 2 and all(sample.depth is not None for sample in found.samples)
    assert found.errors["score"] == 0.0  # a random model finds nothing


def test_a_suite_is_scored_without_the_cache(tasks: Path) -> None:
    found = run_task(byte_model(), byte_tokenizer(), LmEval(count=3), "passkey:prefill", 600, seed=1, text=story())
    assert found.task == "passkey_prefill_600" and not found.generates and found.main() == "acc"
    assert found.metrics == {"acc": 0.0} and len(found.samples) == 3
    config = suite_config("passkey:prefill", 600, 1, byte_tokenizer(), 1, story())
    doc = config["custom_dataset"]()["test"][0]
    scored = config["doc_to_text"](doc) + config["doc_to_target"](doc)
    assert scored.endswith(f"The pass key is {doc['answers'][0]}")


def test_variants_are_kept_and_paired(tasks: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text(story(), encoding="utf-8")
    built: list[str] = []

    def variant(name: str, seed: int) -> Variant:
        def build() -> Any:
            built.append(name)
            return byte_model(seed)

        return Variant(name, build, key=name)

    def both() -> Any:
        request = LmEval(tasks=("local_choice",), include=str(tasks), suites=("passkey",), lengths=(600,), count=2)
        return compare(
            byte_loaded(),
            [variant("dense", 0), variant("plan", 1)],
            [request],
            text=FileText(path=str(text)),
            seed=0,
            cache_dir=tmp_path / "kept",
        )

    first = both()
    assert built == ["dense", "plan"]
    assert both() == first.model_copy(
        update={"variants": [v.model_copy(update={"seconds": 0.0}) for v in first.variants]}
    )
    assert built == ["dense", "plan"]
    gap = first.against_dense(first.variants[1], first.tasks()[0])
    dense, ours = (row.of("lm_eval")[0].metrics["acc_norm"] for row in first.variants)
    assert gap is not None and gap.difference == pytest.approx(ours - dense)
    assert first.worst_drop(first.variants[1]) is not None
    assert any("lm-eval" in table.title for table in tables(first))


def test_paired_difference_by_hand() -> None:
    gap = paired([1, 0, 0, 1], [1, 1, 0, 1])
    assert gap is not None and gap.difference == -0.25
    assert gap.error == pytest.approx(float(torch.tensor([0.0, -1.0, 0.0, 0.0]).std() / 2))
    assert not gap.significant
    assert paired([1, 0], [1]) is None
    assert paired([1, float("nan")], [1, 1]) is None


def test_items_are_sized_with_one_tokenizer_for_all(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sized: list[Any] = []

    def recorded(name: str, tokenizer: Any, *rest: Any) -> Any:
        sized.append(tokenizer)
        return documents(name, tokenizer, *rest)

    monkeypatch.setattr(harness, "documents", recorded)
    own, shared, request = byte_tokenizer(begin=True), byte_tokenizer(), LmEval(count=1)
    run_task(byte_model(), own, request, "passkey", 600, seed=1, text=story())
    run_task(byte_model(), own, request, "passkey", 600, seed=1, text=story(), sizer=shared)
    assert set(map(id, sized[:1])) == {id(own)} and sized[-1] is shared


def test_linear_heads_answer_in_padded_batches_as_alone() -> None:
    """States and windows of a sequence do not depend on its padding, neither scored nor generated."""
    from lm_eval.api.instance import Instance

    from compress.evaluate.strict import Strict

    state, delta = LinearGroup(alpha=1), LinearGroup(rule="delta", alpha=1, decay="token")
    plan = make_plan(byte_loaded().shape, [[state, state], [delta, FullGroup()]])
    model = planned_model(byte_loaded().model, plan, untrained=True)
    for mixer in mixers_of(model):
        for name, weight in mixer.named_parameters():
            if name in ("gain", "gate_bias", "norm"):
                weight.data.fill_(1.0)
    questions = [story()[90 * i : 90 * i + 250 * (1 + i % 4)] for i in range(6)]
    found: list[list[Any]] = []
    for batch in (1, 4):
        lm = Strict(model, copy.deepcopy(byte_tokenizer()), batch)
        scored = [Instance("loglikelihood", {}, (text, " The stone of"), i) for i, text in enumerate(questions)]
        options = {"max_gen_toks": 6, "until": [], "do_sample": False}
        written = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(questions)]
        found.append([*lm.loglikelihood(scored, disable_tqdm=True), *lm.generate_until(written, disable_tqdm=True)])
    alone, padded = found
    assert len(set(alone)) == 12 and [each[0] for each in padded[:6]] == pytest.approx([each[0] for each in alone[:6]])
    assert padded[6:] == alone[6:] and all(alone[6:])
