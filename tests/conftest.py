"""Offline, seeded and quiet, before anything imports transformers."""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pytest
import torch
from torch.utils import collect_env
from typer import main, testing

from compress.cli.app import app
from tests import interpreter, processes

# Until all is imported (see below): little of that becomes garbage, and to look for it takes a quarter of the time.
gc.disable()

# Kernels run in Triton's interpreter where there is no GPU. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# lm-eval writes it into the report of every task, where nobody reads it: it lists what pip has installed, for a second.
collect_env.get_pretty_env_info = lambda: ""


LOOKING = ("tests/plots/", "tests/report/")  # rooms of tests that look at figures


def pytest_configure(config: pytest.Config) -> None:
    """Files go to processes in their order. By their numbers of tests, those of few tests that take long would be the
    last, and one process would wait for the other."""
    config.option.loadscopereorder = False


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, on one thread: tiny tensors lose by more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def fresh() -> Iterator[Callable[..., Any]]:
    """Exports verify themselves in a fork that has torch imported, those of fixtures too; what they do for users."""
    from compress.export import verify

    own = verify.run_fresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_fresh", processes.run_fresh)
        yield own


@pytest.fixture(scope="session", autouse=True)
def hastened_interpreter() -> None:
    """Kernels run as they do, without what the interpreter computes for nobody."""
    interpreter.hasten()


@pytest.fixture(scope="session", autouse=True)
def seeds_alone() -> Iterator[None]:
    """Without a GPU `torch.manual_seed` seeds, and keeps no three tracebacks for accelerators that might still come."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
        yield


@pytest.fixture(scope="session", autouse=True)
def disk_not_waited_for() -> Iterator[None]:
    """Nothing is flushed to the disk, which takes some of them longer than the tests: it is for power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def sketches() -> Iterator[Callable[..., bytes]]:
    """Figures are files with their words and nothing drawn, a fifth of many runs, but for tests that look at them; what
    draws them for users."""
    from compress.plots import figure

    usual = figure.rendered

    def rendered(drawing: Any, kind: str) -> bytes:
        if os.environ.get("PYTEST_CURRENT_TEST", "").startswith(LOOKING):
            return usual(drawing, kind)
        words = " ".join(text.get_text() for text in drawing.findobj(lambda part: hasattr(part, "get_text")))
        return f'<svg viewBox="0 0 1 1"><text>{escape(words)}</text></svg>'.encode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "rendered", rendered)
        yield usual


@pytest.fixture(scope="session", autouse=True)
def commands_made_once() -> Iterator[None]:
    """Typer makes all commands anew from their functions whenever it runs one, as a process of the tool does once."""
    made = functools.cache(main.get_command)
    made(app)  # for forks of this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "get_command", made)
        patch.setattr(testing, "_get_command", made)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Timings make as few calls as they can, of as little as they can: nothing tests how precise they are."""
    from compress.bench import measure
    from compress.stages import speeds

    durations = measure._durations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measure, "_durations", lambda call, device, _, least, most: durations(call, device, 0.0, least, most)
        )
        patch.setattr(speeds, "SECONDS", 0.0)
        patch.setattr(speeds, "BYTES", {"cpu": 2**20, "cuda": 2**20})
        yield


@pytest.fixture(autouse=True)
def fresh_where_marked(
    request: pytest.FixtureRequest, fresh: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the marker `fresh_process` they do as for users."""
    if request.node.get_closest_marker("fresh_process") is not None:
        monkeypatch.setattr("compress.export.verify.run_fresh", fresh)


@pytest.fixture
def traced() -> Iterator[Callable[..., Any]]:
    """What `torch.compile` takes as a backend that runs what was traced; something has to be by the end of the test.

    A process compiles a function eight times and then never again, without a word: what others compiled is forgotten.
    """
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    yield backend
    assert graphs
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """accelerate keeps the precision of a process's first trainer for all later ones."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


class Imported:
    """Leaves all that is imported out of garbage collections, of which the code asks for some and Python makes many.

    The libraries hold a million objects that stay to the end; to look at them takes a third of a second each time. Some
    of them are imported by the test that needs them first.
    """

    modules = 0

    @classmethod
    def freeze(cls) -> None:
        """Where a library has come since the last time."""
        if len(sys.modules) > cls.modules + 30:
            gc.collect()
            gc.freeze()
            cls.modules = len(sys.modules)


def pytest_collection_finish() -> None:
    """All files of tests are imported, and what they import."""
    gc.enable()
    Imported.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tests before this one may have imported more."""
    Imported.freeze()


def pytest_unconfigure() -> None:
    """At the end of the process libraries look for what is left, and would report all of it."""
    gc.unfreeze()


def _roomy() -> Callable[[Callable[[], Any]], Any]:
    """A function that calls another behind a frame of half a mebibyte.

    Python 3.11 maps the memory of frames in pieces of 16 KiB, and unmaps one when its last frame returns. A hot loop of
    Triton's interpreter whose frames lie across a border does that at every call, 2 million times in one test and for
    a third of its time. Behind a frame that is larger than a piece, one is taken that is large enough for what follows.
    """

    def roomy(call: Callable[[], Any]) -> Any:
        return call()

    # Of nothing but room: the places of its code are few, which compilers and tracebacks look up in every frame.
    roomy.__code__ = roomy.__code__.replace(co_stacksize=1 << 16)
    return roomy


ROOMY = _roomy()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    """Call a test as pytest does, behind a large frame."""
    given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    ROOMY(lambda: pyfuncitem.obj(**given))
    return True
