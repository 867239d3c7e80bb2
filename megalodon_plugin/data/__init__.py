"""Text and tokens, from files to rows, without a host."""
