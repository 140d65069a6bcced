"""What a head group can become. Importing this package registers every target."""

from compress.targets import aaren, expert, full, linear, pruned, retain, routed, routed_options, score, window

__all__ = ["aaren", "expert", "full", "linear", "pruned", "retain", "routed", "routed_options", "score", "window"]
