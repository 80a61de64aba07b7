"""Figures of a model on a held-out text or series, which is read once from its beginning.

>>> score = evaluate_text(model, test.encode(model.tokenizer))
>>> score.perplexity, score.bits_per_character
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen import _validate
from fastgen.data import SeriesSet, Streams, TextSet, TokenSet, Windows
from fastgen.models import GPT, RNN, GPTOutput, RNNOutput

__all__ = ["SeriesScore", "TextScore", "evaluate_series", "evaluate_text", "read_streams", "read_windows"]


@dataclass(frozen=True)
class TextScore:
    """Of a text.

    Attributes:
        loss: mean negative log-probability of a token, in nats.
        num_tokens: how many it is the mean of.
        tokens_per_character, tokens_per_byte: of the text.
    """

    loss: float
    num_tokens: int
    tokens_per_character: float
    tokens_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss): among how many equally likely tokens a choice would be as uncertain."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """The length of the text in bits, coded by the model, over its characters: compares across tokenizers."""
        return self.loss / math.log(2) * self.tokens_per_character

    @property
    def bits_per_byte(self) -> float:
        """The same over its bytes in UTF-8."""
        return self.loss / math.log(2) * self.tokens_per_byte


@dataclass(frozen=True)
class SeriesScore:
    """Of a series.

    Attributes:
        loss: mean negative log-density of a step, in nats; of either sign, and in the units of the data.
        rmse: for each column, the root mean square of what the mean of the density was off by.
        num_steps: how many both are the means of.
    """

    loss: float
    rmse: tuple[float, ...]
    num_steps: int


def evaluate_text(model: RNN | GPT, tokens: TokenSet, *, batch_size: int = 32, seq_len: int | None = None) -> TextScore:
    """Read the tokens once, and score them.

    An RNN reads `batch_size` parallel streams, and every token but the first of each counts. A GPT reads windows side
    by side, without a look at what is before them, and every token but the first of the text counts.

    Args:
        model: in whichever mode; dropout is off.
        tokens: of the model's tokenizer.
        batch_size: of an RNN the streams at most, fewer where the text has not a window for each. Each starts from
            zeros, so one (the exact figure) is a little better and slower. Of a GPT the windows at a time, which
            changes memory but not the figures.
        seq_len: tokens at a time. Default 256, which for an RNN changes memory but not the figures; of a GPT its
            context, and shorter windows predict from less.

    Raises:
        TypeError: for what is no `TokenSet`.
        ValueError: for tokens that are not the model's, or fewer than two.
    """
    if not isinstance(tokens, TokenSet):
        hint = ", which .encode(model.tokenizer) turns into one" if isinstance(tokens, TextSet) else ""
        raise TypeError(f"tokens: expected a TokenSet, got {type(tokens).__name__}{hint}")
    vocab_size = model.vocab_size
    size = tokens.tokenizer.vocab_size
    # A GPT's vocabulary may be rounded up.
    if size > vocab_size or (isinstance(model, RNN) and size != vocab_size):
        raise ValueError(f"tokens: expected those of {vocab_size}, as the model has, got {tokens!r}")
    if isinstance(model, GPT):
        context = model.config.max_position_embeddings
        if seq_len is not None and seq_len > context:
            raise ValueError(f"seq_len: expected at most {context}, the context of the model, got {seq_len}")
        _validate.integer("batch_size", batch_size, 1)
        windows = Windows(tokens.tokens, context if seq_len is None else seq_len)
        nats, count = read_windows(model, windows, batch_size).tolist()
    else:
        streams = _streams("tokens", tokens.tokens, batch_size, 256 if seq_len is None else seq_len)
        nats, count = 0.0, streams.num_steps
        for output, targets in read_streams(model, streams):
            nats += _loss(output) * targets.numel()
    return TextScore(
        nats / count,
        int(count),
        len(tokens) / tokens.num_characters,
        len(tokens) / tokens.num_bytes,
    )


def evaluate_series(model: RNN, series: SeriesSet, *, batch_size: int = 1, seq_len: int = 256) -> SeriesScore:
    """Read the series in `batch_size` parallel streams, and score every step but the first of each.

    Args: see `evaluate_text`.

    Raises:
        TypeError: for what is no `SeriesSet`.
        ValueError: for a series of another width, or of fewer than two steps.
    """
    if not isinstance(series, SeriesSet):
        raise TypeError(f"series: expected a SeriesSet, got {type(series).__name__}")
    if model.is_text or series.values.shape[1] != model.config.input_size:
        raise ValueError(f"series: expected {model.config.input_size} columns, as the model has, got {series!r}")
    streams = _streams("series", series.values, batch_size, seq_len)
    nats, squares = 0.0, torch.zeros(series.values.shape[1], dtype=torch.float64)
    for output, targets in read_streams(model, streams):
        assert output.distribution is not None
        nats += _loss(output) * targets.shape[:2].numel()
        squares += (output.distribution.mean - targets).double().square().sum((0, 1)).cpu()
    rmse = tuple((squares / streams.num_steps).sqrt().tolist())
    return SeriesScore(nats / streams.num_steps, rmse, streams.num_steps)


def _streams(name: str, sequence: Tensor, batch_size: int, seq_len: int) -> Streams:
    _validate.integer("batch_size", batch_size, 1)
    _validate.integer("seq_len", seq_len, 1)
    if len(sequence) < 2:
        raise ValueError(f"{name}: expected at least 2, the second to be predicted, got {len(sequence)}")
    windows = (len(sequence) - 1) // seq_len
    return Streams(sequence, max(1, min(batch_size, windows)), seq_len)


def read_streams(model: RNN, streams: Streams) -> Iterator[tuple[RNNOutput, Tensor]]:
    """For each window the output of the model, in evaluation mode, and its targets; the state is carried along."""
    state = None
    for window in streams if streams.count > 0 else ():
        inputs, targets = (x.to(model.device) for x in window)
        with model.inference():
            output = model(inputs, targets, state)
        state = output.state
        yield output, targets


def read_windows(model: GPT, windows: Windows, batch_size: int, process: int = 0, num_processes: int = 1) -> Tensor:
    """(2,) float64: the nats of all targets of the windows and how many they are, or this process's share of both."""
    sums = torch.zeros(2, dtype=torch.float64)
    firsts = torch.arange(len(windows)) * windows.seq_len
    whole, last = firsts[:-1], firsts[-1:]  # which may be shorter, and so goes by itself
    batches = [*(whole.split(batch_size) if len(whole) else ()), last]
    for batch in batches[process::num_processes]:
        inputs, targets, cu_seqlens = windows.batch(batch)
        count = int((targets != -100).sum())
        if count:
            with model.inference():
                output = model(inputs.to(model.device), targets.to(model.device), cu_seqlens=cu_seqlens)
            sums += torch.tensor([_loss(output) * count, count], dtype=torch.float64)
    return sums


def _loss(output: RNNOutput | GPTOutput) -> float:
    assert output.loss is not None
    return float(output.loss)
