"""Objectives, one file each; importing this package registers them."""

from compress.train.objectives import distill, gates, side, text, transfer

__all__ = ["distill", "gates", "side", "text", "transfer"]
