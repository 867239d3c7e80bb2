"""Reads the documents of a unit, streamed: text between line boundaries, or one document for each line of JSON."""

import contextlib
import gzip
import io
import json
import logging
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, cast

from .files import TextFile, Unit
from .fingerprint import hash_of

logger = logging.getLogger(__name__)

BROKEN_LINES = ("error", "skip")
SCAN_BLOCK = 64 * 1024
# A .gz file up to this size is read at once, so that many readers side by side do not run out of file handles.
SMALL_GZIP = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class TextReader:
    """Documents of a unit, streamed. `text_field` and `broken_lines` ("error" | "skip") are for .jsonl."""

    range_bytes: int
    text_field: str = "text"
    broken_lines: str = "error"
    _warned: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.broken_lines not in BROKEN_LINES:
            raise ValueError(f'`data.broken_lines` must be one of {BROKEN_LINES}, but is "{self.broken_lines}"')

    def documents(self, unit: Unit, shuffle_seed: object = None) -> Iterator[str]:
        """Yield the unit's documents, none of them empty.

        Of a text file: the unit as a whole, or, of .gz, ranges of at most `range_bytes` that end at lines. Of a .jsonl
        file: each line's `text_field`; in an order drawn from `shuffle_seed`, if given and the file is not compressed.
        Bytes that are no UTF-8 become U+FFFD. Raises ValueError for a broken line, with file and line number, unless
        broken lines are skipped (one warning per file), and for a broken .gz file.
        """
        if unit.file.json_lines:
            yield from self._json_documents(unit, shuffle_seed)
        else:
            for content in self._text_ranges(unit):
                text = content.decode("utf-8", errors="replace")
                if text:
                    yield text

    def _text_ranges(self, unit: Unit) -> Iterator[bytes]:
        with _opened(unit.file) as stream:
            if not unit.file.compressed:
                start, end = (self._text_edge(stream, unit.file, edge) for edge in (unit.start, unit.end))
                stream.seek(start)
                content = stream.read(end - start)
                yield content.removeprefix(BYTE_ORDER_MARK) if start == 0 else content
                return
            rest = stream.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
            while block := stream.read(self.range_bytes - len(rest)):
                rest += block
                if len(rest) == self.range_bytes:
                    cut = rest.rfind(b"\n") + 1 or _last_character(rest)
                    yield rest[:cut]
                    rest = rest[cut:]
            yield rest

    def _text_edge(self, stream: IO[bytes], file: TextFile, edge: int) -> int:
        """Where a range that would start or end at `edge` does: at a line or, within a long one, at a character."""
        if edge in (0, file.size):
            return edge
        # Ranges are at least half of `range_bytes` long: a search no longer than that never runs into the next edge.
        found = _first_line(stream, edge, edge + self.range_bytes // 2)
        if found is not None:
            return found
        stream.seek(edge)
        continuation = [byte & 0xC0 == 0x80 for byte in stream.read(4)]
        return edge + (continuation.index(False) if False in continuation else 0)

    def _json_documents(self, unit: Unit, shuffle_seed: object) -> Iterator[str]:
        broken = 0
        # Plain units fit in memory; their lines are held so that the file is open only while it is read.
        lines: Iterator[tuple[int, bytes]] | list[tuple[int, bytes]] = _numbered_lines(unit)
        if not unit.file.compressed:
            lines = list(lines)
            if shuffle_seed is not None:
                Random(hash_of("lines", shuffle_seed)).shuffle(lines)
        for number, line in lines:
            if not line.strip():
                continue
            try:
                text = self._text_of(line)
            except ValueError as error:
                if self.broken_lines == "error":
                    number += _lines_before(unit)
                    raise ValueError(
                        f"{unit.file.path}, line {number}: {error} "
                        '(`data.broken_lines` = "skip" leaves out lines like this)'
                    ) from error
                broken += 1
                continue
            if text:
                yield text
        if broken and unit.file.name not in self._warned:
            self._warned.add(unit.file.name)
            part = "" if unit.identity == unit.file.name else f" in bytes {unit.start} to {unit.end}; others may follow"
            logger.warning(f"{unit.file.path}: {broken} broken lines skipped{part}")

    def _text_of(self, line: bytes) -> str:
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"must be JSON, but: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"must be a JSON object, but is a {type(record).__name__}")
        if self.text_field not in record:
            raise ValueError(f'must have the field "{self.text_field}" (`data.text_field`), but has {list(record)}')
        text = record[self.text_field]
        if not isinstance(text, str):
            raise ValueError(f'field "{self.text_field}" must be a string, but is a {type(text).__name__}')
        # JSON can spell half a surrogate pair, which is no character and cannot be encoded.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not text.isascii() else text


@contextlib.contextmanager
def _opened(file: TextFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; ValueError when they cannot be."""
    if not file.compressed:
        with open(file.path, "rb") as stream:
            yield stream
        return
    try:
        with contextlib.ExitStack() as stack:
            small = file.size <= SMALL_GZIP
            raw = io.BytesIO(Path(file.path).read_bytes()) if small else stack.enter_context(open(file.path, "rb"))
            yield cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw)))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file.path} must be a complete .gz file, but: {error}") from error


def _numbered_lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(number from 1 within the unit, line) of each line that starts in the unit."""
    with _opened(unit.file) as stream:
        at, end = 0, unit.end
        if unit.file.compressed:
            end = 2**63
        else:
            first = _first_line(stream, unit.start, unit.end)
            if first is None:
                return
            at = stream.seek(first)
        for number, line in enumerate(stream, start=1):
            if at >= end:
                return
            yield number, line.removeprefix(BYTE_ORDER_MARK) if at == 0 else line
            at += len(line)


def _lines_before(unit: Unit) -> int:
    """Lines that start before the unit does; reads the file up to there, so it is for error messages."""
    if unit.start == 0:
        return 0
    with open(unit.file.path, "rb") as stream:
        first = _first_line(stream, unit.start, unit.end) or unit.end
        stream.seek(0)
        lines = 0
        while block := stream.read(min(SCAN_BLOCK, first - stream.tell())):
            lines += block.count(b"\n")
        return lines


def _first_line(stream: IO[bytes], start: int, stop: int) -> int | None:
    """Offset of the first line that starts in [start, stop); None when none does."""
    if start == 0:
        return 0
    at = stream.seek(start - 1)
    while block := stream.read(min(SCAN_BLOCK, stop - 1 - at)):
        newline = block.find(b"\n")
        if newline >= 0:
            return at + newline + 1
        at += len(block)
    return None


def _last_character(content: bytes) -> int:
    """Offset of a character at the end that may be incomplete; the length when the last byte is ASCII or no UTF-8."""
    for back in range(1, min(4, len(content) - 1) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            return len(content) - back
        if byte < 0x80:
            break
    return len(content)
