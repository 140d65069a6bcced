"""Statistics of head groups."""
