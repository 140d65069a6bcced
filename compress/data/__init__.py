"""Calibration text and recall tasks. Recipes read their parameters here, so only `answers.py` and `calibration.py`
import torch."""
