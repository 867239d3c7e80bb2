"""Text as one stream of tokens, in file order, for evaluation: read on demand, never held as a whole."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .files import MIB, TextFile, cut_into_units
from .reader import TextReader
from .tokenizer import Tokenizer

RANGE_BYTES = MIB


class TextStream:
    """Tokens of the files, each document between the tokenizer's begin and end tokens.

    A .txt, .md or .py file is a document, each line of .jsonl is one. Long files are tokenised in ranges that end at
    lines.

    Args:
        max_tokens: the stream ends after so many.
    """

    def __init__(
        self, files: list[TextFile], tokenizer: Tokenizer, text_field: str = "text", max_tokens: int | None = None
    ):
        self._files, self._tokenizer = files, tokenizer
        self._reader = TextReader(RANGE_BYTES, text_field)
        self._left = max_tokens
        self._runs = self._tokens_of_files()
        self._rest = np.empty(0, np.int32)
        self.n_taken = 0
        self.n_bytes = 0
        """UTF-8 bytes of the text that was tokenised; begin and end tokens have none."""

    def take(self, n: int) -> Tensor:
        """The next n tokens, (n,) int64; fewer at the end."""
        held, n_held = [self._rest], len(self._rest)
        while n_held < n and (run := next(self._runs, None)) is not None:
            held.append(run)
            n_held += len(run)
        if len(held) > 1:
            self._rest = np.concatenate(held)
        taken, self._rest = self._rest[:n], self._rest[n:]
        self.n_taken += len(taken)
        return torch.from_numpy(taken.astype(np.int64))

    def skip(self, n: int) -> None:
        """Skip the next n tokens."""
        while n > 0 and (taken := len(self.take(min(n, MIB)))):
            n -= taken

    def _tokens_of_files(self) -> Iterator[np.ndarray]:
        for ids, text in self._texts():
            n_bytes = len(text.encode("utf-8", "replace"))
            if self._left is not None:
                if len(ids) > self._left:
                    ids = ids[: self._left]
                    n_bytes = min(n_bytes, len(self._tokenizer.decode(ids).encode("utf-8", "replace")))
                self._left -= len(ids)
            self.n_bytes += n_bytes
            yield np.array(ids, np.int32)
            if self._left == 0:
                return

    def _texts(self) -> Iterator[tuple[list[int], str]]:
        """(tokens, text) of one range after another."""
        encode = self._tokenizer.encode
        for file in self._files:
            documents = (text for unit in cut_into_units([file], RANGE_BYTES) for text in self._reader.documents(unit))
            if file.json_lines:
                for text in documents:
                    yield encode(text, add_bos=True, add_eos=True), text
                continue
            begun = False
            for text in documents:
                yield encode(text, add_bos=not begun, add_eos=False), text
                begun = True
            if begun and self._tokenizer.eos_id is not None:
                yield [self._tokenizer.eos_id], ""
