"""Choosing among options: the ones worth considering, the knapsack over them, and the Pareto set of its objectives."""
