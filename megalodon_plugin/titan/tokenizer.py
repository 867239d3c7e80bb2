"""Tokenizers, chosen by `model.hf_assets_path`: bytes, tiktoken ranks, SentencePiece, or the host's tokenizer.json."""

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiktoken
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig

from megalodon_plugin.checkpoint.tokenizer_files import BYTE_TOKENIZER, PATTERNS

# How Llama 3 cuts text before byte-pair merging: contractions, words with at most one leading mark or space, numbers of
# up to three digits, runs of punctuation, and white space, where the last blank before a word goes to that word.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class TiktokenTokenizer(BaseTokenizer):
    """A `tiktoken.Encoding` with one special token that begins and one that ends a document.

    Text that spells a special token is ordinary text: a document cannot end itself.
    """

    def __init__(self, encoding: tiktoken.Encoding, bos: str, eos: str) -> None:
        super().__init__()
        self._encoding = encoding
        self.bos_id: int | None = encoding.encode_single_token(bos)
        self.eos_id: int | None = encoding.encode_single_token(eos)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`, between the begin and end tokens where asked."""
        return _framed(self, self._encoding.encode_ordinary(text), add_bos, add_eos)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        _check_ids(ids, self.get_vocab_size())
        if skip_special_tokens:
            ids = [i for i in ids if i not in (self.bos_id, self.eos_id)]
        try:
            return self._encoding.decode(ids, errors="replace")
        except KeyError as error:  # ranks may have gaps
            raise ValueError(f"token ids must be in the vocabulary: {error}") from error

    def get_vocab_size(self) -> int:
        """Highest token id + 1."""
        return self._encoding.n_vocab


class ByteTokenizer(TiktokenTokenizer):
    """One token for each byte of UTF-8; `<|bos|>` is 256, `<|eos|>` is 257. Needs no file."""

    def __init__(self) -> None:
        encoding = tiktoken.Encoding(
            BYTE_TOKENIZER,
            pat_str=r"[\s\S]",
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={"<|bos|>": 256, "<|eos|>": 257},
        )
        super().__init__(encoding, "<|bos|>", "<|eos|>")

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """The bytes of `text`, between the begin and end tokens where asked."""
        # The same ids as the Encoding's own, which goes through a regex and takes 15 times as long.
        return _framed(self, list(text.encode("utf-8", errors="replace")), add_bos, add_eos)


class SentencePieceTokenizer(BaseTokenizer):
    """A SentencePiece model such as LLaMA-2's `tokenizer.model`. ValueError when the file is not one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # Imported here: only those who have such a model need the library.
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, TypeError) as error:
            raise ValueError(f"{path} must hold a SentencePiece model or tiktoken ranks, but: {error}") from error
        # The library says -1 for a token that the model lacks.
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Token ids of `text`, between the begin and end tokens where asked and where the model has them."""
        return _framed(self, self._processor.encode(text), add_bos, add_eos)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens left out. ValueError for an id outside the vocabulary."""
        ids = [int(i) for i in ids]
        _check_ids(ids, self.get_vocab_size())
        return self._processor.decode(ids)

    def get_vocab_size(self) -> int:
        """Number of pieces, control tokens included."""
        return self._processor.get_piece_size()


def build_tokenizer(job_config: JobConfig) -> BaseTokenizer:
    """The tokenizer that `model.hf_assets_path` names; see `load_tokenizer`."""
    return load_tokenizer(job_config.model.hf_assets_path)


def vocab_size_of(path_or_name: str) -> int:
    """Vocabulary size of the tokenizer that `path_or_name` names; see `load_tokenizer`."""
    return load_tokenizer(path_or_name).get_vocab_size()


def load_tokenizer(path_or_name: str) -> TiktokenTokenizer | SentencePieceTokenizer | HuggingFaceTokenizer:
    """Load "byte", a tokenizer file, or the one tokenizer in a folder.

    A folder is searched for `tokenizer.json`, then `*.tiktoken`, then `*.model` (SentencePiece or tiktoken ranks, by
    content). Raises ValueError when nothing fits, when two of one kind do, and when the file is broken.
    """
    if path_or_name == BYTE_TOKENIZER:
        return ByteTokenizer()
    path = Path(path_or_name)
    if path.is_dir():
        path = _only_tokenizer_in(path)
    elif not path.is_file():
        raise ValueError(_rule(path_or_name, "is neither a file nor a folder"))
    if path.name == "tokenizer.json":
        return _load_huggingface(path)
    if path.suffix == ".tiktoken":
        return _load_ranks(path)
    if path.suffix == ".model":
        return _load_ranks(path) if _is_plain_text(path) else SentencePieceTokenizer(path)
    raise ValueError(_rule(path_or_name, "has another name"))


def _rule(value: Any, why: str) -> str:
    return (
        f'`model.hf_assets_path` must be "{BYTE_TOKENIZER}", a file tokenizer.json, *.tiktoken or *.model, or a folder '
        f'that holds one of them, but is "{value}", which {why}'
    )


def _only_tokenizer_in(folder: Path) -> Path:
    for pattern in PATTERNS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(_rule(folder, f"holds more than one {pattern} file: {names}; name the file instead"))
        if found:
            return found[0]
    raise ValueError(_rule(folder, "holds none of them"))


def _load_huggingface(path: Path) -> HuggingFaceTokenizer:
    try:
        return HuggingFaceTokenizer(str(path.parent))
    except Exception as error:  # the Rust library raises plain Exception for a file that it cannot parse
        raise ValueError(f"{path} must be a Hugging Face tokenizer, but: {error}") from error


def _load_ranks(path: Path) -> TiktokenTokenizer:
    ranks = _read_ranks(path)
    first_special = max(ranks.values()) + 1
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    encoding = tiktoken.Encoding(
        path.stem,
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={bos: first_special, eos: first_special + 1},
    )
    return TiktokenTokenizer(encoding, bos, eos)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from lines "base64 rank"; ValueError with file and line for whatever is wrong."""
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields:
                continue
            where = f"{path}, line {number}:"
            if len(fields) != 2 or not fields[1].isdigit():
                raise ValueError(f'{where} must be "base64 rank", but is {line[:80]!r}')
            try:
                token = base64.b64decode(fields[0], validate=True)
            except binascii.Error as error:
                raise ValueError(f"{where} {fields[0][:80]!r} must be base64, but: {error}") from error
            rank = int(fields[1])
            if rank in line_of_rank:
                raise ValueError(f"{where} rank {rank} must be unique, but line {line_of_rank[rank]} has it too")
            if token in ranks:
                first = line_of_rank[ranks[token]]
                raise ValueError(f"{where} token {token!r} must be unique, but line {first} has it too")
            ranks[token] = rank
            line_of_rank[rank] = number
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing:
        raise ValueError(f"{path} must rank each of the 256 single bytes, but lacks {missing} of them")
    return ranks


def _is_plain_text(path: Path) -> bool:
    """Ranks are printable ASCII; a SentencePiece model is a protocol buffer, with control bytes from the first on."""
    with open(path, "rb") as stream:
        head = stream.read(512)
    return all(byte in b"\r\n\t" or 32 <= byte < 127 for byte in head)


def _framed(tokenizer: BaseTokenizer, ids: list[int], add_bos: bool, add_eos: bool) -> list[int]:
    if add_bos and tokenizer.bos_id is not None:
        ids.insert(0, tokenizer.bos_id)
    if add_eos and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    return ids


def _check_ids(ids: list[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), but one is {token}")
