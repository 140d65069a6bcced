"""Plots of a run as files, SVG and PNG, drawn with matplotlib where it is installed."""
