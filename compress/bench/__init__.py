"""Time and memory of a plan, always beside the dense model in the same process."""
