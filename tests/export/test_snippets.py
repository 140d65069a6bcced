"""The lines that a user copies from the README and from a card: no question, no warning, where nobody can answer."""

from __future__ import annotations

import builtins
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, pipeline

import compress.export.export as export_module
from compress.evaluate.suites import documents
from compress.export.export import export_checkpoint
from compress.export.verify import Checks
from compress.models.load import load_tokenizer
from compress.models.shape import shape_of
from compress.plan import make_plan
from compress.targets.full import FullGroup
from compress.targets.window import WindowGroup
from tests import processes
from tests.tiny import mixed_plan, tiny_loaded

ROOT = Path(__file__).parents[2]
PROGRESS = re.compile(r"^(Loading weights|Loading checkpoint shards).*$", flags=re.MULTILINE)
RUN = """
import os, runpy, sys
sys.modules["compress"] = None
for folder, snippet in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(folder)
    runpy.run_path(snippet)
"""


def snippets(text: str) -> list[str]:
    """The blocks of Python in a page that load something."""
    return [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "from_pretrained" in block]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `patched` and `native`; what proves them otherwise is left out, since the snippets do."""
    folder = tmp_path_factory.mktemp("exported")
    loaded = tiny_loaded("llama-gqa")
    shape = shape_of(loaded.model)
    slides = WindowGroup(sink=0, alpha=50, beta=0.0)
    layered = make_plan(shape, [[target] * shape.kv_heads for target in (slides, FullGroup(), slides)])
    with pytest.MonkeyPatch.context() as patch:
        for form, plan, name in (
            ("patched", mixed_plan(shape), "CompressLlamaForCausalLM"),
            ("native", layered, "MinistralForCausalLM"),
        ):
            proof = Checks(1008, 0.0, 1e-4, "", 1, 1, 1, name, form == "native")
            patch.setattr(export_module, "verify_checkpoint", lambda *_, proof=proof, **__: proof)
            export_checkpoint(loaded, plan, folder / form, form=form)  # type: ignore[arg-type]
    return folder


def test_readme_and_cards_load_as_they_say(exported: Path, tmp_path: Path) -> None:
    (readme,) = snippets((ROOT / "README.md").read_text(encoding="utf-8"))
    named = re.search(r'^path = "(.+)"', readme, flags=re.MULTILINE)
    assert named is not None
    place = tmp_path / named[1]
    place.parent.mkdir(parents=True)
    place.symlink_to(exported / "patched")
    arguments: list[str] = []
    pages = [(tmp_path, readme)]
    for form in ("patched", "native"):
        (own,) = snippets((exported / form / "README.md").read_text(encoding="utf-8"))
        pages.append((exported / form, own))
    for number, (folder, snippet) in enumerate(pages):
        file = tmp_path / f"snippet{number}.py"
        file.write_text(snippet)
        arguments += [str(folder), str(file)]
    done = processes.run("code", RUN, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert PROGRESS.sub("", done.stderr.replace("\r", "\n")).strip() == ""
    assert len(done.stdout.splitlines()) == 3 and "[y/N]" not in done.stdout


class Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What transformers warns of while nobody is there to answer a question."""

    def ask(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr(builtins, "input", ask)
    handler = Kept()
    logging.getLogger("transformers").addHandler(handler)
    yield handler.lines
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize("form", ["patched", "native"])
def test_pipelines_and_configurations_ask_nothing(exported: Path, logged: list[str], form: str) -> None:
    word: dict[str, Any] = {"trust_remote_code": True} if form == "patched" else {}
    path = str(exported / form)
    (answer,) = pipeline("text-generation", model=path, **word)("w5 w7 w9", max_new_tokens=4)
    assert answer["generated_text"].startswith("w5 w7 w9")
    assert AutoConfig.from_pretrained(path, **word).num_hidden_layers == 3
    assert logged == []


def test_our_own_commands_read_a_checkpoints_tokenizer_without_a_question(exported: Path, logged: list[str]) -> None:
    tokenizer = load_tokenizer(str(exported / "patched"))
    assert tokenizer("w5 w96")["input_ids"] == [5, 96]
    assert type(tokenizer) is type(load_tokenizer(str(exported / "native")))
    found = documents.load("niah_single_1", pretrained=str(exported / "patched"), length=256, count=1)
    assert len(found["test"]) == 1
    assert logged == []


def test_lm_eval_asks_nothing(exported: Path, logged: list[str]) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    wrapped = models.HFLM(pretrained=str(exported / "patched"), trust_remote_code=True, device="cpu")
    assert wrapped.tok_encode("w5 w7") == [5, 7]
    assert [line for line in logged if "custom code" in line or "model of type" in line] == []
