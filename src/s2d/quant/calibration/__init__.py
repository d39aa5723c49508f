"""Calibration: ranges from data, blocks one after the other, scales moved between layers, resume."""
