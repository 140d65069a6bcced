"""Text that the model writes itself: drawn as a step-by-step reference draws it, kept, gone on with, and kept apart."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import compress.data.sampled as sampled_module
from compress.data.generated import GeneratedText
from compress.data.reader import Reader
from compress.data.sampled import RECORD, _noise, _Vocabulary, check_time
from compress.data.text import FileText
from compress.errors import NotFiniteError, UserError
from tests.data.language import byte_loaded, byte_tokenizer, story, story_in

LENGTH = 24
ENDS = [2, *range(200, 240)]  # many, so that documents end and begin again


def loaded(begin: bool = False, seed: int = 0) -> Any:
    made: Any = byte_loaded(seed)
    made.model.generation_config.eos_token_id = ENDS
    if begin:
        made.tokenizer = byte_tokenizer(begin=True)
    return made


def request(tokens: int = 5 * LENGTH, **fields: Any) -> GeneratedText:
    usual = {"greedy": 2, "least": 4, "min_p": 0.1, "temperature": 1.5}
    return GeneratedText(tokens=tokens, length=LENGTH, **usual | fields)


def reader(folder: Path, model: Any = None, **options: Any) -> Reader:
    return Reader(model or loaded(), 7, folder, **options)


def reference(made: Any, seed: str, asked: GeneratedText) -> list[int]:
    """One document, a whole pass for every token, in float64 where it is drawn."""
    words = _Vocabulary(made.model, made.tokenizer, torch.device("cpu"))
    noise = _noise(seed, LENGTH).tolist()
    ids: list[int] = []
    forced: list[int | None] = []
    age = 0
    while len(ids) < LENGTH:
        place = len(ids)
        forced = [*words.lead.tolist(), None]
        if age < len(forced):
            token = forced[age]
            chosen = token if token is not None else int(words.begins[int(noise[place] * len(words.begins))])
        else:
            logits = made.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            logits[words.banned] = -torch.inf
            if age < len(forced) + asked.least:
                logits[ENDS] = -torch.inf
            mass = (logits / asked.temperature).softmax(-1)
            mass = torch.where(mass < asked.min_p * mass.max(), 0, mass).cumsum(-1)
            likely = age < len(forced) + asked.greedy
            chosen = int(logits.argmax()) if likely else int((mass > noise[place] * mass[-1]).nonzero()[0])
        age = 0 if chosen in ENDS and age >= len(forced) else age + 1
        ids.append(chosen)
    return ids


@pytest.mark.parametrize("begin", [False, True])
@torch.no_grad()
def test_documents_are_those_of_a_pass_for_every_token(tmp_path: Path, begin: bool) -> None:
    made, asked = loaded(begin), request()
    ids = list(asked.read(reader(tmp_path, made), "calibration", 10).ids)
    assert len(ids) == 5 * LENGTH
    for number in range(5):
        assert ids[number * LENGTH : (number + 1) * LENGTH] == reference(made, f"7/calibration/{number}", asked)
    inside = [ids[i + 1] for i in range(len(ids) - 1) if ids[i] in ENDS and (i + 1) % LENGTH]
    assert len(inside) > 3, "no document ended, so that none began again"
    assert all(token == 1 for token in inside) is begin
    assert 0 not in ids, "a special token that ends nothing"


def test_what_is_there_is_not_written_again_and_more_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    write = sampled_module._Writer.write

    def counted(self: Any, seeds: list[str], report: Any) -> torch.Tensor:
        if len(calls) == 2 and stop:
            raise KeyboardInterrupt
        calls.append(len(seeds))
        return write(self, seeds, report)

    monkeypatch.setattr(sampled_module._Writer, "write", counted)
    stop = True
    lines: list[str] = []
    reports: list[tuple[int, int, str]] = []
    door = reader(tmp_path, say=lines.append, progress=lambda *report: reports.append(report))
    with pytest.raises(KeyboardInterrupt):
        door.ids(request(batch=2), "calibration", 1)
    stop = False
    ids = list(door.ids(request(batch=3), "calibration", 1))
    assert calls == [2, 2, 1] and reports[-1] == (5 * LENGTH, 5 * LENGTH, "text")
    assert list(door.ids(request(batch=1), "calibration", 1)) == ids and calls == [2, 2, 1]
    assert list(door.ids(request(7 * LENGTH - 5), "calibration", 1))[: len(ids)] == ids and calls == [2, 2, 1, 2]
    assert [line.rpartition(" in ")[0] for line in lines] == [
        f"text: the model wrote {count} tokens (calibration)" for count in (LENGTH, 2 * LENGTH)
    ]

    (folder,) = tmp_path.iterdir()
    part = folder / "calibration-0000002.int32"
    part.write_bytes(b"\0" * part.stat().st_size)
    again = list(door.ids(request(7 * LENGTH - 5), "calibration", 1))
    assert again[: len(ids)] == ids and sum(calls) == 7 + 5  # the damaged batch and all behind it
    assert (folder / RECORD).is_file() and not list(folder.glob(".*"))
    # Other parts, seeds and settings are other documents, and half as many are held out.
    held_out = door.ids(request(), "held_out", 1)
    assert len(held_out) == 5 * LENGTH / 2 and not set(ids[1:LENGTH]) >= set(held_out[1:LENGTH])
    for other in (Reader(loaded(), 8, tmp_path), reader(tmp_path, loaded(seed=1))):
        assert list(other.ids(request(), "calibration", 1)) != ids
    assert list(door.ids(request(greedy=0), "calibration", 1)) != ids


def test_batches_are_alike_and_smaller_where_the_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU whose memory another process took meanwhile: documents are written fewer at once, and are the same."""
    calls: list[int] = []
    write = sampled_module._Writer.write

    def full(self: Any, seeds: list[str], report: Any) -> torch.Tensor:
        calls.append(len(seeds))
        if len(seeds) > room:
            raise torch.cuda.OutOfMemoryError
        return write(self, seeds, report)

    monkeypatch.setattr(sampled_module._Writer, "write", full)
    room = 100
    ids = list(reader(tmp_path / "room").ids(request(batch=4), "calibration", 1))
    assert calls == [3, 2]  # not four and one
    calls.clear()
    room, lines = 2, list[str]()
    assert list(reader(tmp_path / "none", say=lines.append).ids(request(batch=5), "calibration", 1)) == ids
    assert calls == [5, 3, 2, 2, 1] and "no room for 5 documents at once; taking 3" in lines[0]
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        reader(tmp_path / "never").ids(request(batch=1), "calibration", 1)


class Together:
    """The processes of a launch as threads, with the face of `models.processes.Processes`."""

    def __init__(self, world: int) -> None:
        self.world, self.place = world, threading.local()
        self.barrier, self.held = threading.Barrier(world, timeout=60), [None] * world

    @property
    def rank(self) -> int:
        return int(self.place.rank)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        self.barrier.wait()

    def broadcast(self, value: Any, source: int) -> Any:
        return self.gather(value)[source]

    def gather(self, value: Any) -> list[Any]:
        self.held[self.rank] = value
        self.barrier.wait()
        held = list(self.held)
        self.barrier.wait()
        return held

    def run(self, call: Any) -> list[Any]:
        def one(rank: int) -> Any:
            self.place.rank = rank
            return call(rank)

        with ThreadPoolExecutor(self.world) as threads:
            return list(threads.map(one, range(self.world)))


def test_processes_share_the_writing_and_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = list(reader(tmp_path / "alone").ids(request(7 * LENGTH), "calibration", 1))
    together, calls, lines = Together(3), list[tuple[int, int]](), list[str]()
    write = sampled_module._Writer.write

    def counted(self: Any, seeds: list[str], report: Any) -> torch.Tensor:
        calls.append((together.rank, len(seeds)))
        if calls.count((1, 2)) == 1 and (together.rank, len(seeds)) == (1, 2):
            raise torch.cuda.OutOfMemoryError
        return write(self, seeds, report)

    monkeypatch.setattr(sampled_module._Writer, "write", counted)
    monkeypatch.setattr(sampled_module, "joined_processes", lambda: together)
    models = [loaded() for _ in range(3)]

    def read(rank: int) -> list[int]:
        say = lines.append if rank == 0 else lambda line: None
        return list(
            reader(tmp_path / "group", models[rank], say=say).ids(request(7 * LENGTH, batch=2), "calibration", 1)
        )

    assert together.run(read) == [alone] * 3
    # One process of the first round has no room, so the batch behind it is not kept; then all take one at once.
    assert sorted(calls) == [(0, 1), (0, 1), (0, 2), (1, 1), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert len(lines) == 1 and "in 3 processes" in lines[0]
    (folder,) = (tmp_path / "group").iterdir()
    assert len(list(folder.glob("*.int32"))) == 6
    calls.clear()
    assert together.run(read) == [alone] * 3 and not calls


def test_a_share_is_mixed_with_a_given_text(tmp_path: Path) -> None:
    given = story_in(tmp_path)
    door, mixed = reader(tmp_path / "kept"), request(8 * LENGTH, given=given, share=0.25)
    whole = given.read(door, "calibration", 6 * LENGTH)
    made = mixed.read(door, "calibration", 1)
    own = request(2 * LENGTH).read(door, "calibration", 1)
    assert list(made.ids) == [*own.ids, *whole.ids[: 6 * LENGTH]]
    assert made.key not in (own.key, whole.key) and own.key in made.key and whole.key in made.key
    assert mixed.written("calibration") == 2 * LENGTH and mixed.written("evaluation") == LENGTH
    assert story()[:100] in mixed.known().text and mixed.known().text != given.known().text
    assert request(batch=2).known() == request().known() != request(greedy=3).known()
    assert len(mixed.foreseen(door.tokenizer, "", "calibration")) == 8 * LENGTH
    ids = list(request(8 * LENGTH).read(door, "evaluation", 1).ids)
    assert request(8 * LENGTH).whole(door) == byte_tokenizer().decode(ids, skip_special_tokens=True)


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields in ({"share": 0.5}, {"given": FileText(path="a.txt")}, {"tokens": 2**34}, {"length": 15}):
        with pytest.raises(ValidationError):
            GeneratedText(**{"tokens": 100, **fields})
    with pytest.raises(UserError, match="longer than its context"):
        request().check(LENGTH - 1)
    request().check(LENGTH)
    with pytest.raises(UserError, match=r"about 200 hours on this machine"):
        check_time(200 * 3600)
    broken = loaded()
    broken.model.lm_head.weight.data[0] = float("nan")
    with pytest.raises(NotFiniteError):
        reader(tmp_path, broken).ids(request(), "calibration", 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="no room for the text"):
        reader(tmp_path).ids(request(greedy=1), "calibration", 1)


@pytest.mark.parametrize("begin", [False, True])
def test_documents_go_on_behind_a_capture_as_if_there_was_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: bool
) -> None:
    """A capture runs steps to warm up, which write tokens and fill the cache; in its place here are plain steps."""
    made, captures = loaded(begin), list[int]()

    def graph_of(step: Any) -> Any:
        captures.append(3)
        for _ in range(3):
            step()
        return step

    single = list(reader(tmp_path / "steps", made).ids(request(), "calibration", 1))
    monkeypatch.setattr(sampled_module, "graph_of", graph_of)
    monkeypatch.setattr(sampled_module, "takes_graphs", lambda model: True)
    replayed = list(reader(tmp_path / "graph", made).ids(request(), "calibration", 1))
    assert replayed == single and captures == [3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_from_a_graph_write_what_steps_by_themselves_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loaded()
    made.model.cuda()
    replayed = list(reader(tmp_path / "graph", made).ids(request(64 * LENGTH), "calibration", 1))
    monkeypatch.setattr(sampled_module, "graph_of", lambda step: step)
    assert list(reader(tmp_path / "steps", made).ids(request(64 * LENGTH), "calibration", 1)) == replayed
