"""Figures as files, SVG with text as text and PNG, and as SVG within a page; the same bytes for the same data."""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any, Literal

from compress.files import write_bytes

# Colours of the page's light form; within a page they are replaced by its variables, which follow the reader's theme.
INK, LINE, PAPER = "#1b1f24", "#d1d9e0", "#ffffff"
SERIES = ("#0b5cad", "#b3470f", "#26734d", "#7a3fa0", "#8a6d00", "#a3195b")
VARIABLES = {INK: "--soft", LINE: "--line", PAPER: "--paper"} | {
    colour: f"--c{number}" for number, colour in enumerate(SERIES)
}


def style() -> AbstractContextManager[Any]:
    """The look of every figure, and settings that leave nothing in a file that differs from run to run."""
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "compress",
            "text.color": INK,
            "axes.edgecolor": LINE,
            "axes.labelcolor": INK,
            "axes.titlesize": 9,
            "xtick.color": INK,
            "ytick.color": INK,
            "legend.fontsize": 7,
            "grid.color": LINE,
        }
    )


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    """An empty figure, in inches, to be drawn on within `style`. It belongs to no window and to no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save(figure: Any, path: Path) -> list[Path]:
    """Write `path` with .png and, last, .svg: where the second is, both are. The files.

    Raises:
        UserError: the folder cannot be written.
    """
    written = []
    for kind in ("png", "svg"):
        written.append(path.with_name(f"{path.name}.{kind}"))
        write_bytes(written[-1], rendered(figure, kind))
    return written[::-1]


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as the bytes of an SVG or PNG file, without a date or a version."""
    data = io.BytesIO()
    with style():
        figure.savefig(data, format=kind, dpi=150, metadata={"svg": {"Date": None}}.get(kind, {"Software": None}))
    return data.getvalue()


def inline_svg(figure: Any, name: str, title: str) -> str:
    """A figure as an SVG element for an HTML page: no outside address, no id of another figure, the page's colours.

    Args:
        name: letters and digits that no other figure of the page has, put before every id.
        title: for readers that do not see it.
    """
    text = rendered(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Nothing is drawn outside the axes, so that no clipping is needed.
    text = re.sub(r"<clipPath.*?</clipPath>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' clip-path="[^"]*"', "", text)
    text = re.sub(r'(id="|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', text)
    label = escape(title)
    head = f'<svg {view.group() if view else ""} role="img" aria-label="{label}"><title>{label}</title>'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
