"""Command lines: parse, build, call."""
