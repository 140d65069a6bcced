"""Small tables between host and device without a wait for what else the device does."""

from __future__ import annotations

from typing import Any

import torch


def send(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A table of the host on the device; the host goes on before it is there."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


class Coming:
    """Numbers on their way from the device to the host.

    Args:
        numbers: as the launches so far leave them; what is launched later is not waited for.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[Any]:
        """The numbers as lists, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        found: list[Any] = self._numbers.tolist()
        return found
