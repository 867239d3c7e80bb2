"""Lets torchtitan 0.2 run on a machine without a GPU.

torchtitan takes its device from `torchtitan.tools.utils`, which falls back to "cuda" and asks the device's module for
functions that `torch.cpu` lacks (torchtitan #1104). `use_cpu` imports that one module with a stand-in for `torch.cpu`;
nothing of torch itself stays changed. It must run before torchtitan is imported.
"""

import importlib
import platform
import sys
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import torch


class CpuDevice:
    """`torch.cpu` with what torchtitan asks of a device module. Memory is that of the process (resident set size)."""

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        """0: the host passes it to `torch.distributed.barrier`, which takes numbers."""
        return 0

    def get_device_name(self, device: object = None) -> str:
        return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=psutil.virtual_memory().total)

    def memory_stats(self, device: object = None) -> dict[str, int]:
        resident = psutil.Process().memory_info().rss
        return {
            "active_bytes.all.peak": resident,
            "reserved_bytes.all.peak": resident,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: object = None) -> None:
        """Nothing to reset: the resident set is read when it is asked for."""

    def empty_cache(self) -> None:
        """Nothing to empty: the system's allocator keeps no cache of ours."""


def needs_cpu() -> bool:
    """Whether this machine has no accelerator that torchtitan would find."""
    return torch._utils._get_available_device_type() is None


def use_cpu() -> None:
    """Make torchtitan use the CPU, and measure the peak that its utilisation figures refer to.

    Raises:
        RuntimeError: torchtitan has chosen its device already.
    """
    if "torchtitan.tools.utils" in sys.modules:
        if sys.modules["torchtitan.tools.utils"].device_type == "cpu":
            return
        raise RuntimeError(
            "torchtitan was imported before the plugin, so it took this machine for one with a GPU; "
            "on a machine without one start `python -m torch.distributed.run -m megalodon_plugin.cli.train`"
        )
    device = CpuDevice()
    with (
        mock.patch.object(torch._utils, "_get_available_device_type", lambda: "cpu"),
        mock.patch.object(torch._utils, "_get_device_module", lambda device_type: device),
    ):
        utils: Any = importlib.import_module("torchtitan.tools.utils")
    utils.get_peak_flops = measured_peak_flops


_peak_flops: float | None = None


def measured_peak_flops(device_name: str) -> float:
    """FLOP/s of a float32 matrix product on this CPU, the best of a few; the host knows only GPUs by name."""
    global _peak_flops
    if _peak_flops is None:
        size = 768
        a = torch.ones(size, size)
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - begin)
        _peak_flops = 2 * size**3 / min(times)
    return _peak_flops
