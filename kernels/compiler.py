"""From a CUDA C++ source in this folder to machine code of one GPU architecture, by NVRTC; no GPU is needed."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from . import cache

SOURCES = Path(__file__).parent
# Line information changes no instruction; profilers and compute-sanitizer then name lines.
OPTIONS = {"std": "c++17", "lineinfo": True}
INSTALL = "`pip install 'megalodon-plugin[cuda]'` installs it"

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


class KernelUnavailable(RuntimeError):
    """No kernel can run here; the message is the reason."""


def compile_cubin(
    source: str, name: str, defines: tuple[tuple[str, int], ...], arch: str, folder: Path = SOURCES
) -> bytes:
    """Machine code of `source`, from the disk cache if it is there.

    Args:
        source: file in `folder`, from which the names of its headers count too.
        name: the kernel that will be used; its being there is checked. Kernels of one source share their cubin.
        defines: macros and their values.
        arch: `sm_80`, `sm_90`, `sm_100`, ...

    Raises:
        KernelUnavailable: cuda-core, NVRTC or the source is missing, NVRTC refuses the source (with its log) or the
            architecture, or there is no such kernel in the source.
    """
    if not (folder / source).is_file():
        raise KernelUnavailable(f"`source` must be a file beside {Path(__file__).name}, but is {source!r}")
    version = nvrtc_version()
    parts = [f"NVRTC {version} {OPTIONS} {arch} {source} {sorted(defines)}"]
    parts += [f"{file.name}\n{text}" for file, text in _with_headers(folder / source, folder, set())]
    # A part's own hash, so that text cannot move from one part to the next without changing the key.
    hashes = "".join(hashlib.sha256(part.encode()).hexdigest() for part in parts)
    key = hashlib.sha256(hashes.encode()).hexdigest()
    cubin = cache.get_or_make(key, lambda: compile_now(source, defines, arch, folder))
    if f".text.{name}\0".encode() not in cubin:
        raise KernelUnavailable(f"`name` must be a kernel of {source}, but is {name!r}")
    return cubin


def compile_now(
    source: str,
    defines: tuple[tuple[str, int], ...],
    arch: str,
    folder: Path = SOURCES,
    ptxas_log: TextIO | None = None,
) -> bytes:
    """`compile_cubin` without the cache and without a check of the kernel's name.

    `ptxas_log` receives what the assembler says of registers, spills and shared memory.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise KernelUnavailable(f"cuda-core cannot be imported ({error}); {INSTALL}") from error
    text = (folder / source).read_text()
    try:
        options = ProgramOptions(
            name=source,
            arch=arch,
            include_path=str(folder),
            define_macro=[(macro, str(value)) for macro, value in defines] or None,  # an empty list is refused
            ptxas_options=None if ptxas_log is None else "-v",
            **OPTIONS,
        )
        return bytes(Program(text, "c++", options).compile("cubin", logs=ptxas_log).code)
    except Exception as error:
        # cuda-core has an exception of its own for each library, with NVRTC's log in the message.
        raise KernelUnavailable(f"NVRTC cannot compile {source} for {arch} with {dict(defines)}: {error}") from error


def nvrtc_version() -> str:
    """NVRTC's version, as "13.0".

    Raises:
        KernelUnavailable: the bindings or the library are not there.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelUnavailable(f"cuda-core's bindings cannot be imported ({error}); {INSTALL}") from error
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # the bindings' own class for a library that is not found has moved between versions
        raise KernelUnavailable(f"NVRTC cannot be loaded ({error}); {INSTALL}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelUnavailable(f"NVRTC does not tell its version: {status}")
    return f"{major}.{minor}"


def _with_headers(path: Path, folder: Path, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """A source and the headers that it names, directly or not, each once. A missing one is left to NVRTC's message."""
    if path in seen or not path.is_file():
        return
    seen.add(path)
    text = path.read_text()
    yield path, text
    for header in _INCLUDE.findall(text):
        yield from _with_headers(folder / header, folder, seen)
