"""Figures, all drawn with matplotlib: as files of a run folder, and as SVG within the report."""
