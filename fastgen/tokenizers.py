"""Tokenizers of text: characters, bytes, and whatever the `tokenizers` library reads or trains.

    >>> tokenizer = train_tokenizer("bpe", text, vocab_size=1024)
    >>> tokenizer.decode(tokenizer.encode("To be, or not to be"))
    'To be, or not to be'

Each is one JSON file, `tokenizer.json`, that lies beside the weights of its model. A byte-pair encoding is
kept in the format of the `tokenizers` library, which other programs read too.
"""

from __future__ import annotations

import abc
import codecs
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from fastgen import _files, _validate
from fastgen._extras import extra

__all__ = [
    "TOKENIZER_FILE",
    "ByteTokenizer",
    "CharTokenizer",
    "SubwordTokenizer",
    "TextStream",
    "Tokenizer",
    "load_tokenizer",
    "train_tokenizer",
]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

TOKENIZER_FILE = "tokenizer.json"
KINDS = ("bytes", "chars", "bpe")

_KEY = "fastgen_tokenizer"  # the member that tells our JSON from that of the tokenizers library


class TextStream(abc.ABC):
    """Decodes a text token by token; what it has given so far never changes."""

    @abc.abstractmethod
    def push(self, token: int) -> str:
        """The text that is certain now: empty while a character is incomplete."""

    @abc.abstractmethod
    def flush(self) -> str:
        """What is left at the end; an incomplete character is U+FFFD."""


class Tokenizer(abc.ABC):
    """Text to token numbers 0 .. vocab_size - 1 and back.

    Attributes:
        kind: "bytes", "chars" or "subwords".
    """

    kind: ClassVar[str]

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """The number of tokens."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            ValueError: for a character that the tokenizer cannot express, naming it and its place.
        """

    def encode_array(self, text: str) -> Array:
        """The same as an array (N,) of the smallest of uint8, int16, int32 and int64 that holds the vocabulary."""
        return np.asarray(self.encode(text), dtype=self._dtype)

    @property
    def _dtype(self) -> type[np.generic]:
        fitting = (d for d in (np.uint8, np.int16, np.int32) if self.vocab_size - 1 <= np.iinfo(d).max)
        return next(fitting, np.int64)

    @abc.abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: for a token out of range.
        """

    @abc.abstractmethod
    def stream(self) -> TextStream:
        """A decoder for tokens that come one by one: its pieces make up `decode` of all of them."""

    @abc.abstractmethod
    def to_json(self) -> str:
        """The content of the tokenizer's file."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a JSON file, or to `tokenizer.json` in a folder; whole or not at all."""
        path = Path(path)
        _files.write_text(path / TOKENIZER_FILE if path.is_dir() else path, self.to_json())

    def token(self, text: str) -> int:
        """The one token that `text` is.

        Raises:
            ValueError: if it is none or several.
        """
        tokens = self.encode(text)
        if len(tokens) != 1:
            raise ValueError(f"{text!r}: expected one token, got {len(tokens)}")
        return tokens[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        checked = [int(token) for token in tokens]
        for token in checked:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"tokens: expected 0 to {self.vocab_size - 1}, got {token}")
        return checked


class _ByteStream(TextStream):
    """For tokenizers whose tokens are bytes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._pieces[token])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text in UTF-8: 256 of them, and no text that it cannot express."""

    kind = "bytes"
    vocab_size = 256
    _PIECES: ClassVar[tuple[bytes, ...]] = tuple(bytes([value]) for value in range(256))

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_array(self, text: str) -> Array:
        return np.frombuffer(_utf8(text), dtype=np.uint8).copy()

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(self._checked(tokens)).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        return _ByteStream(self._PIECES)

    def to_json(self) -> str:
        return json.dumps({_KEY: self.kind}) + "\n"


class CharTokenizer(Tokenizer):
    """A token is a character of a given alphabet, in the order of the code points.

    Args:
        characters: the alphabet; repetitions do not count.
    """

    kind = "chars"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("characters: expected at least one, got none")
        _utf8(self.characters)
        self._index = {character: index for index, character in enumerate(self.characters)}

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._index[character] for character in text]
        except KeyError as error:
            place = text.index(error.args[0])
            line = text.count("\n", 0, place) + 1
            column = place - text.rfind("\n", 0, place)
            raise ValueError(
                f"text: {error.args[0]!r} in line {line}, column {column} is not among the "
                f"{self.vocab_size} characters of the tokenizer"
            ) from None

    def encode_array(self, text: str) -> Array:
        alphabet, points = _code_points(self.characters), _code_points(text)
        tokens = np.searchsorted(alphabet, points).clip(max=len(alphabet) - 1)
        if not np.array_equal(alphabet[tokens], points):
            return super().encode_array(text)  # which names the character that is unknown
        return tokens.astype(self._dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        return "".join([self.characters[token] for token in self._checked(tokens)])

    def stream(self) -> TextStream:
        return _ByteStream([character.encode() for character in self.characters])

    def to_json(self) -> str:
        return json.dumps({_KEY: self.kind, "characters": self.characters}, ensure_ascii=False) + "\n"


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: its merges and normalisation, without its special tokens.

    Args:
        backend: a `tokenizers.Tokenizer`, to which no tokens are added any more. Padding and truncation that it is set
            up for are switched off.
    """

    kind = "subwords"

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        backend.no_padding()
        backend.no_truncation()
        # Numbers need not be contiguous, as where special tokens were added far behind the others. The library copies
        # its whole vocabulary for an answer, which is too long for every token.
        self._vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        tokens: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        text: str = self.backend.decode(self._checked(tokens), skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        return _SubwordStream(self)

    def to_json(self) -> str:
        text: str = self.backend.to_str(pretty=False)
        return text + "\n"


class _SubwordStream(TextStream):
    """Decodes the tokens since the last whole character together with a few before them.

    What a token stands for may depend on its neighbours (a space before a word, the bytes of one
    character), so the piece is the difference between two decodings of a short window.
    """

    _CONTEXT = 4

    def __init__(self, tokenizer: SubwordTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = 0  # how many of them have been given out

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._piece(final=False)

    def flush(self) -> str:
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        before = self._tokenizer.decode(self._tokens[: self._context])
        now = self._tokenizer.decode(self._tokens)
        if not final and now.endswith("\ufffd"):
            return ""
        self._tokens = self._tokens[-self._CONTEXT :]
        self._context = len(self._tokens)
        return now[len(before) :]


def train_tokenizer(kind: str, text: str, vocab_size: int = 1024) -> Tokenizer:
    """The tokenizer of a text.

    Args:
        kind: "bytes"; "chars", the characters that occur; or "bpe", a byte-level byte-pair encoding (Sennrich
            et al., "Neural machine translation of rare words with subword units", 2016; Radford et al.,
            "Language models are unsupervised multitask learners", 2019), which can express any text.
        text: what to learn it from.
        vocab_size: tokens of a "bpe" at most, at least 256.

    Raises:
        ValueError: for an argument out of range, or a text that is empty.
        ImportError: for "bpe" without the package tokenizers.
    """
    _validate.choice("tokenizer", kind, KINDS)
    if not text:
        raise ValueError("text: expected some to learn a tokenizer from, got none")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars":
        return CharTokenizer(text)
    _validate.integer("vocab_size", vocab_size, 256)
    _utf8(text)
    library = _library()
    backend = library.Tokenizer(library.models.BPE())
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True), trainer)
    return SubwordTokenizer(backend)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file, or of `tokenizer.json` in a folder: ours or of the tokenizers library.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: for a file that is no tokenizer.
        ImportError: without the package tokenizers, where it is needed.
    """
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer (not valid JSON: {error})") from None
    if not isinstance(content, dict) or not (_KEY in content or "model" in content):
        raise ValueError(f"{path}: not a tokenizer (neither fastgen's nor of the tokenizers library)")
    if _KEY not in content:
        library = _library()
        try:
            return SubwordTokenizer(library.Tokenizer.from_str(text))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
    kind, characters = content[_KEY], content.get("characters")
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "chars" and isinstance(characters, str) and characters:
        return CharTokenizer(characters)
    raise ValueError(f"{path}: not a tokenizer (expected bytes, or chars with its characters, got {kind!r})")


def _library() -> Any:
    with extra("text"):
        import tokenizers
    return tokenizers


def _code_points(text: str) -> Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"text: {text[error.start]!r} at character {error.start} is half of a pair") from None
