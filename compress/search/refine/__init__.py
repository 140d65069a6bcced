"""Refinement of a plan by its measured loss."""
