"""Attention inside chunks: the op, its definition, and the code that runs it."""

from .op import chunk_attention, chunk_attention_definition, chunk_attention_flops

__all__ = ["chunk_attention", "chunk_attention_definition", "chunk_attention_flops"]
