"""Attention inside chunks: causal softmax attention among the C positions of a chunk, nothing across chunks.

    out_i = sum_j softmax_j(q_i . k_j) v_j      over j <= i in the chunk of i, scores unscaled, softmax in float32

(arXiv 2404.08801, section 3.3; the 1/sqrt of the scores is part of the normalised q and k.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .checks import check_activation, compute_dtype, without_autocast
from .register import define_gradient, define_op

# Scores made at a time: 64 Mi numbers are 256 MiB in float32, far more than a GPU needs to be busy.
SCORES_AT_ONCE = 1 << 26


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
            weights = scores.masked_fill(_future(scores), float("-inf")).softmax(-1)
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


def _future(scores: Tensor) -> Tensor:
    """True where the key lies after the query, (queries, keys)."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def _slices(length: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, chunk) of the stretch of whole chunks and of the short last chunk, as far as there are such."""
    whole = length - length % chunk_size
    stretches = [(0, whole, chunk_size), (whole, length, length - whole)]
    return [s for s in stretches if s[0] < s[1]]


def _by_chunk(t: Tensor, start: int, stop: int, chunk: int) -> Tensor:
    """(B, L, H, .) -> (B * chunks * H, chunk, .)"""
    t = t[:, start:stop].unflatten(1, (-1, chunk)).transpose(2, 3)  # (B, chunks, H, chunk, .)
    return t.reshape(-1, chunk, t.shape[-1])


def _from_chunks(t: Tensor, batch: int, heads: int) -> Tensor:
    """(B * chunks * H, chunk, .) -> (B, L, H, .)"""
    t = t.reshape(batch, -1, heads, *t.shape[1:]).transpose(2, 3)
    return t.reshape(batch, -1, heads, t.shape[-1])


def _groups(rows: int, chunk: int) -> list[slice]:
    step = max(1, SCORES_AT_ONCE // (chunk * chunk))
    return [slice(i, i + step) for i in range(0, rows, step)]


def _product_dtype(q: Tensor) -> torch.dtype:
    """What the matrix products read: on a CPU the compute dtype, so that only the results are rounded.

    A GPU's matrix units are fast in the activations' dtype alone; there the weights and the scores' gradients are
    rounded to it before they are multiplied on, as fused attention kernels do.
    """
    return compute_dtype(q) if q.device.type == "cpu" else q.dtype


def _full_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T of (rows, chunk, .) in float32 (float64): a bfloat16 result would round scores of 10 by 0.03."""
    dtype = compute_dtype(a)
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.bmm(a, b.transpose(1, 2), out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    scores = _full_product(q, k)
    return scores.masked_fill_(_future(scores), float("-inf"))


def _forward_impl(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The output and the logarithm of each softmax's sum, (B, L, H), which the backward pass starts from."""
    batch, length, heads, _ = q.shape
    outputs, sums = [], []
    with without_autocast(q):
        for start, stop, chunk in _slices(length, chunk_size):
            qc, kc, vc = (_by_chunk(t, start, stop, chunk).to(_product_dtype(q)) for t in (q, k, v))
            out = vc.new_empty(vc.shape)
            log_sum = vc.new_empty(vc.shape[0], chunk, 1, dtype=compute_dtype(q))
            for rows in _groups(vc.shape[0], chunk):
                scores = _scores(qc[rows], kc[rows])
                log_sum[rows] = scores.logsumexp(-1, keepdim=True)
                out[rows] = scores.sub_(log_sum[rows]).exp_().to(vc.dtype) @ vc[rows]
            outputs.append(_from_chunks(out.to(v.dtype), batch, heads))
            sums.append(_from_chunks(log_sum, batch, heads).squeeze(-1))
    return torch.cat(outputs, 1), torch.cat(sums, 1)


def _backward_impl(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. The weights are made again from the scores and their log-sum; dS = P (dP - sum out dout)."""
    batch, length, heads, _ = q.shape
    grads: list[list[Tensor]] = [[], [], []]
    with without_autocast(q):
        for start, stop, chunk in _slices(length, chunk_size):
            sizes = (start, stop, chunk)
            qc, kc, vc, outc, doutc = (_by_chunk(t, *sizes).to(_product_dtype(q)) for t in (q, k, v, out, dout))
            log_sums = _by_chunk(log_sum.unsqueeze(-1), *sizes)
            dq, dk, dv = torch.empty_like(qc), torch.empty_like(kc), torch.empty_like(vc)
            for rows in _groups(vc.shape[0], chunk):
                weights = _scores(qc[rows], kc[rows]).sub_(log_sums[rows]).exp_()
                dv[rows] = weights.to(vc.dtype).transpose(1, 2) @ doutc[rows]
                dscores = _full_product(doutc[rows], vc[rows])
                dscores -= (outc[rows].to(weights.dtype) * doutc[rows]).sum(-1, keepdim=True)
                dscores = dscores.mul_(weights).to(qc.dtype)
                dq[rows] = dscores @ kc[rows]
                dk[rows] = dscores.transpose(1, 2) @ qc[rows]
            for parts, grad in zip(grads, (dq, dk, dv), strict=True):
                parts.append(_from_chunks(grad.to(q.dtype), batch, heads))
    dq, dk, dv = (torch.cat(parts, 1) for parts in grads)
    return dq, dk, dv


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
