"""What a head group can become. Importing this package registers every target."""

from compress.targets import full, window

__all__ = ["full", "window"]
