"""Every kernel compiles within its budget of registers and without local memory (spills), as the assembler reports.

All variants are compiled for Hopper, and one variant of each kernel for the other architectures.
"""

import importlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from megalodon_plugin import kernels
from megalodon_plugin.kernels import compiler

MAIN_ARCHITECTURE, OTHER_ARCHITECTURES = "sm_90", ("sm_80", "sm_100")


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

MODULES = ("cema.cuda", "timestep_norm.cuda", "timestep_norm.slices_cuda")


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


class Usage(NamedTuple):
    """What a thread or a block of a kernel takes."""

    registers: int
    local_bytes: int
    static_shared_bytes: int


def usage(ptxas_log: str) -> dict[str, Usage]:
    """Kernel name -> what it takes, from what `ptxas -v` prints."""
    found = {}
    for part in ptxas_log.split("Compiling entry function ")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        local = re.search(r"(\d+) bytes stack frame", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers and local, part
        found[part.split("'")[1]] = Usage(int(registers[1]), int(local[1]), int(shared[1]) if shared else 0)
    return found


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


Variant = tuple[str, str, tuple[tuple[str, int], ...]]


def variants() -> list[Variant]:
    modules = (importlib.import_module(f"megalodon_plugin.ops.{name}") for name in MODULES)
    return sorted({variant for module in modules for variant in module.VARIANTS})


def compilations() -> list[tuple[str, Variant]]:
    """Architecture and variant: all for the main architecture, the first of each kernel for the others."""
    first = {name: (source, name, defines) for source, name, defines in reversed(variants())}
    others = [(arch, variant) for arch in OTHER_ARCHITECTURES for variant in first.values()]
    return [*((MAIN_ARCHITECTURE, variant) for variant in variants()), *others]


def label(value: str | Variant) -> str:
    return value if isinstance(value, str) else ",".join([value[1], *(f"{macro}={n}" for macro, n in value[2])])


@pytest.mark.parametrize(("arch", "variant"), compilations(), ids=label)
def test_a_kernel_stays_in_its_budget(arch: str, variant: Variant) -> None:
    source, name, defines = variant
    log = io.StringIO()
    compiler.compile_now(source, defines, arch, ptxas_log=log)
    used = usage(log.getvalue())[name]
    assert over_budget(name, arch, used) == [], used


def test_a_budget_names_a_kernel_that_is_there() -> None:
    names = {name for _, name, _ in variants()}
    assert {key if isinstance(key, str) else key[0] for key in BUDGETS} <= names


def test_every_source_is_compiled() -> None:
    assert {path.relative_to(compiler.SOURCES).as_posix() for path in compiler.SOURCES.rglob("*.cu")} == {
        source for source, _, _ in variants()
    }


@pytest.mark.parametrize("arch", [MAIN_ARCHITECTURE, *OTHER_ARCHITECTURES])
def test_the_assemblers_report_is_read(tmp_path: Path, arch: str) -> None:
    (tmp_path / "two.cu").write_text(SPILLS + PLAIN)
    log = io.StringIO()
    compiler.compile_now("two.cu", (), arch, tmp_path, log)
    found = usage(log.getvalue())
    assert found.keys() == {"spills", "plain"}
    assert (found["spills"].local_bytes > 0, found["plain"].local_bytes) == (True, 0)
    assert (found["plain"].static_shared_bytes, found["spills"].static_shared_bytes) == (128, 0)
    (told,) = over_budget("spills", arch, found["spills"])
    assert told.endswith("bytes of local memory, more than 0")


def test_a_kernel_over_its_budget_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "f", Budget(64))
    monkeypatch.setitem(BUDGETS, ("f", "sm_90"), Budget(32, local_bytes=16))
    good = Usage(registers=64, local_bytes=0, static_shared_bytes=0)
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
    assert compiler.compile_cubin("plain.cu", "plain", (), "sm_90", tmp_path)


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
