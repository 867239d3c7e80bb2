"""Turns the tokens of several rows into text that appears in order."""

from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from megalodon_plugin.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 16
# Where a text is cut between tokens, at most this many are held back for a character that is not whole.
LONGEST_CHARACTER = 4


class RowText:
    """The text that each new token of a row adds; a character of several bytes once it is whole.

    A token's text may depend on the one before it (SentencePiece drops a leading space), so each is decoded behind the
    last few, not alone and not behind the whole text.
    """

    def __init__(self, prompt_ids: list[int], tokenizer: Tokenizer, stops: Collection[int]):
        self._tokenizer, self._stops = tokenizer, stops
        self._window = prompt_ids[-CONTEXT_TOKENS:]
        self._shown = tokenizer.decode(self._window)
        self._held = 0
        self.ended = False

    def add(self, token: int) -> str:
        """The text that appears with this token; a stop token adds none."""
        if token in self._stops:
            self.ended = True
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        self._held += 1
        if text.endswith("\ufffd") and self._held < LONGEST_CHARACTER:
            return ""
        new = text[len(self._shown) :]
        self._window, self._held = self._window[-CONTEXT_TOKENS:], 0
        self._shown = self._tokenizer.decode(self._window)
        return new


def show_in_order(
    prompts: Sequence[str], rows: Sequence[RowText], steps: Iterator[list[int]], out: TextIO
) -> list[str]:
    """Write each prompt and what follows it, one text after another; return what followed.

    Args:
        prompts: shown in front of each text; several texts are numbered.
        rows: one a prompt. Those behind the one that is shown wait until it has ended.
        steps: the next token of every row, again and again; negative for a row that has ended.
    """
    written = ["" for _ in prompts]
    current = -1

    def advance() -> None:
        nonlocal current
        if current >= 0:
            out.write("\n")
        current += 1
        if current < len(prompts):
            number = f"=== {current + 1} of {len(prompts)} ===\n" if len(prompts) > 1 else ""
            out.write(number + prompts[current] + written[current])

    advance()
    for tokens in steps:
        new = [row.add(token) if token >= 0 else "" for row, token in zip(rows, tokens, strict=True)]
        written = [text + more for text, more in zip(written, new, strict=True)]
        if current < len(prompts):
            out.write(new[current])
        while current < len(prompts) and rows[current].ended:
            advance()
        out.flush()
    while current < len(prompts):
        advance()
    out.flush()
    return written
