"""Scores against sums worked out over the whole text or series at once."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.data import SeriesSet, TextSet
from fastgen.evaluate import TextScore, evaluate_series, evaluate_text
from fastgen.models import RNN
from fastgen.tokenizers import ByteTokenizer, CharTokenizer

TEXT = TextSet("Ä rose is a rose is a rose.\n" * 8)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("seq_len", [7, 64, 1000])
def test_one_stream_is_the_whole_text(seq_len: int) -> None:
    tokens = TEXT.encode(ByteTokenizer())
    model = RNN(vocab_size=256, hidden_size=8, dropout=0.5).double().train()
    score = evaluate_text(model, tokens, batch_size=1, seq_len=seq_len)
    assert model.training
    with model.inference():
        ids = tokens.tokens.long().unsqueeze(0)
        loss = float(model(ids[:, :-1], ids[:, 1:]).loss)
    assert score.loss == pytest.approx(loss, rel=1e-9)
    assert score.num_tokens == len(tokens) - 1
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-9)
    assert score.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-9)
    assert score.bits_per_character == pytest.approx(loss / math.log(2) * tokens.num_bytes / len(TEXT), rel=1e-9)


def test_parallel_streams_start_from_zeros() -> None:
    tokens = TEXT.encode(ByteTokenizer())
    model = RNN(vocab_size=256, hidden_size=8).double()
    score = evaluate_text(model, tokens, batch_size=3, seq_len=10)
    length = (len(tokens) - 1) // 3
    with model.inference():
        losses = []
        for first in range(0, 3 * length, length):
            ids = tokens.tokens[first : first + length + 1].long().unsqueeze(0)
            losses.append(float(model(ids[:, :-1], ids[:, 1:]).loss))
    assert score.loss == pytest.approx(sum(losses) / 3, rel=1e-9)
    assert score.num_tokens == 3 * length


def test_a_model_that_knows_nothing_needs_the_bits_of_the_alphabet() -> None:
    tokenizer = CharTokenizer(TEXT.text)
    model = RNN(vocab_size=tokenizer.vocab_size, hidden_size=4)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    score = evaluate_text(model, TEXT.encode(tokenizer))
    assert score.bits_per_character == pytest.approx(math.log2(tokenizer.vocab_size), rel=1e-6)
    assert score.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)
    assert TextScore(1e4, 1, 1.0, 1.0).perplexity == math.inf


def test_series() -> None:
    series = SeriesSet(torch.randn(50, 2).cumsum(0))
    model = RNN(input_size=2, hidden_size=8, num_components=2)
    model.set_scale(*series.scale())
    score = evaluate_series(model, series, seq_len=16)
    with model.inference():
        output = model(series.values[None, :-1], series.values[None, 1:])
    off = output.distribution.mean[0] - series.values[1:]
    assert score.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert score.rmse == pytest.approx(off.square().mean(0).sqrt().tolist(), rel=1e-5)
    assert score.num_steps == 49


def test_data_that_do_not_fit_are_refused() -> None:
    text, series = RNN(vocab_size=5, hidden_size=4), RNN(input_size=2, hidden_size=4)
    with pytest.raises(ValueError, match="tokens: expected those of 5, as the model has, got text: "):
        evaluate_text(text, TEXT.encode(ByteTokenizer()))
    with pytest.raises(TypeError, match=r"tokens: expected a TokenSet, got TextSet, which \.encode\(model.tokenizer\)"):
        evaluate_text(text, TEXT)
    with pytest.raises(TypeError, match=r"tokens: expected a TokenSet, got Tensor$"):
        evaluate_text(text, torch.zeros(5, dtype=torch.long))
    with pytest.raises(TypeError, match=r"series: expected a SeriesSet, got Tensor$"):
        evaluate_series(series, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="tokens: expected those of 0"):
        evaluate_text(series, TEXT.encode(ByteTokenizer()))
    with pytest.raises(ValueError, match="series: expected 2 columns, as the model has, got series: 3 steps of 1"):
        evaluate_series(series, SeriesSet(torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="series: expected at least 2, the second to be predicted, got 1"):
        evaluate_series(series, SeriesSet(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match="seq_len: expected an int of at least 1, got 0"):
        evaluate_series(series, SeriesSet(torch.zeros(3, 2)), seq_len=0)
