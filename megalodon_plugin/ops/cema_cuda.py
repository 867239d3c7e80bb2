"""CEMA on a GPU: the choice, the memory and the launches of the kernels `kernels/cema_*.cu`; see kernels/README.md.

The forward pass is two kernels: `cema_prepare` makes the coefficients, `cema_pass` walks the sequence. The backward
pass makes the coefficients again, walks the sequence from its end with the same `cema_pass`, and sums the coefficients'
gradients in `cema_grad`, starting from the states that both walks kept at the edges of groups of blocks. Steps that
fill no block are left to `cema_short`. Every sum has a fixed order.
"""

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from megalodon_plugin import kernels

MAX_ORDER = 32
_SLOTS = 19  # complex numbers that cema_prepare makes of a channel and order
_PASS_BLOCKS, _GROUP_BLOCKS = 16, 32  # blocks of a tile of cema_pass, and of a group of cema_grad


class Plan(NamedTuple):
    """Which variant of the kernels takes an activation; the letters are those of the macros in kernels/cema.cuh."""

    block: int  # T
    orders: int
    terms: int
    pass_channels: int
    grad_channels: int
    out_shared: int  # whether cema_pass keeps its table of outputs in shared memory

    def defines(self, channels: int, aligned: bool, **more: int) -> tuple[tuple[str, int], ...]:
        return (
            ("BLOCK", self.block),
            ("ORDERS", self.orders),
            ("TERMS", self.terms),
            ("CHANNELS", channels),
            ("ALIGNED", int(aligned)),
            *more.items(),
        )

    def split(self, length: int) -> tuple[int, int]:
        """Steps in whole blocks, and the rest."""
        return length - length % self.block, length % self.block

    def groups(self, length: int) -> int:
        """Groups of blocks at whose edges states are kept."""
        return -(-(length - length % self.block) // (_GROUP_BLOCKS * self.block))

    def kept_states(self, length: int) -> int:
        """States that the forward pass keeps: between groups, and before the rest that fills no block."""
        whole, rest = self.split(length)
        return max(self.groups(length) - 1, 0) + int(whole > 0 and rest > 0)


def make_plan(length: int, order: int, dtype: torch.dtype) -> Plan | None:
    """The kernels' variant for an activation of `length` steps, or None if there is none for it."""
    if order > MAX_ORDER or dtype not in (torch.bfloat16, torch.float32):
        return None
    if dtype == torch.float32:
        return Plan(16, 16 if order <= 16 else 32, 3, 8, 8, 1)
    if order > 16:
        return Plan(16, 32, 2, 8, 8, 1)
    # A tile is 16 blocks. Blocks of 32 steps need fewer instructions a step, unless half of a tile would be empty.
    long_tiles, short_tiles = -(-length // 512), -(-length // 256)
    if 2 * long_tiles <= short_tiles + short_tiles // 4:
        return Plan(32, 16, 2, 16, 8, 1)
    return Plan(16, 16, 2, 16, 8, 0)


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """Fields as "name:type ...", p a pointer, q a 64-bit and i a 32-bit integer."""
    types = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int32}
    pairs = [field.split(":") for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [(field, types[kind]) for field, kind in pairs]})


_Prepare = _structure(
    "_Prepare",
    "alpha:p delta:p theta:p gamma:p omega:p coefficients:p lags:p segment:q dim:i order:i rotate_input:i",
)
_Pass = _structure(
    "_Pass",
    "x:p y:p coefficients:p lags:p state_in:p state_out:p boundaries:p summaries:p x_row:q y_row:q length:q "
    "batch:i dim:i order:i rows:i segments:i segment_tiles:i",
)
_Grad = _structure(
    "_Grad",
    "x:p dy:p coefficients:p state_in:p states:p state_grads:p state_grad_in:p partial:p partial_omega:p "
    "x_row:q dy_row:q length:q "
    "batch:i dim:i order:i",
)
_Finish = _structure(
    "_Finish",
    "alpha:p delta:p theta:p partial:p partial_omega:p dalpha:p ddelta:p dtheta:p dgamma:p domega:p "
    "dim:i order:i slots:i rotate_input:i",
)
_Short = _structure(
    "_Short",
    "x:p dy:p y:p coefficients:p omega:p state_in:p state_grad_in:p state_out:p partial:p partial_omega:p "
    "x_row:q dy_row:q y_row:q length:i batch:i dim:i order:i",
)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class Division(NamedTuple):
    """How one pass is divided among thread blocks."""

    rows: int  # batch rows of a thread block
    segments: int  # parts of the time axis
    segment_tiles: int


@functools.cache
def divide_pass(batch: int, tiles: int, channel_groups: int, processors: int) -> Division:
    """A thread block walks whole rows if that fills the GPU: a segment's start must first be found by a second pass."""
    segments = 1
    if 2 * batch * channel_groups <= processors and tiles >= 16:
        segments = min(processors // (batch * channel_groups), tiles // 8)
    segment_tiles = -(-tiles // segments)
    segments = -(-tiles // segment_tiles)
    start = 4  # making the tables takes about as long as so many tiles

    def cost(parts: int) -> tuple[int, int]:
        waves = -(-channel_groups * parts * segments // processors)
        return waves * (-(-batch // parts) * segment_tiles + start), parts

    parts = min(range(1, batch + 1), key=cost)
    return Division(-(-batch // parts), segments, segment_tiles)


@functools.cache
def divide_grad(batch: int, groups: int, channel_groups: int, processors: int) -> int:
    """Thread blocks that share a channel's groups of blocks; each leaves a partial sum."""
    items, start = batch * groups, 2

    def cost(parts: int) -> tuple[int, int]:
        waves = -(-channel_groups * parts // processors)
        return waves * (-(-items // parts) + start), parts

    return min(range(1, min(items, 16) + 1), key=cost)


class _Call:
    """One forward or backward pass: the activation's sizes, the coefficients, the launches."""

    def __init__(self, plan: Plan, x: Tensor, parameters: tuple[Tensor, ...], rotate_input: bool) -> None:
        self.plan, self.device, self.rotate_input = plan, x.device, rotate_input
        self.batch, self.length, self.dim = x.shape
        self.alpha, self.delta, self.theta, self.gamma, self.omega = (p.contiguous() for p in parameters)
        self.order = self.alpha.shape[1]
        self.item = x.element_size()
        self.stream = _stream(x.device)
        self.whole, self.rest = plan.split(self.length)
        self.tiles = -(-self.whole // (_PASS_BLOCKS * plan.block))
        self.channel_groups = -(-self.dim // plan.pass_channels)
        self.division = divide_pass(self.batch, max(self.tiles, 1), self.channel_groups, multiprocessors(x.device))
        real = torch.float64 if plan.terms == 3 else torch.float32
        count = self.dim * (plan.orders * _SLOTS * 2 + plan.block)
        self.coefficients = torch.empty(count, dtype=real, device=x.device)
        self.lags = self.coefficients.data_ptr() + self.dim * plan.orders * _SLOTS * 2 * real.itemsize

    def _launch(self, name: str, grid: tuple[int, int, int], threads: int, params, shared: int, **defines: int) -> None:
        channels, aligned = defines.pop("CHANNELS", 8), bool(defines.pop("ALIGNED", 1))
        kernel = kernels.load(f"{name}.cu", name, self.plan.defines(channels, aligned, **defines), self.device)
        kernel.launch(grid, threads, params, self.stream, shared)

    def aligned(self, *tensors: Tensor) -> bool:
        """Whether every row starts on 16 bytes, so that 8 channels can be moved at once."""
        return self.dim % 8 == 0 and all(t.data_ptr() % 16 == 0 and t.stride(0) * self.item % 16 == 0 for t in tensors)

    def prepare(self) -> None:
        segment = self.division.segment_tiles * _PASS_BLOCKS * self.plan.block
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
        self._launch("cema_prepare", (-(-self.dim * self.plan.orders // 256), 1, 1), 256, params, 0)

    def walk(self, x, y, state_in: int | None, state_out: int | None, kept: Tensor | None, reverse: bool) -> None:
        """`cema_pass` over the whole blocks; the states are addresses, `kept` receives those at the groups' edges."""
        plan, d = self.plan, self.division
        params = _Pass(
            x.data_ptr(),
            y.data_ptr(),
            self.coefficients.data_ptr(),
            self.lags,
            state_in,
            state_out,
            None if kept is None else kept.data_ptr(),
            None,
            x.stride(0),
            y.stride(0),
            self.whole,
            self.batch,
            self.dim,
            self.order,
            d.rows,
            d.segments,
            d.segment_tiles,
        )
        shared = pass_shared_bytes(plan)
        macros = {"CHANNELS": plan.pass_channels, "ALIGNED": self.aligned(x, y), "REVERSE": int(reverse)}
        macros["OUT_SHARED"] = plan.out_shared
        row_parts, threads = -(-self.batch // d.rows), 32 * plan.pass_channels
        if d.segments > 1:
            summaries = x.new_empty(d.segments - 1, self.batch, self.dim, self.order, 2, dtype=torch.float32)
            params.summaries = summaries.data_ptr()
            params.y, params.boundaries = None, None
            grid = (self.channel_groups, row_parts, d.segments - 1)
            self._launch("cema_pass", grid, threads, params, shared, **macros)
            params.y, params.boundaries = y.data_ptr(), None if kept is None else kept.data_ptr()
        self._launch("cema_pass", (self.channel_groups, row_parts, d.segments), threads, params, shared, **macros)

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
        grid = (-(-self.dim * self.plan.orders // 256), self.batch if dy is None else 1, 1)
        self._launch("cema_short", grid, 256, params, 0, BACKWARD=int(dy is not None))


def pass_shared_bytes(plan: Plan) -> int:
    """Of cema_pass.cu: two tiles, the scan's powers and the out table of every channel."""
    planes, powers, entry = (3, 112, 24) if plan.terms == 3 else (1, 8, 16)
    channel_words = planes * _PASS_BLOCKS * (plan.block // 2 + 2) + 2
    tile_words = -(-plan.pass_channels * channel_words // 4) * 4
    out_entries = plan.block // 8 * (plan.orders // 8) * plan.out_shared
    return 2 * tile_words * 4 + plan.pass_channels * (plan.orders * powers + out_entries * 32 * entry)


def grad_shared_bytes(plan: Plan) -> int:
    """Of cema_grad.cu: two tiles of x and of dy, and both tables of every channel."""
    planes = 3 if plan.terms == 3 else 1
    tile = plan.grad_channels * planes * 4 * (8 * (plan.block // 2 + 4) + 8) * 4
    return 4 * tile + plan.grad_channels * 2 * 2 * (plan.block // 16) * plan.terms * 32 * 16


def _rows(x: Tensor) -> Tensor:
    """x with its steps and channels packed; its batch rows may lie anywhere."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _state(h: Tensor | None) -> tuple[Tensor | None, int | None]:
    if h is None:
        return None, None
    h = h.contiguous()
    return h, h.data_ptr()


def forward(
    plan: Plan, x: Tensor, parameters: tuple[Tensor, ...], h0: Tensor | None, rotate_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), h (B, D, N, 2), and the states at the groups' edges (kept states, B, D, N, 2)."""
    x = _rows(x)
    call = _Call(plan, x, parameters, rotate_input)
    call.prepare()
    shape = (call.batch, call.dim, call.order, 2)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(shape, dtype=torch.float32, device=x.device)
    kept = torch.empty((plan.kept_states(call.length), *shape), dtype=torch.float32, device=x.device)
    h0, start = _state(h0)
    if call.whole:
        call.walk(x, y, start, kept[-1].data_ptr() if call.rest else h.data_ptr(), kept, reverse=False)
        start = kept[-1].data_ptr() if call.rest else None
    if call.rest:
        call.short(x, y, start, h.data_ptr())
    return y, h, kept


def backward(
    plan: Plan,
    dy: Tensor,
    dh_last: Tensor | None,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    h0: Tensor | None,
    rotate_input: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dalpha, ddelta, dtheta, dgamma, domega, dh0."""
    x, dy = _rows(x), _rows(dy)
    call = _Call(plan, x, parameters, rotate_input)
    call.prepare()
    shape = (call.batch, call.dim, call.order, 2)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dh0 = torch.empty(shape, dtype=torch.float32, device=x.device)
    h0, start = _state(h0)
    dh_last, end = _state(dh_last)
    channel_groups = -(-call.dim // plan.grad_channels)
    groups, order_groups = plan.groups(call.length), plan.orders // 16
    parts = 0
    if call.whole:
        parts = divide_grad(call.batch, groups, channel_groups * order_groups, multiprocessors(x.device))
    slots = parts + int(call.rest > 0)
    partial = torch.empty(slots * call.dim * (plan.orders * 6 + 1), dtype=torch.float32, device=x.device)
    slot_bytes, omega_bytes = call.dim * plan.orders * 6 * 4, call.dim * 4
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
        macros = {"CHANNELS": plan.grad_channels, "ALIGNED": call.aligned(x, dy)}
        grid = (channel_groups, parts, order_groups)
        call._launch("cema_grad", grid, 32 * plan.grad_channels, params, grad_shared_bytes(plan), **macros)
    return dx, *_finish(call, partial, partial_omega, slots), dh0


def _finish(call: _Call, partial: Tensor, partial_omega: int, slots: int) -> tuple[Tensor, ...]:
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
    call._launch("cema_finish", (-(-call.dim * call.plan.orders // 256), 1, 1), 256, params, 0)
    return grads


def _variants() -> tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]:
    plans = [
        make_plan(4096, 16, torch.bfloat16),
        make_plan(256, 16, torch.bfloat16),
        make_plan(4096, 32, torch.bfloat16),
        make_plan(4096, 16, torch.float32),
        make_plan(4096, 32, torch.float32),
    ]
    found = []
    for plan in plans:
        assert plan is not None
        found += [("cema_prepare", plan.defines(8, True)), ("cema_finish", plan.defines(8, True))]
        found += [("cema_short", plan.defines(8, True, BACKWARD=b)) for b in (0, 1)]
        for aligned in (True, False):
            for reverse in (0, 1):
                more = {"REVERSE": reverse, "OUT_SHARED": plan.out_shared}
                found.append(("cema_pass", plan.defines(plan.pass_channels, aligned, **more)))
            found.append(("cema_grad", plan.defines(plan.grad_channels, aligned)))
    return tuple((f"{name}.cu", name, defines) for name, defines in found)


VARIANTS = _variants()
"""Source, kernel and macros of everything that can be launched; the tests compile them for every architecture."""
