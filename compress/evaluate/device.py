"""What a device is called in tables."""

from __future__ import annotations

import torch


def device_name(device: torch.device) -> str:
    """The GPU's own name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
