"""Measures what each head group does. Importing this package registers every statistic."""

from compress.profile import attention, gates, hidden_mass, influence, output_error, retrieval

__all__ = ["attention", "gates", "hidden_mass", "influence", "output_error", "retrieval"]
