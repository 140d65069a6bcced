"""Where text comes from, and how one text is split into parts that never overlap.

Of a text that is longer than a recipe can use only the beginning is read; its sections are those of the whole.
"""

from __future__ import annotations

import io
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.encodings import MARK, encoding_of, wrong_byte
from compress.errors import UserError, nearest
from compress.files import file_stamp, text_key
from compress.registry import Method, PathText, sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compress.data.reader import Reader

Part = Literal["calibration", "held_out", "evaluation"]

SECTION = 8_192  # characters in a section, before it is moved to the end of a paragraph
PATTERN: tuple[Part, ...] = ("calibration", "held_out", "calibration", "evaluation")

MOST = 2**24  # characters that are read of a text, about four million tokens, unless a request needs more
LIMIT = 2**30  # characters that are read whatever a request needs
ROW = 2**26  # characters in a line of a .jsonl file
PER_TOKEN = 8  # characters that are reckoned for a token, twice what English has

PIECE = 2**19  # characters that are tokenised at once
OVERLAP = 2**13  # characters that two pieces share
AGREEMENT = 16  # tokens on which two pieces have to agree where they are joined


def characters_for(tokens: int, part: Part) -> int:
    """Characters of a text to read so that a part of it has this many tokens, as far as the text has them."""
    return min(LIMIT, max(MOST, tokens * PER_TOKEN * len(PATTERN) // PATTERN.count(part)))


@dataclass(frozen=True)
class Excerpt:
    """A text, or its beginning.

    Attributes:
        used: in words, how much of the source that is; None where it is all.
    """

    text: str
    used: str | None = None


@dataclass(frozen=True)
class PartText:
    """A part of a text, as a model reads it.

    Attributes:
        ids: token ids.
        key: stands for the content in the keys of what is made of it.
    """

    ids: Sequence[int]
    key: str


class Source(Method):
    """Base of the text sources. What reads a text has a `Reader`, for sources whose text a model writes."""

    source: str = Field(description="name of the source")

    @property
    def label(self) -> str:
        """How messages call it: by its path or id, where it has one."""
        return self.source

    @abstractmethod
    def read(self, reader: Reader, part: Part, tokens: int) -> PartText:
        """A part of the text, or of as much of it as a request for `tokens` tokens of it can use.

        Raises:
            UserError: the text cannot be read, written or tokenised.
        """

    @abstractmethod
    def whole(self, reader: Reader) -> str:
        """The text for what cuts its own pieces of it. Raises UserError: as `read`."""

    @abstractmethod
    def known(self, most: int = MOST) -> Excerpt:
        """What is known without a model and stands for the text in the keys of stages, up to `most` characters.

        Raises:
            UserError: it cannot be read.
        """

    @abstractmethod
    def foreseen(self, tokenizer: PreTrainedTokenizerBase, known: str, part: Part) -> Sequence[int]:
        """Token ids that a part will have, as far as its text is `known`; others stand for those that are not."""

    def check(self, context: int | None) -> None:
        """Check it against the model's longest input in tokens, None without one. Raises UserError."""

    def written(self, part: Part) -> int:
        """Tokens of a part that the model writes."""
        return 0

    @property
    def written_length(self) -> int:
        """Tokens of a document that the model writes."""
        return 0

    def stamp(self) -> tuple[int, ...] | None:
        """What changes when the content may have changed, at no cost; None where nothing is known."""
        return None


class StoredText(Source):
    """Base of the sources whose text is there before any model is."""

    @abstractmethod
    def excerpt(self, most: int = MOST) -> Excerpt:
        """The text, or its first `most` characters in whole sections. Raises UserError: see the sources."""

    def load(self, most: int = MOST) -> str:
        """The text of `excerpt`."""
        return self.excerpt(most).text

    def part(self, text: str, part: Part) -> str:
        """A part of the text."""
        return split_text(text, part)

    def read(self, reader: Reader, part: Part, tokens: int) -> PartText:
        text = self.part(self.load(characters_for(tokens, part)), part)
        return PartText(tokenise(reader.tokenizer, text), text_key(text))

    def whole(self, reader: Reader) -> str:
        return self.load()

    def known(self, most: int = MOST) -> Excerpt:
        return self.excerpt(most)

    def foreseen(self, tokenizer: PreTrainedTokenizerBase, known: str, part: Part) -> Sequence[int]:
        return tokenise(tokenizer, self.part(known, part))


@sources.register("embedded")
class EmbeddedText(StoredText):
    """Text that every Python installation carries: `pydoc_data.topics`, about 465,000 characters of the language
    reference. Its wording follows the Python version, so figures on it name that version."""

    source: Literal["embedded"] = Field("embedded", description="text that any Python installation carries")

    def excerpt(self, most: int = MOST) -> Excerpt:
        """All topics, in the order of their names.

        Raises:
            UserError: this Python was installed without its documentation data.
        """
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError(
                "this Python installation has no `pydoc_data.topics`",
                where="source: embedded",
                fix="use `source: file` with a text of your own",
            ) from error
        return Excerpt("\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n")


@sources.register("file")
class FileText(StoredText):
    """A text file, or a JSONL file with one text a line.

    UTF-8, with or without a byte order mark; UTF-16 and UTF-32 with one. The mark is no part of the text, and every
    line end (\\n, \\r\\n, \\r) is read as \\n.
    """

    source: Literal["file"] = Field("file", description="a local file")
    path: PathText = Field(description="a .txt or .jsonl file, UTF-8 (or UTF-16 with a byte order mark)")
    column: str = Field("text", description="key of the text in each line of a .jsonl file")

    @property
    def label(self) -> str:
        return self.path

    def excerpt(self, most: int = MOST) -> Excerpt:
        """The file's text; the texts of a JSONL file are joined by blank lines. What lies behind is not looked at.

        Raises:
            UserError: no such file, another kind of file, wrong bytes or characters, empty, or a line that is not as
                expected, with its number.
        """
        path = Path(self.path).expanduser()
        if path.is_dir():
            raise UserError(
                "this is a folder, not a text file", where=self.path, expected="a .txt or .jsonl file in it"
            )
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError("this kind of text file is not supported", where=self.path, expected="*.txt or *.jsonl")
        try:
            with path.open("rb") as raw:
                encoding = encoding_of(raw.read(4))
                raw.seek(0)
                file = io.TextIOWrapper(raw, encoding=encoding)
                if file.read(1) != MARK:
                    file.seek(0)
                if path.suffix == ".jsonl":
                    text, more = _joined(self._rows(file), most)
                else:
                    text = file.read(most + 1)
                    more = len(text) > most
                    _check_characters(text, self.path, lines=True)
                fraction = raw.tell() / max(1, path.stat().st_size)
        except UnicodeDecodeError as error:
            with path.open("rb") as whole:
                raise UserError(
                    "the file is not UTF-8",
                    where=self.path,
                    expected="UTF-8, or UTF-16 with a byte order mark",
                    found=wrong_byte(whole),
                    fix="save it as UTF-8",
                ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError("the text file cannot be read", where=self.path, found=reason) from error
        if not text.strip():
            raise UserError("the file holds no text", where=self.path)
        return _cut(text, most, f"about {fraction:.2%} of the file") if more else Excerpt(text)

    def stamp(self) -> tuple[int, ...] | None:
        return file_stamp(Path(self.path).expanduser())

    def _rows(self, file: Any) -> Iterator[str]:
        """The text of every line but the empty ones."""
        number = 0
        while line := file.readline(ROW + 1):
            number += 1
            if len(line) > ROW:
                raise UserError(
                    "the line is too long",
                    where=f"{self.path}:{number}",
                    expected=f"at most {ROW:,} characters",
                    found="more than that",
                    fix="split the row, or give the text as a .txt file",
                )
            if line.strip():
                yield self._line(line.rstrip("\n"), number)

    def _line(self, line: str, number: int) -> str:
        where = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise UserError("the line is nested too deeply", where=where, found=_shown(line)) from error
        except ValueError as error:
            if "\0" in line:
                raise _nul(where) from error
            raise UserError("the line is not JSON", where=where, found=_shown(line)) from error
        if not isinstance(row, dict):
            raise UserError("the line is not a JSON object", where=where, found=_shown(line))
        return _text_of(row, self.column, where)


@sources.register("undivided")
class UndividedText(FileText):
    """A file as `file` reads it, of which every part is the whole.

    For a text that serves one purpose only, such as a test set, or a corpus that nothing but training reads: parts that
    are asked for two purposes are the same.
    """

    source: Literal["undivided"] = Field(  # type: ignore[assignment]
        "undivided", description="a local file of which every part is the whole, for a text with one purpose"
    )

    def part(self, text: str, part: Part) -> str:
        """All of it."""
        return text


@sources.register("dataset")
class DatasetText(StoredText):
    """A Hugging Face dataset. Needs the package `datasets`; code that a dataset carries is never run."""

    source: Literal["dataset"] = Field("dataset", description="a Hugging Face dataset")
    id: PathText = Field(description="dataset id on the hub, or a local folder of data files")
    config: str | None = Field(None, description="name of the dataset's configuration")
    split: str = Field("train", description="split, slices allowed: `train[:1%]`")
    column: str = Field("text", description="column that holds the text")

    @property
    def label(self) -> str:
        return self.id

    def excerpt(self, most: int = MOST) -> Excerpt:
        """The texts of the rows, joined by blank lines; rows behind the last that is used are not looked at.

        Raises:
            UserError: `datasets` is missing or too old, the dataset cannot be reached, or it has no such column.
        """
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                "`source: dataset` needs the package datasets", where=self.id, fix="pip install 'datasets>=4'"
            ) from error
        if int(datasets.__version__.split(".")[0]) < 4:
            raise UserError(
                "this version of the package datasets can run code from a dataset",
                where=self.id,
                expected="datasets 4 or later, which does not run code from datasets",
                found=datasets.__version__,
                fix="pip install -U 'datasets>=4'",
            )
        try:
            rows: Any = datasets.load_dataset(self.id, self.config, split=self.split)
        except Exception as error:  # the library raises its own, httpx's, fsspec's and pyarrow's kinds
            raise UserError(
                "the dataset could not be loaded",
                where=self.id,
                expected="an id that can be reached or is in the local cache, and its config and split",
                found=(str(error).strip() or type(error).__name__).splitlines()[0],
                fix="without a network use `source: file` or `source: embedded`",
            ) from error
        if self.column not in rows.column_names:
            _missing_column(self.column, rows.column_names, self.id)
        texts = (_text_of(row, self.column, f"{self.id}: row {number}") for number, row in enumerate(rows))
        text, more = _joined(texts, most)
        if not text.strip():
            raise UserError("the dataset holds no text", where=self.id)
        return _cut(text, most, f"of {len(rows):,} rows") if more else Excerpt(text)


TextSource = Annotated[Source, sources]


def _joined(texts: Iterable[str], most: int) -> tuple[str, bool]:
    """Texts joined by blank lines until there are more than `most` characters; whether there are."""
    joined: list[str] = []
    size = 0
    for text in texts:
        joined.append(text)
        size += len(text) + 2
        if size > most + 2:
            return "\n\n".join(joined)[: most + 1], True
    return "\n\n".join(joined) + "\n", False


def _cut(text: str, most: int, of: str) -> Excerpt:
    """The beginning of a text in sections that are the whole text's, too: none whose end lies beyond what was read."""
    size, length = min(SECTION, most // 16), 0
    for section in _sections(text[:most]):
        if length + size + size // 2 > most:
            break
        length += len(section)
    return Excerpt(text[:length], f"the first {length:,} characters, {of}")


def _shown(line: str) -> str:
    return line[:60].encode("utf-8", "backslashreplace").decode()


def _check_characters(text: str, where: str, *, lines: bool = False) -> None:
    """Refuse what no tokenizer can read, or what shows that the bytes are no text.

    Args:
        lines: whether `where` is a file, to which the line is added.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"{where}:{text.count(chr(10), 0, error.start) + 1}" if lines else where
        raise UserError(
            "half of a surrogate pair, which is not a character",
            where=place,
            expected="whole characters: \\ud800 to \\udfff stand in pairs only",
            found=f"\\u{ord(text[error.start]):04x} at character {error.start:,} of the text",
            fix="correct or remove the row",
        ) from None
    if lines and (nul := text.find("\0")) >= 0:
        raise _nul(f"{where}:{text.count(chr(10), 0, nul) + 1}")


def _nul(where: str) -> UserError:
    return UserError(
        "a NUL character, which a text cannot contain",
        where=where,
        expected="UTF-8, or UTF-16 with a byte order mark",
        found="bytes of another encoding, or a binary file",
        fix="save it as UTF-8",
    )


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in one row."""
    if column not in row:
        _missing_column(column, list(row), where)
    if not isinstance(row[column], str):
        raise UserError(f"`{column}` is not text", where=where, found=type(row[column]).__name__)
    _check_characters(row[column], where)
    return row[column].strip()


def _missing_column(column: str, known: list[str], where: str) -> None:
    shown = [_shown(str(name)) for name in known[:20]]
    raise UserError(
        f"there is no column `{column}`",
        where=where,
        expected=f"one of {', '.join(shown)}" if known else None,
        fix=nearest(column, shown),
    )


def split_text(text: str, part: Part) -> str:
    """One of the three parts of a text: half of it for calibration, a quarter held out, a quarter for evaluation.

    The text is cut into sections of about 8,192 characters (of a sixteenth of it, where it is short), each ending
    with a paragraph where it can, and the sections are dealt out in turn. So the parts have the same kind of text
    and no section is in two of them.
    """
    return "".join(section for number, section in enumerate(_sections(text)) if PATTERN[number % 4] == part)


def _sections(text: str) -> list[str]:
    """The whole text in consecutive pieces."""
    size = max(1, min(SECTION, len(text) // 16))
    sections, start = [], 0
    while start < len(text):
        end = start + size
        for mark in ("\n\n", "\n", " "):
            position = text.find(mark, end, end + size // 2)
            if position >= 0:
                end = position + len(mark)
                break
        sections.append(text[start:end])
        start = end
    return sections


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text of any length, without special tokens.

    A long text is tokenised in pieces that overlap, joined where both have the same tokens in the same places, so that
    the ids are those of the whole. Where no such place is found the whole is tokenised at once.

    Raises:
        UserError: the tokenizer fails.
    """
    if len(text) > PIECE and getattr(tokenizer, "is_fast", False):
        joined = _in_pieces(tokenizer, text)
        if joined is not None:
            return joined
    return list(_run(tokenizer, text)["input_ids"])


def _run(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, AttributeError) as error:
        raise UserError(
            "the model's tokenizer cannot read a text",
            where=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            fix="check tokenizer.json and tokenizer_config.json of the model",
        ) from error


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """`tokenise` piece by piece; None where two pieces have no place to be joined at."""
    same: dict[int, int] = {}  # one object for every id, not one for every token
    ids: list[int] = []
    before: list[tuple[int, int, int]] = []  # id, first and last character of each token
    first = 0  # the token of `before` that comes next
    for start in range(0, len(text), PIECE):
        made = _run(tokenizer, text[start : start + PIECE + OVERLAP], return_offsets_mapping=True)
        piece = [
            (same.setdefault(token, token), start + low, start + high)
            for token, (low, high) in zip(made["input_ids"], made["offset_mapping"], strict=True)
        ]
        if start:
            place = _agreement(before, piece, start)
            if place is None:
                return None
            ids += [token for token, _, _ in before[first : place[0]]]
            first = place[1]
        before = piece
        if start + PIECE + OVERLAP >= len(text):
            break
    return ids + [token for token, _, _ in before[first:]]


def _agreement(
    before: list[tuple[int, int, int]], after: list[tuple[int, int, int]], start: int
) -> tuple[int, int] | None:
    """Where two pieces have the same tokens in the same places, as an index into each; None where they never have."""
    places = {token: number for number, token in enumerate(after) if token[1] < start + OVERLAP}
    run = 0
    for number in range(next((i for i, token in enumerate(before) if token[1] >= start), len(before)), len(before)):
        other = places.get(before[number])
        run = (
            run + 1
            if other is not None
            and other >= run
            and after[other - run : other + 1] == before[number - run : number + 1]
            else 0
        )
        if run == 2 * AGREEMENT:
            return number - AGREEMENT, other - AGREEMENT  # type: ignore[operator]
    return None


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its beginning-of-sequence token, or nothing."""
    plain = tokenise(tokenizer, "x")
    whole = list(tokenizer("x")["input_ids"])
    starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(starts, 0)]  # a tokenizer that knows no "x" writes nothing for it
