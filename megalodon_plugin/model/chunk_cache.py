"""Chunk attention of a piece of text that starts anywhere in a chunk, row by row, after cached keys and values.

The cache holds a row's unfinished chunk: C entries of which the first `position mod C` are valid. Cache and piece form
one aligned row, in which the chunk starts at 0; entry s of it is cached for s < fill and of the piece after that.
All shapes depend on the piece's length alone, never on the positions, so a step can be captured in a CUDA graph.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megalodon_plugin.ops import chunk_attention
from megalodon_plugin.ops.checks import compute_dtype, without_autocast

from .state import LayerPast


def attend_after(
    past: LayerPast,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    attend_rows: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a piece after `past`, and the caches of keys and values after it.

    Args:
        q, k: (B, L, H, E), rotated by their position inside the chunk. v: (B, L, H, F).
        attend_rows: chunk attention of q, k, v whose first timestep begins a chunk.

    Returns:
        (B, L, H, F), and the caches (B, C, H, E) and (B, C, H, F), or those of 0 entries that `past` has.
    """
    state = past.state
    if state is None:
        return attend_rows(q, k, v), _first_cache(k, chunk_size), _first_cache(v, chunk_size)
    if state.k.shape[1] == 0:  # whole chunks after whole chunks
        return attend_rows(q, k, v), state.k, state.v
    if past.in_place:
        return _attend_in_place(q, k, v, state.k, state.v, past.position), state.k, state.v
    return _attend_after_cache(q, k, v, state.k, state.v, past.position)


def _first_cache(t: Tensor, chunk_size: int) -> Tensor:
    """What a text that starts with t (B, L, H, E) leaves of its unfinished chunk, (B, C, H, E), 0 behind the end."""
    rest = t.shape[1] % chunk_size
    cache = t.new_zeros(t.shape[0], chunk_size, *t.shape[2:])
    return torch.cat([t[:, t.shape[1] - rest :], cache[:, rest:]], 1)


def _attend_after_cache(
    q: Tensor, k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor, position: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a piece, and the caches after it.

    Args:
        q, k, v: as in `attend_after`.
        cached_k: (B, C, H, E). cached_v: (B, C, H, F).
        position: (B,) int64, timesteps before the piece.

    Returns:
        (B, L, H, F), and the new caches.
    """
    chunk_size, length = cached_k.shape[1], q.shape[1]
    fill = (position % chunk_size).unsqueeze(1)  # (B, 1)
    k_all, v_all = torch.cat([cached_k.to(k.dtype), k], 1), torch.cat([cached_v.to(v.dtype), v], 1)  # (B, C + L, H, .)
    if length <= chunk_size:
        out = _attend_dense(q, k_all, v_all, fill, chunk_size)
    else:
        out = _attend_aligned(q, k_all, v_all, fill, chunk_size)
    entries = torch.arange(chunk_size, device=q.device)
    new_fill = (fill + length) % chunk_size
    sources = _source(fill + length - new_fill + entries, fill, chunk_size, length)
    unused = (entries >= new_fill)[..., None, None]
    return out, _take(k_all, sources).masked_fill(unused, 0), _take(v_all, sources).masked_fill(unused, 0)


def _attend_in_place(q: Tensor, k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor, position: Tensor) -> Tensor:
    """Attention of one timestep a row, (B, 1, H, F); k and v are written into the caches, nothing is copied.

    Arguments as in `_attend_after_cache` with L = 1. Entries of the chunk before are left behind where a chunk begins:
    see `MegalodonState.with_unused_zeroed`.
    """
    batch, chunk_size, n_heads, _ = cached_k.shape
    fill, rows, dtype = position % chunk_size, torch.arange(batch, device=q.device), compute_dtype(q)
    cached_k[rows, fill] = k[:, 0].to(cached_k.dtype)
    cached_v[rows, fill] = v[:, 0].to(cached_v.dtype)
    hidden = (torch.arange(chunk_size, device=q.device) > fill.unsqueeze(1)).unsqueeze(1)  # (B, 1, C)
    outputs = []
    with without_autocast(q):
        for head in range(n_heads):  # one product over all heads would first copy the caches
            scores = _products(q[:, :, head], cached_k[:, :, head].mT, dtype)  # (B, 1, C)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outputs.append(weights.to(cached_v.dtype) @ cached_v[:, :, head])  # (B, 1, F)
    return torch.stack(outputs, 2).to(v.dtype)


def _products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b (batches of matrices), summed and returned in `dtype`."""
    if a.is_cuda and a.dtype == b.dtype != dtype:
        return torch.bmm(a, b, out_dtype=dtype)  # casting b would take longer than the product
    return a.to(dtype) @ b.to(dtype)


def _source(aligned: Tensor, fill: Tensor, chunk_size: int, length: int) -> Tensor:
    """Index into [cache, piece] of entries of the aligned row, (B, .); entries behind the end give the last one."""
    return torch.where(aligned < fill, aligned, chunk_size + aligned - fill).clamp(max=chunk_size + length - 1)


def _take(t: Tensor, index: Tensor) -> Tensor:
    """t (B, S, H, E), index (B, K) -> (B, K, H, E)"""
    return t[torch.arange(t.shape[0], device=t.device).unsqueeze(1), index]


def _attend_dense(q: Tensor, k_all: Tensor, v_all: Tensor, fill: Tensor, chunk_size: int) -> Tensor:
    """At most a chunk of queries against cache and piece under a mask: L (C + L) scores a row and head."""
    length, dtype = q.shape[1], compute_dtype(q)
    steps = torch.arange(length, device=q.device)
    query_chunk = (fill + steps) // chunk_size  # (B, L), 0 is the chunk that the cache belongs to
    cached_slots = torch.arange(chunk_size, device=q.device)
    sees_cache = (query_chunk == 0).unsqueeze(2) & (cached_slots < fill).unsqueeze(1)  # (B, L, C)
    sees_piece = (query_chunk.unsqueeze(2) == query_chunk.unsqueeze(1)) & (steps <= steps.unsqueeze(1))  # (B, L, L)
    hidden = ~torch.cat([sees_cache, sees_piece], 2).unsqueeze(1)
    with without_autocast(q):
        scores = torch.einsum("blhe,bshe->bhls", q.to(dtype), k_all.to(dtype))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("bhls,bshf->blhf", weights.to(v_all.dtype), v_all)


def _attend_aligned(q: Tensor, k_all: Tensor, v_all: Tensor, fill: Tensor, chunk_size: int) -> Tensor:
    """A long piece: lay every row out from the start of its chunk and attend by whole chunks. The queries in the
    cache's place are fillers; what lies behind a row's end comes after every real query, which does not see it.
    """
    length = q.shape[1]
    n_chunks = -(-(chunk_size - 1 + length) // chunk_size)
    aligned = torch.arange(n_chunks * chunk_size, device=q.device)
    sources = _source(aligned, fill, chunk_size, length)
    queries = (aligned - fill).clamp(0, length - 1)
    out = chunk_attention(_take(q, queries), _take(k_all, sources), _take(v_all, sources), chunk_size)
    return _take(out, fill + torch.arange(length, device=q.device))
