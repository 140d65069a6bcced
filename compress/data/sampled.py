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

from compress.data.text import Part, leading_tokens
from compress.errors import NotFiniteError, UserError
from compress.files import key_of, write_bytes, write_text
from compress.json_file import read_sealed, sealed
from compress.models.graph import graph_of
from compress.models.placement import free_bytes, input_device, takes_graphs
from compress.models.planned import planned_model
from compress.models.stream import refuse_streamed
from compress.plan import uniform_plan
from compress.runtime.modeling_compress import CACHE
from compress.targets.full import FullGroup
from compress.words import duration, size

if TYPE_CHECKING:
    from compress.data.generated import GeneratedText
    from compress.data.reader import Reader

SCHEMA = 1
RECORD = "written.json"
AT_ONCE = {"cpu": 16, "cuda": 512}  # documents, where the memory has room for them
SHARE_OF_MEMORY = 0.5  # of what is free, for caches and logits
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
    whole or not at all, with a checksum; what is there is not written again, and more tokens go on behind it. In a
    launch of several processes the main one writes, and the others wait for it.

    Raises:
        UserError: the disk has no room, or the work would take more than a week.
        NotFiniteError: the model's logits are not finite.
    """
    loaded = reader.loaded
    dtype = str(next(loaded.model.parameters()).dtype)
    key = key_of("generated", SCHEMA, loaded.shape.fingerprint, dtype, reader.seed, request.facts)
    folder, count = reader.folder / f"generated-{key}", -(-tokens // request.length)
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if group and torch.distributed.get_rank() > 0:
        torch.distributed.barrier()
    elif len(_kept(folder, part)) < count * request.length:
        _write(reader, request, part, folder, count)
    if group and torch.distributed.get_rank() == 0:
        torch.distributed.barrier()
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


def _write(reader: Reader, request: GeneratedText, part: Part, folder: Path, count: int) -> None:
    """Write what is missing of the first `count` documents of a part, batch by batch."""
    record = _record(folder)
    done = sum(batch.documents for batch in _whole(folder, part, record))
    reader.folder.mkdir(parents=True, exist_ok=True)
    _check_disk(reader.folder, 4 * (count - done) * request.length)
    writer = _Writer(reader.loaded, request)
    began = time.monotonic()
    start = done
    while done < count:
        numbers = range(done, min(count, done + writer.at_once))

        def report(written: int, before: int = done, count_at_once: int = len(numbers)) -> None:
            if reader.progress is not None:
                reader.progress(before * request.length + count_at_once * written, count * request.length, "text")

        before = time.monotonic()
        documents = writer.write([f"{reader.seed}/{part}/{number}" for number in numbers], report)
        data = documents.numpy().tobytes()
        batch = _Batch(
            part=part,
            first=done,
            documents=len(numbers),
            seconds=round(time.monotonic() - before, 3),
            sha256=hashlib.sha256(data).hexdigest(),
            device=writer.device.type,
        )
        write_bytes(folder / batch.name, data)
        others = tuple(other for other in record.batches if (other.part, other.first) != (part, done))
        record = _Record(batches=(*others, batch))
        write_text(folder / RECORD, sealed(record.model_dump(mode="json")))
        done += len(numbers)
        check_time((time.monotonic() - began) / (done - start) * (count - done))
    tokens = (count - start) * request.length
    reader.say(
        f"text: the model wrote {tokens:,} tokens ({part.replace('_', ' ')}) in {duration(time.monotonic() - began)}"
    )


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
        banned: `[vocabulary of the model]` bool.
        ends: `[n]` tokens that end a text.
        begins: `[n]` tokens that a document may begin with, which are readable by themselves.
        lead: `[n]` tokens that the tokenizer puts before a text.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        columns = int(model.config.vocab_size)
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
        ended = {int(number) for number in (*of_config, tokenizer.eos_token_id) if number is not None}
        banned = torch.ones(columns, dtype=torch.bool)
        banned[[*plain, *(number for number in ended if number < columns)]] = False
        self.banned = banned.to(device)
        self.ends = torch.tensor(sorted(ended), dtype=torch.long, device=device)
        self.begins = torch.tensor(begins, dtype=torch.long, device=device)
        self.lead = torch.tensor(leading_tokens(tokenizer), dtype=torch.long, device=device)


class _Writer:
    """Writes documents of one length, all of a batch at once.

    Attributes:
        at_once: documents in a batch.
    """

    def __init__(self, loaded: Any, request: GeneratedText) -> None:
        self.request = request
        refuse_streamed(loaded.model, "text that the model writes", "source: generated", "take another text")
        # The runtime's own cache: it takes steps that a graph can hold, and knows layers that slide by themselves.
        self.model = planned_model(loaded.model, uniform_plan(loaded.shape, FullGroup()))
        self.device = input_device(loaded.model)
        self.vocabulary = _Vocabulary(loaded.model, loaded.tokenizer, self.device)
        weights = next(loaded.model.parameters())
        cache = loaded.shape.dense_cost(request.length, weights.dtype.itemsize).held_bytes
        row_bytes = cache + 24 * len(self.vocabulary.banned)  # logits, their distribution and its sum, in float32
        free = free_bytes(loaded.model)
        room = AT_ONCE.get(self.device.type, 16) if free is None else int(SHARE_OF_MEMORY * free / row_bytes)
        self.at_once = request.batch or max(1, min(room, AT_ONCE.get(self.device.type, 16)))

    @torch.inference_mode()
    def write(self, seeds: Sequence[str], report: Callable[[int], None]) -> torch.Tensor:
        """Token ids of one document for every seed, `[B, length]` int32 on the CPU.

        Args:
            report: called with the tokens of every document so far.

        Raises:
            NotFiniteError: the logits are not finite.
        """
        request, words, length = self.request, self.vocabulary, self.request.length
        noise = torch.stack([_noise(seed, length) for seed in seeds]).to(self.device)
        firsts = words.begins[(noise * len(words.begins)).long()]
        forced = len(words.lead) + 1  # tokens at the start of a document that nobody chooses
        if forced >= length:
            raise UserError("the documents have no room for a text", expected=f"length above {forced}")
        batch = len(seeds)
        ids = torch.zeros(batch, length, dtype=torch.long, device=self.device)
        ids[:, : forced - 1] = words.lead
        ids[:, forced - 1] = firsts[:, forced - 1]
        age = torch.empty(batch, dtype=torch.long, device=self.device)  # tokens of the document that is being written
        place = torch.empty(1, dtype=torch.long, device=self.device)
        finite = torch.ones(1, dtype=torch.bool, device=self.device)

        def choose(logits: torch.Tensor) -> None:
            """Write the next token of every document, from logits `[B, V]`."""
            finite.logical_and_(torch.isfinite(logits).all())
            logits = logits.masked_fill(words.banned, -torch.inf)
            likely = logits.argmax(-1)
            mass = (logits / request.temperature).softmax(-1).cumsum(-1)
            level = noise.index_select(1, place) * mass[:, -1:]
            drawn = torch.searchsorted(mass, level, right=True)[:, 0].clamp(max=mass.shape[1] - 1)
            drawn = torch.where(words.banned[drawn], likely, drawn)  # rounding, at an end of the distribution
            chosen = torch.where(age < forced + request.greedy, likely, drawn)
            chosen = torch.where(age == forced - 1, firsts.index_select(1, place)[:, 0], chosen)
            if forced > 1:
                chosen = torch.where(age < forced - 1, words.lead[age.clamp(max=forced - 2)], chosen)
            ids.index_copy_(1, place, chosen[:, None])
            ended = (chosen[:, None] == words.ends).any(1) & (age >= forced)
            age.add_(1).masked_fill_(ended, 0)  # a scalar in `torch.where` would be copied from the host
            place.add_(1)

        cache = self.model.new_cache(max_length=length)

        def begin() -> None:
            age.fill_(forced)
            place.fill_(forced)

        begin()
        choose(self.model(input_ids=ids[:, :forced], logits_to_keep=1, **{CACHE: cache}).logits[:, -1].float())

        def step() -> None:
            token = ids.index_select(1, place - 1)
            choose(self.model(input_ids=token, **{CACHE: cache}).logits[:, -1].float())

        if takes_graphs(self.model) and length - forced > 8:
            kept = age.clone(), place.clone()
            replay = graph_of(step)
            cache.assume(forced)
            age.copy_(kept[0])
            place.copy_(kept[1])
        else:
            replay = step
        for written in range(forced + 1, length):
            replay()
            if written % EVERY == 0:
                report(written)
        report(length)
        if not bool(finite):
            raise NotFiniteError("the model's logits are not finite in a text that it writes")
        return ids.int().cpu()


def _noise(seed: str, length: int) -> torch.Tensor:
    """Numbers in [0, 1) for every token of a document, `[length]` float32."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    return torch.rand(length, generator=torch.Generator().manual_seed(number))
