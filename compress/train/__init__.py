"""Training: one loop with objectives by name, for recovery, for statistics and for targets that are trained first."""
