"""A checkpoint loads where Triton is not installed, and says what it runs in instead."""

import sys

from transformers.dynamic_module_utils import get_imports

from compress.export.layout import RUNTIME
from tests.processes import run

CHILD = """
import sys, torch, transformers
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(f"{name} is blocked")
for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocked())
from compress.runtime.impl import IMPLS, explain_impl
from compress.runtime.impl_linear import LINEAR_IMPLS
from compress.runtime.impl_retain import RETAIN_IMPLS
from compress.runtime.impl_routed import ROUTED_IMPLS
assert set(IMPLS) == set(RETAIN_IMPLS) == set(ROUTED_IMPLS) == {"reference"} and not LINEAR_IMPLS, IMPLS
print(explain_impl("auto", torch.device("cuda"), torch.bfloat16, 128))
try:
    explain_impl("triton", torch.device("cuda"), torch.bfloat16, 128)
except ValueError as error:
    print(error)
"""


def test_it_falls_back_and_says_why() -> None:
    done = run("code", CHILD)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert "reference" in first and "Triton cannot be imported" in first
    assert "triton was asked for, but Triton cannot be imported" in second


def test_transformers_asks_for_no_package_but_torch() -> None:
    asked = {package for path in RUNTIME.glob("*.py") for package in get_imports(path)}
    assert asked - set(sys.stdlib_module_names) == {"torch", "transformers"}
