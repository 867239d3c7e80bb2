"""Which implementation an op runs on a CUDA tensor: its kernels or PyTorch code.

Three questions decide, in this order, in every op:

1. Is there a kernel for this call? The op's own `tiles` (chunk attention: `hopper`) answers, from shapes and dtypes
   alone, so that a traced call gets the same answer.
2. Does the mode allow it? The mode is that of the process, for all ops and threads (gradients are computed in others):

       auto     the kernels; where they cannot run, PyTorch code after one warning that says why
       require  the kernels; where they cannot run, an error that says why
       off      PyTorch code

   It starts as what the environment variable MEGALODON_KERNELS says, else as auto. float64 always runs PyTorch code:
   it is the precision of the definition.
3. Can it run here? The first launch finds out (no compiler, a GPU that NVRTC does not know). A failure is remembered
   for the op and device.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from megalodon_plugin.kernels import KernelUnavailable

T = TypeVar("T")

MODES = ("auto", "require", "off")


def _checked(mode: str, key: str) -> str:
    if mode not in MODES:
        raise ValueError(f"`{key}` must be one of {', '.join(MODES)}, but is {mode!r}")
    return mode


_mode = _checked(os.environ.get("MEGALODON_KERNELS") or "auto", "MEGALODON_KERNELS")
_failures: dict[tuple[str, torch.device], str] = {}
_warned: set[tuple[str, str]] = set()


def kernels_mode() -> str:
    """The mode: "auto", "require" or "off"."""
    return _mode


def set_kernels(mode: str, key: str = "mode") -> None:
    """Set the mode. `key` is what an error calls it.

    Raises:
        ValueError: the mode is none of the three.
    """
    global _mode
    _mode = _checked(mode, key)


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """The mode inside a `with` block, for tests and benchmarks. Backward passes belong inside it too."""
    before = _mode
    set_kernels(mode)
    try:
        yield
    finally:
        set_kernels(before)


def kernel_or_none(op_name: str, tensor: Tensor, run: Callable[[], T]) -> T | None:
    """What `run` returns, or None where PyTorch code must compute it instead.

    Args:
        op_name: names the op in messages. After a failure `run` is not called again for this name and device.
        tensor: the activation that the op is called with.
        run: launches the op's kernels and returns their results.

    Raises:
        KernelUnavailable: in the mode "require", where `run` raises it.
    """
    if _mode == "off" or tensor.dtype == torch.float64:
        return None
    reason = _failures.get((op_name, tensor.device)) if _failures else None
    if reason is None:
        try:
            return run()
        except KernelUnavailable as error:
            reason = _failures[op_name, tensor.device] = str(error)
    if _mode == "require":
        raise KernelUnavailable(f"{op_name} has no CUDA kernel on {tensor.device}, and kernels are required: {reason}")
    if (op_name, reason) not in _warned:
        _warned.add((op_name, reason))
        warnings.warn(
            f"{op_name} RUNS AS PYTORCH CODE on {tensor.device}, many times slower than its CUDA kernel: {reason}\n"
            '`megalodon.kernels = "require"` (or MEGALODON_KERNELS=require) makes this an error, "off" silences it.',
            RuntimeWarning,
            stacklevel=2,
        )
    return None
