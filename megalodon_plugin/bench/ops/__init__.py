"""The ops on one GPU: checked, then timed."""
