"""What the scripts share that check kernels on a GPU: a table that is kept, errors, sections one after the other."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compress.bench import measure
from compress.environment import environment
from compress.files import write_json

COLD = 256 << 20  # bytes of the caches that a decode step reads in turn, several times what the chip keeps
LINES: list[str] = []
START = time.time()


def say(line: str) -> None:
    """A line of the table, printed at once and kept."""
    print(line, flush=True)
    LINES.append(line)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN."""
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm().clamp(min=1e-30))


def poison() -> None:
    """Fill the memory that the next outputs are given with NaN."""
    blocks = [torch.full((2**20 * size,), torch.nan, device="cuda") for size in (1, 4, 16, 64, 256)]
    del blocks


def attempt(
    found: dict[str, Any], name: str, work: Callable[[], Any], line: Callable[[Any], str], folder: Path
) -> None:
    """Put into `found` what one of several pieces of work gives, and print its line; where it fails, its error, with
    the traceback in errors.txt. The GPU's memory is free for the next."""
    try:
        found[name] = work()
        print(line(found[name]), flush=True)
    except Exception as failure:
        found[name] = {"error": repr(failure)[:300]}
        print(f"{name}: {found[name]['error']}", flush=True)
        (folder / "errors.txt").open("a").write(f"{name}\n{traceback.format_exc()}\n")
    gc.collect()
    torch.cuda.empty_cache()


def keep(folder: Path, name: str, facts: dict[str, Any]) -> None:
    """Write what is known so far, `NAME.json`, and the table, `NAME.txt`."""
    facts["table"] = LINES
    write_json(folder / f"{name}.json", facts)
    (folder / f"{name}.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")


def run_sections(
    script: str, sections: Mapping[str, Callable[[], Any]], usual: Sequence[str], head: Sequence[str] = ()
) -> None:
    """The sections that the command line names behind a folder, one after the other; one that fails is told, and the
    others go on.

    Args:
        script: name of the folder where none is given, and of the files in it.
        usual: the sections to run where none is named.
        head: lines to say first.
    """
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else script)
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"environment": environment()}
    for line in (f"{torch.cuda.get_device_name()}, torch {torch.__version__}", *head):
        say(line)
    for name in sys.argv[2:] or usual:
        try:
            facts[name] = sections[name]()
        except Exception:  # told, and the next section may still find something out
            facts[name] = {"failed": traceback.format_exc()}
            say(f"{name} FAILED: {traceback.format_exc()}")
        measure.release(torch.device("cuda"))
        say(f"-- {name}: {time.time() - START:.0f} s")
        keep(folder, script, facts)
