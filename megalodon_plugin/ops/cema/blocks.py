"""CEMA by blocks: matrix products over blocks of T steps and a scan over the blocks.

kernels/README.md (section CEMA) derives it for this code and for the kernels alike: the tables k, C, S and A of a
channel's coefficients p, q and g, what they make of a block and of the state before it, and all gradients. Names are
the same, but `lam` is the gradient of the state that leaves a block, of which l there is the conjugate, and the other
gradients of complex numbers are not conjugated here either.

Conjugates are physical: inside a custom op that a compiled graph calls, torch does not resolve a lazy conjugate, and
exp or a product then reads the number unconjugated.

Nothing of size L*D*N is stored: the states at the block edges are 2N/T of an activation. The tables are made in
float64 (they hold D*N*T numbers, and the phase of q^t is lost in float32 long before t = 1000) and rounded once.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import compute_dtype

BLOCK = 64  # steps: the products inside a block cost T, those with the state 4N multiply-adds an element; N is 16


class CemaParameters(NamedTuple):
    """The parameters of `cema`, in its shapes, and whether the input coefficient is rotated ("paper")."""

    alpha: Tensor
    delta: Tensor
    theta: Tensor
    gamma: Tensor
    omega: Tensor
    rotate_input: bool

    def coefficients(self) -> "Coefficients":
        """p, q and g; omega has no part in them."""
        return coefficients(self.alpha, self.delta, self.theta, self.gamma, self.rotate_input)


class Coefficients(NamedTuple):
    """p, log q and g of every channel and order, complex128 (D, N), and what their gradients need."""

    p: Tensor
    log_q: Tensor
    g: Tensor
    a: Tensor  # sigmoid(alpha), float64 (D, N)
    d: Tensor  # sigmoid(delta), float64 (D, N)
    f: Tensor  # sigmoid(theta), float64 (D, 1)
    steps: Tensor  # 2 pi n / N for n = 1..N, float64 (N,)
    rotate_input: bool


class CoefficientGrads(NamedTuple):
    """Gradients of p, log q and g, complex128 (D, N), and of omega, float64 (D,). They add up over slices of time."""

    p: Tensor
    log_q: Tensor
    g: Tensor
    omega: Tensor

    def __add__(self, other: "CoefficientGrads") -> "CoefficientGrads":  # type: ignore[override]  # a tuple's joins
        return CoefficientGrads(*(a + b for a, b in zip(self, other, strict=True)))


def coefficients(alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, rotate_input: bool) -> Coefficients:
    """Coefficients from the parameters alpha, delta (D, N, 1), theta (D, 1, 1), gamma (D, N, 2)."""
    order = alpha.shape[1]
    a = torch.sigmoid(alpha.squeeze(-1).double())
    d = torch.sigmoid(delta.squeeze(-1).double())
    f = torch.sigmoid(theta.squeeze(-1).double())
    steps = torch.arange(1, order + 1, dtype=torch.float64, device=alpha.device) * (2 * math.pi / order)
    angle = f * steps  # (D, N)
    # |q| = 1 - a d may round to 0 when both saturate; its logarithm must stay finite.
    log_decay = torch.log1p(-(a * d).clamp(max=1 - 1e-15))
    p = torch.polar(a, angle) if rotate_input else torch.complex(a, torch.zeros_like(a))
    g = torch.complex(*gamma.double().unbind(-1)) * math.sqrt(1 / order)
    return Coefficients(p, torch.complex(log_decay, angle), g, a, d, f, steps, rotate_input)


def parameter_grads(c: Coefficients, grads: CoefficientGrads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From gradients of p, log q and g to those of alpha, delta, theta and gamma, in the parameters' shapes."""
    order = c.a.shape[1]
    da = -grads.log_q.real * c.d / (1 - c.a * c.d).clamp(min=1e-15)
    dd = -grads.log_q.real * c.a / (1 - c.a * c.d).clamp(min=1e-15)
    dangle = grads.log_q.imag
    if c.rotate_input:
        turn = torch.polar(torch.ones_like(c.a), c.log_q.imag)
        da = da + (turn.conj_physical() * grads.p).real
        dangle = dangle + ((1j * c.p).conj_physical() * grads.p).real
    else:
        da = da + grads.p.real
    dtheta = (dangle * c.steps).sum(-1, keepdim=True) * c.f * (1 - c.f)
    dalpha = da * c.a * (1 - c.a)
    ddelta = dd * c.d * (1 - c.d)
    dgamma = torch.view_as_real(grads.g * math.sqrt(1 / order))
    return dalpha.unsqueeze(-1), ddelta.unsqueeze(-1), dtheta.unsqueeze(-1), dgamma


class Tables(NamedTuple):
    """The tables of one block length T in the compute dtype; complex ones as (real, imaginary) rows for products."""

    powers: Tensor  # q^0 .. q^T, complex128 (D, N, T+1)
    toeplitz: Tensor  # [s, t] = k_{t-s} for t >= s, (D, T, T)
    out: Tensor  # rows Re C, -Im C, so that [Re h, Im h] @ out = Re(C h), (D, 2N, T)
    into: Tensor  # columns Re S, Im S, (D, T, 2N)
    log_a: Tensor  # log A = T log q, complex128 (D, N)


def make_tables(c: Coefficients, omega: Tensor, block: int, dtype: torch.dtype) -> Tables:
    """Tables for blocks of `block` steps; omega (D,) joins k_0."""
    lags = torch.arange(block + 1, dtype=torch.float64, device=c.p.device)
    powers = torch.exp(c.log_q.unsqueeze(-1) * lags)  # (D, N, T+1)
    kernel = torch.einsum("dn,dnl->dl", c.p * c.g, powers[..., :-1]).real.clone()  # (D, T)
    kernel[:, 0] += omega.double()
    steps = torch.arange(block, device=c.p.device)
    lag = steps - steps.unsqueeze(1)  # [s, t] = t - s
    toeplitz = kernel.to(dtype)[:, lag.clamp(min=0)] * (lag >= 0)
    out = c.g.unsqueeze(-1) * powers[..., 1:]  # C, (D, N, T)
    into = (c.p.unsqueeze(-1) * powers[..., :-1]).flip(-1)  # S, (D, N, T)
    return Tables(
        powers,
        toeplitz,
        torch.cat([out.real, -out.imag], 1).to(dtype),
        # In memory (D, 2N, T): a CPU's batched product with 2N = 32 columns is eight times faster so.
        torch.cat([into.real, into.imag], 1).to(dtype).transpose(1, 2),
        c.log_q * block,
    )


def table_grads(c: Coefficients, t: Tables, d_toeplitz: Tensor, d_out: Tensor, d_into: Tensor, d_a: Tensor):
    """Gradients of the coefficients from those of the tables (shapes as in `Tables`; d_a complex (D, N))."""
    order, block = c.p.shape[1], d_toeplitz.shape[1]
    # Sum every diagonal: flip the rows, pad to width 2T, drop T numbers and reshape to width 2T-1. Each row then
    # starts one column further on, so lag l lands in column T-1+l. No atomics, so the sum has one fixed order.
    skewed = torch.nn.functional.pad(d_toeplitz.flip(1), (0, block)).flatten(1)[:, :-block]
    d_kernel = skewed.unflatten(1, (block, 2 * block - 1)).sum(1)[:, block - 1 :].double()  # (D, T)
    d_c = torch.complex(d_out[:, :order].double(), -d_out[:, order:].double())  # (D, N, T)
    d_s = torch.complex(d_into[..., :order].double(), d_into[..., order:].double()).transpose(1, 2).flip(-1)
    conj_p, conj_g, conj_powers = (z.conj_physical() for z in (c.p, c.g, t.powers))
    inner, outer = conj_powers[..., :-1], conj_powers[..., 1:]  # conj q^l for l < T and for 1 <= l <= T
    # Each table's sum over l, once plain (for p and g) and once weighted by the power's exponent (for log q).
    lags = torch.arange(block + 1, dtype=torch.float64, device=c.p.device)
    weights = torch.stack([torch.ones_like(lags), lags], -1).to(inner.dtype)  # (T+1, 2)
    of_kernel, kernel_by_lag = (inner @ (d_kernel.unsqueeze(-1) * weights[:-1])).unbind(-1)  # each (D, N)
    of_s, s_by_lag = ((inner * d_s) @ weights[:-1]).unbind(-1)
    of_c, c_by_lag = ((outer * d_c) @ weights[1:]).unbind(-1)
    d_log_q = conj_p * (conj_g * kernel_by_lag + s_by_lag) + conj_g * c_by_lag + block * conj_powers[..., -1] * d_a
    return CoefficientGrads(conj_g * of_kernel + of_s, d_log_q, conj_p * of_kernel + of_c, d_kernel[:, 0])


def scan(u: Tensor, log_a: Tensor) -> Tensor:
    """s_b = A s_{b-1} + u_b with s_{-1} = 0, over dimension -2, by pairs: work O(blocks), depth O(log blocks).

    u complex (D, B, blocks, N); log_a = log A, complex128 (D, N), from which every A^(2^j) is computed, so that
    squaring does not pile up rounding.
    """
    blocks = u.shape[-2]
    if blocks == 1:
        return u
    a = torch.exp(log_a).to(u.dtype)[:, None, None]  # (D, 1, 1, N)
    even, odd = u[..., 0::2, :], u[..., 1::2, :]
    pairs = odd.shape[-2]
    s = torch.empty_like(u)
    s[..., 1::2, :] = scan(torch.addcmul(odd, a, even[..., :pairs, :]), 2 * log_a)
    s[..., 0, :] = u[..., 0, :]
    s[..., 2::2, :] = torch.addcmul(even[..., 1:, :], a, s[..., 1 : blocks - 1 : 2, :])
    return s


def to_blocks(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """(B, L, D) -> (D, B * L/T, T), contiguous: a strided operand is copied by each product that reads it."""
    by_channel = x.to(dtype).reshape(-1, x.shape[2]).t().contiguous()  # two dimensions: torch transposes by tiles
    return by_channel.view(x.shape[2], by_channel.shape[1] // block, block)


def from_blocks(y: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """(D, B * L/T, T) -> (B, L, D)"""
    by_step = y.flatten(1).t().contiguous()  # (B * L, D)
    return by_step.view(batch, by_step.shape[0] // batch, y.shape[0]).to(dtype)


def to_pairs(z: Tensor) -> Tensor:
    """complex (D, B, blocks, N) -> real (D, B * blocks, 2N), real parts first."""
    return torch.cat([z.real, z.imag], -1).flatten(1, 2)


def to_complex(z: Tensor, batch: int) -> Tensor:
    """real (D, B * blocks, 2N) -> complex (D, B, blocks, N)"""
    z = z.unflatten(1, (batch, -1))
    order = z.shape[-1] // 2
    return torch.complex(z[..., :order].contiguous(), z[..., order:].contiguous())


def _states_before(xb: Tensor, h: Tensor, t: Tables, batch: int) -> tuple[Tensor, Tensor]:
    """States that enter every block, complex (D, B, blocks, N), and the one that leaves the last, (D, B, N)."""
    u = to_complex(torch.bmm(xb, t.into), batch)
    u[:, :, 0] += torch.exp(t.log_a).to(u.dtype)[:, None] * h
    after = scan(u, t.log_a)
    return torch.cat([h.unsqueeze(2), after[:, :, :-1]], 2), after[:, :, -1]


def slice_forward(x: Tensor, h: Tensor, t: Tables) -> tuple[Tensor, Tensor]:
    """x (B, L, D) with T | L and the complex state h (D, B, N) before it -> y (B, L, D) and the state after it."""
    batch = x.shape[0]
    xb = to_blocks(x, t.toeplitz.shape[1], t.toeplitz.dtype)
    before, h_last = _states_before(xb, h, t, batch)
    y = torch.baddbmm(torch.bmm(xb, t.toeplitz), to_pairs(before), t.out)
    return from_blocks(y, batch, x.dtype), h_last


def slice_state(x: Tensor, h: Tensor, t: Tables) -> Tensor:
    """The state after a slice, as `slice_forward` has it, without the output."""
    return _states_before(to_blocks(x, t.toeplitz.shape[1], t.toeplitz.dtype), h, t, x.shape[0])[1]


def _state_grads(dyb: Tensor, dh_last: Tensor, t: Tables, batch: int) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave every block, complex (D, B, blocks, N), and of the one before the first."""
    # They run backwards by the same scan: what enters is dh_last, what each block adds is conj(C) dy.
    added = to_complex(torch.bmm(dyb, t.out.transpose(1, 2)), batch)
    conj_log_a = t.log_a.conj_physical()
    entering = torch.cat([dh_last.unsqueeze(2), added[:, :, 1:].flip(2)], 2)
    lam = scan(entering, conj_log_a).flip(2)  # (D, B, blocks, N)
    return lam, torch.exp(conj_log_a).to(lam.dtype)[:, None] * lam[:, :, 0] + added[:, :, 0]


def slice_state_grad(dy: Tensor, dh_last: Tensor, t: Tables) -> Tensor:
    """The gradient of the state before a slice, as `slice_backward` has it, without the others."""
    return _state_grads(to_blocks(dy, t.toeplitz.shape[1], t.toeplitz.dtype), dh_last, t, dy.shape[0])[1]


def slice_backward(dy: Tensor, dh_last: Tensor, x: Tensor, h: Tensor, c: Coefficients, t: Tables):
    """Gradients of `slice_forward`: dx (B, L, D), dh complex (D, B, N), and those of the coefficients."""
    batch, block, dtype = x.shape[0], t.toeplitz.shape[1], t.toeplitz.dtype
    xb, dyb = to_blocks(x, block, dtype), to_blocks(dy, block, dtype)
    before, _ = _states_before(xb, h, t, batch)
    lam, dh = _state_grads(dyb, dh_last, t, batch)
    lam_pairs = to_pairs(lam)
    dx = torch.baddbmm(torch.bmm(dyb, t.toeplitz.transpose(1, 2)), lam_pairs, t.into.transpose(1, 2))
    grads = table_grads(
        c,
        t,
        torch.bmm(xb.transpose(1, 2), dyb),
        torch.bmm(to_pairs(before).transpose(1, 2), dyb),
        torch.bmm(lam_pairs.transpose(1, 2), xb).transpose(1, 2),  # and so is this than with the factors exchanged
        (lam * before.conj_physical()).sum((1, 2)).to(c.p.dtype),
    )
    return from_blocks(dx, batch, x.dtype), dh, grads


def split(length: int) -> int:
    """Steps in whole blocks; the rest forms one shorter block of its own, so padding never decays the state."""
    return length - length % BLOCK


def start_state(x: Tensor, alpha: Tensor, h0: Tensor | None) -> Tensor:
    """The incoming state (B, D, N, 2), None for an empty one, as complex (D, B, N) in the compute dtype."""
    dtype = compute_dtype(x, alpha)
    if h0 is None:
        return torch.complex(*[x.new_zeros(x.shape[2], x.shape[0], alpha.shape[1], dtype=dtype)] * 2)
    # A complex view would need memory aligned to twice a real number's size, which a mapped file does not give.
    return torch.complex(*h0.to(dtype).transpose(0, 1).unbind(-1))


def to_state(h: Tensor, dtype: torch.dtype) -> Tensor:
    """complex (D, B, N) -> (B, D, N, 2)"""
    return torch.view_as_real(h.transpose(0, 1).contiguous()).to(dtype)
