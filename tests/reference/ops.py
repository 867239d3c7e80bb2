"""The operations: TimestepNorm, CEMA, RoPE and attention inside chunks, each as a loop over time."""

import math

import torch

F64 = torch.float64
C128 = torch.complex128


def timestep_norm(x, weight, bias, num_groups, eps, state=None, padding_mask=None):
    """Normalise each step by the statistics of every unmasked step so far, its own included.

    x (B, L, D); weight, bias (D), the gain is weight + 1; state (count (B) int64, mean (B, G), var (B, G)) or None;
    padding_mask (B, L), True where the step is padding: y is 0 there and the state stays.
    Returns y (B, L, D) and the last state.
    """
    B, L, D = x.shape
    G = num_groups
    x, weight, bias = x.to(F64), weight.to(F64), bias.to(F64)
    rows, counts, means, variances = [], [], [], []
    for b in range(B):
        n = 0 if state is None else int(state[0][b])
        mean = torch.zeros(G, dtype=F64) if state is None else state[1][b].to(F64)  # (G,)
        var = torch.zeros(G, dtype=F64) if state is None else state[2][b].to(F64)  # (G,)
        steps = []
        for t in range(L):
            if padding_mask is not None and bool(padding_mask[b, t]):
                steps.append(torch.zeros(D, dtype=F64))
                continue
            grouped = x[b, t].reshape(G, D // G)  # group g owns D/G contiguous features
            mu = grouped.mean(dim=1)
            s2 = ((grouped - mu[:, None]) ** 2).mean(dim=1)
            n = n + 1
            c2 = 1.0 / n
            c1 = 1.0 - c2
            d = mu - mean
            var = c1 * var + c2 * s2 + c1 * c2 * d**2
            mean = mean + c2 * d
            normed = (grouped - mean[:, None]) / torch.sqrt(var + eps)[:, None]
            steps.append(normed.reshape(D) * (weight + 1) + bias)
        rows.append(torch.stack(steps))
        counts.append(n)
        means.append(mean)
        variances.append(var)
    return torch.stack(rows), (torch.tensor(counts), torch.stack(means), torch.stack(variances))


def cema(x, alpha, delta, theta, gamma, omega, h0=None, cema_input="released"):
    """h_t = p x_t + q h_{t-1}; y_t = sum_n Re(g_n h_{n,t}) + omega x_t.

    x (B, L, D); alpha, delta (D, N, 1); theta (D, 1, 1); gamma (D, N, 2) = (re, im); omega (D, 1);
    h0 (B, D, N) complex or None. The input coefficient p is a in the released code and a e^{i angle} in the paper.
    Returns y (B, L, D) and the last h (B, D, N) complex.
    """
    B, L, D = x.shape
    N = alpha.shape[1]
    x = x.to(F64)
    a = torch.sigmoid(alpha.to(F64)).reshape(D, N)
    d = torch.sigmoid(delta.to(F64)).reshape(D, N)
    n = torch.arange(1, N + 1, dtype=F64)
    angle = torch.sigmoid(theta.to(F64)).reshape(D, 1) * (2 * math.pi / N) * n  # (D, N)
    rotation = torch.complex(torch.cos(angle), torch.sin(angle))
    q = (1 - a * d) * rotation
    if cema_input == "released":
        p = a.to(C128)
    elif cema_input == "paper":
        p = a * rotation
    else:
        raise ValueError(cema_input)
    g = torch.complex(gamma[..., 0].to(F64), gamma[..., 1].to(F64)) * math.sqrt(1 / N)
    h = torch.zeros(B, D, N, dtype=C128) if h0 is None else h0.to(C128)
    steps = []
    for t in range(L):
        x_t = x[:, t]  # (B, D)
        h = p * x_t[:, :, None] + q * h
        steps.append((g * h).real.sum(dim=2) + omega.to(F64).reshape(D) * x_t)
    return torch.stack(steps, dim=1), h


def rope_frequencies(head_dim, base):
    """base^(-2j/E) for j = 0..E/2-1 as the released code has it: each of its three steps (exponent, power, reciprocal)
    rounds to float32. The power is taken in float64 before it rounds, so that no machine's float32 pow has a say."""
    exponent = torch.arange(0, head_dim, 2).to(torch.float32) / head_dim
    power = (base ** exponent.to(F64)).to(torch.float32)
    return (1.0 / power).to(F64)


def apply_rope(x, base):
    """Rotate the interleaved pairs of x (..., L, E) by position 0..L-1 times the frequencies."""
    L, E = x.shape[-2:]
    angle = torch.arange(L, dtype=F64)[:, None] * rope_frequencies(E, base)[None, :]  # (L, E/2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def chunk_attention(q, k, v, chunk_size, rope_base=None):
    """Causal softmax attention inside each chunk of `chunk_size` steps; the last chunk may be short.

    q, k (B, L, H, E), v (B, L, H, F) -> (B, L, H, F). Scores q.k without a scale. With `rope_base`, q and k are
    rotated here by their position inside the chunk; without it they are taken as they are.
    """
    B, L, H, _ = q.shape
    chunks = []
    for start in range(0, L, chunk_size):
        end = min(start + chunk_size, L)
        rows = []
        for b in range(B):
            heads = []
            for head in range(H):
                qc, kc, vc = (s[b, start:end, head].to(F64) for s in (q, k, v))  # (c, E), (c, E), (c, F)
                if rope_base is not None:
                    qc, kc = apply_rope(qc, rope_base), apply_rope(kc, rope_base)
                steps = []
                for t in range(end - start):
                    score = kc[: t + 1] @ qc[t]  # (t + 1,): this step and those before it
                    steps.append(torch.softmax(score, dim=0) @ vc[: t + 1])
                heads.append(torch.stack(steps))
            rows.append(torch.stack(heads, dim=1))  # (c, H, F)
        chunks.append(torch.stack(rows))
    return torch.cat(chunks, dim=1)
