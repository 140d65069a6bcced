"""Triton's interpreter without the work of which it throws the results away: two thirds of what its tests cost."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace


def hasten() -> None:
    """Let it prepare the language once instead of at every call of a function, and check no sum that it cannot report.

    It replaces some 200 functions of `triton.language` by its own whenever a kernel calls another function, although
    the kernel's own launch has done that. And it computes every sum and product of integers in 64 bits too, to compare
    them, and then asserts nothing: assertions are off unless the options say `debug`, which they never do.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # not on this system
        return
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    nothing = type(interpreter._patch_lang(everything))
    interpreter._patch_lang = lambda function: nothing()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
