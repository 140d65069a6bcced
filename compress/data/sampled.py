"""Samples documents from the dense model, many at once through its KV cache, and keeps them on disk.

A document depends on the seed, its part and its number. Its random numbers are drawn on the CPU, one a token, and the
token is found on the device by the inverse of the distribution function, so that a step needs nothing from the host and
a CUDA graph holds it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.data.draw import draw
from compress.data.generated import AT_ONCE, GeneratedText
from compress.data.text import Part, leading_tokens
from compress.errors import NotFiniteError, UserError
from compress.files import key_of, write_bytes, write_text
from compress.json_file import read_sealed, sealed
from compress.models.graph import graph_of
from compress.models.placement import free_bytes, input_device, takes_graphs
from compress.models.planned import planned_model
from compress.models.processes import Processes, joined_processes
from compress.models.stream import refuse_streamed
from compress.plan import uniform_plan
from compress.runtime.modeling_compress import CACHE
from compress.targets.full import FullGroup
from compress.words import duration, size

if TYPE_CHECKING:
    from compress.data.reader import Reader

SCHEMA = 1
RECORD = "written.json"
SHARE_OF_MEMORY = {"cpu": 0.5, "cuda": 0.75}  # of what is free, for caches and logits
CAPTURING = 8  # steps, more than a graph takes to be captured
LONGEST_WRITING = 7 * 24 * 3600.0  # seconds
EVERY = 64  # tokens of every document between two reports


class _Batch(BaseModel):
    """One file of documents: their token ids in a row, as 4-byte integers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: Part
    first: int = Field(ge=0)
    documents: int = Field(ge=1)
    seconds: float = Field(ge=0)
    sha256: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.part}-{self.first:07d}.int32"


class _Record(BaseModel):
    """What a folder holds: batches that are whole, in the order in which they were written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: tuple[_Batch, ...] = ()


def sampled(reader: Reader, request: GeneratedText, part: Part, tokens: int) -> tuple[array[int], str]:
    """The first `tokens` token ids of a part of what the model writes, and a key of what they depend on.

    Batches of documents are files of a folder in `reader.folder`, named after all that they depend on, each written
    whole or not at all, with a checksum; what is there is not written again, and more tokens go on behind it. Several
    processes of a launch, which all have to ask, share the work, and the main one keeps what they wrote.

    Raises:
        UserError: the disk has no room, or the work would take more than a week.
        NotFiniteError: the model's logits are not finite.
    """
    loaded = reader.loaded
    dtype = str(next(loaded.model.parameters()).dtype)
    key = key_of("generated", SCHEMA, loaded.shape.fingerprint, dtype, reader.seed, request.facts)
    folder, count = reader.folder / f"generated-{key}", -(-tokens // request.length)
    processes = joined_processes()
    # What the main process sees counts: others could look while it writes.
    done = processes.broadcast(_documents_there(folder, part) if processes.main else 0, 0)
    if done < count:
        _write(reader, request, part, folder, range(done, count), processes)
        processes.wait()  # the files are there from here on
    ids = _kept(folder, part)
    if len(ids) < tokens:
        raise RuntimeError(f"{folder}: {len(ids)} tokens of {part} where {tokens} were written")
    del ids[tokens:]
    return ids, key_of(key, part, tokens)


def _record(folder: Path) -> _Record:
    """Of a folder; empty where there is none, or it is damaged."""
    try:
        return _Record.model_validate(read_sealed(folder / RECORD) or {})
    except ValidationError:
        return _Record()


def _kept(folder: Path, part: Part) -> array[int]:
    """Token ids of a part up to the first batch that is not there, or not as it was written."""
    ids = array("i")
    for batch in _whole(folder, part, _record(folder)):
        ids.frombytes((folder / batch.name).read_bytes())
    return ids


def _whole(folder: Path, part: Part, record: _Record) -> list[_Batch]:
    """The batches of a part that follow each other from the first document on, unchanged on the disk."""
    by_first = {batch.first: batch for batch in record.batches if batch.part == part}
    batches: list[_Batch] = []
    first = 0
    while first in by_first:
        batch = by_first[first]
        path = folder / batch.name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != batch.sha256:
            break
        batches.append(batch)
        first += batch.documents
    return batches


def _documents_there(folder: Path, part: Part) -> int:
    """Documents of a part that are there from the first on."""
    return sum(batch.documents for batch in _whole(folder, part, _record(folder)))


def _write(
    reader: Reader, request: GeneratedText, part: Part, folder: Path, missing: range, processes: Processes
) -> None:
    """Write the documents of a part that are missing, batch by batch, in every process a batch of its own; the main one
    puts all of them on the disk."""
    main, length, count = processes.main, request.length, missing.stop
    record, done = _record(folder), missing.start
    reader.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(reader.folder, 4 * len(missing) * length)
    writer = _Writer(reader.loaded, request)
    began = time.monotonic()
    while done < count:
        at_once = min(processes.gather(writer.at_once))
        size = alike(count - done, at_once, processes.world)
        starts = range(done, count, size)[: processes.world]

        def report(written: int, before: int = done, now: int = min(count - done, size * len(starts))) -> None:
            if reader.progress is not None:
                reader.progress(before * length + now * written, count * length, "text")

        batch: tuple[_Batch, bytes] | None = None
        if processes.rank < len(starts):
            first = starts[processes.rank]
            numbers = range(first, min(count, first + size))
            batch = _batch(writer, reader.seed, part, numbers, report)
            if batch is None:
                reader.say(f"text: the GPU has no room for {len(numbers):,} documents at once; taking {writer.at_once}")
        for made in processes.gather(batch)[: len(starts)]:
            if made is None:  # what lies behind it would be behind a gap
                break
            if main:
                record = _keep(folder, record, *made)
            done += made[0].documents
        if done > missing.start:
            check_time((time.monotonic() - began) / (done - missing.start) * (count - done))
    beside = f" in {processes.world} processes" if processes.world > 1 else ""
    reader.say(
        f"text: the model wrote {len(missing) * length:,} tokens ({part.replace('_', ' ')}){beside} in "
        f"{duration(time.monotonic() - began)}"
    )


def alike(left: int, most: int, processes: int = 1) -> int:
    """Documents of a batch where so many are left: batches are as large as each other, not the last one small, because
    a step takes as long for few documents as for some more."""
    rounds = -(-left // (most * processes))
    return -(-left // (rounds * processes))


def _batch(
    writer: _Writer, seed: int, part: Part, numbers: range, report: Callable[[int], None]
) -> tuple[_Batch, bytes] | None:
    """The documents of these numbers and what is recorded of them; None as `_tried`."""
    before = time.monotonic()
    documents = _tried(writer, [f"{seed}/{part}/{number}" for number in numbers], report)
    if documents is None:
        return None
    data = documents.numpy().tobytes()
    seconds, digest = round(time.monotonic() - before, 3), hashlib.sha256(data).hexdigest()
    batch = _Batch(
        part=part,
        first=numbers.start,
        documents=len(numbers),
        seconds=seconds,
        sha256=digest,
        device=writer.device.type,
    )
    return batch, data


def _keep(folder: Path, record: _Record, batch: _Batch, data: bytes) -> _Record:
    """Put a batch on the disk, and then into the record, which is returned."""
    write_bytes(folder / batch.name, data)
    others = tuple(other for other in record.batches if (other.part, other.first) != (batch.part, batch.first))
    record = _Record(batches=(*others, batch))
    write_text(folder / RECORD, sealed(record.model_dump(mode="json")))
    return record


def _tried(writer: _Writer, seeds: Sequence[str], report: Callable[[int], None]) -> torch.Tensor | None:
    """The documents; None where another process took the memory meanwhile, and the writer now takes half as many."""
    try:
        return writer.write(seeds, report)
    except torch.cuda.OutOfMemoryError:
        if len(seeds) == 1:
            raise
    torch.cuda.empty_cache()  # here, where nothing holds what the failed call had
    writer.at_once = -(-len(seeds) // 2)
    return None


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if need > free:
        raise UserError(
            "the disk has no room for the text that the model is to write",
            where=str(folder),
            expected=f"{size(need)} free",
            found=size(free),
            fix="ask for fewer tokens",
        )


def check_time(seconds: float) -> None:
    """Refuse to write for longer than a week. Raises UserError."""
    if seconds > LONGEST_WRITING:
        raise UserError(
            "the model would write this text for too long",
            where="source: generated",
            expected=f"at most {LONGEST_WRITING / 3600:.0f} hours",
            found=f"about {seconds / 3600:,.0f} hours on this machine",
            fix="ask for fewer tokens, or use a GPU",
        )


class _Vocabulary:
    """What a model may write: its tokenizer's tokens, and of the special ones only those that end a text.

    Attributes:
        columns: tokens that the model has logits of.
        banned: `[n]` tokens among these that it may not write.
        ends: `[n]` tokens that end a text.
        begins: `[n]` tokens that a document may begin with, which are readable by themselves.
        lead: `[n]` tokens that the tokenizer puts before a text.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.columns = columns = int(model.config.vocab_size)
        special = set(tokenizer.all_special_ids)
        special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        known = sorted(number for number in tokenizer.get_vocab().values() if number < columns)
        plain = [number for number in known if number not in special]
        words = tokenizer.batch_decode([[number] for number in plain])
        begins = [
            number
            for number, word in zip(plain, words, strict=True)
            if word.strip() and word.strip().isprintable() and "\ufffd" not in word
        ]
        if not begins:
            raise UserError(
                "the tokenizer has no token that a text may begin with",
                where="source: generated",
                expected="tokens that are words or characters",
            )
        ends = model.generation_config.eos_token_id
        of_config = [] if ends is None else list(ends) if hasattr(ends, "__iter__") else [ends]
        asked = {int(number) for number in (*of_config, tokenizer.eos_token_id) if number is not None}
        ended = {number for number in asked if number < columns}
        banned = torch.ones(columns, dtype=torch.bool)
        banned[[*plain, *ended]] = False
        self.banned = banned.nonzero()[:, 0].to(device)
        self.ends = torch.tensor(sorted(ended), dtype=torch.long, device=device)
        self.begins = torch.tensor(begins, dtype=torch.long, device=device)
        self.lead = torch.tensor(leading_tokens(tokenizer), dtype=torch.long, device=device)


class _Writer:
    """Writes documents of one length, all of a batch at once.

    Attributes:
        at_once: documents in a batch, at most.
    """

    def __init__(self, loaded: Any, request: GeneratedText) -> None:
        self.request = request
        refuse_streamed(loaded.model, "text that the model writes", "source: generated", "take another text")
        # The runtime's own cache: it takes steps that a graph can hold, and knows layers that slide by themselves.
        self.model = planned_model(loaded.model, uniform_plan(loaded.shape, FullGroup()))
        self.device = input_device(loaded.model)
        self.vocabulary = _Vocabulary(loaded.model, loaded.tokenizer, self.device)
        if len(self.vocabulary.lead) + 1 >= request.length:
            raise UserError(
                "the documents have no room for a text", expected=f"length above {len(self.vocabulary.lead) + 1}"
            )
        weights = next(loaded.model.parameters())
        cache = loaded.shape.dense_cost(request.length, weights.dtype.itemsize).held_bytes
        row_bytes = cache + 24 * self.vocabulary.columns  # logits and their distribution, in float32
        kind = self.device.type
        if kind == "cuda":
            torch.cuda.empty_cache()  # or what an earlier part was written with would not count as free
        free = free_bytes(loaded.model)
        most, share = AT_ONCE.get(kind, AT_ONCE["cpu"]), SHARE_OF_MEMORY.get(kind, SHARE_OF_MEMORY["cpu"])
        room = most if free is None else int(share * free / row_bytes)
        self.at_once = request.batch or max(1, min(room, most))

    @torch.inference_mode()
    def write(self, seeds: Sequence[str], report: Callable[[int], None]) -> torch.Tensor:
        """Token ids of one document for every seed, `[B, length]` int32 on the CPU.

        Args:
            report: called with the tokens of every document so far.

        Raises:
            NotFiniteError: the logits are not finite.
        """
        documents = _Documents(self.model, self.vocabulary, self.request, self.device, seeds)
        documents.begin()
        replay = documents.captured() if takes_graphs(self.model) else documents.step
        for written in range(documents.forced + 1, self.request.length):
            replay()
            if written % EVERY == 0:
                report(written)
        report(self.request.length)
        if not bool(documents.finite):
            raise NotFiniteError("the model's logits are not finite in a text that it writes")
        return documents.ids.int().cpu()


class _Documents:
    """A batch of documents that are being written, one token of each a step.

    All that a step reads and changes lies on the device at addresses that stay: a CUDA graph holds it, and the random
    numbers are there before the first step. The host reads nothing until the documents are whole.

    Attributes:
        forced: tokens at the start of a document that nobody chooses.
        ids: `[B, length]` token ids, those that are not written yet 0.
        finite: `[1]` bool, whether all logits so far were.
    """

    def __init__(
        self, model: Any, words: _Vocabulary, request: GeneratedText, device: torch.device, seeds: Sequence[str]
    ) -> None:
        self.model, self.words, self.request = model, words, request
        batch, self.forced = len(seeds), len(words.lead) + 1
        self.noise = torch.stack([_noise(seed, request.length) for seed in seeds]).to(device)
        self.firsts = words.begins[(self.noise * len(words.begins)).long()]
        self.ids = torch.zeros(batch, request.length, dtype=torch.long, device=device)
        self.ids[:, : self.forced - 1] = words.lead
        self.ids[:, self.forced - 1] = self.firsts[:, self.forced - 1]
        self.age = torch.full((batch,), self.forced, device=device)  # tokens of the text that is being written
        self.place = torch.full((1,), self.forced, device=device)  # of the next token
        self.finite = torch.ones(1, dtype=torch.bool, device=device)
        self.cache = model.new_cache(max_length=request.length)

    def begin(self) -> None:
        """Write the first token behind those that nobody chooses."""
        first = self.ids[:, : self.forced]
        self._choose(self.model(input_ids=first, logits_to_keep=1, **{CACHE: self.cache}).logits[:, -1])

    def step(self) -> None:
        """Write the next token of every document."""
        token = self.ids.index_select(1, self.place - 1)
        self._choose(self.model(input_ids=token, **{CACHE: self.cache}).logits[:, -1])

    def captured(self) -> Callable[[], None]:
        """The replay of a CUDA graph that holds `step`; behind it all is as before."""
        age, place = self.age.clone(), int(self.place)
        if self.request.length - place <= CAPTURING:  # there is no room for the steps that capturing takes
            return self.step
        replay = graph_of(self.step)
        self.go_to(place)
        self.age.copy_(age)
        return replay

    def go_to(self, place: int) -> None:
        """Make the token at this place the next one; the cache then counts what lies before it."""
        self.cache.assume(place - 1)  # it has all tokens but the last
        self.place.fill_(place)

    def _choose(self, logits: torch.Tensor) -> None:
        """Write the next token of every document, from logits `[B, V]`."""
        words, age, forced = self.words, self.age, self.forced
        noise = self.noise.index_select(1, self.place)
        asked = self.request
        early = (age < forced + asked.least, words.ends)
        found = draw(logits, words.banned, noise, asked.temperature, asked.min_p, early)
        self.finite.logical_and_(found.finite)
        chosen = torch.where(age < forced + asked.greedy, found.likely, found.token)
        chosen = torch.where(age == forced - 1, self.firsts.index_select(1, self.place)[:, 0], chosen)
        if forced > 1:
            chosen = torch.where(age < forced - 1, words.lead[age.clamp(max=forced - 2)], chosen)
        self.ids.index_copy_(1, self.place, chosen[:, None])
        ended = (chosen[:, None] == words.ends).any(1) & (age >= forced)
        age.add_(1).masked_fill_(ended, 0)  # a scalar in `torch.where` would be copied from the host
        self.place.add_(1)


def _noise(seed: str, length: int) -> torch.Tensor:
    """Numbers in [0, 1) for every token of a document, `[length]` float32."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    return torch.rand(length, generator=torch.Generator().manual_seed(number))
