"""Objectives, one file each; importing this package registers them."""

from compress.train.objectives import distill, gates, text, transfer

__all__ = ["distill", "gates", "text", "transfer"]
