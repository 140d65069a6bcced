"""Measures what each head group, head and neuron does. Importing this package registers every statistic."""

from compress.profile.heads import (
    ar_loss,
    attention,
    effect,
    gates,
    hidden_mass,
    influence,
    lse_spread,
    output_error,
    query_constancy,
    reconstruction,
    removal,
    retrieval,
    state_rank,
)
from compress.profile.units import amp, drawn, flap, magnitude, taylor, wanda_sp

__all__ = [
    "amp",
    "ar_loss",
    "attention",
    "drawn",
    "effect",
    "flap",
    "gates",
    "hidden_mass",
    "influence",
    "lse_spread",
    "magnitude",
    "output_error",
    "query_constancy",
    "reconstruction",
    "removal",
    "retrieval",
    "state_rank",
    "taylor",
    "wanda_sp",
]
