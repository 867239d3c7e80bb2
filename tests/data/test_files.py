"""Text files: how they are found, cut into units without loss, split, and read as documents."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from megalodon_plugin.data import reader
from megalodon_plugin.data.files import (
    TextFile,
    Unit,
    cut_into_units,
    find_python_stdlib,
    find_text_files,
    range_bytes_of,
    split_units,
)
from megalodon_plugin.data.reader import TextReader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.py", "sub/deep/d.jsonl", ".hidden.txt", ".git/e.txt", "__pycache__/f.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "x"}\n')
    (tmp_path / "image.png").write_bytes(b"no text")
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"zipped\n"))
    return tmp_path


def names(files: list[TextFile]) -> list[str]:
    return [file.name for file in files]


def whole(path: Path) -> Unit:
    file = find_text_files(str(path))[0]
    return Unit(file, 0, file.size)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_folder_is_searched_in_sorted_order_without_hidden_files(folder: Path) -> None:
    assert names(find_text_files(str(folder))) == ["a.md", "b.txt", "g.txt.gz", "sub/c.py", "sub/deep/d.jsonl"]


def test_globs_name_files_relative_to_their_fixed_part(folder: Path) -> None:
    assert names(find_text_files(f"{folder}/*.txt*")) == ["b.txt", "g.txt.gz"]
    assert names(find_text_files(f"{folder}/sub/**/*")) == ["c.py", "deep/d.jsonl"]


def test_several_paths_between_commas_count_each_file_once(folder: Path) -> None:
    files = find_text_files(f"{folder}/b.txt, {folder}/sub,{folder}/*.txt")
    assert names(files) == ["0:b.txt", "1:c.py", "1:deep/d.jsonl"]


def test_a_name_with_a_comma_and_brackets_is_taken_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a,[b].txt").write_text("x")
    assert names(find_text_files(str(tmp_path / "a,[b].txt"))) == ["a,[b].txt"]


def test_linked_folders_are_followed_but_cycles_are_not(tmp_path: Path) -> None:
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "real" / "a.txt").write_text("x")
    (tmp_path / "elsewhere" / "b.txt").write_text("x")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "real" / "cycle").symlink_to(tmp_path / "data")
    assert names(find_text_files(str(tmp_path / "data"))) == ["link/b.txt", "real/a.txt"]


def test_paths_without_text_are_reported_by_key_rule_and_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`validation.dataset_path` must .* does not exist"):
        find_text_files(str(tmp_path / "nowhere"), "validation.dataset_path")
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"`training.dataset_path` must name files \.txt, .* has none"):
        find_text_files(str(tmp_path))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="holds no text: 1 files, all of them empty"):
        find_text_files(str(tmp_path))


def test_the_standard_library_is_python_without_tests() -> None:
    found = names(find_python_stdlib())
    assert found == sorted(found) and len(found) > 100
    assert "json/decoder.py" in found and all(name.endswith(".py") for name in found)
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "__pycache__"}


@pytest.mark.parametrize(
    ("total", "seq_len", "expected"),
    [(1000, 8, 128), (64 * 1000, 8, 1000), (2**40, 8, 2**22), (2**40, 2**21, 2**25)],
)
def test_range_size_adapts_to_the_corpus(total: int, seq_len: int, expected: int) -> None:
    assert range_bytes_of([TextFile("a", "a", total)], seq_len) == expected


def test_cutting_reads_nothing_and_leaves_gz_whole() -> None:
    files = [TextFile("/nowhere/a.txt", "a.txt", 2**50 // 2**10), TextFile("/nowhere/b.gz", "b.txt.gz", 2**40)]
    units = cut_into_units(files, 2**28)
    assert len(units) == 2**12 + 1
    assert [unit.start for unit in units[1:-1]] == [unit.end for unit in units[:-2]]
    assert units[-1].identity == "b.txt.gz" and units[0].identity == f"a.txt[0:{2**28}]"


CONTENTS: dict[str, Callable[[], str]] = {
    "short lines": lambda: "".join(f"line {n} é\n" for n in range(3000)),
    "no newline": lambda: "文字é" * 4000,
    "long lines": lambda: "".join("x" * (n * 37 % 900) + "\n" for n in range(100)),
    "no last newline": lambda: "one\ntwo\n" * 500 + "end",
    "blank lines": lambda: "\n" * 5000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("range_bytes", [16, 101, 1000, 10**6])
def test_ranges_hold_each_byte_once(tmp_path: Path, content: str, range_bytes: int) -> None:
    text = CONTENTS[content]()
    (tmp_path / "a.txt").write_bytes(text.encode())
    units = cut_into_units(find_text_files(str(tmp_path)), range_bytes)
    documents = [list(TextReader(range_bytes).documents(unit)) for unit in units]
    assert all(len(own) <= 1 for own in documents)
    ranges = [own[0] for own in documents if own]
    assert "".join(ranges) == text  # no character is cut either, or it would come back as U+FFFD
    if content == "short lines" and range_bytes > 100:
        assert all(text.endswith("\n") for text in ranges)
    assert all(len(text.encode()) <= 1.5 * range_bytes + 4 for text in ranges)


def test_a_large_file_is_read_in_bounded_ranges(tmp_path: Path) -> None:
    size = 2**36
    with open(tmp_path / "holes.txt", "wb") as stream:  # 64 GiB of holes take no room
        stream.write(b"first line\n")
        stream.seek(size // 2)
        stream.write(b"\nmiddle line\n")
        stream.truncate(size)
    units = cut_into_units(find_text_files(str(tmp_path)), 2**20)
    assert len(units) == 2**16
    middle = [unit for unit in units if unit.start <= size // 2 < unit.end]
    (document,) = TextReader(2**20).documents(middle[0])
    assert len(document) < 2 * 2**20 and "middle line" in document


@pytest.mark.parametrize("range_bytes", [16, 100, 1000, 10**6])
def test_jsonl_ranges_hold_each_line_once(tmp_path: Path, range_bytes: int) -> None:
    texts = [f"document {n} " + "y" * (n % 50) for n in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    units = cut_into_units(find_text_files(str(path)), range_bytes)
    read = [text for unit in units for text in TextReader(range_bytes).documents(unit)]
    assert read == texts


def test_jsonl_lines_are_shuffled_by_the_seed_alone(tmp_path: Path) -> None:
    texts = [str(n) for n in range(1, 50)]
    unit = whole(write_jsonl(tmp_path / "a.jsonl", texts))
    reader = TextReader(10**6)
    once, again, other = (list(reader.documents(unit, seed)) for seed in ("s", "s", "t"))
    assert once == again != other
    assert sorted(once) == sorted(other) == sorted(texts) and once != texts


def test_gz_text_is_streamed_in_ranges_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"zeile {n} ü\n" for n in range(2000)) + "ü" * 700
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    ranges = list(TextReader(301).documents(whole(tmp_path / "a.txt.gz")))
    assert "".join(ranges) == text
    assert max(len(text.encode()) for text in ranges) <= 301
    assert all(text.endswith("\n") for text in ranges[:80])


def test_large_gz_is_read_from_the_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "SMALL_GZIP", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n\n{"text": "two"}\n'))
    assert list(TextReader(100).documents(whole(tmp_path / "a.jsonl.gz"))) == ["one", "two"]


@pytest.mark.parametrize("damage", ["truncated", "no gzip", "bit flipped"])
def test_broken_gz_is_reported_by_file(tmp_path: Path, damage: str) -> None:
    content = bytearray(gzip.compress(b"some text\n" * 1000))
    if damage == "truncated":
        del content[-10:]
    elif damage == "no gzip":
        content[:2] = b"no"
    else:
        content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt\.gz must be a complete \.gz file"):
        list(TextReader(10**6).documents(whole(tmp_path / "a.txt.gz")))


def test_byte_order_mark_and_broken_utf8_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xffc")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "d\xff"}\n{"text": "half \\ud83d pair"}\n')
    assert list(TextReader(100).documents(whole(tmp_path / "a.txt"))) == ["ab\ufffdc"]
    assert list(TextReader(100).documents(whole(tmp_path / "b.jsonl"))) == ["d\ufffd", "half \ufffd pair"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object, but is a list"),
        ('{"body": "x"}', r"must have the field \"text\" .* but has \['body'\]"),
        ('{"text": 3}', 'field "text" must be a string, but is a int'),
    ],
)
@pytest.mark.parametrize("range_bytes", [16, 64, 10**6])
@pytest.mark.parametrize("shuffle_seed", [None, "s"])
def test_broken_lines_are_reported_by_file_and_line(
    tmp_path: Path, line: str, message: str, range_bytes: int, shuffle_seed: str | None
) -> None:
    good = '{"text": "good"}'
    (tmp_path / "a.jsonl").write_text("\n".join([good] * 20 + [""] + [line] + [good] * 20))
    units = cut_into_units(find_text_files(str(tmp_path)), range_bytes)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 22: .*{message}.*data\.broken_lines"):
        for unit in units:
            list(TextReader(range_bytes).documents(unit, shuffle_seed))


def test_skipped_lines_are_counted_in_one_warning_per_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{\n[]\n{"text": "two"}\n')
    unit = whole(tmp_path / "a.jsonl")
    reader = TextReader(1000, broken_lines="skip")
    with caplog.at_level(logging.WARNING):
        assert list(reader.documents(unit)) == list(reader.documents(unit)) == ["one", "two"]
    assert [record.getMessage() for record in caplog.records] == [f"{unit.file.path}: 2 broken lines skipped"]


def test_broken_lines_option_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`data\.broken_lines` must be one of .* but is \"ignore\""):
        TextReader(10, broken_lines="ignore")


def test_text_field_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n{"body": ""}\n')
    assert list(TextReader(100, text_field="body").documents(whole(tmp_path / "a.jsonl"))) == ["yes"]


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_split_is_disjoint_covers_and_leaves_no_side_empty(fraction: float) -> None:
    units = [Unit(TextFile(f"/x/{n}", f"{n}.txt", 10), 0, 10) for n in range(400)]
    training, validation = split_units(units, fraction, seed=1)
    assert training and validation and not set(training) & set(validation)
    assert sorted([*training, *validation], key=units.index) == units
    assert abs(len(validation) / 400 - fraction) < 0.07


def test_split_depends_on_seed_and_names_not_on_paths() -> None:
    def held_out(root: str, seed: int) -> list[str]:
        units = [Unit(TextFile(f"{root}/{n}", f"{n}.txt", 10), 0, 10) for n in range(100)]
        return [unit.identity for unit in split_units(units, 0.3, seed)[1]]

    assert held_out("/x", 1) == held_out("/y", 1) != held_out("/x", 2)
