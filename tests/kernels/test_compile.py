"""Every kernel compiles for each architecture, within its budget of registers and without local memory (spills).

The figures are read from the machine code itself, an ELF file whose `.nv.info` sections hold them.
"""

import importlib
import importlib.util
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megalodon_plugin import kernels
from megalodon_plugin.kernels import compiler

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


class Budget(NamedTuple):
    """The most that a thread of a kernel may take: registers, and bytes of local memory (spilled or indexed)."""

    registers: int = 255
    local_bytes: int = 0


# Kernel -> budget, or (kernel, architecture) -> budget, which comes first. The others have the default one.
BUDGETS: dict[str | tuple[str, str], Budget] = {
    "cema_prepare": Budget(64, 0),
    # 16 warps, so 128 registers (the launch bound sees to it), and a few words that the loop reads once a tile.
    "cema_pass": Budget(255, 64),
    "cema_grad": Budget(255, 64),
    "cema_finish": Budget(64, 0),
    "cema_fold": Budget(64, 0),
    "norm_summary": Budget(64, 0),
    "norm_summary_finish": Budget(64, 0),
    # The backward pass keeps the state before each of its T steps in an array that it indexes while running.
    "cema_short": Budget(96, 16 * 32),
    "timestep_norm_forward": Budget(160, 0),
    "timestep_norm_backward": Budget(168, 16),
    "timestep_norm_parameters": Budget(48, 0),
}

OPS = tuple(f"megalodon_plugin.ops.{name}" for name in ("cema.cuda", "timestep_norm.cuda", "timestep_norm.slices_cuda"))

SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
  float v[96];
  #pragma unroll
  for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = v[i] * v[(i + 37) % 96];
}
"""
PLAIN = """
struct Params { float* x; long long n; float factor; };
extern "C" __global__ void plain(const __grid_constant__ Params p) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[32];
  fixed[threadIdx.x] = p.factor;
  dynamic[threadIdx.x] = fixed[threadIdx.x ^ 1];
  __syncthreads();
  p.x[threadIdx.x] = dynamic[threadIdx.x ^ 2];
}
"""


# Attributes of `.nv.info`.
FRAME_SIZE, PARAM_SIZE, REGISTER_COUNT = 0x11, 0x19, 0x2F
NOBITS = 8  # a section with a size and no content


class Usage(NamedTuple):
    """What a thread or a block of a kernel takes."""

    registers: int
    local_bytes: int
    static_shared_bytes: int
    param_bytes: int


def usage(cubin: bytes) -> dict[str, Usage]:
    """Kernel name -> what it takes."""
    sections = dict(_sections(cubin))
    names = sections[".strtab"][0]
    symbols = [
        names[start : names.index(b"\0", start)].decode()
        for (start,) in struct.iter_unpack("<I20x", sections[".symtab"][0])
    ]
    by_attribute: dict[int, dict[str, int]] = {REGISTER_COUNT: {}, FRAME_SIZE: {}}
    for attribute, payload in _attributes(sections[".nv.info"][0]):
        if attribute in by_attribute:
            symbol, value = struct.unpack("<II", payload)
            by_attribute[attribute][symbols[symbol]] = value
    # From compute capability 9.0 on a kernel's shared memory starts with a part of the driver's own.
    reserved = 1024 if any(section.startswith(".nv.shared.reserved") for section in sections) else 0
    found = {}
    for section in sections:
        name = section.removeprefix(".nv.info.")
        if name != section:
            params = [payload for kind, payload in _attributes(sections[section][0]) if kind == PARAM_SIZE]
            found[name] = Usage(
                by_attribute[REGISTER_COUNT][name],
                by_attribute[FRAME_SIZE][name],
                max(0, sections.get(f".nv.shared.{name}", (b"", 0))[1] - reserved),
                struct.unpack("<H", params[0])[0] if params else 0,
            )
    return found


def _sections(elf: bytes) -> Iterator[tuple[str, tuple[bytes, int]]]:
    """Section name -> content and size (shared memory has no content)."""
    (table,), (count, names_at) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HH", elf, 0x3C)
    headers = [struct.unpack_from("<II16xQQ", elf, table + 64 * i) for i in range(count)]
    names = headers[names_at][2]
    for name, kind, offset, size in headers:
        label = elf[names + name : elf.index(b"\0", names + name)].decode()
        yield label, (b"" if kind == NOBITS else elf[offset : offset + size], size)


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Attribute and payload: a byte of format, a byte of attribute, then 2 bytes of value or, in format 4, of size."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        yield attribute, info[at : at + size] if form == 4 else info[at - 2 : at]
        at += size if form == 4 else 0


def over_budget(name: str, arch: str, used: Usage) -> list[str]:
    """What a kernel takes beyond its budget; empty when all is well."""
    budget = BUDGETS.get((name, arch)) or BUDGETS.get(name) or Budget()
    found = []
    if used.registers > budget.registers:
        found.append(f"{used.registers} registers, more than {budget.registers}")
    if used.local_bytes > budget.local_bytes:
        found.append(f"{used.local_bytes} bytes of local memory, more than {budget.local_bytes}")
    if used.static_shared_bytes:
        found.append(f"{used.static_shared_bytes} bytes of fixed shared memory, more than 0")
    return found


def variants() -> list[tuple[str, str, tuple[tuple[str, int], ...]]]:
    names = [name for name in OPS if importlib.util.find_spec(name)]
    modules = [importlib.import_module(name) for name in names]
    return sorted({variant for module in modules for variant in module.VARIANTS})


def label(value: str | tuple[tuple[str, int], ...]) -> str | None:
    """Of a test: the kernel and its macros, without the file."""
    if isinstance(value, str):
        return None if value.endswith(".cu") else value
    return ",".join(f"{macro}={number}" for macro, number in value)


@pytest.fixture
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that stays between runs, beside pytest's own: what did not change is not compiled again."""
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(request.config.cache.mkdir("kernels")))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("source", "name", "defines"), variants(), ids=label)
def test_a_kernel_stays_in_its_budget(
    kept: None, source: str, name: str, defines: tuple[tuple[str, int], ...], arch: str
) -> None:
    used = usage(kernels.compile_cubin(source, name, defines, arch))[name]
    assert over_budget(name, arch, used) == [], used


def test_a_budget_names_a_kernel_that_is_there() -> None:
    names = {name for _, name, _ in variants()}
    assert {key if isinstance(key, str) else key[0] for key in BUDGETS} <= names


def test_every_source_is_compiled() -> None:
    assert {path.relative_to(compiler.SOURCES).as_posix() for path in compiler.SOURCES.rglob("*.cu")} == {
        source for source, _, _ in variants()
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_figures_are_the_assemblers(tmp_path: Path, arch: str) -> None:
    from cuda.core import Program, ProgramOptions

    log = tmp_path / "log"
    with log.open("w") as file:
        options = ProgramOptions(arch=arch, std="c++17", ptxas_options="-v")
        cubin = Program(SPILLS + PLAIN, "c++", options).compile("cubin", logs=file).code
    text = log.read_text()
    found = usage(cubin)
    assert found.keys() == {"spills", "plain"}
    for name, used in found.items():
        told = text.partition(f"Compiling entry function '{name}'")[2]
        assert used.local_bytes == int(re.search(r"(\d+) bytes stack frame", told)[1])
        assert used.registers == int(re.search(r"Used (\d+) registers", told)[1])
    assert (found["spills"].local_bytes > 0, found["plain"].local_bytes) == (True, 0)
    assert (found["plain"].static_shared_bytes, found["spills"].static_shared_bytes) == (128, 0)
    (told,) = over_budget("spills", arch, found["spills"])
    assert told.endswith("bytes of local memory, more than 0")
    assert (found["plain"].param_bytes, found["spills"].param_bytes) == (24, 8)


def test_a_kernel_over_its_budget_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "f", Budget(64))
    monkeypatch.setitem(BUDGETS, ("f", "sm_90"), Budget(32, local_bytes=16))
    good = Usage(registers=64, local_bytes=0, static_shared_bytes=0, param_bytes=8)
    assert over_budget("f", "sm_80", good) == []
    assert over_budget("f", "sm_90", good) == ["64 registers, more than 32"]
    spills = good._replace(local_bytes=16)
    assert over_budget("f", "sm_80", spills) == ["16 bytes of local memory, more than 0"]
    assert over_budget("f", "sm_90", spills._replace(registers=32)) == []
    assert over_budget("other", "sm_80", good._replace(registers=255)) == []
    fixed = good._replace(static_shared_bytes=128)
    assert over_budget("f", "sm_80", fixed) == ["128 bytes of fixed shared memory, more than 0"]


def test_macros_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "plain.cu").write_text(PLAIN)
    assert usage(compiler.compile_cubin("plain.cu", "plain", (), "sm_90", tmp_path))["plain"].registers > 0


def test_what_nvrtc_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void wrong(int* x) { *x = SIZE + missing; }')
    with pytest.raises(kernels.KernelUnavailable, match=r'(?s)wrong\.cu for sm_90 .*identifier "missing" is undefined'):
        compiler.compile_cubin("wrong.cu", "wrong", (("SIZE", 3),), "sm_90", tmp_path)
    (tmp_path / "right.cu").write_text('extern "C" __global__ void right(int* x) { *x = SIZE; }')
    with pytest.raises(kernels.KernelUnavailable, match=r"for sm_1 with"):
        compiler.compile_cubin("right.cu", "right", (("SIZE", 3),), "sm_1", tmp_path)
    with pytest.raises(kernels.KernelUnavailable, match=r"`name` must be a kernel of right\.cu, but is 'left'"):
        compiler.compile_cubin("right.cu", "left", (("SIZE", 3),), "sm_90", tmp_path)
    with pytest.raises(kernels.KernelUnavailable, match=r"`source` must be a file .* but is 'none\.cu'"):
        compiler.compile_cubin("none.cu", "none", (), "sm_90", tmp_path)


@pytest.mark.parametrize("missing", ["cuda.core", "cuda.bindings"])
def test_a_missing_compiler_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "right.cu").write_text('extern "C" __global__ void right(int* x) { *x = 1; }')
    with pytest.raises(kernels.KernelUnavailable, match=r"cannot be imported .*megalodon-plugin\[cuda\]"):
        compiler.compile_cubin("right.cu", "right", (), "sm_90", tmp_path)
