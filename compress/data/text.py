"""Where text comes from, and how one text is split into parts that never overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.errors import UserError, nearest
from compress.registry import Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Part = Literal["calibration", "held_out", "evaluation"]

SECTION = 8_192  # characters in a section, before it is moved to the end of a paragraph
PATTERN: tuple[Part, ...] = ("calibration", "held_out", "calibration", "evaluation")


class EmbeddedText(Method):
    """Text that every Python installation carries: `pydoc_data.topics`, about 465,000 characters of the language
    reference. Its wording follows the Python version, so figures on it name that version."""

    source: Literal["embedded"] = Field("embedded", description="text that any Python installation carries")

    def load(self) -> str:
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
        return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


class FileText(Method):
    """A text file, or a JSONL file with one text a line."""

    source: Literal["file"] = Field("file", description="a local file")
    path: str = Field(description="a .txt or .jsonl file, UTF-8")
    column: str = Field("text", description="key of the text in each line of a .jsonl file")

    def load(self) -> str:
        """The file's text; the texts of a JSONL file are joined by blank lines.

        Raises:
            UserError: no such file, another kind of file, not UTF-8, empty, or a line that is not as expected.
        """
        path = Path(self.path).expanduser()
        if path.suffix not in (".txt", ".jsonl"):
            raise UserError("not a kind of text file that is read here", where=self.path, expected="*.txt or *.jsonl")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError("the file is not UTF-8", where=self.path, found=f"byte {error.start}") from error
        except OSError as error:
            raise UserError("the text file cannot be read", where=self.path, found=error.strerror) from error
        if path.suffix == ".jsonl":
            lines = text.split("\n")
            rows = [self._line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
            text = "\n\n".join(rows) + "\n"
        if not text.strip():
            raise UserError("the file holds no text", where=self.path)
        return text

    def _line(self, line: str, number: int) -> str:
        where = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError("the line is not JSON", where=where, found=line[:60]) from error
        if not isinstance(row, dict):
            raise UserError("the line is not a JSON object", where=where, found=line[:60])
        return _text_of(row, self.column, where)


class DatasetText(Method):
    """A Hugging Face dataset. Needs the package `datasets`; code that a dataset carries is never run."""

    source: Literal["dataset"] = Field("dataset", description="a Hugging Face dataset")
    id: str = Field(description="dataset id on the hub, or a local folder of data files")
    config: str | None = Field(None, description="name of the dataset's configuration")
    split: str = Field("train", description="split, slices allowed: `train[:1%]`")
    column: str = Field("text", description="column that holds the text")

    def load(self) -> str:
        """The texts of all rows, joined by blank lines.

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
                "this version of datasets may run code that a dataset carries",
                where=self.id,
                expected="datasets 4 or later, which cannot",
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
        texts = [_text_of(row, self.column, f"{self.id}: row {number}") for number, row in enumerate(rows)]
        if not any(text.strip() for text in texts):
            raise UserError("the dataset holds no text", where=self.id)
        return "\n\n".join(texts) + "\n"


TextSource = Annotated[EmbeddedText | FileText | DatasetText, Field(discriminator="source")]


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    """The text in one row."""
    if column not in row:
        _missing_column(column, list(row), where)
    if not isinstance(row[column], str):
        raise UserError(f"`{column}` is not text", where=where, found=type(row[column]).__name__)
    return row[column].strip()


def _missing_column(column: str, known: list[str], where: str) -> None:
    raise UserError(
        f"there is no column `{column}`",
        where=where,
        expected=f"one of {', '.join(map(str, known))}" if known else None,
        fix=nearest(column, map(str, known)),
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
            found = text.find(mark, end, end + size // 2)
            if found >= 0:
                end = found + len(mark)
                break
        sections.append(text[start:end])
        start = end
    return sections


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text of any length, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its beginning-of-sequence token, or nothing."""
    plain = tokenise(tokenizer, "x")
    whole = list(tokenizer("x")["input_ids"])
    return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
