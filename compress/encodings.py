"""Bytes of a text file to text: UTF-8, or what the byte order mark at its start says; every line end becomes \\n."""

from __future__ import annotations

import codecs
import io
from typing import BinaryIO

MARK = "\ufeff"
# The longer marks first: that of UTF-32 (little-endian) starts with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CHUNK = 1 << 20  # bytes decoded at once when the place of a wrong byte is looked for


def encoding_of(start: bytes) -> str:
    """The name of the encoding of a file that starts with these bytes (four, if it has them).

    It decodes a byte order mark to the character `MARK`, which is no part of the text.
    """
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """The text of a whole file, without its byte order mark, every line end as \\n.

    Raises:
        UnicodeDecodeError: the bytes are not of the encoding; `wrong_byte` says where.
    """
    return data.decode(encoding_of(data)).removeprefix(MARK).replace("\r\n", "\n").replace("\r", "\n")


def wrong_byte(file: BinaryIO) -> str:
    """Where a file stops being of its encoding, in words: its line from 1, and the byte of the file from 0.

    Args:
        file: opened for bytes; it is read from its start, in pieces.
    """
    file.seek(0)
    encoding = encoding_of(file.read(4))
    decoder = codecs.getincrementaldecoder(encoding)()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    line, start, data = 1, 0, b"-"
    file.seek(0)
    while data:
        data = file.read(CHUNK)
        held = len(decoder.getstate()[0])  # bytes of a character whose rest is in this piece
        try:
            line += lines.decode(decoder.decode(data, not data)).count("\n")
        except UnicodeDecodeError as error:
            line += lines.decode(error.object[: error.start].decode(encoding)).count("\n")
            return (
                f"a byte that is not {encoding.upper()} in line {line}, byte {start - held + error.start:,} of the file"
            )
        start += len(data)
    return f"no byte that is not {encoding.upper()}"
