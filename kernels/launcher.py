"""Kernels on a GPU: loading machine code through the CUDA driver, and launching it with little work on the CPU.

The driver is called through ctypes: one call with numbers as arguments, about a microsecond of Python for a launch.
"""

import ctypes
import threading
from typing import Any

import torch

from .compiler import KernelUnavailable, compile_cubin

OLDEST = (8, 0)
"""The oldest compute capability: bfloat16 matrix products."""
SHARED_WITHOUT_ASKING = 48 * 1024

# Values of the driver's enumerations.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_MAX_DYNAMIC_SHARED = 8
_CAPTURE_RELAXED = 2

_Pointer, _Unsigned, _Int = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_Unsigned,),
    "cuGetErrorName": (_Int, _Pointer),
    "cuDeviceGet": (_Pointer, _Int),
    "cuDeviceGetAttribute": (_Pointer, _Int, _Int),
    "cuDevicePrimaryCtxRetain": (_Pointer, _Int),
    "cuCtxGetCurrent": (_Pointer,),
    "cuCtxPushCurrent_v2": (_Pointer,),
    "cuCtxPopCurrent_v2": (_Pointer,),
    "cuThreadExchangeStreamCaptureMode": (_Pointer,),
    "cuModuleLoadData": (_Pointer, _Pointer),
    "cuModuleGetFunction": (_Pointer, _Pointer, ctypes.c_char_p),
    "cuFuncLoad": (_Pointer,),
    "cuFuncGetParamInfo": (_Pointer, ctypes.c_size_t, _Pointer, _Pointer),
    "cuFuncSetAttribute": (_Pointer, _Int, _Int),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (_Pointer, _Pointer, _Int, ctypes.c_size_t),
    "cuLaunchKernel": (_Pointer, *[_Unsigned] * 7, _Pointer, _Pointer, _Pointer),
    "cuLaunchCooperativeKernel": (_Pointer, *[_Unsigned] * 7, _Pointer, _Pointer),
}
# Newer than the oldest driver of CUDA 12; what they do is a precaution.
_OPTIONAL = {"cuFuncLoad", "cuFuncGetParamInfo"}


class Driver:
    """The CUDA driver's functions that are used here, as attributes with the driver's names; each returns a status.

    Raises:
        KernelUnavailable: there is no driver, or it cannot start.
    """

    def __init__(self, library: Any = None) -> None:
        try:
            library = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise KernelUnavailable(f"the CUDA driver cannot be loaded: {error}") from error
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None and name not in _OPTIONAL:
                raise KernelUnavailable(f"the CUDA driver is too old: it has no {name}")
            if function is not None:
                function.argtypes, function.restype = arguments, _Int
            setattr(self, name, function)
        self.expect("cuInit", self.cuInit(0))

    def __getattr__(self, name: str) -> Any:  # for the type checker: the attributes are set by name
        raise AttributeError(name)

    def error_name(self, status: int) -> str:
        """The name of a status that is no success, as CUDA_ERROR_OUT_OF_MEMORY."""
        text = ctypes.c_char_p()
        if self.cuGetErrorName(status, ctypes.byref(text)) or text.value is None:
            return f"error {status}"
        return text.value.decode()

    def expect(self, what: str, status: int) -> None:
        """Raises KernelUnavailable where a call on the way to a kernel failed."""
        if status:
            raise KernelUnavailable(f"{what} failed with {self.error_name(status)}")


class Kernel:
    """One kernel on one device. May be called from any thread."""

    def __init__(self, driver: Driver, name: str, context: int, function: int, param_bytes: int | None) -> None:
        self.name = name
        self._driver = driver
        self._context = context
        self._function = function
        self._param_bytes = param_bytes
        self._shared_allowed = SHARED_WITHOUT_ASKING
        self._occupancy: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        params: ctypes.Structure,
        stream: int,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Queue the kernel; returns at once.

        Args:
            grid: blocks in x, y and z.
            threads: threads of a block.
            params: the kernel's only parameter, by value: copied before this returns.
            stream: a CUstream of this kernel's device, as `torch.cuda.current_stream(device).cuda_stream`.
            shared_bytes: dynamic shared memory of a block.
            cooperative: all blocks are resident at once (and may wait for each other), or the launch fails.

        Raises:
            RuntimeError: the driver refuses the launch, or reports an error of earlier work.
        """
        if self._param_bytes is not None and ctypes.sizeof(params) != self._param_bytes:
            raise ValueError(
                f"`params` of {self.name} must have the kernel's {self._param_bytes} bytes, but "
                f"{type(params).__name__} has {ctypes.sizeof(params)}"
            )
        if shared_bytes > self._shared_allowed:
            self._allow_shared(shared_bytes)
        pointer = _Pointer(ctypes.addressof(params))
        arguments = (self._function, *grid, threads, 1, 1, shared_bytes, stream, ctypes.byref(pointer))
        with_context = _Pointer()
        driver = self._driver
        # torch makes the right context current where it works; a thread of someone else's may have another or none.
        elsewhere = driver.cuCtxGetCurrent(ctypes.byref(with_context)) or with_context.value != self._context
        if elsewhere:
            driver.cuCtxPushCurrent_v2(self._context)
        status = (
            driver.cuLaunchCooperativeKernel(*arguments) if cooperative else driver.cuLaunchKernel(*arguments, None)
        )
        if elsewhere:
            driver.cuCtxPopCurrent_v2(ctypes.byref(with_context))
        if status:
            raise RuntimeError(
                f"Launching {self.name} with grid {grid}, {threads} threads a block and {shared_bytes} bytes of shared "
                f"memory{', cooperatively,' if cooperative else ''} failed with {driver.error_name(status)}"
            )

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int) -> int:
        """Blocks that a multiprocessor holds at once; 0 where one block is too large. Remembered.

        Raises:
            RuntimeError: the driver refuses the question.
        """
        blocks = self._occupancy.get((threads, shared_bytes))
        if blocks is None:
            if shared_bytes > self._shared_allowed:
                self._allow_shared(shared_bytes)
            answer = _Int()
            with _Current(self._driver, self._context):
                status = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    ctypes.byref(answer), self._function, threads, shared_bytes
                )
            if status:
                raise RuntimeError(f"The occupancy of {self.name} is unknown: {self._driver.error_name(status)}")
            blocks = self._occupancy[threads, shared_bytes] = answer.value
        return blocks

    def _allow_shared(self, shared_bytes: int) -> None:
        with self._lock:  # the largest demand must stand, whichever thread comes last
            if shared_bytes <= self._shared_allowed:
                return
            with _Current(self._driver, self._context):
                status = self._driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared_bytes)
            if status:
                raise RuntimeError(
                    f"{self.name} cannot have {shared_bytes} bytes of shared memory a block: "
                    f"{self._driver.error_name(status)}"
                )
            self._shared_allowed = shared_bytes


class _Current:
    """Makes a context the calling thread's own for a while."""

    def __init__(self, driver: Driver, context: int) -> None:
        self._driver, self._context = driver, context

    def __enter__(self) -> None:
        self._driver.expect("cuCtxPushCurrent", self._driver.cuCtxPushCurrent_v2(self._context))

    def __exit__(self, *error: object) -> None:
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(_Pointer()))


_kernels: dict[tuple[str, str, tuple[tuple[str, int], ...], int | None], Kernel] = {}
_modules: dict[tuple[str, tuple[tuple[str, int], ...], int], tuple[int, int]] = {}  # context and module
_driver: Driver | None = None
_loading = threading.RLock()


def load(source: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device) -> Kernel:
    """The kernel `name` of a source in this folder, compiled with the macros `defines`, on a CUDA device.

    Remembered for the process. May be called while a CUDA graph is captured, though the first call takes seconds
    where the disk cache does not have the kernel.

    Raises:
        KernelUnavailable: for every reason why there is no such kernel here: no compiler, no driver, a GPU older than
            compute capability 8.0, a source that does not compile, machine code that the driver does not load.
    """
    kernel = _kernels.get((source, name, defines, device.index))
    if kernel is None:
        with _loading:
            kernel = _load(source, name, defines, torch.cuda.current_device() if device.index is None else device.index)
            if device.index is not None:
                _kernels[source, name, defines, device.index] = kernel
    return kernel


def _load(source: str, name: str, defines: tuple[tuple[str, int], ...], index: int) -> Kernel:
    global _driver
    if (source, name, defines, index) in _kernels:  # loaded while this thread waited
        return _kernels[source, name, defines, index]
    driver = _driver = _driver or Driver()
    if (source, defines, index) not in _modules:
        device = _Int()
        driver.expect("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), index))
        cubin = compile_cubin(source, name, defines, _arch(driver, device.value))
        _modules[source, defines, index] = _load_module(driver, device.value, cubin)
    context, module = _modules[source, defines, index]
    with _Current(driver, context), _Relaxed(driver):
        function = _Pointer()
        status = driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        driver.expect(f"Finding {name} in {source}", status)
        if driver.cuFuncLoad is not None:  # the driver would else load its code at the first launch
            driver.expect(f"Loading {name}", driver.cuFuncLoad(function))
        param_bytes = _param_bytes(driver, function)
    assert function.value is not None
    return Kernel(driver, name, context, function.value, param_bytes)


def _load_module(driver: Driver, device: int, cubin: bytes) -> tuple[int, int]:
    """The device's primary context, which is torch's too, and the module in it. Both stay until the process ends."""
    context, module = _Pointer(), _Pointer()
    driver.expect("cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    assert context.value is not None
    with _Current(driver, context.value), _Relaxed(driver):
        driver.expect("cuModuleLoadData", driver.cuModuleLoadData(ctypes.byref(module), cubin))
    assert module.value is not None
    return context.value, module.value


def _arch(driver: Driver, device: int) -> str:
    major, minor = _Int(), _Int()
    for answer, attribute in ((major, _CAPABILITY_MAJOR), (minor, _CAPABILITY_MINOR)):
        status = driver.cuDeviceGetAttribute(ctypes.byref(answer), attribute, device)
        driver.expect("cuDeviceGetAttribute", status)
    if (major.value, minor.value) < OLDEST:
        raise KernelUnavailable(
            f"the GPU's compute capability must be at least {OLDEST[0]}.{OLDEST[1]}, but is {major.value}.{minor.value}"
        )
    return f"sm_{major.value}{minor.value}"


def _param_bytes(driver: Driver, function: ctypes.c_void_p) -> int | None:
    """Size of the kernel's first parameter; None where the driver does not tell."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuFuncGetParamInfo is None:
        return None
    status = driver.cuFuncGetParamInfo(function, 0, ctypes.byref(offset), ctypes.byref(size))
    return None if status else size.value


class _Relaxed:
    """Lets the calling thread load code while a CUDA graph is captured, here or in another thread."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._mode = _Int(_CAPTURE_RELAXED)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *error: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        status = self._driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))
        self._driver.expect("cuThreadExchangeStreamCaptureMode", status)
