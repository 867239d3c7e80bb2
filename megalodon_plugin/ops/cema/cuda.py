"""CEMA on a GPU: the choice, the memory and the launches of the kernels `kernels/cema/*.cu`; see kernels/README.md.

The forward pass is two kernels: `cema_prepare` makes the coefficients, `cema_pass` walks the sequence. The backward
pass makes the coefficients again, walks the sequence from its end with the same `cema_pass`, and sums the coefficients'
gradients in `cema_grad`, starting from the states that both walks kept at the edges of groups of blocks. Steps that
fill no block are left to `cema_short`. Every sum has a fixed order.
"""

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import address, contiguous, multiprocessors, packed, parameter_struct, stream_of
from .blocks import CemaParameters
from .tiles import (
    PASS_BLOCKS,
    VARIANTS,
    Tiles,
    divide_grad,
    divide_pass,
    grad_shared_bytes,
    pass_shared_bytes,
)

__all__ = ["VARIANTS", "Tiles", "backward", "divide_pass", "forward"]

_SLOTS = 19  # complex numbers that cema_prepare makes of a channel and order


_Prepare = parameter_struct(
    "_Prepare",
    pointers="alpha delta theta gamma omega coefficients lags",
    int64="segment",
    int32="dim order rotate_input",
)
_Pass = parameter_struct(
    "_Pass",
    pointers="x y coefficients lags state_in state_out boundaries summaries",
    int64="x_row y_row",
    int32="length batch dim order rows segments segment_tiles",
)
_Grad = parameter_struct(
    "_Grad",
    pointers="x dy coefficients state_in states state_grads state_grad_in partial partial_omega",
    int64="x_row dy_row",
    int32="length batch dim order",
)
_Finish = parameter_struct(
    "_Finish",
    pointers="alpha delta theta partial partial_omega dalpha ddelta dtheta dgamma domega",
    int32="dim order slots rotate_input",
)
_Short = parameter_struct(
    "_Short",
    pointers="x dy y coefficients omega state_in state_grad_in state_out partial partial_omega",
    int64="x_row dy_row y_row",
    int32="length batch dim order",
)


class Call:
    """One forward or backward pass: the activation's sizes, the coefficients, the launches."""

    def __init__(self, tiles: Tiles, x: Tensor, parameters: CemaParameters) -> None:
        self.tiles, self.device = tiles, x.device
        self.batch, self.length, self.dim = x.shape
        *tensors, self.rotate_input = parameters
        self.alpha, self.delta, self.theta, self.gamma, self.omega = (p.contiguous() for p in tensors)
        self.order = self.alpha.shape[1]
        self.item = x.element_size()
        self.stream = stream_of(x.device)
        self.whole, self.rest = tiles.split(self.length)
        self.n_tiles = -(-self.whole // (PASS_BLOCKS * tiles.block))
        self.channel_groups = -(-self.dim // tiles.pass_channels)
        self.division = divide_pass(self.batch, max(self.n_tiles, 1), self.channel_groups, multiprocessors(x.device))
        real = torch.float64 if tiles.terms == 3 else torch.float32
        count = self.dim * (tiles.orders * _SLOTS * 2 + tiles.block)
        self.coefficients = torch.empty(count, dtype=real, device=x.device)
        self.lags = self.coefficients.data_ptr() + self.dim * tiles.orders * _SLOTS * 2 * real.itemsize

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, params, shared: int, **defines: int) -> None:
        channels, aligned = defines.pop("CHANNELS", 8), bool(defines.pop("ALIGNED", 1))
        kernel = kernels.load(
            f"cema/{name}.cu", f"cema_{name}", self.tiles.defines(channels, aligned, **defines), self.device
        )
        kernel.launch(grid, threads, params, self.stream, shared)

    def aligned(self, *tensors: Tensor) -> bool:
        """Whether every row starts on 16 bytes, so that 8 channels can be moved at once."""
        return self.dim % 8 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) * self.item % 16 == 0 for t in tensors)

    def prepare(self) -> None:
        segment = self.division.segment_tiles * PASS_BLOCKS * self.tiles.block
        params = _Prepare(
            self.alpha.data_ptr(),
            self.delta.data_ptr(),
            self.theta.data_ptr(),
            self.gamma.data_ptr(),
            self.omega.data_ptr(),
            self.coefficients.data_ptr(),
            self.lags,
            segment,
            self.dim,
            self.order,
            self.rotate_input,
        )
        self.launch("prepare", (-(-self.dim * self.tiles.orders // 256), 1, 1), 256, params, 0)

    def walk(self, x, y, state_in: int | None, state_out: int | None, kept: Tensor | None, reverse: bool) -> None:
        """`cema_pass` over the whole blocks; the states are addresses, `kept` receives those at the groups' edges."""
        params = self._pass_params(x)
        params.state_in = state_in  # the first segment's summary starts from it
        left = None  # held until the second launch, which reads it
        if self.division.segments > 1:
            left = self._leave_summaries(x, params, self.division.segments - 1, reverse)
            params.summaries = left.data_ptr()
        params.y, params.y_row, params.state_out = y.data_ptr(), y.stride(0), state_out
        params.boundaries = address(kept)
        self._launch_pass(params, self.division.segments, self.aligned(x, y), reverse, summary=False)

    def summaries(self, x: Tensor, reverse: bool) -> Tensor:
        """What each segment of time leaves of a zero state, in walking order, (segments, B, D, N, 2)."""
        return self._leave_summaries(x, self._pass_params(x), self.division.segments, reverse)

    def _pass_params(self, x: Tensor):
        d = self.division
        params = _Pass(x=x.data_ptr(), coefficients=self.coefficients.data_ptr(), lags=self.lags, x_row=x.stride(0))
        params.length, params.batch, params.dim, params.order = self.whole, self.batch, self.dim, self.order
        params.rows, params.segments, params.segment_tiles = d.rows, d.segments, d.segment_tiles
        return params

    def _leave_summaries(self, x: Tensor, params, segments: int, reverse: bool) -> Tensor:
        left = x.new_empty(segments, self.batch, self.dim, self.order, 2, dtype=torch.float32)
        params.summaries = left.data_ptr()
        self._launch_pass(params, segments, self.aligned(x), reverse, summary=True)
        return left

    def _launch_pass(self, params, segments: int, aligned: bool, reverse: bool, summary: bool) -> None:
        tiles = self.tiles
        macros = {"CHANNELS": tiles.pass_channels, "ALIGNED": aligned, "REVERSE": int(reverse)}
        macros |= {"OUT_SHARED": tiles.out_shared, "SUMMARY": int(summary)}
        grid = (self.channel_groups, -(-self.batch // self.division.rows), segments)
        self.launch("pass", grid, 32 * tiles.pass_channels, params, pass_shared_bytes(tiles), **macros)

    def short(self, x: Tensor, y: Tensor, state_in: int | None, state_out: int | None, **backward) -> None:
        """`cema_short` over the rest; `backward` holds dy, state_grad_in, partial and partial_omega."""
        dy = backward.get("dy")
        skip = self.whole * self.dim * self.item
        params = _Short(
            x.data_ptr() + skip,
            None if dy is None else dy.data_ptr() + skip,
            y.data_ptr() + skip,
            self.coefficients.data_ptr(),
            self.omega.data_ptr(),
            state_in,
            backward.get("state_grad_in"),
            state_out,
            backward.get("partial"),
            backward.get("partial_omega"),
            x.stride(0),
            0 if dy is None else dy.stride(0),
            y.stride(0),
            self.rest,
            self.batch,
            self.dim,
            self.order,
        )
        grid = (-(-self.dim * self.tiles.orders // 256), self.batch if dy is None else 1, 1)
        self.launch("short", grid, 256, params, 0, BACKWARD=int(dy is not None))


def forward(tiles: Tiles, x: Tensor, parameters: CemaParameters, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), h (B, D, N, 2), and the states at the groups' edges (kept states, B, D, N, 2)."""
    x = packed(x)
    call = Call(tiles, x, parameters)
    call.prepare()
    shape = (call.batch, call.dim, call.order, 2)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(shape, dtype=torch.float32, device=x.device)
    kept = torch.empty((tiles.kept_states(call.length), *shape), dtype=torch.float32, device=x.device)
    h0 = contiguous(h0)  # kept while its address is in use
    start = address(h0)
    if call.whole:
        call.walk(x, y, start, kept[-1].data_ptr() if call.rest else h.data_ptr(), kept, reverse=False)
        start = kept[-1].data_ptr() if call.rest else None
    if call.rest:
        call.short(x, y, start, h.data_ptr())
    return y, h, kept


def backward(
    tiles: Tiles,
    dy: Tensor,
    dh_last: Tensor | None,
    x: Tensor,
    parameters: CemaParameters,
    h0: Tensor | None,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dalpha, ddelta, dtheta, dgamma, domega, dh0."""
    x, dy = packed(x), packed(dy)
    call = Call(tiles, x, parameters)
    call.prepare()
    shape = (call.batch, call.dim, call.order, 2)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dh0 = torch.empty(shape, dtype=torch.float32, device=x.device)
    h0 = contiguous(h0)  # kept while its address is in use
    start = address(h0)
    dh_last = contiguous(dh_last)
    end = address(dh_last)
    channel_groups = -(-call.dim // tiles.grad_channels)
    groups, order_groups = tiles.groups(call.length), tiles.orders // 16
    parts = 0
    if call.whole:
        parts = divide_grad(call.batch, groups, channel_groups * order_groups, multiprocessors(x.device))
    slots = parts + int(call.rest > 0)
    partial = torch.empty(slots * call.dim * (tiles.orders * 6 + 1), dtype=torch.float32, device=x.device)
    slot_bytes, omega_bytes = call.dim * tiles.orders * 6 * 4, call.dim * 4
    partial_omega = partial.data_ptr() + slots * slot_bytes
    if call.rest:
        middle = torch.empty(shape, dtype=torch.float32, device=x.device) if call.whole else dh0
        call.short(
            x,
            dx,
            kept[-1].data_ptr() if call.whole else start,
            middle.data_ptr(),
            dy=dy,
            state_grad_in=end,
            partial=partial.data_ptr() + parts * slot_bytes,
            partial_omega=partial_omega + parts * omega_bytes,
        )
        end = middle.data_ptr()
    if call.whole:
        edge_grads = torch.empty((groups - 1, *shape), dtype=torch.float32, device=x.device)
        call.walk(dy, dx, end, dh0.data_ptr(), edge_grads, reverse=True)
        params = _Grad(
            x.data_ptr(),
            dy.data_ptr(),
            call.coefficients.data_ptr(),
            start,
            kept.data_ptr(),
            edge_grads.data_ptr(),
            end,
            partial.data_ptr(),
            partial_omega,
            x.stride(0),
            dy.stride(0),
            call.whole,
            call.batch,
            call.dim,
            call.order,
        )
        macros = {"CHANNELS": tiles.grad_channels, "ALIGNED": call.aligned(x, dy)}
        grid = (channel_groups, parts, order_groups)
        call.launch("grad", grid, 32 * tiles.grad_channels, params, grad_shared_bytes(tiles), **macros)
    dalpha, ddelta, dtheta, dgamma, domega = _finish(call, partial, partial_omega, slots)
    return dx, dalpha, ddelta, dtheta, dgamma, domega, dh0


def _finish(call: Call, partial: Tensor, partial_omega: int, slots: int) -> tuple[Tensor, ...]:
    grads = tuple(torch.empty_like(p) for p in (call.alpha, call.delta, call.theta, call.gamma, call.omega))
    params = _Finish(
        call.alpha.data_ptr(),
        call.delta.data_ptr(),
        call.theta.data_ptr(),
        partial.data_ptr(),
        partial_omega,
        *(g.data_ptr() for g in grads),
        call.dim,
        call.order,
        slots,
        call.rotate_input,
    )
    call.launch("finish", (-(-call.dim * call.tiles.orders // 256), 1, 1), 256, params, 0)
    return grads
