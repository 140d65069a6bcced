"""What a head group can become. Importing this package registers every target."""

from compress.targets import aaren, full, pruned, score, window

__all__ = ["aaren", "full", "pruned", "score", "window"]
