"""Measures what each head group, head and neuron does. Importing this package registers every statistic."""

from compress.profile.heads import attention, effect, gates, hidden_mass, influence, output_error, retrieval
from compress.profile.units import amp, drawn, flap, magnitude, taylor, wanda_sp

__all__ = [
    "amp",
    "attention",
    "drawn",
    "effect",
    "flap",
    "gates",
    "hidden_mass",
    "influence",
    "magnitude",
    "output_error",
    "retrieval",
    "taylor",
    "wanda_sp",
]
