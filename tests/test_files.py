"""The writer of whole files: what a failed or killed write leaves, and what importing it costs."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from megalodon_plugin.files import (
    new_figure,
    read_tensors,
    whole_file,
    whole_folder,
    write_figure,
    write_json,
    write_tensors,
    write_text,
)

TENSORS = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.tensor([True])}
WRITERS = {
    "text": lambda path: write_text("new", path),
    "json": lambda path: write_json({"new": 1}, path),
    "tensors": lambda path: write_tensors(TENSORS, path),
    "figure": lambda path: write_figure(new_figure(2, 1), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path, kind):
    path = tmp_path / "file.x"
    path.write_text("old")
    (tmp_path / "file.x.unfinished").write_text("what a killed write left")
    WRITERS[kind](path)
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=["failed", "interrupted"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_at_its_end_leaves_the_old_file_alone(tmp_path, monkeypatch, kind, error):
    def fail(descriptor):
        raise error

    path = tmp_path / "file.x"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(type(error)):
        WRITERS[kind](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_in_the_middle_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file_and_the_next_write_clears_its_rest(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    killed = (
        "import os, signal, sys\nfrom megalodon_plugin.files import whole_file\n"
        "with whole_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", killed, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text("new", path)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole(tmp_path):
    folder, rest = tmp_path / "a" / "folder", tmp_path / "a" / "folder.unfinished"
    rest.mkdir(parents=True)
    (rest / "old").write_text("what a killed write left")
    with whole_folder(folder) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not folder.exists()
    assert [path.relative_to(folder).as_posix() for path in folder.rglob("*")] == ["sub", "sub/file"]
    assert not rest.exists()


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def write():
        with whole_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("x")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write()
    assert not list(tmp_path.iterdir())


def test_json_may_be_asked_to_refuse_what_is_no_json(tmp_path):
    write_json([1.0, float("nan")], tmp_path / "a.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json([float("inf")], tmp_path / "a.json", allow_nan=False)
    assert str(json.loads((tmp_path / "a.json").read_text())) == "[1.0, nan]"


def test_tensors_and_metadata_come_back(tmp_path):
    strided = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    write_tensors(TENSORS | {"strided": strided}, tmp_path / "t", {"mark": "m"})
    tensors, metadata = read_tensors(tmp_path / "t")
    assert metadata == {"mark": "m"}
    assert tensors.keys() == {"x", "y", "strided"}
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert torch.equal(tensors["strided"], strided)


def test_what_is_no_whole_safetensors_file_is_refused(tmp_path):
    write_tensors(TENSORS, tmp_path / "t")
    (tmp_path / "half").write_bytes((tmp_path / "t").read_bytes()[:-3])
    with pytest.raises(ValueError, match="half must be a whole safetensors file, but: "):
        read_tensors(tmp_path / "half")
    with pytest.raises(ValueError, match=r"the file must exist, but .*none does not"):
        read_tensors(tmp_path / "none")


def test_a_figure_needs_no_display(tmp_path):
    figure = new_figure(2, 1)
    figure.subplots().plot([1, 2])
    write_figure(figure, tmp_path / "a.png", dpi=50)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_importing_it_imports_neither_torch_nor_matplotlib():
    code = "import sys, megalodon_plugin.files; sys.exit(bool({'torch', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
