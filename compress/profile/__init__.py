"""Measures what each head group, head and neuron does."""
