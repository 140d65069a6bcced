"""The GPU check of linear heads: every kernel against float64, then speed beside dense attention and fla.

python scripts/gpu_linear.py [FOLDER] [SECTION ...]     one GPU, under 5 minutes; without sections, all but sweeps

Writes JSON and a table into the folder.

flash-linear-attention is compared with where it is installed (the wheel `fla-core` and `einops` are enough).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.gpu_check import run_sections
from scripts.gpu_linear_fla import fla_rows
from scripts.gpu_linear_numerics import model_rows, numerics
from scripts.gpu_linear_speed import decode_rows, part_rows, prefill_rows, train_rows
from scripts.gpu_linear_sweep import sweep_decode_rows, sweep_rows

SECTIONS: dict[str, Callable[[], Any]] = {
    "numerics": numerics,
    "model": model_rows,
    "decode": decode_rows,
    "parts": part_rows,
    "prefill": prefill_rows,
    "train": train_rows,
    "fla": fla_rows,
    "sweep": sweep_rows,
    "sweep-decode": sweep_decode_rows,
}


def main() -> None:
    """See `run_sections`; all but the sweeps of launch parameters."""
    run_sections("gpu_linear", SECTIONS, [name for name in SECTIONS if not name.startswith("sweep")])


if __name__ == "__main__":
    main()
