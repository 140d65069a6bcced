"""A process that has imported torch and transformers once, and forks for every Python process that a test starts.

Usage: python -P zygote.py DESCRIPTOR, the number of an inherited socket; `tests/processes.py` starts it and asks.

A fork is safe here because nothing has computed yet: there is one thread, and no pool of OpenMP or of a BLAS. A child
has its own environment, folder, arguments and streams, as if started afresh. A child can be a zygote itself, with more
imported: with the toolkit, which no process that loads a checkpoint may know.
"""

import atexit
import gc
import importlib
import importlib.machinery
import json
import os
import pathlib
import random
import runpy
import socket
import sys
import threading
import traceback
from typing import Any

FAMILIES = ("gemma3", "llama", "ministral", "mistral", "phi3", "qwen2", "qwen3")
MODULES = [
    "torch",
    "safetensors.torch",
    "transformers",
    "transformers.generation.utils",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "peft",
    "pydantic",
]
RUNTIME = sorted((pathlib.Path(__file__).parents[1] / "compress" / "runtime").glob("*.py"))
Order = dict[str, Any]


def import_all() -> None:
    """Import, and see that it started no thread and knows nothing of the toolkit."""
    for name in MODULES:
        importlib.import_module(name)
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # compiles a thousand expressions, and keeps them
    compile_runtime()
    read_imports()
    see_one_thread()
    if any(name.partition(".")[0] == "compress" for name in sys.modules):
        sys.exit("zygote: compress has been imported, and a checkpoint has to load without it")


def see_one_thread() -> None:
    """End where there are more."""
    if os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) > 1:
        sys.exit("zygote: an import has started a thread, so that a fork would not be safe")


def compile_runtime() -> None:
    """Compile the runtime's files once: every checkpoint carries copies, which every child would compile anew."""
    known = {path.read_bytes(): path for path in RUNTIME}
    codes = {data: compile(data, path, "exec", dont_inherit=True) for data, path in known.items()}
    loader: Any = importlib.machinery.SourceFileLoader
    usual = loader.source_to_code

    def source_to_code(self: Any, data: Any, path: Any, **options: Any) -> Any:
        code = codes.get(bytes(data)) if isinstance(data, bytes | bytearray | memoryview) else None
        return code if code is not None else usual(self, data, path, **options)

    loader.source_to_code = source_to_code


def read_imports() -> None:
    """Note what files import, the runtime's first: transformers parses every copy of them anew at every load."""
    from transformers import dynamic_module_utils

    for name in ("get_imports", "get_relative_imports"):
        usual = getattr(dynamic_module_utils, name)
        known = {path.read_bytes(): usual(path) for path in RUNTIME}

        def read(path: Any, usual: Any = usual, known: dict[bytes, list[str]] = known) -> list[str]:
            data = pathlib.Path(path).read_bytes()
            if data not in known:
                known[data] = usual(path)
            return list(known[data])

        setattr(dynamic_module_utils, name, read)


def serve(channel: socket.socket) -> tuple[Order, list[int]]:
    """Fork for every order that comes; returns in the children, and ends the process when nobody can ask any more.

    Returns the order, and descriptors that came with it behind those of its streams and its status.
    """
    keepers: list[int] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 4)
        while data and not data.endswith(b"\n"):
            data += channel.recv(1 << 16)
        # Waited for, so that what children cost is counted with the tests.
        keepers = [keeper for keeper in keepers if os.waitpid(keeper, os.WNOHANG if data else 0) == (0, 0)]
        if not data:
            os._exit(0)
        keepers.append(os.fork())
        if keepers[-1] == 0:
            channel.close()
            keep(*descriptors[:3])
            return json.loads(data), descriptors[3:]
        for descriptor in descriptors:
            os.close(descriptor)


def keep(out: int, err: int, status: int) -> None:
    """Fork once more and return in the child; its parent tells number and exit status, for only a parent can wait."""
    child = os.fork()
    if child:
        os.close(out)
        os.close(err)
        os.write(status, f"{child}\n".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.close(status)
    for descriptor, number in ((out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)


def become(order: Order) -> None:
    """Take over what a new process would have found."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    sys.path[:0] = order["path"]
    sys.argv = order["arguments"]
    random.seed()
    if "HF_MODULES_CACHE" in os.environ:
        _move_code_cache(os.environ["HF_MODULES_CACHE"])


def _move_code_cache(folder: str) -> None:
    """Where the code of checkpoints is copied to, which transformers reads when it is imported."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "HF_MODULES_CACHE" in vars(module):
            before, vars(module)["HF_MODULES_CACHE"] = vars(module)["HF_MODULES_CACHE"], folder
            while before in sys.path:
                sys.path.remove(before)
        elif name.partition(".")[0] == "transformers_modules":  # a process that has loaded checkpoints before
            del sys.modules[name]


def do(what: str, name: str) -> int:
    """Run a file, a module or code as the main module of this process; its exit status."""
    try:
        if what == "code":
            exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
        elif what == "module":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve; in a child, do what the order says, and leave without taking all of torch apart, which takes a second."""
    gc.disable()  # little of what is imported becomes garbage
    channel = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    channel.sendall(b"\n")  # ready
    gc.freeze()
    order, more = serve(channel)
    while order["run"][0] == "zygote":
        become(order)
        for name in order["run"][1].split():
            importlib.import_module(name)
        see_one_thread()
        channel = socket.socket(fileno=more[0])
        channel.sendall(b"\n")
        gc.freeze()
        order, more = serve(channel)
    gc.enable()
    become(order)
    status = do(*order["run"])
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
