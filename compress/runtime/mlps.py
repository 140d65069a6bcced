"""What a layer's MLP has beside its width: the base of such MLPs, and the registry of what puts them into layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class PlannedMlp(nn.Module):
    """An MLP with parameters that the dense model's has not."""

    def reset_parameters(self) -> None:
        """Give these their first values, as the constructor has to; those of modules in it are reset by themselves."""
        raise NotImplementedError

    def own_parameters(self) -> list[nn.Parameter]:
        """These parameters."""
        raise NotImplementedError


Installer = Callable[[Any, Any, dict[str, Any], int, int], None]  # with the arguments of `install_mlp`
INSTALLERS: dict[str, Installer] = {}  # by the key of a plan's `mlp` that asks for it
WIDTH = {"kept"}  # the keys of `mlp` that say a width, which `widths.py` reads


def register(key: str) -> Callable[[Installer], Installer]:
    """Decorator: the function runs for layers in whose plan `mlp` has this key."""

    def add(install: Installer) -> Installer:
        INSTALLERS[key] = install
        return install

    return add


def install_mlp(layer: Any, attention: Any, mlp: dict[str, Any], hidden_size: int, number: int) -> None:
    """Give a decoder layer the MLP that its plan asks for, where it asks for more than a width.

    Args:
        attention: of the layer, which runs before.
        mlp: what the layer's plan says of it; empty where it says nothing.
        number: of the layer.

    Raises:
        ValueError: one that this runtime does not have.
    """
    asked = mlp.keys() - WIDTH
    found = [INSTALLERS[key] for key in mlp if key in INSTALLERS]
    if asked and not found:
        raise ValueError(f"layer {number}: this runtime has no MLP of {', '.join(sorted(asked))}")
    for install in found:
        install(layer, attention, mlp, hidden_size, number)
