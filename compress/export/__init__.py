"""Writes a checkpoint that loads with transformers alone, and proves that it does."""
