"""The device that a name stands for on this machine."""

from __future__ import annotations

import torch

from compress.errors import UserError
from compress.models.placement import SPREAD
from compress.stages.processes import launch


def resolve_device(name: str) -> str:
    """The device of `auto`, or the one that is named; in a launch of several processes each has a GPU of its own.

    `cuda` without a number and `balanced` stand for the GPUs of this machine (`models.placement.place_for`).

    Raises:
        UserError: the named device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    started = launch()
    if name == SPREAD:
        if started is not None or torch.cuda.device_count() < 2:
            raise UserError(
                f"`{SPREAD}` spreads a model over the GPUs of one process",
                where="device",
                expected="several GPUs, and no launch of several processes",
                found=f"{torch.cuda.device_count()} GPUs" if started is None else f"{started.count} processes",
                fix="take `auto`",
            )
        return name
    if name == "cuda" and started is not None:
        name = f"cuda:{started.local_rank}"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = name.partition(":")
    if not there.get(kind) or (number and int(number) >= torch.cuda.device_count()):
        raise UserError(
            f"this machine has no device `{name}`",
            where="device",
            expected="auto, or one of " + ", ".join(kind for kind, present in there.items() if present),
            fix="take `auto`, or see what `compress doctor` lists",
        )
    return name
