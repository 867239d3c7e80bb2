"""CUDA C++ kernels, compiled for the GPU that is there when they are first needed; README.md derives them.

    kernel = kernels.load("scale.cu", "scale", (("FACTOR", 2),), x.device)
    kernel.launch((blocks, 1, 1), 256, params, torch.cuda.current_stream(x.device).cuda_stream)

A kernel is `extern "C" __global__ void NAME(const __grid_constant__ Params p)`; `params` is a `ctypes.Structure` with
the layout of its `Params`. NVRTC compiles it, so neither nvcc nor a host compiler is needed; what it made is kept on
disk (cache.py). No part of CUDA is imported or loaded before the first kernel is requested.
"""

from .compiler import KernelUnavailable, compile_cubin
from .launcher import Kernel, load

__all__ = ["Kernel", "KernelUnavailable", "compile_cubin", "load"]
