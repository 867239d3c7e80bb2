"""One module a checkpoint format."""
