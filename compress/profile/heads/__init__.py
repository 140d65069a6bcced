"""Statistics of head groups, one file each."""
