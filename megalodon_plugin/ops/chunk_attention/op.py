"""Attention inside chunks: causal softmax attention among the C positions of a chunk, nothing across chunks.

    out_i = sum_j softmax_j(q_i . k_j) v_j      over j <= i in the chunk of i, scores unscaled, softmax in float32

(arXiv 2404.08801, section 3.3; the 1/sqrt of the scores is part of the normalised q and k.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..checks import check_activation, compute_dtype, without_autocast
from ..library import define_gradient, define_op
from . import dense, hopper
from .saved import SavedForward


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    """Causal attention inside chunks; equation at the head of this module.

    Args:
        q, k: (B, L, H, E), already normalised, scaled and rotated. v: (B, L, H, F).
            One dtype: bfloat16, float32 or float64.
        chunk_size: C >= 1. Chunks start at multiples of C; the last may be short.

    Returns:
        (B, L, H, F) in v's dtype.

    Raises:
        ValueError: a shape, a dtype or `chunk_size` breaks a rule above.
    """
    _check(q, k, v, chunk_size)
    return _attention_op(q, k, v, chunk_size)[0]


def chunk_attention_definition(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, dropout: float = 0.0) -> Tensor:
    """`chunk_attention` as its equation reads, chunk after chunk, in plain differentiable torch.

    `dropout` is the probability of dropping a weight after the softmax. It is the path that training with attention
    dropout takes: the fast op has none.
    """
    _check(q, k, v, chunk_size)
    dtype = compute_dtype(q)
    outputs = []
    for start in range(0, q.shape[1], chunk_size):
        q_c, k_c, v_c = (t[:, start : start + chunk_size].transpose(1, 2).to(dtype) for t in (q, k, v))  # (B, H, C, .)
        with without_autocast(q):
            scores = q_c @ k_c.transpose(2, 3)  # (B, H, C, C)
            weights = scores.masked_fill(dense.future(scores), float("-inf")).softmax(-1)
            outputs.append((F.dropout(weights, dropout) @ v_c).transpose(1, 2))
    return torch.cat(outputs, 1).to(v.dtype)


def chunk_attention_flops(batch: int, length: int, heads: int, qk_dim: int, v_dim: int, chunk_size: int) -> int:
    """Floating-point operations of one forward pass, of the pairs i >= j only: 2 E for a score, 2 F for its value."""
    whole, rest = divmod(length, chunk_size)
    pairs = whole * chunk_size * (chunk_size + 1) // 2 + rest * (rest + 1) // 2
    return batch * heads * pairs * 2 * (qk_dim + v_dim)


def _check(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> None:
    check_activation("q", q, 4)
    if k.shape != q.shape:
        raise ValueError(f"`k` must have q's shape {tuple(q.shape)}, but has {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"`v` must have q's shape {tuple(q.shape[:3])} before its last dimension, but has {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"`q`, `k` and `v` must have one dtype, but have {q.dtype}, {k.dtype} and {v.dtype}")
    if chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, but is {chunk_size}")


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of each softmax's sum, (B, L, H), which the backward pass starts from."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    with without_autocast(q):
        if hopper.takes(q, v):
            found = dispatch.kernel_or_none("chunk_attention", q, lambda: hopper.forward(q, k, v, chunk_size))
            if found is not None:
                return found
        return dense.forward(q, k, v, chunk_size)


def _backward_impl(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. The weights are recomputed from the scores and their log-sum; dS = P (dP - sum out dout)."""
    dout, q, k, v = (t.contiguous() for t in (dout, q, k, v))
    saved = SavedForward(q, k, v, out, log_sum)
    with without_autocast(q):
        if hopper.takes(q, v):
            found = dispatch.kernel_or_none("chunk_attention", q, lambda: hopper.backward(dout, saved, chunk_size))
            if found is not None:
                return found
        return dense.backward(dout, saved, chunk_size)


_attention_op = define_op("chunk_attention", _forward_impl)
_attention_backward_op = define_op("chunk_attention_backward", _backward_impl)


@torch.library.register_fake("megalodon::chunk_attention")
def _(q, k, v, chunk_size):
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


@torch.library.register_fake("megalodon::chunk_attention_backward")
def _(dout, q, k, v, out, log_sum, chunk_size):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, ctx.chunk_size = inputs
    out, log_sum = output
    ctx.mark_non_differentiable(log_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, log_sum)


def _backward(ctx, dout: Tensor | None, _):
    if dout is None:
        return None, None, None, None
    return *_attention_backward_op(dout, *ctx.saved_tensors, ctx.chunk_size), None


define_gradient(_attention_op, _save_for_backward, _backward)


@register_flop_formula(torch.ops.megalodon.chunk_attention)
def _flops(q_shape, k_shape, v_shape, chunk_size, *args, **kwargs) -> int:
    batch, length, heads, qk_dim = q_shape
    return chunk_attention_flops(batch, length, heads, qk_dim, v_shape[3], chunk_size)


@register_flop_formula(torch.ops.megalodon.chunk_attention_backward)
def _backward_flops(dout_shape, q_shape, k_shape, v_shape, attended, log_sum, chunk_size, *args, **kwargs) -> int:
    return 2 * _flops(q_shape, k_shape, v_shape, chunk_size)
