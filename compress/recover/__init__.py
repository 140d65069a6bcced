"""Trains a compressed model until it has regained what it can: LoRA or all weights, on text or on the dense model."""
