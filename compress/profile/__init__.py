"""Measures what each head group, head and neuron does. Importing this package registers every statistic."""

from compress.profile import (
    amp,
    attention,
    flap,
    gates,
    hidden_mass,
    influence,
    magnitude,
    output_error,
    random,
    retrieval,
    taylor,
    wanda_sp,
)

__all__ = [
    "amp",
    "attention",
    "flap",
    "gates",
    "hidden_mass",
    "influence",
    "magnitude",
    "output_error",
    "random",
    "retrieval",
    "taylor",
    "wanda_sp",
]
