"""What the launches of all CUDA kernels share: parameter structs, addresses, the stream, the size of the GPU."""

import ctypes
import functools

import torch
from torch import Tensor


def parameter_struct(
    name: str, *, pointers: str, int64: str = "", int32: str = "", double: str = ""
) -> type[ctypes.Structure]:
    """The C struct that a kernel takes as its `Params`, with the names of its fields by type.

    Fields lie in the order pointers, int64, int32, double, as every `Params` in kernels/ has them, without padding.
    An instance takes them in this order or by name; a pointer is an address or None.
    """
    kinds = (
        (pointers, ctypes.c_void_p),
        (int64, ctypes.c_int64),
        (int32, ctypes.c_int32),
        (double, ctypes.c_double),
    )
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream_of(device: torch.device) -> int:
    """The handle of PyTorch's current stream; 0 on a CPU, where the tests run kernels."""
    # torch.cuda.current_stream makes a Python object first, which takes longer than a launch.
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def address(t: Tensor | None) -> int | None:
    """Where the first element lies; a null pointer for None."""
    return None if t is None else t.data_ptr()


def contiguous(t: Tensor | None) -> Tensor | None:
    """`t.contiguous()`, or None."""
    return None if t is None else t.contiguous()


def packed(x: Tensor) -> Tensor:
    """x (B, L, D) with its steps and channels packed; its batch rows may lie anywhere."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
