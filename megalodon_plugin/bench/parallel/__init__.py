"""Layouts of several GPUs: checked, timed, simulated."""
