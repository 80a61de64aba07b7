"""What the commands that train on text have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.cli.train.run import size, tell
from fastgen.data import TextSet, TokenSet, load_text
from fastgen.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer, train_tokenizer
from fastgen.train import TrainingResult

__all__ = ["TOKENIZERS", "encode", "load_texts", "make_tokenizer", "text_summary", "tokens_again"]

TOKENIZERS = ("chars", "bytes", "bpe")


def load_texts(source: Mapping[str, Any], quiet: bool) -> tuple[TextSet, TextSet]:
    """The text to train on, and what is held out at its end."""
    text = load_text(source["data"])
    train, test = text.split(size("test-size", source.get("test_size", "0.05")))
    tell(f"{text}; {len(train):,} to train on, {len(test):,} to test", quiet)
    return train, test


def make_tokenizer(source: Mapping[str, Any], train: TextSet, test: TextSet, default: str) -> Tokenizer:
    kind = source.get("tokenizer", default)
    if kind != "bpe" and "vocab_size" in source:
        raise ValueError(f"--vocab-size: expected with --tokenizer bpe only, got it with {kind}")
    if kind == "chars":  # also those that only the held-out text has: it could not be read otherwise
        return train_tokenizer(kind, train.text + test.text)
    if kind in ("bytes", "bpe"):
        return train_tokenizer(kind, train.text, source.get("vocab_size", 1024))
    try:
        return load_tokenizer(kind)
    except FileNotFoundError:
        raise ValueError(f"--tokenizer: expected chars, bytes, bpe or a tokenizer.json, got {kind!r}") from None


def encode(train: TextSet, test: TextSet, tokenizer: Tokenizer, quiet: bool) -> tuple[TokenSet, TokenSet]:
    tokens = train.encode(tokenizer), test.encode(tokenizer)
    tell(f"{len(tokens[0]):,} tokens of {tokenizer.vocab_size:,} ({tokenizer.kind})", quiet)
    return tokens


def tokens_again(folder: Path, source: Mapping[str, Any], quiet: bool) -> tuple[TokenSet, TokenSet]:
    """What the run in `folder` trains on and is judged by, in the tokens that it began with."""
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    texts = load_texts(source, quiet)
    try:
        return encode(*texts, tokenizer, quiet)
    except ValueError as error:
        raise ValueError(f"data: expected that which {folder} was started with, but {error}") from error


def text_summary(result: TrainingResult) -> str:
    """The result in a line."""
    perplexity, bits = result.metrics["perplexity"], result.metrics["bits_per_character"]
    weights = f"weights of step {result.best_step} of {result.step}"
    return f"test perplexity {perplexity:.3f} a token, {bits:.3f} bits a character, {weights}"
