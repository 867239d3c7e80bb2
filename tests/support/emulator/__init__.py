"""Kernels on a CPU: `emulated_load` stands in for `megalodon_plugin.kernels.load` and takes tensors of the CPU.

Each CUDA thread becomes a fiber (emulator/scheduler.h), and emulator/primitives.cuh takes the place of the header of
that name. It shows wrong indices, missing barriers, lanes that do not meet, uninitialised shared memory (filled with
NaN), misaligned vectors; it says nothing about speed, registers or the GPU's memory order.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

# The order in which the threads run between two waits: 0 by index, 1 reversed, another number a shuffle by that seed.
# A result that depends on it shows a missing barrier.
SCHEDULE = 0

# "address,undefined", say. The address sanitizer needs LD_PRELOAD=$(g++ -print-file-name=libasan.so).
SANITIZERS = os.environ.get("EMULATOR_SANITIZE", "")

_HERE = Path(__file__).parent
_KERNELS = Path(__file__).parents[3] / "kernels"
_WARP = 32
_EMULATOR = "emulator.h"


class EmulatedKernel:
    """What `megalodon_plugin.kernels.load` returns, on the CPU."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._name = name
        self._launch = library.emulator_launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.c_uint] * 4 + [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint]
        library.emulator_params_bytes.restype = ctypes.c_size_t
        self._params_bytes = library.emulator_params_bytes()

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        params: ctypes.Structure,
        stream: int = 0,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Run the kernel to its end. RuntimeError says which lanes did not meet, or what was wrong."""
        rules = {
            f"params of {self._params_bytes} bytes, not {ctypes.sizeof(params)}": ctypes.sizeof(params)
            == self._params_bytes,
            f"whole warps, at most 1024 threads, not {threads}": 0 < threads <= 1024 and threads % _WARP == 0,
            f"at most 232448 bytes of shared memory, not {shared_bytes}": 0 <= shared_bytes <= 232448,
            f"a grid of three positive numbers within (2^31 - 1, 65535, 65535), not {grid}": len(grid) == 3
            and all(1 <= n <= limit for n, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=True)),
        }
        for rule, holds in rules.items():
            if not holds:
                raise RuntimeError(f"{self._name} takes {rule}")
        message = self._launch(*grid, threads, ctypes.addressof(params), shared_bytes, cooperative, SCHEDULE)
        if message:
            raise RuntimeError(f"{self._name}: {message.decode()}")

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int = 0) -> int:
        return 2


def emulated_load(
    source: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device | None = None
) -> EmulatedKernel:
    """Kernel `name` of kernels/`source`, compiled with g++; skips the test where there is none."""
    return _load(source, name, tuple(defines), SANITIZERS)


@functools.cache
def _load(source: str, name: str, defines: tuple[tuple[str, int], ...], sanitizers: str) -> EmulatedKernel:
    return EmulatedKernel(ctypes.CDLL(str(build(_KERNELS / source, name, defines, sanitizers))), name)


def build(source: Path, name: str, defines: tuple[tuple[str, int], ...], sanitizers: str = "") -> Path:
    """The shared library of kernel `name` in `source`; kept in the temporary folder per text, macros and flags."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulator needs g++")
    # Kernels run for milliseconds here: what takes time is compiling them.
    flags = ["-std=c++20", "-O0", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-ffp-contract=off", "-fno-strict-aliasing"]
    if sanitizers:
        flags += ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    headers = _headers(compiler, tuple(flags))
    flags += ["-shared", *(f"-D{key}={value}" for key, value in defines)]
    # Includes are named from the sources' root, and the emulator's primitives.cuh must be found before the kernels'.
    moved = [source, *sorted(source.parent.glob("*.cuh"))]
    names = [path.relative_to(_KERNELS).as_posix() for path in moved]
    texts = {name: f'#line 1 "{name}"\n{path.read_text()}' for name, path in zip(names, moved, strict=True)}
    key = hashlib.sha256(repr((texts, name, flags, headers.name)).encode()).hexdigest()[:24]
    cache = _cache()
    library = cache / f"{name}-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        for file, text in texts.items():
            (Path(folder) / file).parent.mkdir(exist_ok=True)
            (Path(folder) / file).write_text(text)
        main = Path(folder) / "main.cpp"
        main.write_text(f'#include "{_EMULATOR}"\n#include "{names[0]}"\nEMULATED_KERNEL({name})\n')
        built = Path(folder) / library.name
        paths = [f"-I{headers}", f"-I{_HERE}", f"-I{folder}"]
        _run([compiler, *flags, *paths, "-o", str(built), str(main)], f"{source.name} {dict(defines)}")
        built.replace(library)
    return library


@functools.cache
def _headers(compiler: str, flags: tuple[str, ...]) -> Path:
    """The folder of a header with all of the emulator, which is precompiled: g++ would spend half its time on it."""
    key = hashlib.sha256(repr(flags).encode())
    for path in sorted([*_HERE.glob("*.h"), *_HERE.glob("*.cuh")]):
        key.update(path.read_bytes())
    folder = _cache() / f"headers-{key.hexdigest()[:24]}"
    folder.mkdir(exist_ok=True)
    header = folder / _EMULATOR
    if not header.with_suffix(".h.gch").exists():
        with tempfile.TemporaryDirectory(dir=_cache()) as made:
            (Path(made) / _EMULATOR).write_text('#include "primitives.cuh"\n')
            (Path(made) / _EMULATOR).replace(header)
            built = Path(made) / "header.gch"
            command = [compiler, *flags, f"-I{_HERE}", "-x", "c++-header", "-o", str(built), str(header)]
            _run(command, "the emulator")
            built.replace(header.with_suffix(".h.gch"))
    return folder


def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"megalodon-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run(command: list[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"g++ does not compile {what}:\n{result.stderr[:8000]}")
