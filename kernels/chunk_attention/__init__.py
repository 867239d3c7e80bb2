"""Chunk attention in Triton, for Hopper."""
