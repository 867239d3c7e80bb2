"""Times, memory and attainable rates of one GPU. Every function also runs on a CPU, where its numbers mean little."""

import contextlib
import gc
import itertools
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypedDict

import torch
from torch import Tensor

Call = Callable[[int], object]
"""Called with 0, 1, 2, ...; the number chooses a set of inputs."""
MIB = 2**20


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int:
    """Bytes free on the device, once the allocator has given back what no tensor holds."""
    if device.type != "cuda":
        return 2**40
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def median_ms(call: Call, device: torch.device, seconds: float = 0.4, most: int = 100) -> float:
    """Median time of a call among calls in a row, from the end of one to the end of the next, after a warm-up."""
    for i in range(3):
        call(i)
    synchronize(device)
    start = time.perf_counter()
    call(3)
    synchronize(device)
    calls = min(max(int(seconds / max(time.perf_counter() - start, 1e-6)), 5), most)
    if device.type != "cuda":
        times = []
        for i in range(calls):
            start = time.perf_counter()
            call(i)
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for i in range(calls):
        call(i)
        events[i + 1].record()
    synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def graph_ms(call: Call, device: torch.device, sets: int, seconds: float = 0.4) -> float:
    """As `median_ms`, of calls that follow each other inside a CUDA graph: without the CPU time of each call.

    One graph holds several rounds through the `sets` of inputs, so that many calls share the cost of starting it.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for i in range(sets + 1):
            call(i)
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    calls = sets * -(-12 // sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return median_ms(lambda _: graph.replay(), device, seconds) / calls


def input_sets(activation_bytes: int, device: torch.device) -> int:
    """Sets of inputs to use in turn, so that none is still in the L2 cache when it is used again."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if activation_bytes >= wanted else -(-wanted // activation_bytes) + 1


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that returns the peak of the memory in use beyond what was in use at the start, in bytes."""
    if device.type != "cuda":
        yield lambda: 0
        return
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


def peak_mib(device: torch.device) -> float:
    """Peak memory: of the GPU's tensors since the statistics were reset, on a CPU of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB


def extra_memory(
    function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor, device: torch.device
) -> tuple[float, float]:
    """MiB in use beyond inputs, output and gradients, at the worst moment of the forward and of the backward pass.

    What the forward pass keeps for the backward pass counts in both.
    """
    with peak_memory(device) as rise:
        y = function(*inputs)
        forward = rise() - size(y)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        gradients = torch.autograd.grad(y, inputs, dy)
        backward = rise() - size(y) - sum(map(size, gradients))
    return max(forward, 0) / MIB, max(backward, 0) / MIB


def size(t: Tensor) -> int:
    """Bytes of a tensor's numbers."""
    return t.numel() * t.element_size()


class Measured(TypedDict):
    """Times and memory of a function's forward pass, and of its forward and backward pass together."""

    graph: list[str]
    """Of "fwd" and "fwd_bwd" those whose time is that of calls inside a CUDA graph."""
    eager_fwd_ms: float
    fwd_ms: float
    eager_fwd_bwd_ms: float
    fwd_bwd_ms: float
    extra_fwd_mib: float
    extra_bwd_mib: float
    extra_mib: float
    """The larger of both."""


def measure(
    function: Callable[..., Tensor],
    sets: list[tuple[list[Tensor], Tensor]],
    device: torch.device,
    seconds: float = 0.4,
    graph_below_ms: float = 3.0,
) -> Measured:
    """Times of the forward pass, and of forward and backward together.

    Args:
        function: inputs -> y.
        sets: inputs, all with a gradient, and the output's gradient; taken in turn.
        graph_below_ms: calls that take less are also timed inside a CUDA graph, for the GPU may have waited for the
            CPU between them.
    """
    kept: list[object] = [None] * len(sets)  # outputs of the last round: a buffer used at once again stays in the cache

    def forward(i: int) -> None:
        inputs, _ = sets[i % len(sets)]
        kept[i % len(sets)] = function(*inputs).detach()

    def both(i: int) -> None:
        inputs, dy = sets[i % len(sets)]
        y = function(*inputs)
        kept[i % len(sets)] = (y.detach(), torch.autograd.grad(y, inputs, dy))

    eager, in_graph = {}, {}
    for name, call in (("fwd", forward), ("fwd_bwd", both)):
        eager[name] = median_ms(call, device, seconds)
        if eager[name] < graph_below_ms and device.type == "cuda":
            try:
                in_graph[name] = graph_ms(call, device, len(sets), seconds)
            except RuntimeError as error:
                print(f"    no CUDA graph of this one: {str(error).splitlines()[0]}", flush=True)
        kept[:] = [None] * len(sets)
    times = eager | in_graph
    inputs, dy = sets[0]
    extra_forward, extra_backward = extra_memory(function, inputs, dy, device)
    return {
        "graph": list(in_graph),
        "eager_fwd_ms": eager["fwd"],
        "fwd_ms": times["fwd"],
        "eager_fwd_bwd_ms": eager["fwd_bwd"],
        "fwd_bwd_ms": times["fwd_bwd"],
        "extra_fwd_mib": extra_forward,
        "extra_bwd_mib": extra_backward,
        "extra_mib": max(extra_forward, extra_backward),
    }


def copy_rate(device: torch.device, numbers: int = 2**30) -> float:
    """TB/s of a copy from device memory to device memory, bytes read and bytes written."""
    source = torch.empty(numbers, dtype=torch.bfloat16, device=device).zero_()
    target = torch.empty_like(source)
    ms = median_ms(lambda _: target.copy_(source), device)
    return 2 * size(source) / (ms * 1e-3) / 1e12


def matmul_rate(device: torch.device, width: int = 8192) -> float:
    """TFLOP/s of a bfloat16 product of two random square matrices."""
    a, b = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda _: a @ b, device)
    return 2 * width**3 / (ms * 1e-3) / 1e12


def cpu_us(call: Call, device: torch.device, calls: int = 100, rounds: int = 9) -> float:
    """Time that the CPU spends on a call that it does not wait for, median over rounds, in microseconds."""
    for i in range(min(calls, 10)):
        call(i)
    times = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for i in range(calls):
            call(i)
        times.append((time.perf_counter() - start) / calls * 1e6)
    synchronize(device)
    return statistics.median(times)


@lru_cache
def empty_op() -> Callable[[Tensor], Tensor]:
    """An op of torch.library with a fake and an autograd formula that does nothing but allocate its result."""

    @torch.library.custom_op("megalodon_bench::empty", mutates_args=())
    def empty(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @empty.register_fake
    def _(x):
        return torch.empty_like(x)

    empty.register_autograd(
        lambda ctx, dy: torch.ops.megalodon_bench.empty(dy),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return empty


def kernel_times(call: Call, device: torch.device, calls: int = 10) -> list[tuple[str, float, float]]:
    """(kernel, launches a call, microseconds a call) of everything that runs on the GPU, the longest first."""
    for i in range(min(calls, 3)):
        call(i)
    synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(calls):
            call(i)
        synchronize(device)
    found = [
        (event.key, event.count / calls, event.self_device_time_total / calls)
        for event in profile.key_averages()
        if event.device_type != torch.autograd.DeviceType.CPU and event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda row: -row[2])
