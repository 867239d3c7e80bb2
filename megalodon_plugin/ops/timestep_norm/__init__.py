"""TimestepNorm: the op, its definition, its state, and the code that runs it."""
