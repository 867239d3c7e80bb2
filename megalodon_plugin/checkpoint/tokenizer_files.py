"""Tokenizers as checkpoints name them: "byte", or files that lie in the checkpoint's folder or elsewhere."""

import shutil
from pathlib import Path

BYTE_TOKENIZER = "byte"
"""Names the tokenizer whose tokens are bytes; it has no file."""
PATTERNS = ("tokenizer.json", "*.tiktoken", "*.model")
"""Files that are a tokenizer, in the order in which a folder is searched for them."""
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")


def tokenizer_of(folder: Path, named: str | None) -> str | None:
    """The tokenizer of a checkpoint's folder: "byte", a path, or None where there is none.

    Args:
        named: what the checkpoint's configuration names, relative to the folder if it lies there.
    """
    if named is None:
        return str(folder) if any(list(folder.glob(pattern)) for pattern in PATTERNS) else None
    inside = folder / named
    return str(inside) if named != BYTE_TOKENIZER and inside.exists() else named


def copy_tokenizer(tokenizer: str | None, folder: Path) -> str | None:
    """Copy a tokenizer's files into a checkpoint's folder; return what its configuration names, see `tokenizer_of`."""
    if tokenizer is None or tokenizer == BYTE_TOKENIZER:
        return tokenizer
    path = Path(tokenizer)
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
        return path.name
    if path.is_dir():
        for pattern in (*PATTERNS, *_BESIDE):
            for file in path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        return None  # found by looking
    return tokenizer


def absolute(tokenizer: str | None) -> str | None:
    """The name by which a tokenizer that stays where it is can be found from any folder."""
    return tokenizer if tokenizer is None or tokenizer == BYTE_TOKENIZER else str(Path(tokenizer).resolve())
