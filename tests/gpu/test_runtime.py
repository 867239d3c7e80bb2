"""The CUDA kernels inside torch: CUDA graphs, compilation, operator checks, streams, and what happens without them."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_plugin import kernels
from megalodon_plugin.bench.ops.problems import CALLS, Problem, cema_problem, padded, solve, timestep_norm_problem
from megalodon_plugin.ops import dispatch
from megalodon_plugin.ops.dispatch import use_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DEVICE, MODE = torch.device("cuda"), "require"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
OPS = pytest.mark.parametrize("op", ["cema", "timestep_norm"])


@pytest.fixture(autouse=True)
def kernels_required() -> Iterator[None]:
    with use_kernels(MODE):
        yield


def make(op: str, dtype: torch.dtype, seed: int = 0, length: int = 700, masked: bool = False) -> Problem:
    if op == "cema":
        return cema_problem((2, length, 40), 16, dtype, DEVICE, seed)
    problem = timestep_norm_problem((2, length, 64), 4, dtype, DEVICE, seed)
    return padded(problem) if masked else problem


def differing(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    assert got.keys() == want.keys()
    return [name for name, value in want.items() if not torch.equal(got[name], value)]


@OPS
@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_a_cuda_graph_replays_forward_and_backward_on_new_numbers(op: str, dtype: torch.dtype, masked: bool) -> None:
    if masked and op == "cema":
        pytest.skip("CEMA takes no padding mask")
    static = make(op, dtype, masked=masked)
    # Warmed up on a stream of its own, as torch wants it: what is compiled or allocated once must not be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            solve(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = solve(static)
    for seed in (1, 2):
        new = make(op, dtype, seed, masked=masked)
        tensors = zip(
            [*static.arguments.values(), *static.weights.values(), *static.options.values()],
            [*new.arguments.values(), *new.weights.values(), *new.options.values()],
            strict=True,
        )
        for target, source in tensors:
            if isinstance(target, torch.Tensor):
                target.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        assert differing(got, solve(new)) == []


@OPS
@DTYPES
@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
def test_compiled_whole_equals_eager(op: str, dtype: torch.dtype, backend_name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[op], fullgraph=True, backend=backend_name)
    for length in (700, 701):  # the second with a symbolic length
        problem = make(op, dtype, length=length)
        assert differing(solve(problem, call=compiled), solve(problem)) == []


class Recorder(TorchDispatchMode):
    """Remembers the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "megalodon":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@OPS
@DTYPES
@pytest.mark.parametrize("length", [1, 70])
def test_opcheck(op: str, dtype: torch.dtype, length: int) -> None:
    """On every operator that a forward and a backward pass call, with the arguments that they call it with."""
    with Recorder() as recorder:
        solve(make(op, dtype, length=length, masked=length > 1))
    names = [func.name() for func, _ in recorder.calls]
    assert len(names) >= 2 and any("backward" in name for name in names), names
    for func, arguments in recorder.calls:
        forward = "backward" not in func.name()
        copies = [
            a.detach().clone().requires_grad_(forward and a.is_floating_point()) if isinstance(a, torch.Tensor) else a
            for a in arguments
        ]
        torch.library.opcheck(func, copies)


@OPS
@DTYPES
def test_the_current_stream_is_used(op: str, dtype: torch.dtype) -> None:
    """On another stream the inputs would be read before the numbers are there."""
    late, problem = make(op, dtype, 1), make(op, dtype, 0)
    want = solve(late)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, about 0.1 s
        for name, value in late.arguments.items():
            problem.arguments[name].copy_(value)
        for name, value in late.weights.items():
            problem.weights[name].copy_(value)
        got = solve(problem)
    side.synchronize()
    assert differing(got, want) == []


@OPS
def test_the_kernels_are_what_runs(op: str) -> None:
    """Their numbers differ from PyTorch's in the last bits, or nothing was tested here."""
    problem = make(op, torch.float32)
    with use_kernels("off"):
        plain = solve(problem)
    assert differing(solve(problem), plain)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments):
        raise kernels.KernelUnavailable("the compiler is on holiday")

    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(dispatch, "_failures", {})
    monkeypatch.setattr(dispatch, "_warned", set())


# Sizes that nothing else here has, so that no plan of the ops remembers a kernel for them.
UNSEEN = {
    "cema": lambda: cema_problem((2, 45, 22), 5, torch.bfloat16, DEVICE),
    "timestep_norm": lambda: timestep_norm_problem((2, 45, 22), 2, torch.bfloat16, DEVICE),
}


@OPS
def test_a_required_kernel_that_cannot_be_loaded_is_an_error(op: str, broken: None) -> None:
    with pytest.raises(RuntimeError, match="on holiday"):
        solve(UNSEEN[op]())


@OPS
def test_otherwise_there_is_one_warning_and_the_result_is_right(op: str, broken: None) -> None:
    problem = UNSEEN[op]()
    with use_kernels("auto"):
        with pytest.warns(RuntimeWarning, match="on holiday"):
            got = solve(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = solve(problem)
    with use_kernels("off"):
        want = solve(problem)
    assert differing(got, want) == [] and differing(again, want) == []
