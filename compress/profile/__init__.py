"""Measures what each head group does. Importing this package registers every statistic."""

from compress.profile import attention, influence, retrieval

__all__ = ["attention", "influence", "retrieval"]
