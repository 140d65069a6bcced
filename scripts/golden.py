"""Rewrites the golden artifacts of the tests; the commit says why a value changed.

python scripts/golden.py [PART ...]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.golden.compare import differences
from tests.golden.make import PARTS, machine, make_part

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"


def main(names: list[str]) -> None:
    """Make the named parts anew, all without names; print what changed."""
    for name in names or list(PARTS):
        path = GOLDEN / f"{name}.json"
        with tempfile.TemporaryDirectory() as folder:
            values = json.loads(json.dumps(make_part(name, Path(folder))))
        before = json.loads(path.read_text(encoding="utf-8"))["values"] if path.is_file() else {}
        changed = list(differences(before, values, exact=True))
        print(f"{name}: {len(changed)} changed values", *changed[:20], sep="\n  ")
        text = json.dumps({"machine": machine(), "values": values}, sort_keys=True, indent=0)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
