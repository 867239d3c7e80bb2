"""Measurements: of the ops, of training steps, of layouts, of generation."""
