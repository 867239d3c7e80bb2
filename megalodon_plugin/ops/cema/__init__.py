"""CEMA: the op, its definition, and the code that runs it."""
