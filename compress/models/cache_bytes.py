"""Bytes of a KV cache, whichever library made it. The check of a checkpoint reads this file by its path."""

from typing import Any


def cache_bytes(cache: Any) -> int | None:
    """Bytes of keys and values that a cache holds: what a paged cache says itself, else its tensors' storages."""
    if hasattr(cache, "allocated_bytes"):
        return int(cache.allocated_bytes())
    sides: list[Any] = [
        side
        for layer in getattr(cache, "layers", [])
        for side in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if hasattr(side, "untyped_storage")
    ]
    return sum(side.untyped_storage().nbytes() for side in sides) if sides else None
