"""Training steps in the host."""
