"""Objectives, one file each; importing this package registers them."""

from compress.train.objectives import distill, gates, parts, reconstruction, routing, side, text, transfer, weights

__all__ = ["distill", "gates", "parts", "reconstruction", "routing", "side", "text", "transfer", "weights"]
