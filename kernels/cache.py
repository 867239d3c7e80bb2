"""Compiled kernels on disk: in the folder that MEGALODON_KERNEL_CACHE names, else with the user's other caches.

An entry is a file named by the hash of everything that decides its content, and holds that hash, a checksum and the
content. One that does not agree with its name and checksum (cut short, damaged, copied from another) is replaced.
Entries are written to a file of their own and renamed, so that a reader never sees half of one. Of many processes that
want the same entry one makes it while the others wait, but none waits for long, and a folder that cannot be written
costs time, never the run.

cuda.core 1.2's FileStreamProgramCache was tried instead. It returns an entry that was cut short as if it were whole,
lets every process compile what one is compiling already, and needs cuda.core (0.3 s of imports) to find an entry.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

MAGIC = b"megalodon kernel 1\n"
# Several times what the slowest kernel takes to compile: after that the other process is taken to be stuck.
LONGEST_WAIT_S = 120.0

_told = False


def folder() -> Path:
    """Where the entries are: MEGALODON_KERNEL_CACHE, else `megalodon/kernels` in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("MEGALODON_KERNEL_CACHE")
    if named:
        return Path(named)
    # A home that cannot be found (a user id without a name) is left as "~", a folder beside the run.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "megalodon" / "kernels"


def get_or_make(key: str, make: Callable[[], bytes]) -> bytes:
    """The entry `key` (64 hexadecimal digits), from `make` if there is none that can be trusted."""
    path = folder() / key
    content = _read(path)
    if content is not None:
        return content
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            content = _read(path)  # another process may have made it meanwhile
            if content is None:
                content = make()
                _write(path, content)
    except OSError as error:
        _tell(path.parent, error)
        if content is None:
            content = make()
    return content


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    header = len(_header(path.name, b""))
    content = entry[header:]
    return content if entry[:header] == _header(path.name, content) else None


def _write(path: Path, content: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with open(descriptor, "wb") as file:
            file.write(_header(path.name, content) + content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _header(key: str, content: bytes) -> bytes:
    return MAGIC + f"{key} {hashlib.sha256(content).hexdigest()}\n".encode()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an entry's lock, which the system frees with the process; goes on without it where it cannot be had."""
    with open(path, "ab") as file:
        _try_to_lock(file.fileno())
        yield


def _try_to_lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    give_up = time.monotonic() + LONGEST_WAIT_S
    while time.monotonic() < give_up:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:  # a file system without locks
            return


def _tell(where: Path, error: OSError) -> None:
    global _told
    if not _told:
        _told = True
        warnings.warn(
            f"Compiled kernels cannot be kept in {where} ({error}), so every process compiles them again; "
            "MEGALODON_KERNEL_CACHE can name another folder",
            RuntimeWarning,
            stacklevel=3,
        )
