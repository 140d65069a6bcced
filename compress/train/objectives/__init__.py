"""Objectives, one file each; importing this package registers them."""

from compress.train.objectives import (
    distill,
    gates,
    kept,
    parts,
    reconstruction,
    routing,
    side,
    text,
    transfer,
    weights,
)

__all__ = ["distill", "gates", "kept", "parts", "reconstruction", "routing", "side", "text", "transfer", "weights"]
