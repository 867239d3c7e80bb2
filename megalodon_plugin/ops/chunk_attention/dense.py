"""Chunk attention as matrix products over whole scores: the path of CPUs and of shapes that no kernel takes."""

import torch
from torch import Tensor

from ..checks import compute_dtype
from .runs import Run, runs
from .saved import SavedForward

# Scores made at a time: 64 Mi numbers are 256 MiB in float32, far more than a GPU needs to be busy.
SCORES_AT_ONCE = 1 << 26


def forward(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """out (B, L, H, F) and log_sum (B, L, H). All tensors contiguous."""
    out, log_sum = empty_outputs(q, v)
    for run in runs(q.shape[1], chunk_size):
        forward_run(q, k, v, run, out, log_sum)
    return out, log_sum


def backward(dout: Tensor, saved: SavedForward, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. All tensors contiguous."""
    grads = empty_gradients(saved)
    for run in runs(dout.shape[1], chunk_size):
        backward_run(dout, saved, run, grads)
    return grads


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and log_sum, to be filled run by run."""
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=compute_dtype(q))


def empty_gradients(saved: SavedForward) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, to be filled run by run."""
    q, k, v = saved.q, saved.k, saved.v
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def forward_run(q: Tensor, k: Tensor, v: Tensor, run: Run, out: Tensor, log_sum: Tensor) -> None:
    """Fill the run's positions of out (B, L, H, F) and of log_sum (B, L, H)."""
    qc, kc, vc = (_by_chunk(t, run).to(_product_dtype(q)) for t in (q, k, v))
    out_c = vc.new_empty(vc.shape)
    sums = vc.new_empty(vc.shape[0], run.chunk, 1, dtype=log_sum.dtype)
    for rows in _groups(vc.shape[0], run.chunk):
        scores = _scores(qc[rows], kc[rows])
        sums[rows] = scores.logsumexp(-1, keepdim=True)
        out_c[rows] = scores.sub_(sums[rows]).exp_().to(vc.dtype) @ vc[rows]
    _fill(out, out_c, run)
    _fill(log_sum.unsqueeze(-1), sums, run)


def backward_run(dout: Tensor, saved: SavedForward, run: Run, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fill the run's positions of dq, dk and dv."""
    q, k, v, out = saved.q, saved.k, saved.v, saved.out
    qc, kc, vc, out_c, dout_c = (_by_chunk(t, run).to(_product_dtype(q)) for t in (q, k, v, out, dout))
    sums = _by_chunk(saved.log_sum.unsqueeze(-1), run)
    dq, dk, dv = torch.empty_like(qc), torch.empty_like(kc), torch.empty_like(vc)
    for rows in _groups(vc.shape[0], run.chunk):
        weights = _scores(qc[rows], kc[rows]).sub_(sums[rows]).exp_()
        dv[rows] = weights.to(vc.dtype).transpose(1, 2) @ dout_c[rows]
        dscores = _full_product(dout_c[rows], vc[rows])
        dscores -= (out_c[rows].to(weights.dtype) * dout_c[rows]).sum(-1, keepdim=True)
        dscores = dscores.mul_(weights).to(qc.dtype)
        dq[rows] = dscores @ kc[rows]
        dk[rows] = dscores.transpose(1, 2) @ qc[rows]
    for grad, grad_c in zip(grads, (dq, dk, dv), strict=True):
        _fill(grad, grad_c, run)


def future(scores: Tensor) -> Tensor:
    """True where the key lies after the query, (queries, keys)."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def _by_chunk(t: Tensor, run: Run) -> Tensor:
    """(B, L, H, .) -> (B * chunks * H, chunk, .)"""
    t = t[:, run.start : run.stop].unflatten(1, (-1, run.chunk)).transpose(2, 3)
    return t.reshape(-1, run.chunk, t.shape[-1])


def _fill(t: Tensor, by_chunk: Tensor, run: Run) -> None:
    """Write (B * chunks * H, chunk, .) to the run's positions of t (B, L, H, .)."""
    batch, _, heads, width = t.shape
    by_chunk = by_chunk.reshape(batch, run.n_chunks, heads, run.chunk, width).transpose(2, 3)
    t[:, run.start : run.stop].unflatten(1, (-1, run.chunk)).copy_(by_chunk)


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
    return scores.masked_fill_(future(scores), float("-inf"))
