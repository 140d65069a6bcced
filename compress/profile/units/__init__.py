"""Statistics of single heads and neurons: their importance."""
