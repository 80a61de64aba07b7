"""Tokenizers: exact round trips, whole or token by token, files, and what they cannot express."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    SubwordTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SAMPLE = (
    "It is the east, and Juliet is the sun.\nÄrgere dich nicht: 東京は夜 🙂\n\n\tIt is my lady, O, it is my love!\n" * 3
)
SUBWORDS = train_tokenizer("bpe", SAMPLE, vocab_size=300)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_round_trip(kind: str) -> None:
    tokenizer = train_tokenizer(kind, SAMPLE, vocab_size=300)
    tokens = tokenizer.encode(SAMPLE)
    assert tokenizer.decode(tokens) == SAMPLE
    assert 0 <= min(tokens) <= max(tokens) < tokenizer.vocab_size


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SUBWORDS], ids=["bytes", "bpe"])
@given(text=any_text)
def test_bytes_and_subwords_express_any_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in tokens) + stream.flush() == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SUBWORDS, CharTokenizer(SAMPLE)], ids=lambda t: t.kind)
@given(data=st.data())
def test_a_stream_makes_up_the_whole_of_any_tokens(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A model may well draw bytes that are no UTF-8."""
    tokens = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in tokens) + stream.flush() == tokenizer.decode(tokens)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SUBWORDS, CharTokenizer(SAMPLE)], ids=lambda t: t.kind)
def test_arrays(tokenizer: Tokenizer) -> None:
    array = tokenizer.encode_array(SAMPLE)
    assert array.tolist() == tokenizer.encode(SAMPLE)
    assert array.dtype == (np.int16 if tokenizer.kind == "subwords" else np.uint8)
    assert tokenizer.encode_array("").shape == (0,)
    assert CharTokenizer(map(chr, range(1000, 1300))).encode_array("\u03e8").dtype == np.int16


def test_a_character_comes_out_when_it_is_whole() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"


def test_subwords_are_learnt() -> None:
    assert 256 < SUBWORDS.vocab_size <= 300
    assert len(SUBWORDS.encode(SAMPLE)) < len(SAMPLE.encode()) / 2


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_files(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(kind, SAMPLE, vocab_size=300)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded == load_tokenizer(tmp_path / "tokenizer.json") == tokenizer
    assert loaded.encode(SAMPLE) == tokenizer.encode(SAMPLE)


def test_a_tokenizer_of_the_library_is_read(tmp_path: Path) -> None:
    """One with a token behind a gap, and with padding and special tokens that must not show."""
    library = pytest.importorskip("tokenizers")
    backend = library.Tokenizer(library.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "to": 2, "be": 9}, "[UNK]"))
    backend.pre_tokenizer = library.pre_tokenizers.Whitespace()
    backend.post_processor = library.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    backend.enable_padding(length=12)
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(tmp_path / "words.json")
    assert isinstance(tokenizer, SubwordTokenizer)
    assert tokenizer.encode("to be or to be") == [2, 9, 0, 2, 9]
    assert tokenizer.vocab_size == 10
    stream = tokenizer.stream()
    assert (
        "".join(stream.push(token) for token in [2, 9, 2]) + stream.flush() == tokenizer.decode([2, 9, 2]) == "to be to"
    )


def test_one_token() -> None:
    assert ByteTokenizer().token("\n") == 10
    with pytest.raises(ValueError, match="'ab': expected one token, got 2"):
        ByteTokenizer().token("ab")


def test_an_unknown_character_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"text: 'z' in line 2, column 3 is not among the 4 characters"):
        CharTokenizer("abc\n").encode("abc\nabz")
    with pytest.raises(ValueError, match=r"text: 'z' in line 2, column 3 is not among the 4 characters"):
        CharTokenizer("abc\n").encode_array("abc\nabz")
    with pytest.raises(ValueError, match=r"text: '\\ud83d' in line 1, column 2 is not among"):
        CharTokenizer("abc\n").encode_array("a\ud83d")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SUBWORDS], ids=["bytes", "bpe"])
def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text: '\\ud83d' at character 2 is half of a pair"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), SUBWORDS, CharTokenizer("ab")], ids=lambda t: t.kind)
@pytest.mark.parametrize("token", [-1, 1000])
def test_a_token_out_of_range_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=f"tokens: expected 0 to {tokenizer.vocab_size - 1}, got {token}"):
        tokenizer.decode([token])


def test_training_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected one of bytes, chars, bpe, got 'words'"):
        train_tokenizer("words", SAMPLE)
    with pytest.raises(ValueError, match="vocab_size: expected an int of at least 256, got 100"):
        train_tokenizer("bpe", SAMPLE, vocab_size=100)
    with pytest.raises(ValueError, match="text: expected some"):
        train_tokenizer("chars", "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a tokenizer .not valid JSON"),
        ("[]", "not a tokenizer .neither fastgen's nor"),
        (json.dumps({"fastgen_tokenizer": "runes"}), "got 'runes'"),
        (json.dumps({"fastgen_tokenizer": "chars"}), "chars with its characters"),
        (json.dumps({"model": {"type": "no such"}}), "not a tokenizer"),
    ],
)
def test_damaged_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        load_tokenizer(tmp_path)


def test_the_library_is_not_asked_for_its_vocabulary_with_every_token():
    """It copies all of it: 30 ms for 50,000 tokens."""
    backend = mock.Mock(wraps=SUBWORDS.backend)
    tokenizer = SubwordTokenizer(backend)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(SAMPLE)]
    assert "".join(pieces) + stream.flush() == SAMPLE
    assert backend.get_vocab.call_count == 1
