"""Decides what each head group becomes under a budget: one solver per file, and the parts they share."""
