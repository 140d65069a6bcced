"""Measures of a comparison, one file each."""
