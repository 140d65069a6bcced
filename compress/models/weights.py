"""The weight files of a model folder, by their headers alone: safetensors, whole, inside it, of plain numbers."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path, PurePosixPath
from typing import Any

from compress.errors import UserError
from compress.json_file import JsonError, parse_json, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number, by the dtypes that are read
MOST_NAME = 255  # bytes, on every usual file system
MOST_HEADER = 100_000_000  # bytes, as the safetensors library has it
POINTER = b"version https://git-lfs.github.com/spec/"

AGAIN = "download the file again; the download was interrupted, or the file was damaged"
Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype, as safetensors names it, and shape, by name


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in the place of a large one that was not fetched."""
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def refuse_pointer(path: Path) -> None:
    """Raise UserError where a file is a Git LFS pointer."""
    try:
        pointer = path.is_file() and is_pointer(path)
    except OSError:
        return  # told when it is read
    if pointer:
        raise UserError(
            "the file is a Git LFS pointer, and its content was not downloaded",
            where=str(path),
            fix=f"git -C {path.parent} lfs pull (needs git-lfs), or download the model with: hf download NAME",
        )


def read_tensors(folder: Path, named: Any = None) -> Tensors:
    """Every tensor in the weight files of a folder, without reading its values. Pickles are never opened.

    Args:
        named: what config.json says in `transformers_weights`, which takes the place of the usual names.

    Raises:
        UserError: no safetensors weights, an index that names files which are not there, are no safetensors, or lie
            outside, a file that is cut short or a Git LFS pointer, or weights that are quantised.
    """
    shapes: Tensors = {}
    for path in weight_files(folder, named):
        shapes |= read_header(path)
    quantised = {dtype for name, (dtype, shape) in shapes.items() if len(shape) > 1 and dtype not in SIZES}
    if quantised:
        name = next(name for name, (dtype, shape) in shapes.items() if len(shape) > 1 and dtype not in SIZES)
        raise UserError(
            "the weights are quantised",
            where=f"{folder}: {name}",
            expected="weights in float32, bfloat16 or float16",
            found=", ".join(sorted(quantised)),
            fix=DEQUANTISED,
        )
    return shapes


DEQUANTISED = "name the model that it was quantised from: plans are searched on plain weights, and quantised afterwards"


def weight_files(folder: Path, named: Any = None) -> list[Path]:
    """The files that transformers reads the weights from, all of them there.

    Raises:
        UserError: see `read_tensors`.
    """
    first = _named(folder, named) if named is not None else folder / SINGLE
    if named is None and not first.is_file() and (folder / INDEX).is_file():
        first = folder / INDEX
    if not first.is_file():
        raise _none(folder)
    refuse_pointer(first)
    if first.suffix != ".json":
        return [first]
    names = _indexed(first)
    paths = [folder / name for name in names]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        raise UserError(
            f"{len(lacking)} of the {len(paths)} weight files are missing",
            where=str(folder),
            expected=f"every file that {first.name} lists",
            found=f"without {', '.join(lacking[:4])}{', ...' if len(lacking) > 4 else ''}",
            fix="download the rest of the model: hf download NAME --local-dir FOLDER goes on where it stopped",
        )
    for path in paths:
        refuse_pointer(path)
    return paths


def _named(folder: Path, named: Any) -> Path:
    where = f"{folder / 'config.json'}: transformers_weights"
    _check_inside(named, where, (".safetensors", ".safetensors.index.json"))
    return folder / named


def _indexed(index: Path) -> list[str]:
    """The files that an index names, each once."""
    refuse_pointer(index)
    entries = read_object(index, "the index of the weights", fix=AGAIN).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise UserError(
            "the index of the weights is damaged",
            where=str(index),
            expected="a `weight_map` from tensors to files",
            found=type(entries).__name__,
            fix=AGAIN,
        )
    for name in entries.values():
        _check_inside(name, str(index), (".safetensors",))
    return sorted(set(entries.values()))


def _check_inside(name: Any, where: str, suffixes: tuple[str, ...]) -> None:
    """Raise UserError for a name that is no safetensors file inside the folder. What a link leads to is not asked:
    the hub's cache is made of links."""
    if not isinstance(name, str) or len(name.encode("utf-8", "surrogatepass")) > MOST_NAME:
        raise UserError("not the name of a file", where=where, expected="text", found=repr(name)[:80], fix=AGAIN)
    if not name.endswith(suffixes):
        raise UserError(
            "a weight file is not in the safetensors format, and pickled weights are never read",
            where=where,
            expected="files that end with .safetensors",
            found=repr(name)[:80],
            fix="take the model in safetensors, or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        )
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or os.path.isabs(name):
        raise UserError(
            "a weight file lies outside the model's folder", where=where, found=repr(name)[:80], fix="correct the name"
        )


def _none(folder: Path) -> UserError:
    """Why there are no weights, in the words that help."""
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    if pickles and not others:
        fix = (
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), "
            "or take the model in safetensors"
        )
    elif ggufs:
        fix = f"name the file: {folder / ggufs[0]}"
    elif others:
        fix = f"get {INDEX}, which says what is in them, or rename the one file to {SINGLE}"
    else:
        fix = "download the weights: hf download NAME --local-dir FOLDER"
    return UserError(
        "no safetensors weights in the model folder",
        where=str(folder),
        expected=f"{SINGLE}, or {INDEX} and the files it names (pickled weights are never read)",
        found=", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder",
        fix=fix,
    )


def read_header(path: Path) -> Tensors:
    """The tensors of a safetensors file, from its header; the file is as long as the header says.

    Raises:
        UserError: it is not safetensors, or cut short.
    """

    def damaged(found: str, expected: str = "a safetensors file") -> UserError:
        return UserError("the weight file is damaged", where=str(path), expected=expected, found=found, fix=AGAIN)

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise damaged(f"a file of {size} bytes")
            (length,) = struct.unpack("<Q", start)
            if length > min(MOST_HEADER, size - 8):
                raise damaged(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(file.read(length))
    except JsonError as error:
        raise damaged(f"a header that is not JSON: {error}") from None
    except OSError as error:
        raise damaged(error.strerror or str(error)) from None
    if not isinstance(header, dict):
        raise damaged("a header without tensors")
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    end = 0
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = [*shape, first, last]
            if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in whole):
                raise TypeError
        except (TypeError, KeyError, ValueError):
            raise damaged(f"tensor `{name[:60]}` without dtype, shape and place") from None
        if dtype in SIZES and last - first != math.prod(shape) * SIZES[dtype]:
            raise damaged(f"tensor `{name[:60]}` of shape {shape} in {last - first:,} bytes")
        tensors[name] = dtype, tuple(shape)
        end = max(end, last)
    if 8 + length + end != size:
        raise damaged(f"{size:,} bytes", f"{8 + length + end:,} bytes, as its header says")
    return tensors


def elements(tensors: Tensors) -> int:
    """Numbers in all tensors."""
    return sum(math.prod(shape) for _, shape in tensors.values())
