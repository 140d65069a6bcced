"""Commands, run in the process of the tests."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner, Result

from compress.cli.app import app


def call(*words: Any) -> Result:
    """What a command of those words gives."""
    return CliRunner().invoke(app, [str(word) for word in words])


def checked(*words: Any, fails: bool = False) -> Result:
    """The same of one that works, or that `fails`."""
    done = call(*words)
    assert (done.exit_code != 0) == fails, f"compress {' '.join(map(str, words))}: {done.output}"
    return done
