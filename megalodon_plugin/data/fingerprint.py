"""Hashes that are the same in every process and version, and what tells one tokenizer from another."""

import hashlib

from .tokenizer import Tokenizer

PROBE = "Ab z\n\t 0123 déjà vu: ≠ 文字 {[(x_1)]};"


def hash_of(*parts: object) -> bytes:
    """Sixteen bytes that depend on the parts' text alone."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def tokenizer_probe(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Vocabulary size and the tokens of one text, which differ between tokenizers, whatever path they came from."""
    return (tokenizer.get_vocab_size(), *tokenizer.encode(PROBE, add_bos=True, add_eos=True))
