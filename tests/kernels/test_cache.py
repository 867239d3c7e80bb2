"""Compiled kernels on disk: kept, keyed by all that decides them, never trusted unchecked, safe for many processes."""

import os
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

from megalodon_plugin.kernels import cache, compiler

from support.ranks import run_on_ranks

KEY = "ab" * 32
SOURCE = """#include "one.cuh"
extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= factor() * TIMES; }
extern "C" __global__ void shift(float* x) { x[threadIdx.x] += factor() * TIMES; }
"""
HEADERS = {
    "one.cuh": '#pragma once\n#include "two.cuh"\n',
    "two.cuh": '#pragma once\n#include "one.cuh"\n__device__ float factor() { return 3; }\n',
}


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the entries."""
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(tmp_path / "entries"))
    monkeypatch.setattr(cache, "_told", False)
    return tmp_path / "entries"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, text in {"scale.cu": SOURCE, **HEADERS}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What NVRTC was asked for: one item for each time."""
    calls = []
    compile_now = compiler.compile_now
    monkeypatch.setattr(compiler, "compile_now", lambda *what: calls.append(what) or compile_now(*what))
    return calls


def scale(folder: Path, *, name: str = "scale", times: int = 2, arch: str = "sm_90") -> bytes:
    return compiler.compile_cubin("scale.cu", name, (("TIMES", times),), arch, folder)


def entry_of(folder: Path) -> Path:
    (path,) = (path for path in folder.iterdir() if path.suffix == "")
    return path


def test_the_second_call_does_not_compile(sources: Path, entries: Path, compiled: list) -> None:
    first = scale(sources)
    assert scale(sources) == scale(sources, name="shift") == first
    assert len(compiled) == 1
    assert entry_of(entries).stat().st_size > len(first)


def test_the_key_knows_all_that_decides_the_code(
    sources: Path, compiled: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale(sources)
    scale(sources, times=3)
    scale(sources, arch="sm_80")
    assert len(compiled) == 3
    for name in ("two.cuh", "one.cuh", "scale.cu"):
        path = sources / name
        path.write_text(path.read_text() + "// changed\n")
        before = len(compiled)
        scale(sources)
        assert len(compiled) == before + 1, name
    monkeypatch.setattr(compiler, "OPTIONS", compiler.OPTIONS | {"lineinfo": False})
    scale(sources)
    assert len(compiled) == 7
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "99.9")
    scale(sources)
    assert len(compiled) == 8
    scale(sources)
    assert len(compiled) == 8


def test_a_header_beside_that_is_not_included_does_not_count(sources: Path, compiled: list) -> None:
    scale(sources)
    (sources / "three.cuh").write_text("// another\n")
    scale(sources)
    assert len(compiled) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[:-1],
        lambda entry: entry[:40],
        lambda entry: b"",
        lambda entry: entry[:-20] + bytes([entry[-20] ^ 1]) + entry[-19:],
        lambda entry: entry + b"\0",
        lambda entry: entry[len(cache._header(KEY, b"")) :],  # the bare machine code
        lambda entry: b"something else of this length" * (len(entry) // 29),
    ],
    ids=["cut short", "header cut short", "empty", "one bit", "longer", "no header", "another format"],
)
def test_a_broken_entry_is_made_again(entries: Path, damage) -> None:
    assert cache.get_or_make(KEY, lambda: b"code" * 100) == b"code" * 100
    path = entry_of(entries)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert cache.get_or_make(KEY, lambda: b"code" * 100) == b"code" * 100
    assert path.read_bytes() == good


def test_an_entry_under_another_name_is_not_trusted(entries: Path) -> None:
    cache.get_or_make(KEY, lambda: b"one")
    other = "cd" * 32
    (entries / other).write_bytes((entries / KEY).read_bytes())
    assert cache.get_or_make(other, lambda: b"two") == b"two"
    assert cache.get_or_make(other, pytest.fail) == b"two"


def test_what_fails_leaves_nothing(entries: Path) -> None:
    def fail() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get_or_make(KEY, fail)
    assert [path.name for path in entries.iterdir()] == [f"{KEY}.lock"]
    assert cache.get_or_make(KEY, lambda: b"code") == b"code"


def _make_while_the_others_ask(log: str) -> bytes:
    """The entry. Making it ends when every other rank has been refused the lock, or makes it too."""
    import fcntl

    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    flock = fcntl.flock

    def tell_of_refusal(*arguments: int) -> None:
        try:
            flock(*arguments)
        except BlockingIOError:
            store.set(f"asked {rank}", "")
            raise

    def make() -> bytes:
        with open(log, "a") as file:
            file.write("made\n")
        store.set(f"asked {rank}", "")
        store.wait([f"asked {other}" for other in range(dist.get_world_size())])
        return b"code" * 1000

    fcntl.flock = tell_of_refusal  # in this process, which ends with the test
    return cache.get_or_make(KEY, make)


def test_of_many_processes_one_makes_the_entry(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    log = tmp_path / "log"
    assert set(run_on_ranks(4, _make_while_the_others_ask, str(log))) == {b"code" * 1000}
    assert log.read_text() == "made\n"


def test_a_stuck_process_does_not_stop_the_others(entries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    entries.mkdir()
    monkeypatch.setattr(cache, "LONGEST_WAIT_S", 0.1)
    with open(entries / f"{KEY}.lock", "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cache.get_or_make(KEY, lambda: b"code") == b"code"
    assert cache.get_or_make(KEY, pytest.fail) == b"code"


def test_a_folder_that_cannot_be_made_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", str(tmp_path / "file" / "entries"))
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*MEGALODON_KERNEL_CACHE can name another"):
        assert cache.get_or_make(KEY, lambda: b"code") == b"code"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get_or_make(KEY, lambda: b"again") == b"again"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write into any folder")
def test_a_read_only_folder_is_read(entries: Path) -> None:
    cache.get_or_make(KEY, lambda: b"code")
    entries.chmod(0o500)
    try:
        assert cache.get_or_make(KEY, pytest.fail) == b"code"
        with pytest.warns(RuntimeWarning, match="cannot be kept"):
            assert cache.get_or_make("cd" * 32, lambda: b"other") == b"other"
    finally:
        entries.chmod(0o700)


def test_a_full_disk_makes_once(entries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    made = []
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert cache.get_or_make(KEY, lambda: made.append(1) or b"code") == b"code"
    assert made == [1]
    assert [path.name for path in entries.iterdir()] == [f"{KEY}.lock"]


def test_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", "here")
    assert cache.folder() == Path("here")
    monkeypatch.setenv("MEGALODON_KERNEL_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert cache.folder() == Path("caches/megalodon/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "home-of-one")
    assert cache.folder() == Path("home-of-one/.cache/megalodon/kernels")
