"""What the layer needs of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. `encode` puts begin and end tokens around, where asked and where there are some."""

    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...

    def get_vocab_size(self) -> int: ...
