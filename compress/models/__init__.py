"""Where heads, projections and MLPs sit in an architecture, and how a model is named and loaded."""
