"""A process that takes every form of every Triton kernel through the compiler's front end, and prints what it says.

`tests/runtime/test_front_end.py` starts it, without `TRITON_INTERPRET`. It prints one object of JSON: `lowered`, the
statements that were, and `refused`, of each launch that failed what it is called, where, and why.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any


def main() -> None:
    """All rooms, to the end whatever is refused."""
    from tests import hopper

    hopper.tune()
    from tests.kernel_forms import CODE, ROOMS

    lowered: set[hopper.Place] = set()
    failed_at: list[hopper.Place] = []
    refused: list[dict[str, Any]] = []
    label = ""

    def take(source: Any, options: Any, backend: Any) -> None:
        failed_at.clear()
        try:
            hopper.lower(source, options, backend)
        except Exception as error:  # whatever the compiler raises is a result
            ours = [place for place in failed_at if not place[0].startswith("triton.")]
            refused.append({"form": label, "place": (ours or failed_at)[0], "why": hopper.reason(error)})

    hopper.take_launches(take)
    hopper.note_statements(lowered.add, failed_at.append)
    for room in ROOMS:
        for label, call in room(CODE):  # `take` reads it
            try:
                call()
            except Exception:  # a launch that is wrong itself
                refused.append({"form": label, "place": None, "why": traceback.format_exc()})
    json.dump({"lowered": sorted(lowered), "refused": refused}, sys.stdout)


if __name__ == "__main__":
    main()
