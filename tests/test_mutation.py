"""Damaged files of every kind end with a message: no traceback, no hang, and nothing changed is taken for whole.

`python -m scripts.mutate` runs thousands of the same cases.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damage import READERS, Reader, Trials, last_line, make_world
from tests.forkserver import ForkServer
from tests.mutation import FORMS, damages

QUICK = ("inspect", "report", "validate")  # a tenth of a second each; what reads models takes three times that


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    """The world, and children of this process, which has imported everything by then."""
    root = tmp_path_factory.mktemp("world")
    make_world(root)
    with ForkServer(()) as server:
        yield Trials(root, server)


def count_of(reader: Reader) -> int:
    if reader.slow:
        return 0
    return 2 if reader.command[0] in QUICK else 1


@pytest.mark.parametrize("kind", sorted({reader.kind for reader in READERS}))
def test_damage_is_told(kind: str, trials: Trials) -> None:
    wrong = []
    for number, reader in enumerate(READERS):
        if reader.kind == kind:
            for _, finding in trials.run(reader, number, count_of(reader)):
                if finding is not None:
                    wrong.append(f"{finding.why}: {reader.name}: {finding.mutator}: {last_line(finding.outcome)}")
    assert not wrong, "\n".join(wrong)


def test_a_finding_is_a_finding(trials: Trials, tmp_path: Path) -> None:
    """The harness sees what it is there to see: a command that fails without damage, and a change that is not told."""
    reader = next(reader for reader in READERS if reader.kind == "curve of a recovery")
    good = (trials.root / reader.world / reader.file).read_bytes()
    assert trials.one(reader, good)[0] is None
    silent = Reader("text", "unprofiled", "text.txt", "text", ("profile", "recipe.yaml"), reader_outputs())
    text = (trials.root / "unprofiled" / "text.txt").read_bytes()
    assert trials.one(silent, text[::-1].replace(b"w", b"") + text)[0] == "changed, silently"


def reader_outputs() -> tuple[str, ...]:
    return next(reader.outputs for reader in READERS if reader.kind == "partial profile")


@pytest.mark.parametrize("form", sorted(FORMS))
def test_damage_is_the_same_for_the_same_seed(form: str) -> None:
    data = {
        "yaml": b"model: ./model\nsearch: {points: 1}\n",
        "text": b"w1 w2 w3",
        "jsonl": b'{"text": "w1"}\n{"text": "w2"}\n',
        "safetensors": TENSORS,
        "partial": bytes(32) + TENSORS,
        "gguf": b"GGUF" + random.Random(0).randbytes(400),
    }.get(form, b'{"a": [1, 2.5, {"b": "c"}], "checksum": "sha256:0"}')
    first, second = damages(data, form, 1), damages(data, form, 1)
    some = [next(first) for _ in range(60)]
    assert some == [next(second) for _ in range(60)] and len({changed for _, changed in some}) > 30
    assert all(changed != data for _, changed in some)


TENSORS = (56).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  ' + bytes(8)
