"""Statistics of single heads and neurons, their importance, one file each."""
