"""The RNN against the definitions of its losses, and what it promises about state, files and arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastgen._load import kernel_devices
from fastgen.models import RNN, GaussianMixture, RNNConfig, detach_state, from_pretrained
from fastgen.models.rnn import State
from fastgen.tokenizers import ByteTokenizer, CharTokenizer

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TEXT = {"vocab_size": 11, "hidden_size": 12, "embedding_dim": 7}
SERIES = {"input_size": 2, "hidden_size": 12, "num_components": 3}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape)


def parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def series_model(**fields: object) -> RNN:
    model = RNN(**{**SERIES, **fields})
    model.set_scale(torch.tensor([5.0, -100.0]), torch.tensor([2.0, 30.0]))
    return model


def series(*shape: int) -> Tensor:
    return torch.randn(*shape, 2) * torch.tensor([2.0, 30.0]) + torch.tensor([5.0, -100.0])


# ---------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("cell", CELLS)
def test_logits_are_those_of_torch(cell: str) -> None:
    model = RNN(**TEXT, cell=cell)
    kinds = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
    more = {} if cell in kinds else {"nonlinearity": cell.removeprefix("rnn_")}
    layers = kinds.get(cell, torch.nn.RNN)(7, 12, 2, batch_first=True, **more)
    layers.load_state_dict(model.rnn.state_dict())
    x = tokens(3, 5)
    hidden, state = layers(model.embedding(x))
    output = model(x)
    torch.testing.assert_close(output.logits, F.linear(hidden, model.head.weight, model.head.bias))
    for got, want in zip(parts(output.state), parts(state), strict=True):
        torch.testing.assert_close(got, want)
    assert output.loss is None
    assert output.distribution is None


def test_loss_is_the_mean_over_the_targets_that_count() -> None:
    model, x, y = RNN(**TEXT), tokens(3, 5), tokens(3, 5)
    y[0, 1:] = -100
    output = model(x, y)
    log_p = output.logits.log_softmax(-1)
    terms = [-log_p[b, t, y[b, t]] for b in range(3) for t in range(5) if y[b, t] != -100]
    torch.testing.assert_close(output.loss, torch.stack(terms).mean())


@pytest.mark.parametrize("fields", [TEXT, SERIES], ids=["text", "series"])
@pytest.mark.parametrize("cell", CELLS)
def test_state_carries_over_windows(cell: str, fields: dict[str, int]) -> None:
    model = RNN(**fields, cell=cell).double()
    x = tokens(2, 9) if "vocab_size" in fields else torch.randn(2, 9, 2, dtype=torch.float64)
    whole = model(x)
    first = model(x[:, :4])
    second = model(x[:, 4:], state=first.state)
    if whole.logits is not None:
        torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole.logits)
    else:
        means = torch.cat((first.distribution.means, second.distribution.means), 1)
        torch.testing.assert_close(means, whole.distribution.means)
    for got, want in zip(parts(second.state), parts(whole.state), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_detached_state_has_no_history(cell: str) -> None:
    state = RNN(**TEXT, cell=cell)(tokens(2, 3)).state
    assert all(part.requires_grad for part in parts(state))
    assert not any(part.requires_grad for part in parts(detach_state(state)))


@pytest.mark.parametrize("embedding_dim", [12, 7])
def test_tied_weights(embedding_dim: int, tmp_path: Path) -> None:
    model = RNN(vocab_size=11, hidden_size=12, embedding_dim=embedding_dim, tie_weights=True)
    assert [name for name in model.state_dict() if "head" in name] == (
        ["head.bias"] if embedding_dim == 12 else ["head.bias", "head.projection.weight"]
    )
    x = tokens(2, 4)
    hidden, _ = model.rnn(model.embedding(x))
    if embedding_dim != 12:
        hidden = hidden @ model.head.projection.weight.T
    torch.testing.assert_close(model(x).logits, hidden @ model.embedding.weight.T + model.head.bias)
    model.save_pretrained(tmp_path)
    for again in (copy.deepcopy(model), RNN.from_pretrained(tmp_path)):
        assert again.head.output_weight is again.embedding.weight
        assert torch.equal(again(x).logits, model(x).logits)
        with torch.no_grad():
            again.embedding.weight.zero_()
            assert torch.equal(again(x).logits[0, 0], again.head.bias)


def test_learns_a_text_by_heart() -> None:
    text = "to be, or not to be, that is the question"
    tokenizer = CharTokenizer(text)
    model = RNN(vocab_size=tokenizer.vocab_size, hidden_size=48, num_layers=1, tokenizer=tokenizer)
    ids = torch.tensor([tokenizer.encode(text)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert model.generate("t", len(text) - 1, temperature=0) == text
    assert model.generate("t", len(text) - 1, temperature=0.1, seed=1) == text


# ---------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("locked", [False, True])
def test_dropout_of_embedding_and_output(locked: bool) -> None:
    model = RNN(vocab_size=11, hidden_size=64, num_layers=1, dropout=0.5, locked_dropout=locked)
    x = torch.ones(4, 32, 64)
    dropped = model._dropped(x)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    same_over_time = bool((dropped == dropped[:, :1]).all())
    assert same_over_time == locked
    assert not bool((dropped == dropped[:1]).all())
    torch.manual_seed(3)
    first = model(tokens(2, 5)).logits
    torch.manual_seed(3)
    assert torch.equal(model(tokens(2, 5)).logits, first)
    model.eval()
    assert torch.equal(model._dropped(x), x)


@pytest.mark.parametrize("name", ["state_dropout", "weight_dropout"])
def test_dropout_inside_the_layers(name: str) -> None:
    plain = RNN(**TEXT)
    dropped = RNN(**TEXT, **{name: 0.5})
    assert getattr(dropped.rnn, name) == 0.5
    dropped.load_state_dict(plain.state_dict())
    x = tokens(3, 6)
    assert torch.equal(dropped.eval()(x).logits, plain.eval()(x).logits)
    first, second = (dropped.train()(x).logits for _ in range(2))
    assert torch.equal(first[:, 0], second[:, 0]), "the first step has no state yet"
    assert not torch.equal(first[:, 1:], second[:, 1:])


# ---------------------------------------------------------------------------------------------------
# Series


@pytest.mark.parametrize("num_components", [1, 3])
def test_density_is_that_of_torch(num_components: int) -> None:
    model = series_model(num_components=num_components)
    x = series(2, 6)
    output = model(x[:, :-1], x[:, 1:])
    mixture = output.distribution
    torchs = MixtureSameFamily(
        Categorical(logits=mixture.log_weights), Independent(Normal(mixture.means, mixture.scales), 1)
    )
    torch.testing.assert_close(mixture.log_prob(x[:, 1:]), torchs.log_prob(x[:, 1:]))
    torch.testing.assert_close(mixture.mean, torchs.mean)
    torch.testing.assert_close(output.loss, -torchs.log_prob(x[:, 1:]).mean())


def test_losses_are_in_the_units_of_the_data() -> None:
    """Standardised data have the same loss but for the Jacobian of the scale."""
    model, plain = series_model(), RNN(**SERIES)
    plain.load_state_dict({**model.state_dict(), "mean": torch.zeros(2), "scale": torch.ones(2)})
    x = series(3, 7)
    z = (x - model.mean) / model.scale
    loss, plain_loss = model(x[:, :-1], x[:, 1:]).loss, plain(z[:, :-1], z[:, 1:]).loss
    torch.testing.assert_close(loss, plain_loss + math.log(2) + math.log(30))


def test_the_scale_stays_exact_in_half_precision() -> None:
    model = RNN(**SERIES)
    mean = torch.tensor([1013.25, -1e6 - 1])
    model.set_scale(mean, torch.ones(2))
    for half in (model.half(), model.to(torch.bfloat16), model.float()):
        assert torch.equal(half.mean, mean)
    x = mean + torch.randn(2, 5, 2).round(decimals=2)
    torch.testing.assert_close(model(x, x).loss, model.bfloat16()(x, x).loss, rtol=0.05, atol=0.05)
    assert model.double().mean.dtype == torch.float64


def test_an_offset_costs_no_digits() -> None:
    model, shifted = RNN(**SERIES), RNN(**SERIES)
    shifted.load_state_dict(model.state_dict())
    shifted.set_scale(torch.full((2,), 2.0**20), torch.ones(2))
    x = torch.randint(-8, 8, (2, 6, 2)) / 8.0  # exact behind the offset, too
    torch.testing.assert_close(shifted(x + 2.0**20, x + 2.0**20).loss, model(x, x).loss)


def test_scales_have_a_floor() -> None:
    model = series_model(min_scale=0.25)
    with torch.no_grad():
        model.head.bias.fill_(-50.0)
        model.head.weight.zero_()
    scales = model(series(1, 3)).distribution.scales
    torch.testing.assert_close(scales[0, 0, 0], torch.tensor([0.5, 7.5]))


def test_learns_a_sine() -> None:
    t = torch.arange(240) * 0.3
    x = torch.sin(t).view(1, -1, 1)
    model = RNN(input_size=1, hidden_size=24, num_layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(150):
        optimizer.zero_grad()
        model(x[:, :-1], x[:, 1:]).loss.backward()
        optimizer.step()
    continued = model.generate(x[0, :120], 20, temperature=0)
    assert float((continued[120:, 0] - x[0, 120:140, 0]).abs().max()) < 0.3


def test_draws_have_the_moments_of_the_mixture() -> None:
    n = 40_000
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]).log().expand(n, 2),
        torch.tensor([[-4.0, 1.0], [2.0, 3.0]]).expand(n, 2, 2),
        torch.tensor([[0.5, 1.0], [1.0, 2.0]]).expand(n, 2, 2),
    )
    elements = torch.stack((torch.arange(n), torch.full((n,), 7)), 1)
    drawn = mixture.draw(elements).double()
    # Weighted by 0.3 and 0.7: the mean is (0.2, 2.4), the variance that within plus that between components.
    torch.testing.assert_close(drawn.mean(0), torch.tensor([0.2, 2.4], dtype=torch.float64), rtol=0, atol=0.06)
    variance = torch.tensor([0.3 * 0.25 + 0.7 + 0.21 * 36, 0.3 + 0.7 * 4 + 0.21 * 4], dtype=torch.float64)
    torch.testing.assert_close(drawn.var(0), variance, rtol=0.05, atol=0)
    assert torch.equal(mixture.draw(elements, temperature=0), mixture.mean)
    cold = mixture.draw(elements, temperature=0.04)
    assert float((cold[:, 0] > 0).float().mean()) > 0.999  # the heavier component
    torch.testing.assert_close(cold[:, 0].std(), torch.tensor(0.2), rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------
# Precision, compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_are_at_least_float32(dtype: torch.dtype) -> None:
    at_least = torch.float64 if dtype == torch.float64 else torch.float32
    text = RNN(**TEXT)
    x, y = tokens(2, 5), tokens(2, 5)
    want = text(x, y).loss
    got = text.to(dtype)(x, y).loss
    assert got.dtype == at_least
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)
    model, values = series_model(), series(2, 5)
    want = model(values, values).loss
    got = model.to(dtype)(values, values).loss
    assert got.dtype == at_least
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not kernel_devices("recurrent"), reason="the layers are PyTorch's, which do not trace")
@pytest.mark.parametrize("fields", [TEXT, SERIES], ids=["text", "series"])
def test_compiles_to_one_graph_for_any_length(fields: dict[str, int]) -> None:
    model = RNN(**fields)
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for length in (5, 9, 4):
        x = tokens(2, length) if "vocab_size" in fields else series(2, length)
        torch.testing.assert_close(compiled(x, x).loss, model(x, x).loss)
    assert graphs == 1


# ---------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("cell", CELLS)
def test_pretrained(cell: str, tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abcdefghijk")
    model = RNN(**TEXT, cell=cell, tokenizer=tokenizer)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert isinstance(again, RNN)
    assert again.tokenizer == tokenizer
    assert again.config == model.config
    assert again.generate("abc", 20, seed=1) == model.generate("abc", 20, seed=1)
    model.tokenizer = None
    model.save_pretrained(tmp_path)
    assert RNN.from_pretrained(tmp_path).tokenizer is None


def test_scale_is_saved(tmp_path: Path) -> None:
    series_model().save_pretrained(tmp_path)
    again = RNN.from_pretrained(tmp_path)
    assert again.mean.tolist() == [5.0, -100.0]
    assert again.scale.tolist() == [2.0, 30.0]


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer: expected 11 tokens as the model has, got ByteTokenizer"):
        RNN(**TEXT, tokenizer=ByteTokenizer())
    RNN(**TEXT).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected 11 tokens"):
        RNN.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "vocab_size, input_size: expected one of them above 0, got 0 and 0"),
        ({"vocab_size": 3, "input_size": 1}, "vocab_size, input_size: expected one of them above 0, got 3 and 1"),
        ({"vocab_size": 3, "cell": "mamba"}, "cell: expected one of lstm, gru, rnn_tanh, rnn_relu, got 'mamba'"),
        ({"vocab_size": 3, "hidden_size": 0}, "hidden_size: expected an int of at least 1, got 0"),
        ({"vocab_size": 3, "num_layers": 0}, "num_layers: expected an int of at least 1"),
        ({"vocab_size": 3, "dropout": 1.0}, "dropout: expected a finite number of at least 0 and below 1, got 1.0"),
        ({"vocab_size": 3, "num_components": 2}, "num_components: expected 1 for a model of tokens, got 2"),
        ({"input_size": 1, "tie_weights": True}, "tie_weights: expected False for a model of numbers, got True"),
        ({"input_size": 1, "embedding_dim": 4}, "embedding_dim: expected 0 for a model of numbers, got 4"),
        ({"input_size": 1, "min_scale": 0}, "min_scale: expected a finite number above 0, got 0"),
    ],
)
def test_bad_configurations(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RNNConfig(**fields)


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        ([[1]], None, TypeError, "inputs: expected a tensor, got list"),
        (torch.ones(2, 3), None, TypeError, "inputs: expected int64 or int32 tokens, got float32"),
        (torch.ones(3, dtype=torch.int64), None, ValueError, r"inputs: expected shape \(B, T\).*got \(3,\)"),
        (torch.ones(2, 0, dtype=torch.int64), None, ValueError, r"neither of them 0, got \(2, 0\)"),
        (torch.tensor([[1, 11]]), None, ValueError, "inputs: expected tokens 0 to 10, got 11"),
        (torch.tensor([[-1, 1]]), None, ValueError, "inputs: expected tokens 0 to 10, got -1"),
        (torch.tensor([[1, 2]]), torch.tensor([[1]]), ValueError, r"targets: expected the shape .*\(1, 2\), got"),
        (torch.tensor([[1, 2]]), torch.ones(1, 2), TypeError, "targets: expected int64 tokens, got float32"),
    ],
)
def test_bad_tokens(inputs: Tensor, targets: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RNN(**TEXT)(inputs, targets)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_bad_states(cell: str) -> None:
    model = RNN(**{**TEXT, "cell": cell, "num_layers": 2})
    inputs = torch.zeros(3, 4, dtype=torch.int64)
    good = model(inputs).state
    model(inputs, None, good)
    h = good[0] if cell == "lstm" else good

    def given(value: Any) -> Any:
        return (value, value) if cell == "lstm" else value

    width = model.config.hidden_size
    for bad, error, message in (
        (given(h[:, :2]), ValueError, rf"state: expected shape \(2, 3, {width}\), .* got \(2, 2, {width}\)"),
        (given(h[:1]), ValueError, r"state: expected shape .* got \(1, 3"),
        (given(h[0]), ValueError, r"state: expected shape"),
        (given(h.double()), TypeError, "state: expected float32, got float64"),
        (given([1.0]), TypeError, "state: expected a tensor, got list"),
    ):
        with pytest.raises(error, match=message):
            model(inputs, None, bad)
    if cell == "lstm":
        for bad in (h, (h,), "x"):
            with pytest.raises(TypeError, match=r"state: expected a pair of tensors \(h, c\), got"):
                model(inputs, None, bad)


def test_bad_values() -> None:
    model = series_model()
    with pytest.raises(TypeError, match="inputs: expected floating-point values, got int64"):
        model(torch.ones(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs: expected shape \(B, T, 2\), none of them 0, got \(1, 2, 3\)"):
        model(torch.ones(1, 2, 3))
    with pytest.raises(TypeError, match="targets: expected floating-point values"):
        model(torch.ones(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64))
    for mean, scale, message in (
        (torch.ones(3), torch.ones(2), "mean: expected 2 finite numbers"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), "scale: expected 2 finite numbers"),
        (torch.ones(2), torch.tensor([1.0, 0.0]), "scale: expected numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_scale(mean, scale)
    with pytest.raises(ValueError, match="expected a model of numbers"):
        RNN(**TEXT).set_scale(torch.zeros(1), torch.ones(1))
    with pytest.raises(TypeError, match=r"^mean: expected a tensor, got list"):
        model.set_scale([0.0, 0.0], [1.0, 1.0])
