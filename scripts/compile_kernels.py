"""Compiles every form of the Triton kernels for an H100, where no GPU is needed, and prints what each takes.

Usage: python -m scripts.compile_kernels [ROOM or KERNEL ...]

A room is a part of tests/kernel_forms.py, such as `linear`; a kernel is named as in the table. One line a form: the
kernel, registers of a thread, bytes that are spilled, bytes of shared memory, and the launch. Some seconds each. It
ends with 1 where a form does not compile or takes more shared memory than an H100 has.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

SHARED = 227 << 10  # bytes of a multiprocessor's shared memory that one program may have


def main() -> int:
    """The table, then what failed; the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    sys.path.append(str(Path(__file__).parents[1] / "plugins" / "vllm"))
    from tests import hopper

    hopper.tune()
    from tests.kernel_forms import ROOMS, SIZES

    asked, rooms = set(sys.argv[1:]), {room.__name__ for room in ROOMS}
    failed: list[str] = []
    compiled = 0
    label = ""

    def take(source: Any, options: Any, backend: Any) -> None:
        nonlocal compiled
        kernel = f"{source.fn.__module__.rpartition('.')[2]}.{source.fn.__name__}"
        if asked - rooms and kernel not in asked:
            return
        try:
            made = hopper.compile_whole(source, options, backend)
        except Exception as error:  # whatever the compiler raises is a result
            failed.append(f"{kernel}: {label}\n{error}")
            print(f"{kernel:32} does not compile: {label}", flush=True)
            return
        print(f"{kernel:32} {made.registers:4} {made.spilled:5} {made.shared:7}  {label}", flush=True)
        compiled += 1
        if made.shared > SHARED:
            failed.append(f"{kernel}: {label}: {made.shared} bytes of shared memory, {SHARED} are there")

    hopper.take_launches(take)
    print(f"{'kernel':32} regs spill  shared  form")
    for room in ROOMS:
        if not asked & rooms or room.__name__ in asked:
            for label, call in room(SIZES):  # noqa: B007  # `take` reads it
                call()
    print(f"compiled: {compiled}, failed: {len(failed)}", *failed, sep="\n\n")
    return int(bool(failed) or not compiled)


if __name__ == "__main__":
    sys.exit(main())
