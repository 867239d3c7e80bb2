"""The head of every result, of benchmarks and evaluations: where, by which versions and how it was measured."""

import datetime
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict

import torch

from megalodon_plugin import __version__


class Environment(TypedDict):
    """The keys that all results have in common."""

    device: str
    """Name of the GPU, or "CPU" with the number of threads."""
    torch: str
    cuda: str | None
    """Version that torch is built for; None without CUDA."""
    driver: str | None
    triton: str | None
    version: str
    """Of this plugin."""
    commit: str
    """Twelve digits, "-changed" behind them where files differ from it; "unknown" where git cannot tell."""
    date: str
    """Start of the run, ISO 8601 in UTC."""
    command: str
    """The command line."""


def environment(device: str, commit: str | None = None) -> Environment:
    """The head of a result that is measured now; `device` by `device_name`, `commit` in place of what git says."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver.split("\n")[0] if driver else None,
        "triton": _version("triton"),
        "version": __version__,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name; of a CPU the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def device_of(results: Mapping[str, Any]) -> str:
    """The device of results read from a file; those of `bench ops` once had it under "gpu"."""
    return results["device"] if "device" in results else results["gpu"]


def _commit() -> str:
    here = str(Path(__file__).parent)
    if _output("git", "-C", here, "ls-files", "--error-unmatch", __file__) is None:
        return "unknown"  # an installed package, whose folder may lie inside another project's repository
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD") or "unknown"
    return commit + ("-changed" if _output("git", "-C", here, "status", "--porcelain", "-uno") else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
