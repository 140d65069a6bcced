"""Files of a figure: SVG with text as text, and PNG, the same bytes for the same data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from compress.files import write_bytes

EXTRA = "in the clone: pip install -e '.[plots]'"


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches. It belongs to no window and to no state of the process.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> list[Path]:
    """Write `path` with .png and, last, .svg: where the second is, both are. The files.

    Raises:
        UserError: the folder cannot be written.
    """
    from matplotlib import rc_context

    written = []
    # A fixed salt and no date: a run that is repeated leaves the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "compress"}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            data = io.BytesIO()
            figure.savefig(data, format=kind, dpi=150, metadata=metadata)
            written.append(path.with_name(f"{path.name}.{kind}"))
            write_bytes(written[-1], data.getvalue())
    return written[::-1]
