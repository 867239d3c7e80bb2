"""The package as a user gets it: built, installed into a new environment, and run from another folder."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from support.processes import HANG_S
from support.tiny_job import read_records, write_job

CHECKOUT = Path(__file__).parents[2]
# What a build needs of the checkout; it must not write into the checkout itself.
NOT_SOURCE = shutil.ignore_patterns(".*", "tests", "build", "dist", "outputs", "__pycache__", "*.egg-info")


def call(*words: str | Path, cwd: Path, **variables: str) -> str:
    """The output of a command that must succeed, in an environment that does not lead to the checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    result = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    source = shutil.copytree(CHECKOUT, folder / "source", ignore=NOT_SOURCE)
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    call(*pip_wheel, "--wheel-dir", folder / "dist", source, cwd=folder)
    (path,) = (folder / "dist").iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it. The dependencies are those of the running interpreter, behind it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    pip_install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    call(*pip_install, "--no-index", "--no-deps", wheel, cwd=folder)
    behind = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "dependencies.pth").write_text("\n".join(behind) + "\n")
    # NVRTC is looked for in the environment's own folders only.
    for nvidia in (path for path in (Path(path, "nvidia") for path in behind) if path.is_dir()):
        (site_packages / "nvidia").symlink_to(nvidia)
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("megalodon_plugin/")}
    modules = {path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "megalodon_plugin").rglob("*.py")}
    assert modules | {"megalodon_plugin/py.typed"} <= packed
    folder = CHECKOUT / "kernels"
    files = (path for path in folder.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))
    kernels = {path.relative_to(folder).as_posix() for path in files}
    assert {"__init__.py", "primitives.cuh"} <= kernels
    inside = "megalodon_plugin/kernels/"
    assert {name.removeprefix(inside) for name in packed if name.startswith(inside)} == kernels
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megalodon_plugin"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_one_that_runs(environment: Path, tmp_path: Path) -> None:
    program = "import json, megalodon_plugin as m, sys; print(json.dumps([m.__file__, m.__version__, sys.prefix]))"
    file, version, prefix = json.loads(call(environment / "bin" / "python", "-c", program, cwd=tmp_path))
    assert Path(file).is_relative_to(environment) and Path(prefix) == environment
    (metadata,) = environment.glob("lib/python*/site-packages/megalodon_plugin-*.dist-info")
    assert metadata.name == f"megalodon_plugin-{version}.dist-info"


def test_the_installed_package_compiles_a_kernel(environment: Path, tmp_path: Path) -> None:
    program = "\n".join(
        [
            "from pathlib import Path",
            "from megalodon_plugin import kernels",
            "from megalodon_plugin.kernels import compiler",
            "kernel = 'extern \"C\" __global__ void f(unsigned* p) { *p = pack_bf16(1, 2); }'",
            "text = '#include \"primitives.cuh\"\\n' + kernel",
            "(compiler.SOURCES / 'f.cu').write_text(text)",
            "print(kernels.__file__, len(kernels.compile_cubin('f.cu', 'f', (), 'sm_90')))",
        ]
    )
    cache = {"MEGALODON_KERNEL_CACHE": str(tmp_path / "cache")}
    file, size = call(environment / "bin" / "python", "-c", program, cwd=tmp_path, **cache).split()
    assert Path(file).is_relative_to(environment) and int(size) > 0


def test_the_console_command_trains(environment: Path, tmp_path: Path) -> None:
    config = write_job(tmp_path, job={"dump_folder": "run"}, training={"steps": 2})
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    log = call(environment / "bin" / "megalodon", "train", config, "--training.seq_len", "32", cwd=cwd)
    assert "Training completed" in log and "sequence length 32" in log
    # A relative dump folder lies where the command was called.
    assert [record["step"] for record in read_records(cwd / "run")] == [1, 2]
    assert (cwd / "run" / "checkpoint" / "step-2" / ".metadata").is_file()
