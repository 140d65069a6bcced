"""What a head group can become. Importing this package registers every target."""

from compress.targets import full, linear, pruned, window

__all__ = ["full", "linear", "pruned", "window"]
