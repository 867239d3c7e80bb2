"""A text as a stream of tokens: the same however it is asked for, and its bytes counted."""

import torch

from megalodon_plugin.data.files import find_text_files
from megalodon_plugin.data.stream import TextStream
from megalodon_plugin.titan.tokenizer import load_tokenizer


def test_it_gives_the_same_tokens_however_they_are_asked_for(tmp_path):
    text = "\n".join(f"line {i} ü" for i in range(300_000))  # several pieces
    (tmp_path / "a.txt").write_text(text)
    tokenizer = load_tokenizer("byte")
    files = find_text_files(str(tmp_path))
    stream = TextStream(files, tokenizer)
    tokens = stream.take(10**9)
    assert tokens.tolist() == [256, *text.encode(), 257]
    assert stream.n_bytes == len(text.encode())
    again = TextStream(files, tokenizer)
    again.skip(1_000_003)
    assert torch.equal(again.take(70_000), tokens[1_000_003:1_070_003])


def test_a_cut_text_counts_the_bytes_of_what_is_kept(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 10)
    stream = TextStream(find_text_files(str(tmp_path)), load_tokenizer("byte"), max_tokens=21)
    assert len(stream.take(1000)) == 21
    assert stream.n_bytes == 20  # the begin token has none
