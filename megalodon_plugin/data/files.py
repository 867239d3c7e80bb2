"""Which files hold the text, the units they are cut into, and the split of these into training and validation.

A *unit* is what is shuffled and held out as one: a file, or a byte range of a large file. Units follow from file
sizes alone, so that a corpus of any size starts at once; where a range really begins is found when it is read
(`reader`).
"""

import functools
import glob
import itertools
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .fingerprint import hash_of

TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
PYTHON_STDLIB = "python_stdlib"

MIB = 2**20
LARGEST_RANGE = 4 * MIB
RANGES_OF_A_CORPUS = 64
BYTES_PER_ROW_TOKEN = 16

# Test data, code of others, and what a build wrote about its own machine.
NOT_STDLIB = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
NOT_STDLIB_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file: `path` opens it; `name`, relative to the folder that was asked for, identifies it on every machine."""

    path: str
    name: str
    size: int

    @property
    def compressed(self) -> bool:
        return self.name.lower().endswith(".gz")

    @property
    def json_lines(self) -> bool:
        return self.name.lower().removesuffix(".gz").endswith(".jsonl")


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes [start, end) of `file`, moved to line boundaries when read."""

    file: TextFile
    start: int
    end: int

    @property
    def identity(self) -> str:
        """The file's name, and the range when it is not the whole file."""
        whole = self.start == 0 and self.end == self.file.size
        return self.file.name if whole else f"{self.file.name}[{self.start}:{self.end}]"

    @property
    def n_bytes(self) -> int:
        return self.end - self.start


def find_text_files(dataset_path: str, key: str = "training.dataset_path") -> list[TextFile]:
    """Text files under `dataset_path`: a file, a folder, a glob (`**` allowed), or several of these between commas.

    Files are sorted by path within each of the several. Raises ValueError, which names `key`, when something does not
    exist, is no text file, or when there is no text at all.
    """
    # A path that exists is taken as it stands, whatever commas and brackets its name has.
    parts = [dataset_path] if os.path.exists(dataset_path) else [part.strip() for part in dataset_path.split(",")]
    files: dict[str, TextFile] = {}
    for index, part in enumerate(parts):
        found = _files_of(part, f'`{key}` must name files, folders or globs, but is "{dataset_path}"')
        if not found:
            raise ValueError(
                f'`{key}` must name files {", ".join(TEXT_SUFFIXES)} or these with .gz, but "{part}" has none'
            )
        for path, name in found:
            # Two folders may hold files of one name: their place in the list tells them apart.
            name = name if len(parts) == 1 else f"{index}:{name}"
            files.setdefault(os.path.realpath(path), TextFile(path, name, os.path.getsize(path)))
    _check_holds_text(list(files.values()), f'`{key}` = "{dataset_path}"')
    return list(files.values())


def find_python_stdlib() -> list[TextFile]:
    """Python sources of the running interpreter's standard library, without tests: text that is on every machine."""
    return list(_stdlib_under(sysconfig.get_paths()["stdlib"]))


@functools.cache  # both sides of a split ask, and every file is read to see that it is UTF-8
def _stdlib_under(root: str) -> tuple[TextFile, ...]:
    files = []
    for path, name in _walk(root):
        steps = PurePosixPath(name).parts
        if NOT_STDLIB.intersection(steps) or any(step.startswith(NOT_STDLIB_PREFIXES) for step in steps):
            continue
        if name.endswith(".py") and _is_utf8(path):
            files.append(TextFile(path, name, os.path.getsize(path)))
    _check_holds_text(files, f"the standard library in {root}")
    return tuple(files)


def _files_of(part: str, rule: str) -> list[tuple[str, str]]:
    """(path, name) of each text file under one path or glob."""
    if os.path.isdir(part):
        return [(path, name) for path, name in _walk(part) if _is_text_name(name)]
    if os.path.isfile(part):
        return [(part, os.path.basename(part))] if _is_text_name(part) else []
    if not glob.has_magic(part):
        raise ValueError(f'{rule}: "{part}" does not exist')
    paths = [path for path in glob.glob(part, recursive=True) if os.path.isfile(path) and _is_text_name(path)]
    # Names are relative to the deepest folder that the glob names in full.
    steps = Path(part).parts
    fixed = next(index for index, step in enumerate(steps) if glob.has_magic(step))
    root = Path(*steps[:fixed])
    return sorted(((path, Path(path).relative_to(root).as_posix()) for path in paths), key=lambda found: found[1])


def _walk(root: str) -> list[tuple[str, str]]:
    """(path, name relative to `root`) of all files but hidden ones, sorted by name. Follows links, but no cycles."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__pycache__")
        for file in files:
            path = os.path.join(folder, file)
            if not file.startswith(".") and os.path.isfile(path):
                found.append((path, Path(path).relative_to(root).as_posix()))
    return sorted(found, key=lambda pair: pair[1])


def _is_text_name(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(TEXT_SUFFIXES)


def _is_utf8(path: str) -> bool:
    try:
        Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check_holds_text(files: list[TextFile], what: str) -> None:
    if not any(file.size for file in files):
        raise ValueError(f"{what} must hold some text, but holds no text: {len(files)} files, all of them empty")


def range_bytes_of(files: list[TextFile], seq_len: int) -> int:
    """Size above which a file is cut: a 64th of the corpus, at most 4 MiB, but 16 bytes for each token of a row."""
    total = sum(file.size for file in files)
    smallest = BYTES_PER_ROW_TOKEN * seq_len
    return max(smallest, min(total // RANGES_OF_A_CORPUS, LARGEST_RANGE))


def cut_into_units(files: list[TextFile], range_bytes: int) -> list[Unit]:
    """Units of `files`, in their order: even ranges of at most `range_bytes`; .gz files stay whole."""
    units = []
    for file in files:
        if file.size == 0:
            continue
        n_ranges = 1 if file.compressed else -(-file.size // range_bytes)
        edges = [file.size * i // n_ranges for i in range(n_ranges + 1)]
        units += [Unit(file, start, end) for start, end in itertools.pairwise(edges)]
    return units


def split_units(units: list[Unit], validation_fraction: float, seed: int) -> tuple[list[Unit], list[Unit]]:
    """(training, validation) units: a hash of seed and identity below the fraction holds a unit out.

    Each side gets at least one unit when there are two or more, and a fraction above 0.
    """

    def draw(unit: Unit) -> float:
        return int.from_bytes(hash_of("split", seed, unit.identity)[:8], "big") / 2**64

    if validation_fraction == 0 or len(units) < 2:
        return units, []
    draws = [draw(unit) for unit in units]
    held_out = [value < validation_fraction for value in draws]
    if not any(held_out):
        held_out[draws.index(min(draws))] = True
    if all(held_out):
        held_out[draws.index(max(draws))] = False
    training = [unit for unit, out in zip(units, held_out, strict=True) if not out]
    return training, [unit for unit, out in zip(units, held_out, strict=True) if out]
