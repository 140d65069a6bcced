"""A plan's provenance for people, as Markdown or plain: how it was searched, and what was expected of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NAME = re.compile(r"[\w./:@+-]*[A-Za-z_][\w./:@+-]*")  # a name as code has it
SPECIAL = re.compile(r"([\\`*_<>|\[\]#])")


def provenance_lines(provenance: Mapping[str, Any], indent: str = "") -> list[str]:
    """A nested list; keys become words, and what was not measured is left out."""
    lines = []
    for key, value in provenance.items():
        label = f"{indent}- {_escaped(str(key).replace('_', ' '))}"
        if _is_empty(value):
            continue
        if isinstance(value, Mapping):
            lines += [f"{label}:", *provenance_lines(value, indent + "  ")]
        elif _has_parts(value):
            lines += [f"{label}:", *(f"{indent}  - {_inline(item)}" for item in value if not _is_empty(item))]
        else:
            lines.append(f"{label}: {_inline(value)}")
    return lines


def plain_lines(provenance: Mapping[str, Any]) -> list[str]:
    """A line for each key, without Markdown and with keys as they are; what was not measured is left out."""
    return [f"{key}: {_inline(value, plain=True)}" for key, value in provenance.items() if not _is_empty(value)]


def _has_parts(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value)


def _is_empty(value: Any) -> bool:
    """None, and what has nothing else in it."""
    if isinstance(value, Mapping):
        return all(_is_empty(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_empty(item) for item in value)
    return value is None or value == ""


def _inline(value: Any, plain: bool = False) -> str:
    """A value on one line, as Markdown unless it is to be `plain`."""
    if isinstance(value, Mapping):
        parts = ((str(key), item) for key, item in value.items() if not _is_empty(item))
        return ", ".join(
            f"{key if plain else _escaped(key.replace('_', ' '))} {_inline(item, plain)}" for key, item in parts
        )
    if isinstance(value, list | tuple):
        between = "; " if plain and _has_parts(value) else ", "
        return between.join(_inline(item, plain) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(str(value).split())
    if plain:
        return text
    return f"`{text}`" if NAME.fullmatch(text) else _escaped(text)


def _escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text)
