"""Long-context suites, made by seed at any length in the model's own tokens. A new one is a file here: importing it
registers it, and every file is imported."""

from importlib import import_module
from pkgutil import iter_modules

from compress.evaluate.suites.suite import SUITES

for file in iter_modules(__path__):
    import_module(f"{__name__}.{file.name}")

__all__ = ["SUITES"]
