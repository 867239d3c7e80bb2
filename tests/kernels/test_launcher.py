"""Loading and launching, with a stand-in for the CUDA driver that writes down what it is asked."""

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalodon_plugin import kernels
from megalodon_plugin.kernels import launcher

DEVICE = torch.device("cuda", 0)
CONTEXT, MODULE, FUNCTION, STREAM = 0x7F0000001000, 0x7F0000002000, 0x7F0000003000, 0x7F0000004000


class Params(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("n", ctypes.c_int64), ("factor", ctypes.c_float))


def write(pointer: Any, value: Any) -> int:
    """Through what the driver gets as a pointer for an answer."""
    pointer._obj.value = value
    return 0


class FakeDriver(SimpleNamespace):
    """A library with the driver's functions; `fails` maps a name to the status that it returns."""

    def __init__(self, capability: tuple[int, int] = (9, 0), **fails: int) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.current: int | None = CONTEXT  # of the calling thread
        self.capture_mode = 0
        self.modes_at_loads: list[int] = []
        answers: dict[str, Callable[..., int]] = {
            "cuGetErrorName": lambda status, text: write(text, f"CUDA_ERROR_{status}".encode()),
            "cuDeviceGet": write,
            "cuDeviceGetAttribute": lambda answer, which, _: write(answer, capability[which - 75]),
            "cuDevicePrimaryCtxRetain": lambda answer, _: write(answer, CONTEXT),
            "cuCtxGetCurrent": lambda answer: write(answer, self.current),
            "cuThreadExchangeStreamCaptureMode": self.exchange,
            "cuModuleLoadData": lambda answer, _: (
                self.modes_at_loads.append(self.capture_mode) or write(answer, MODULE)
            ),
            "cuModuleGetFunction": lambda answer, *_: write(answer, FUNCTION),
            "cuFuncGetParamInfo": lambda _, __, ___, size: write(size, ctypes.sizeof(Params)),
            "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda answer, *_: write(answer, 3),
        }
        for name in launcher._SIGNATURES:
            setattr(self, name, self.recording(name, answers.get(name, lambda *_: 0), fails.get(name, 0)))

    def recording(self, name: str, answer: Callable[..., int], status: int) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name, *arguments))
            return status or answer(*arguments)

        return call

    def exchange(self, mode: Any) -> int:
        self.capture_mode, mode._obj.value = mode._obj.value, self.capture_mode
        return 0

    def times(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is asked of the compiler, which compiles nothing; the launcher has loaded nothing."""
    asked: list[tuple] = []
    monkeypatch.setattr(launcher, "compile_cubin", lambda *what: asked.append(what) or b"cubin")
    monkeypatch.setattr(launcher, "_kernels", {})
    monkeypatch.setattr(launcher, "_modules", {})
    return asked


@pytest.fixture
def use(compiled: list, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDriver]:
    def start(**how: Any) -> FakeDriver:
        fake = FakeDriver(**how)
        monkeypatch.setattr(launcher, "_driver", launcher.Driver(fake))
        fake.calls.clear()
        return fake

    return start


def load(name: str = "scale") -> kernels.Kernel:
    return kernels.load("scale.cu", name, (("FACTOR", 2),), DEVICE)


def test_a_kernel_is_loaded_once(use: Callable[..., FakeDriver], compiled: list) -> None:
    fake = use()
    kernel = load()
    assert load() is kernel
    assert load("shift") is not kernel
    assert compiled == [("scale.cu", "scale", (("FACTOR", 2),), "sm_90")]
    assert [fake.times(name) for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncLoad")] == [1, 2, 2]
    # Loading may happen while a graph is captured; the thread's mode is as it was afterwards.
    assert (fake.modes_at_loads, fake.capture_mode) == ([2], 0)


def test_many_threads_load_it_once(use: Callable[..., FakeDriver], compiled: list) -> None:
    use()
    found: list[kernels.Kernel] = []
    threads = [threading.Thread(target=lambda: found.append(load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1 and len(found) == 8 and len(compiled) == 1


def test_a_launch(use: Callable[..., FakeDriver]) -> None:
    fake = use()
    kernel = load()
    fake.calls.clear()
    params = Params(0x1000, 1 << 40, 2.5)
    kernel.launch((70000, 3, 2), 256, params, STREAM, 1024)
    kernel.launch((1, 1, 1), 32, params, STREAM, cooperative=True)
    first, second = (call for call in fake.calls if "Launch" in call[0])
    assert first[:10] == ("cuLaunchKernel", FUNCTION, 70000, 3, 2, 256, 1, 1, 1024, STREAM) and first[11] is None
    assert second[:10] == ("cuLaunchCooperativeKernel", FUNCTION, 1, 1, 1, 32, 1, 1, 0, STREAM)
    read = Params.from_address(first[10]._obj.value)
    assert (read.x, read.n, read.factor) == (0x1000, 1 << 40, 2.5)
    assert fake.times("cuCtxPushCurrent_v2") == 0


@pytest.mark.parametrize("current", [None, 0x7F00DEAD0000])
def test_a_launch_where_another_context_is_current(use: Callable[..., FakeDriver], current: int | None) -> None:
    fake = use()
    kernel = load()
    fake.calls.clear()
    fake.current = current
    kernel.launch((1, 1, 1), 32, Params(), STREAM)
    names = [call[0] for call in fake.calls]
    assert names == ["cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert fake.calls[1][1] == CONTEXT


def test_more_shared_memory_is_asked_for_once(use: Callable[..., FakeDriver]) -> None:
    fake = use()
    kernel = load()
    for size in (48 * 1024, 100_000, 60_000, 100_000, 120_000):
        kernel.launch((1, 1, 1), 32, Params(), STREAM, size)
    assert kernel.blocks_per_multiprocessor(32, 200_000) == kernel.blocks_per_multiprocessor(32, 200_000) == 3
    asked = [call[2:] for call in fake.calls if call[0] == "cuFuncSetAttribute"]
    assert asked == [(8, 100_000), (8, 120_000), (8, 200_000)]
    assert fake.times("cuOccupancyMaxActiveBlocksPerMultiprocessor") == 1


def test_what_is_wrong_with_a_launch_is_told(use: Callable[..., FakeDriver]) -> None:
    use(cuLaunchKernel=701, cuLaunchCooperativeKernel=720, cuFuncSetAttribute=1)
    kernel = load()
    with pytest.raises(RuntimeError, match=r"scale with grid \(9, 1, 1\), 512 threads .* 1024 bytes .*CUDA_ERROR_701"):
        kernel.launch((9, 1, 1), 512, Params(), STREAM, 1024)
    with pytest.raises(RuntimeError, match="cooperatively, failed with CUDA_ERROR_720"):
        kernel.launch((9, 1, 1), 512, Params(), STREAM, cooperative=True)
    with pytest.raises(RuntimeError, match="scale cannot have 300000 bytes of shared memory a block: CUDA_ERROR_1"):
        kernel.launch((9, 1, 1), 512, Params(), STREAM, 300_000)
    with pytest.raises(ValueError, match=r"`params` of scale must have the kernel's 24 bytes, but .* has 8"):
        kernel.launch((9, 1, 1), 512, (type("Other", (ctypes.Structure,), {"_fields_": [("x", ctypes.c_int64)]}))(), 0)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"capability": (7, 5)}, r"compute capability must be at least 8\.0, but is 7\.5"),
        ({"cuModuleLoadData": 209}, "cuModuleLoadData failed with CUDA_ERROR_209"),
        ({"cuModuleGetFunction": 500}, r"Finding scale in scale\.cu failed with CUDA_ERROR_500"),
        ({"cuDevicePrimaryCtxRetain": 2}, "cuDevicePrimaryCtxRetain failed with CUDA_ERROR_2"),
        ({"cuDeviceGet": 101}, "cuDeviceGet failed with CUDA_ERROR_101"),
    ],
)
def test_a_kernel_that_cannot_be_had(use: Callable[..., FakeDriver], how: dict, reason: str) -> None:
    fake = use(**how)
    for _ in range(2):
        with pytest.raises(kernels.KernelUnavailable, match=reason):
            load()
    assert fake.capture_mode == 0 and fake.times("cuCtxPushCurrent_v2") == fake.times("cuCtxPopCurrent_v2")


def test_a_driver_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kernels.KernelUnavailable, match="cuInit failed with CUDA_ERROR_100"):
        launcher.Driver(FakeDriver(cuInit=100))
    old = FakeDriver()
    del old.cuFuncLoad, old.cuFuncGetParamInfo
    assert launcher.Driver(old).cuFuncLoad is None
    del old.cuLaunchCooperativeKernel
    with pytest.raises(kernels.KernelUnavailable, match="too old: it has no cuLaunchCooperativeKernel"):
        launcher.Driver(old)

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(kernels.KernelUnavailable, match=r"driver cannot be loaded: libcuda\.so\.1: cannot open"):
        launcher.Driver()
