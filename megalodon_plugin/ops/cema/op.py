"""CEMA, the complex exponential moving average of Megalodon (arXiv 2404.08801, section 3.1).

    a = sigmoid(alpha), d = sigmoid(delta), angle_n = sigmoid(theta) (2 pi / N) n  for n = 1..N
    p = a  ("released")  or  a e^{i angle}  ("paper"),    q = (1 - a d) e^{i angle},    g = gamma sqrt(1/N)
    h_t = p x_t + q h_{t-1},    y_t = Re sum_n g_n h_{n,t} + omega x_t

The paper rotates the input coefficient, the authors' released code does not; checkpoints of the released code need
"released".
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from ..checks import check_activation, check_parameter, compute_dtype, without_autocast
from ..library import define_gradient, define_op
from . import blocks, cuda
from .blocks import CemaParameters
from .tiles import Tiles, choose_tiles

CEMA_INPUTS = ("released", "paper")


def cema(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    return_state: bool = False,
    cema_input: str = "released",
) -> tuple[Tensor, Tensor | None]:
    """Complex exponential moving average over time, per channel; the equation stands at the head of this module.

    Args:
        x: (B, L, D), bfloat16, float32 or float64, any strides.
        alpha, delta: (D, N, 1). theta: (D, 1, 1). gamma: (D, N, 2), real and imaginary part. omega: (D, 1).
            float32, or float64 in a float64 model; never rounded to the activations' dtype.
        h0: the hidden state before the first step, (B, D, N, 2) as (real, imaginary), dtype of alpha; None is zero.
        return_state: also return the hidden state after the last step.
        cema_input: "released" (p real) or "paper" (p rotated).

    Returns:
        y (B, L, D) in x's dtype, and the hidden state (B, D, N, 2) in alpha's dtype, or None. Gradients flow into and
        out of both states.

    Raises:
        ValueError: a shape, a dtype (float16 is refused) or `cema_input` breaks a rule above.
    """
    _check_cema_input(cema_input)
    parameters = CemaParameters(alpha, delta, theta, gamma, omega, cema_input == "paper")
    _check(x, parameters, h0)
    y, h, _ = _cema_op(x, alpha, delta, theta, gamma, omega, h0, parameters.rotate_input)
    return y, (h if return_state else None)


def cema_definition(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None = None,
    return_state: bool = False,
    cema_input: str = "released",
) -> tuple[Tensor, Tensor | None]:
    """`cema` as its equation reads: a loop over time, in the parameters' dtype. The contract of every fast path."""
    _check_cema_input(cema_input)
    _check(x, CemaParameters(alpha, delta, theta, gamma, omega, cema_input == "paper"), h0)
    dtype = compute_dtype(x, alpha)
    order = alpha.shape[1]
    a, d = torch.sigmoid(alpha.to(dtype))[..., 0], torch.sigmoid(delta.to(dtype))[..., 0]  # (D, N)
    n = torch.arange(1, order + 1, dtype=dtype, device=x.device)
    angle = torch.sigmoid(theta.to(dtype))[..., 0] * (2 * math.pi / order) * n  # (D, N)
    rotation = torch.polar(torch.ones_like(angle), angle)
    p = a * rotation if cema_input == "paper" else a.to(rotation.dtype)
    q = (1 - a * d) * rotation
    g = torch.complex(*gamma.to(dtype).unbind(-1)) * math.sqrt(1 / order)
    h = x.new_zeros(x.shape[0], *q.shape, dtype=q.dtype) if h0 is None else torch.complex(*h0.unbind(-1))
    outputs = []
    for x_t in x.to(dtype).unbind(1):  # (B, D)
        h = p * x_t.unsqueeze(-1) + q * h  # (B, D, N)
        outputs.append((g * h).real.sum(-1) + omega.to(dtype)[:, 0] * x_t)
    state = torch.view_as_real(h).to(alpha.dtype) if return_state else None
    return torch.stack(outputs, 1).to(x.dtype), state


def cema_flops(tokens: int, dim: int, order: int) -> int:
    """Floating-point operations of one forward pass of the recurrence (not of the way it is computed).

    A step of one channel and order: q h is a complex product (6), p x joins it (2), and Re(g h) is added up (4).
    omega x adds 2 a channel.
    """
    return tokens * dim * (12 * order + 2)


def _check_cema_input(cema_input: str) -> None:
    if cema_input not in CEMA_INPUTS:
        raise ValueError(f"`cema_input` must be one of {CEMA_INPUTS}, but is {cema_input!r}")


def _check(x: Tensor, parameters: CemaParameters, h0: Tensor | None) -> None:
    check_activation("x", x, 3)
    alpha, delta, theta, gamma, omega, _ = parameters
    if alpha.ndim != 3:
        raise ValueError(f"`alpha` must have shape (D, N, 1), but has {tuple(alpha.shape)}")
    dim, order = x.shape[2], alpha.shape[1]
    check_parameter("alpha", alpha, (dim, order, 1))
    check_parameter("delta", delta, (dim, order, 1))
    check_parameter("theta", theta, (dim, 1, 1))
    check_parameter("gamma", gamma, (dim, order, 2))
    check_parameter("omega", omega, (dim, 1))
    if h0 is not None:
        check_parameter("h0", h0, (x.shape[0], dim, order, 2))
        if h0.dtype != alpha.dtype:
            raise ValueError(f"`h0` must have alpha's dtype {alpha.dtype}, but is {h0.dtype}")


def kernel_tiles(x: Tensor, alpha: Tensor) -> Tiles | None:
    """The kernels' variant for this call, or None where PyTorch code runs. Nothing but shapes and dtypes decides."""
    if not x.is_cuda or alpha.dtype != torch.float32 or dispatch.kernels_mode() == "off":
        return None
    return choose_tiles(x.shape[1], alpha.shape[1], x.dtype)


def kept_states(length: int, order: int, dtype: torch.dtype) -> int:
    """Hidden states (B, D, N, 2) that a forward pass on a GPU keeps inside a sequence for the backward pass."""
    tiles = choose_tiles(length, order, dtype)
    return 0 if tiles is None else tiles.kept_states(length)


def _kept_shape(x: Tensor, alpha: Tensor, tiles: Tiles | None) -> tuple[int, ...]:
    """Shape of the states that a forward pass keeps for the backward pass; PyTorch code keeps none."""
    return (tiles.kept_states(x.shape[1]) if tiles else 0, x.shape[0], x.shape[2], alpha.shape[1], 2)


def _forward_impl(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    rotate_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and states inside the sequence that the backward pass of the kernels starts from."""
    tiles = kernel_tiles(x, alpha)
    parameters = CemaParameters(alpha, delta, theta, gamma, omega, rotate_input)
    if tiles is not None and x.numel():
        found = dispatch.kernel_or_none("cema", x, lambda: cuda.forward(tiles, x, parameters, h0))
        if found is not None:
            return found
    y, h = _torch_forward(x, parameters, h0)
    # A kernel that met these states by mistake would show it.
    return y, h, alpha.new_full(_kept_shape(x, alpha, tiles), float("nan"))


def _torch_forward(x: Tensor, parameters: CemaParameters, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    alpha, omega = parameters.alpha, parameters.omega
    with without_autocast(x):
        c = parameters.coefficients()
        h, dtype, whole = blocks.start_state(x, alpha, h0), compute_dtype(x, alpha), blocks.split(x.shape[1])
        outputs = []
        for piece, block in ((x[:, :whole], blocks.BLOCK), (x[:, whole:], x.shape[1] - whole)):
            if piece.shape[1]:
                y, h = blocks.slice_forward(piece, h, blocks.make_tables(c, omega[:, 0], block, dtype))
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), blocks.to_state(h, alpha.dtype)


def _backward_impl(
    dy: Tensor,
    dh_last: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    h0: Tensor | None,
    rotate_input: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dalpha, ddelta, dtheta, dgamma, domega, dh0. States between the kept ones are recomputed, not stored."""
    tiles = kernel_tiles(x, alpha)
    parameters = CemaParameters(alpha, delta, theta, gamma, omega, rotate_input)
    if tiles is not None and x.numel() and kept.shape[0] == tiles.kept_states(x.shape[1]):
        found = dispatch.kernel_or_none("cema", x, lambda: cuda.backward(tiles, dy, dh_last, x, parameters, h0, kept))
        if found is not None:
            return found
    return _torch_backward(dy, dh_last, x, parameters, h0)


def _torch_backward(
    dy: Tensor, dh_last: Tensor | None, x: Tensor, parameters: CemaParameters, h0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    alpha, omega = parameters.alpha, parameters.omega
    with without_autocast(x):
        c = parameters.coefficients()
        dtype, whole = compute_dtype(x, alpha), blocks.split(x.shape[1])
        h, dh = blocks.start_state(x, alpha, h0), blocks.start_state(x, alpha, dh_last)
        dxs: list[Tensor] = []
        total = None
        rest = x.shape[1] - whole
        whole_tables = blocks.make_tables(c, omega[:, 0], blocks.BLOCK, dtype) if whole else None
        if rest:
            h_rest = h if whole_tables is None else blocks.slice_state(x[:, :whole], h, whole_tables)
            rest_tables = blocks.make_tables(c, omega[:, 0], rest, dtype)
            dx, dh, total = blocks.slice_backward(dy[:, whole:], dh, x[:, whole:], h_rest, c, rest_tables)
            dxs.insert(0, dx)
        if whole_tables is not None:
            dx, dh, grads = blocks.slice_backward(dy[:, :whole], dh, x[:, :whole], h, c, whole_tables)
            total = grads if total is None else grads + total
            dxs.insert(0, dx)
        assert total is not None  # L >= 1
        dalpha, ddelta, dtheta, dgamma = blocks.parameter_grads(c, total)
        return (
            dxs[0] if len(dxs) == 1 else torch.cat(dxs, 1),
            dalpha.to(alpha.dtype),
            ddelta.to(alpha.dtype),
            dtheta.to(alpha.dtype),
            dgamma.to(alpha.dtype),
            total.omega.unsqueeze(-1).to(alpha.dtype),
            blocks.to_state(dh, alpha.dtype),
        )


_cema_op = define_op("cema", _forward_impl)
_cema_backward_op = define_op("cema_backward", _backward_impl)


@torch.library.register_fake("megalodon::cema")
def _(x, alpha, delta, theta, gamma, omega, h0, rotate_input):
    state = alpha.new_empty(x.shape[0], x.shape[2], alpha.shape[1], 2)
    return x.new_empty(x.shape), state, alpha.new_empty(_kept_shape(x, alpha, kernel_tiles(x, alpha)))


@torch.library.register_fake("megalodon::cema_backward")
def _(dy, dh_last, x, alpha, delta, theta, gamma, omega, h0, rotate_input, kept):
    parameters = (p.new_empty(p.shape) for p in (alpha, delta, theta, gamma, omega))
    return x.new_empty(x.shape), *parameters, alpha.new_empty(x.shape[0], x.shape[2], alpha.shape[1], 2)


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, rotate_input = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])
    ctx.rotate_input = rotate_input


def _backward(ctx, dy: Tensor | None, dh_last: Tensor | None, _):
    x, alpha, delta, theta, gamma, omega, h0, kept = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, dh0 = _cema_backward_op(dy, dh_last, x, alpha, delta, theta, gamma, omega, h0, ctx.rotate_input, kept)
    return *grads, (dh0 if h0 is not None else None), None


define_gradient(_cema_op, _save_for_backward, _backward)


@register_flop_formula(torch.ops.megalodon.cema)
def _flops(x_shape, alpha_shape, *args, **kwargs) -> int:
    return cema_flops(x_shape[0] * x_shape[1], x_shape[2], alpha_shape[1])


@register_flop_formula(torch.ops.megalodon.cema_backward)
def _backward_flops(dy_shape, dh_shape, x_shape, alpha_shape, *args, **kwargs) -> int:
    return 2 * cema_flops(x_shape[0] * x_shape[1], x_shape[2], alpha_shape[1])
