"""The ops on one GPU: checked, then timed."""

OPS = ("cema", "timestep_norm")
