"""What a head group can become. Importing this package registers every target."""

from compress.targets import full, pruned, score, window

__all__ = ["full", "pruned", "score", "window"]
