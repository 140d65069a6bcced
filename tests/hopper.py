"""A Hopper GPU that is none: Triton takes launches on CPU tensors for launches on it, compiles them and runs nothing.

The interpreter, which runs the kernels in other tests, is Python, and takes much that the compiler refuses: a variable
that changes its type in a loop, a shape that is no power of two. It knows no other way; here nothing is computed, and
outputs hold anything.

All that is used of Triton's insides is in this file. It has to be imported in a process without `TRITON_INTERPRET`,
and before the kernels are.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.compiler.code_generator import CodeGenerator
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction

from compress.runtime import tuned

MULTIPROCESSORS = 132  # of an H100
Place = tuple[str, str, int]  # module and name of a function for kernels, and a line counted from its `def`


class Driver:
    """What a launch asks of a driver before it compiles."""

    def get_current_target(self) -> Any:
        """Hopper, with warps of 32 threads."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The usual one."""
        return 0


def tune() -> None:
    """Have launches on CPU tensors take the sizes of a Hopper GPU, and not those of the interpreter."""
    gpu = torch.device("cuda", 0)

    def on_gpu(function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        instead = {name: gpu if isinstance(x, torch.device) else x for name, x in named.items()}
        return function(*(gpu if isinstance(x, torch.device) else x for x in given), **instead)

    for name, answer in (("hopper", True), ("multiprocessors", MULTIPROCESSORS)):
        setattr(tuned, name, lambda device, answer=answer: answer)
    for path in sorted(Path(str(tuned.__file__)).parent.glob("tuned*.py")):  # `tuned` itself first
        module = import_module(f"compress.runtime.{path.stem}")
        for name, function in vars(module).copy().items():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                setattr(module, name, functools.partial(on_gpu, function))


def take_launches(take: Callable[[Any, Any, Any], None]) -> None:
    """Call `take` in the place of every launch of a new form, with its source, options and back end."""
    seen = set()

    def forward(
        kernel: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        """No kernel, so that nothing is launched."""
        if (kernel.__module__, kernel.__name__, key) not in seen:
            seen.add((kernel.__module__, kernel.__name__, key))
            take(ASTSource(kernel, signature, constants, attributes), options, kernel.device_caches[device][3])

    parse = functools.cache(ast.parse)  # of a function at every call: a quarter of what `lower` would cost
    JITCallable.parse = lambda function: parse(function.src)
    driver.set_active(Driver())
    JITFunction._do_compile = forward


def lower(source: Any, options: Any, backend: Any) -> None:
    """Take a launch through the front end to Triton's own representation, a tenth of a second; raises what it says.

    Without the checks of sums and products of integers, for which it makes code and then uses none of it: they are for
    kernels that are debugged.
    """
    from triton._C.libtriton import ir

    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = replace(options, sanitize_overflow=options.debug)
    functions = backend.get_codegen_implementation(options)
    source.make_ir(backend.target, options, functions, backend.get_module_map(), context)


def reason(error: BaseException) -> str:
    """The words of what was raised first, without the source above them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "error_message", None) or error)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes: registers of a thread, bytes of them that are spilled, and bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def compile_whole(source: Any, options: Any, backend: Any) -> Compiled:
    """Take a launch through the whole compiler, seconds; raises what any part of it says."""
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True  # there is no log of what was compiled before
    with redirect_stdout(StringIO()) as log:
        compiled = compile(source, target=backend.target, options=dict(vars(options)))
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    assert registers, log.getvalue()
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", log.getvalue())]
    return Compiled(int(registers[1]), sum(spilled), compiled.metadata.shared)


def note_statements(note: Callable[[Place], None], refused: Callable[[Place], None]) -> None:
    """Call `note` with every statement that the front end lowers, and `refused` with one that it does not take."""
    visit = CodeGenerator.visit

    def noted(generator: Any, node: Any) -> Any:
        if not isinstance(node, ast.stmt) or not hasattr(node, "lineno"):  # some it makes itself
            return visit(generator, node)
        place = (generator.jit_fn.__module__, generator.jit_fn.__name__, node.lineno)
        note(place)
        try:
            return visit(generator, node)
        except Exception:
            refused(place)
            raise

    CodeGenerator.visit = noted
