"""What holds for every source: its length, no path of a machine, CUDA sources that need no header but ours."""

import re

from architecture.sources import CUDA, KERNELS, ROOT, SOURCES, TESTS, label

MOST_LINES = 400
MACHINE_PATH = re.compile(r"""["'`\s(=](/(?:home|Users|work|mnt|root|opt|scratch|data)/\w)""")


def test_no_file_is_too_long():
    lengths = {label(path): len(path.read_text().splitlines()) for path in [*SOURCES, *TESTS, *CUDA]}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def test_no_path_of_a_machine():
    configs = (ROOT / "train_configs").glob("*.toml")
    found = {label(path): MACHINE_PATH.findall(path.read_text()) for path in [*SOURCES, *TESTS, *CUDA, *configs]}
    assert not {name: paths for name, paths in found.items() if paths}


def test_the_pattern_for_paths_of_a_machine():
    root = "/"
    assert MACHINE_PATH.search(f'open("{root}home/someone/x")')
    assert not MACHINE_PATH.search("a/data/b and https://host/data/x, D/G, /dev/null, d mu/data")


def test_kernels_include_nothing_but_each_other():
    """No CUDA header: the compiler that users have comes without them."""
    headers = {f'"{path.relative_to(KERNELS)}"' for path in CUDA if path.suffix == ".cuh"}
    included = {
        label(path): set(re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE)) for path in CUDA
    }
    assert not {name: wrong for name, names in included.items() if (wrong := names - headers)}
