"""Tokenizers: round trips, ids of the special tokens, and what is said about files that are none."""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import regex

from megalodon_plugin.titan.tokenizer import SPLIT_PATTERN, build_tokenizer, load_tokenizer, vocab_size_of

TEXTS = ["", "plain words, 12345 of them\n\n\ttab", "déjà vu — 文字 🙂", "it's <|eos|> or <|end_of_text|> here"]


def rank_lines(extra: tuple[bytes, ...] = (b"he", b"ll", b"hell", b"hello")) -> list[str]:
    tokens = [bytes([byte]) for byte in range(256)] + list(extra)
    return [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    words = ["the cat sat on the mat", "a dog ran in the park", "cats and dogs are here"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_huggingface(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids == [256, *text.encode(), 257]
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text) == list(text.encode())


def test_byte_needs_no_file_and_has_258_tokens() -> None:
    job_config = SimpleNamespace(model=SimpleNamespace(hf_assets_path="byte"))
    tokenizer = build_tokenizer(job_config)
    assert (tokenizer.get_vocab_size(), tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert vocab_size_of("byte") == 258


def test_byte_decodes_broken_utf8_and_shows_special_tokens_on_request() -> None:
    tokenizer = load_tokenizer("byte")
    assert tokenizer.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"
    assert tokenizer.decode([256, 0x61, 257], skip_special_tokens=False) == "<|bos|>a<|eos|>"


@pytest.mark.parametrize("token", [258, -1])
def test_byte_refuses_ids_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 258\), but one is {token}"):
        load_tokenizer("byte").decode([token])


@pytest.mark.parametrize("name", ["small.tiktoken", "tokenizer.model"])
@pytest.mark.parametrize("as_folder", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_round_trip(tmp_path: Path, name: str, as_folder: bool, text: str) -> None:
    path = write_lines(tmp_path / name, rank_lines())
    tokenizer = load_tokenizer(str(tmp_path) if as_folder else path)
    assert (tokenizer.get_vocab_size(), tokenizer.bos_id, tokenizer.eos_id) == (262, 260, 261)
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids[0] == 260 and ids[-1] == 261 and not {260, 261}.intersection(ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_tiktoken_merges_by_rank_within_words(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_lines(tmp_path / "small.tiktoken", rank_lines()))
    assert tokenizer.encode("hello") == [259]
    assert tokenizer.encode("he llo") == [256, ord(" "), 257, ord("o")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I'll go", ["I", "'ll", " go"]),
        ("12345 x", ["123", "45", " x"]),
        ("a  b\n\nc!?", ["a", " ", " b", "\n\n", "c", "!?"]),
    ],
)
def test_split_pattern(text: str, words: list[str]) -> None:
    assert regex.findall(SPLIT_PATTERN, text) == words


def test_sentencepiece_round_trip(tmp_path: Path, sentencepiece_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    text = "the cat é and <s> dogs"
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids == [1, *tokenizer.encode(text), 2]
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.get_vocab_size() == vocab_size_of(str(tmp_path / "tokenizer.model"))
    with pytest.raises(ValueError, match="must be in"):
        tokenizer.decode([tokenizer.get_vocab_size()])


@pytest.mark.parametrize("as_folder", [True, False])
def test_huggingface_round_trip(tmp_path: Path, as_folder: bool) -> None:
    write_huggingface(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path if as_folder else tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("the cat é", add_bos=True, add_eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(ids) == "the cat é"


def test_a_folder_prefers_json_then_tiktoken_then_model(tmp_path: Path, sentencepiece_model: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    assert type(load_tokenizer(str(tmp_path))).__name__ == "SentencePieceTokenizer"
    write_lines(tmp_path / "small.tiktoken", rank_lines())
    assert type(load_tokenizer(str(tmp_path))).__name__ == "TiktokenTokenizer"
    write_huggingface(tmp_path)
    assert type(load_tokenizer(str(tmp_path))).__name__ == "HuggingFaceTokenizer"


def test_two_of_one_kind_are_named(tmp_path: Path) -> None:
    for name in ("a.tiktoken", "b.tiktoken"):
        write_lines(tmp_path / name, rank_lines())
    with pytest.raises(ValueError, match=r"more than one \*\.tiktoken file: a\.tiktoken, b\.tiktoken"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_reported_by_key_rule_and_value(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`model.hf_assets_path` must be \"byte\", .* but is \"nowhere\""):
        load_tokenizer("nowhere")
    with pytest.raises(ValueError, match="holds none of them"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "words.txt").write_text("a b")
    with pytest.raises(ValueError, match="has another name"):
        load_tokenizer(str(tmp_path / "words.txt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: "AAAA"}, r'line 4: must be "base64 rank"'),
        ({3: "!bad! 3"}, r"line 4: .* must be base64"),
        ({257: rank_lines()[257].split()[0] + " 3"}, r"line 258: rank 3 must be unique, but line 4 has it too"),
        ({257: rank_lines()[5].split()[0] + " 257"}, r"line 258: token .* must be unique, but line 6 has it too"),
        ({5: ""}, r"256 single bytes, but lacks 1 of them"),
    ],
)
def test_broken_ranks_are_reported_by_file_and_line(tmp_path: Path, change: dict[int, str], message: str) -> None:
    lines = [change.get(index, line) for index, line in enumerate(rank_lines())]
    with pytest.raises(ValueError, match=r"broken\.tiktoken.*" + message):
        load_tokenizer(write_lines(tmp_path / "broken.tiktoken", lines))


def test_broken_models_are_reported_by_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x00broken\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.model must hold a SentencePiece model or tiktoken ranks"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a Hugging Face tokenizer"):
        load_tokenizer(str(tmp_path))
