"""Notes a request to stop (SIGTERM, SIGINT), so that training ends between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def noted_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a signal came. Outside the main thread none is noted.

    A second signal acts as it did before. A first one that arrives after the last call of the function is raised again
    at the end, and acts as it did before.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(number: int, frame: Any) -> None:
        came.append(number)
        put_back()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        put_back()
    if came:
        signal.raise_signal(came[0])
