"""A GGUF file by its header alone: that every part of it lies inside the file, and which tensors there are."""

from __future__ import annotations

import copy
import functools
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.models.weights import AGAIN, Tensors, refuse_pointer
from compress.swapped import swapped

VERSIONS = (2, 3)
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
TEXT, ARRAY = 8, 9
MOST_DIMS = 4
MOST_PER_BYTE = 8  # numbers in a byte: no quantisation takes less than a bit for one


class _Reader:
    """Reads numbers and strings of a header in order; what would lie behind the end of the file is an error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def number(self, form: str) -> int:
        """One number, in a form of `struct`."""
        start = self.skip(struct.calcsize(form))
        value: int = struct.unpack_from(form, self.data, start)[0]
        return value

    def skip(self, count: int) -> int:
        """The place before `count` bytes that are passed over."""
        start = self.place
        if count > len(self.data) - start:
            raise ValueError(f"the file ends at byte {len(self.data):,}, inside a value at byte {start:,}")
        self.place += count
        return start

    def text(self) -> str:
        """One string."""
        length = self.number("<Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> None:
        """Pass over one value of metadata."""
        if kind in WIDTHS:
            self.skip(WIDTHS[kind])
        elif kind == TEXT:
            self.skip(self.number("<Q"))
        elif kind == ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in WIDTHS:
                self.skip(WIDTHS[inner] * count)
            elif inner == TEXT:
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                raise ValueError(f"an array of the unknown type {inner}")
        else:
            raise ValueError(f"a value of the unknown type {kind}")


def read_gguf(path: Path) -> Tensors:
    """Every tensor of a GGUF file, without reading its values; the shape is torch's, the dtype GGML's number.

    Raises:
        UserError: not a GGUF file, or one that is damaged or cut short.
    """
    refuse_pointer(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError("not a GGUF file", where=str(path), expected="a file that starts with the bytes GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _tensors(_Reader(data))
            except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
                raise UserError(
                    "the GGUF file is damaged", where=str(path), expected="GGUF", found=str(error), fix=AGAIN
                ) from None


@contextmanager
def headers_read_once() -> Iterator[None]:
    """Lets transformers read what a GGUF file says of its model once, and not for every configuration and tokenizer.

    It takes seconds, a call a token of the vocabulary, and a run asks half a dozen times. A file that changes is read
    again. Where transformers has another reader there is nothing to do.
    """
    try:
        from transformers import modeling_gguf_pytorch_utils as stock
    except ImportError:
        yield
        return
    read = stock.load_gguf_checkpoint

    def remembering(path: Any, return_tensors: bool = False, *args: Any, **options: Any) -> Any:
        if return_tensors or args or options:
            return read(path, return_tensors, *args, **options)
        file = Path(path).stat()
        return copy.deepcopy(_described(str(path), file.st_size, file.st_mtime_ns, read))

    with swapped(stock, "load_gguf_checkpoint", remembering):
        yield


@functools.lru_cache(maxsize=2)
def _described(path: str, size: int, changed: int, read: Any) -> Any:
    """What `read` says of a file of that size and time of change, without its tensors."""
    return read(path, return_tensors=False)


@contextmanager
def names_made_once() -> Iterator[None]:
    """Lets transformers make an architecture's table of tensors' names once, and not for each of a model's modules.

    That is a third of the time that a model of 30 layers takes to load from a GGUF file.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    with swapped(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)):
        yield


def _tensors(header: _Reader) -> Tensors:
    version = header.number("<I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}; only versions {' and '.join(map(str, VERSIONS))} can be read")
    tensors, entries = header.number("<Q"), header.number("<Q")
    for _ in range(entries):
        header.text()
        header.value(header.number("<I"))
    shapes: Tensors = {}
    for _ in range(tensors):
        name, dims = header.text(), header.number("<I")
        if not 0 < dims <= MOST_DIMS:
            raise ValueError(f"tensor `{name[:60]}` has {dims:,} dimensions")
        shape = tuple(header.number("<Q") for _ in range(dims))
        kind, start = header.number("<I"), header.number("<Q")
        most = MOST_PER_BYTE * (len(header.data) - start)
        if math.prod(shape) > most:
            raise ValueError(f"tensor `{name[:60]}` of shape {shape} lies beyond the end of the file")
        shapes[name] = str(kind), shape[::-1]
    return shapes
