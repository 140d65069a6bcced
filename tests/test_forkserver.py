"""The server that forks children: what they print, how they end, and that no limit is passed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.forkserver import ForkServer


def prints(text: str) -> int:
    print(text)
    print("beside", file=sys.stderr)
    subprocess.run(["echo", "grandchild"], check=True)
    return 3


def sleeps() -> None:
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)


def eats() -> None:
    bytearray(3 << 30)


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with ForkServer(()) as running:
        yield running


def test_what_a_child_prints_and_returns(server: ForkServer) -> None:
    outcome = server.run(prints, "hello")
    assert outcome.code == 3
    assert sorted(outcome.stdout.split()) == ["grandchild", "hello"] and outcome.stderr == "beside\n"
    assert outcome.maxrss > 1 << 20 and outcome.seconds < 20 and not outcome.timed_out


def test_limits_and_signals(server: ForkServer) -> None:
    slow = server.run(sleeps, timeout=0.2)
    assert slow.timed_out and slow.code == -signal.SIGKILL
    greedy = server.run(eats, memory_limit=1 << 30)
    assert greedy.code == 1 and "MemoryError" in greedy.stderr
    assert server.run(dies).code == -signal.SIGKILL
    assert server.run(sys.exit, 7).code == 7


def test_a_fresh_interpreter() -> None:
    with ForkServer(("json",), fresh=True) as server:
        outcome = server.run(eval, "print('torch' in __import__('sys').modules)")
    assert (outcome.code, outcome.stdout) == (0, "False\n")
