"""Recurrent sequence models: the next token of a text, or the next values of a series.

Tokens: embedding, recurrent layers, logits of the next token (Mikolov et al., "Recurrent neural network
based language model", 2010; Graves, "Generating sequences with recurrent neural networks", 2013). Values:
recurrent layers, and the density of the next value as a Gaussian or a mixture of Gaussians (Bishop,
"Mixture density networks", 1994; Graves, 2013).

Example:
    >>> model = RNN(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    >>> output = model(inputs, targets, state)  # int64 (B, T) each; state: of the window before, or None
    >>> output.loss.backward()
    >>> model.generate("To be", max_new_tokens=100, seed=1)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

import fastgen.nn as nn
from fastgen import _validate, functional
from fastgen._dtypes import at_least_float32, dtype_name
from fastgen.models._pretrained import PretrainedConfig
from fastgen.models._sampling import (
    Generation,
    GenerationState,
    LogitsProcessor,
    RecurrentRows,
    Sampling,
    Seed,
    Stop,
    generate_values,
)
from fastgen.models._text import TextModel
from fastgen.random import dropout_mask
from fastgen.reference.recurrent import Mode
from fastgen.tokenizers import Tokenizer

__all__ = ["RNN", "GaussianMixture", "Generation", "GenerationState", "RNNConfig", "RNNOutput", "State", "detach_state"]

_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="tanh", **kwargs),
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
_LOG_2PI = math.log(2 * math.pi)

State = tuple[Tensor, Tensor] | Tensor
"""(h, c) of an LSTM, h of the other cells: (num_layers, B, hidden_size) each."""


@dataclasses.dataclass(frozen=True)
class RNNConfig(PretrainedConfig):
    """Everything that defines an RNN but its weights.

    Args:
        vocab_size: for tokens 0 .. vocab_size - 1, else 0.
        input_size: for a series of that many numbers a step, else 0. One of the two is given.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        embedding_dim: width of the embedding of a token; 0 is `hidden_size`.
        hidden_size: width of the recurrent layers.
        num_layers: how many of them.
        num_components: for numbers: 1 for a Gaussian density of the next step, more for a mixture. The
            numbers of a step are independent given the component.
        min_scale: least standard deviation of a Gaussian, in units of the training data's own; without
            one the likelihood of a series without noise has no bound.
        tie_weights: the output has the embedding's weights (Press & Wolf, "Using the output embedding to
            improve language models", 2017), behind a projection without bias if the widths differ.
        dropout: probability of dropping an element of the embedding, of the output of each recurrent layer
            but the last, and of the last before the output (Zaremba et al., "Recurrent neural network
            regularization", 2014).
        locked_dropout: whether the masks of the embedding and of the last layer stay the same over a window
            (Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016).
        state_dropout: probability of dropping an element of the state on its way to the next step, by a mask
            that stays the same over a window (the same paper).
        weight_dropout: probability of dropping an element of the recurrent weights (Merity et al.,
            "Regularizing and optimizing LSTM language models", 2018).
        zoneout: probability with which a unit of the state keeps its value of the step before, and of an LSTM's
            cells too, or (p_c, p_h) for cells and states; see `fastgen.nn.LSTM`.
        layer_norm: whether an LSTM normalises its products and cells; see `fastgen.nn.LSTM`.

    Raises:
        ValueError: for a field out of range, naming it.
    """

    model_type: ClassVar[str] = "rnn"

    vocab_size: int = 0
    input_size: int = 0
    cell: str = "lstm"
    embedding_dim: int = 0
    hidden_size: int = 256
    num_layers: int = 2
    num_components: int = 1
    min_scale: float = 1e-3
    tie_weights: bool = False
    dropout: float = 0.0
    locked_dropout: bool = False
    state_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    layer_norm: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "vocab_size": _validate.integer("vocab_size", self.vocab_size, 0),
            "input_size": _validate.integer("input_size", self.input_size, 0),
            "cell": _validate.choice("cell", self.cell, _LAYERS),
            "embedding_dim": _validate.integer("embedding_dim", self.embedding_dim, 0),
            "hidden_size": _validate.integer("hidden_size", self.hidden_size, 1),
            "num_layers": _validate.integer("num_layers", self.num_layers, 1),
            "num_components": _validate.integer("num_components", self.num_components, 1),
            "min_scale": _validate.number("min_scale", self.min_scale, above=0),
            "tie_weights": _validate.boolean("tie_weights", self.tie_weights),
            "locked_dropout": _validate.boolean("locked_dropout", self.locked_dropout),
            "zoneout": self._checked_zoneout(),
            "layer_norm": _validate.boolean("layer_norm", self.layer_norm),
        }
        for name in ("dropout", "state_dropout", "weight_dropout"):
            checked[name] = _validate.number(name, getattr(self, name), minimum=0, below=1)
        if bool(self.vocab_size) == bool(self.input_size):
            raise ValueError(
                f"vocab_size, input_size: expected one of them above 0, got {self.vocab_size} and {self.input_size}"
            )
        if self.vocab_size:
            checked["embedding_dim"] = checked["embedding_dim"] or checked["hidden_size"]
            unused: dict[str, Any] = {"num_components": 1}
        else:
            unused = {"embedding_dim": 0, "tie_weights": False}
        if self.layer_norm and self.cell != "lstm":
            raise ValueError(f"layer_norm: expected False for {self.cell}, only an LSTM has it, got True")
        for name, value in unused.items():
            if checked[name] != value:
                kind = "tokens" if self.vocab_size else "numbers"
                raise ValueError(f"{name}: expected {value} for a model of {kind}, got {checked[name]}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _checked_zoneout(self) -> float | tuple[float, float]:
        value = self.zoneout
        if not isinstance(value, (tuple, list)):
            return _validate.number("zoneout", value, minimum=0, below=1)
        if len(value) != 2 or self.cell != "lstm":
            expected = "a number, or one for c and one for h" if self.cell == "lstm" else f"a number for {self.cell}"
            raise ValueError(f"zoneout: expected {expected}, got {value!r}")
        of_c, of_h = (_validate.number("zoneout", p, minimum=0, below=1) for p in value)
        return of_c, of_h


@dataclasses.dataclass
class GaussianMixture:
    """The density of a vector of F numbers: K Gaussians with diagonal covariances, in the units of the data.

    Attributes:
        log_weights: (..., K), log-probabilities of the components.
        means: (..., K, F).
        scales: (..., K, F), standard deviations.
    """

    log_weights: Tensor
    means: Tensor
    scales: Tensor

    @property
    def mean(self) -> Tensor:
        """(..., F): the mean of the mixture."""
        return (self.log_weights.exp().unsqueeze(-1) * self.means).sum(-2)

    def draw(self, elements: Tensor, temperature: float = 1.0) -> Tensor:
        """(n, F): a sample for each of n rows, or at temperature 0 the mean; the density is (n, ...).

        Logits of the components are divided by the temperature and variances multiplied by it (Ha & Schmidhuber,
        "World models", 2018).

        Args:
            elements: (n, 2) int64, a seed and an element e for each row. The component takes element e of the
                64-bit stream, number f of the F takes element e F + f of the 32-bit one.
            temperature: at least 0.
        """
        if temperature == 0:
            return self.mean
        features = self.means.shape[-1]
        weights = torch.softmax(self.log_weights.double() / temperature, dim=-1).cumsum(-1)
        u = torch.ops.fastgen.uniform(elements, [1], torch.float64, 0.0, 1.0)
        component = torch.searchsorted(weights, u, right=True).clamp(max=weights.shape[-1] - 1)
        places = component.unsqueeze(-1).expand(-1, 1, features)
        mean, scale = (x.gather(1, places).squeeze(1) for x in (self.means, self.scales))
        places = torch.stack((elements[:, 0], elements[:, 1] * features), dim=-1)
        noise = torch.ops.fastgen.normal(places, [features], torch.float32, 0.0, 1.0)
        return mean + scale * math.sqrt(temperature) * noise.to(mean.dtype)

    def log_prob(self, values: Tensor) -> Tensor:
        """(...,): the log-density of values (..., F), in nats."""
        z = (values.unsqueeze(-2) - self.means) / self.scales
        log_density = -0.5 * (z.square() + _LOG_2PI).sum(-1) - self.scales.log().sum(-1)
        return torch.logsumexp(self.log_weights + log_density, dim=-1)


@dataclasses.dataclass
class RNNOutput:
    """What `RNN.forward` gives; B streams, T steps.

    Attributes:
        loss: scalar, the mean negative log-likelihood of a target in nats; None without targets.
        logits: (B, T, vocab_size) of the next token, or None.
        distribution: of the next values, or None; its leading dimensions are (B, T).
        state: after the last step, to start the next window with.
    """

    loss: Tensor | None
    logits: Tensor | None
    distribution: GaussianMixture | None
    state: State


class RNN(TextModel):
    """Recurrent sequence model; `RNN(config)` or `RNN(**fields)` with the fields of `RNNConfig`.

    Losses and densities are at least float32, also in a half-precision model and under autocast. Series
    come in and go out in the units of the data: the model holds the mean and the standard deviation that
    it standardises them by (`set_scale`). Weights and dropout draw from torch's default generator.

    Args:
        config, fields: see `RNNConfig`.
        tokenizer: what `generate` reads and writes strings with; saved and loaded with the model.
    """

    config_class = RNNConfig
    rows_class = RecurrentRows
    config: RNNConfig
    embedding: nn.Embedding
    rnn: nn.RNNBase
    mean: Tensor
    scale: Tensor

    def __init__(self, config: RNNConfig | None = None, *, tokenizer: Tokenizer | None = None, **fields: Any) -> None:
        super().__init__(config, tokenizer=tokenizer, **fields)
        config = self.config
        if config.vocab_size:
            self.embedding = nn.Embedding(config.vocab_size, config.embedding_dim)
            self.head: _TokenHead | _MixtureHead = _TokenHead(config, self.embedding if config.tie_weights else None)
        else:
            self.register_buffer("mean", torch.zeros(config.input_size))
            self.register_buffer("scale", torch.ones(config.input_size))
            self.head = _MixtureHead(config)
        more = {
            name: p
            for name in ("state_dropout", "weight_dropout", "zoneout", "layer_norm")
            if (p := getattr(config, name))
        }
        self.rnn = _LAYERS[config.cell](
            config.embedding_dim or config.input_size,
            config.hidden_size,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
            **more,
        )
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        if self.config.cell == "lstm":
            # A forget gate that starts open lets gradients through from the first step on (Jozefowicz et al.,
            # "An empirical exploration of recurrent network architectures", 2015).
            hidden = self.config.hidden_size
            with torch.no_grad():
                for layer in range(self.config.num_layers):
                    getattr(self.rnn, f"bias_ih_l{layer}")[hidden : 2 * hidden] += 1.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in (torch.bfloat16, torch.float16):
                # In a half type a mean of 1013 would be off by 2, much of what is left when it is taken away.
                self._buffers[name] = buffer.to(moved.device)
        return self

    @property
    def mode(self) -> Mode:
        """The cell, as the ops number them."""
        return Mode[self.config.cell.upper()]

    @property
    def is_text(self) -> bool:
        """Whether the steps are tokens; else they are numbers."""
        return self.config.vocab_size > 0

    def set_scale(self, mean: Tensor, scale: Tensor) -> None:
        """What a series is standardised by: (values - mean) / scale, (input_size,) each, scale > 0."""
        if self.is_text:
            raise ValueError("mean: expected a model of numbers, this one has tokens")
        for name, value in (("mean", mean), ("scale", scale)):
            shape = _validate.tensor(name, value).shape
            if shape != (self.config.input_size,) or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}: expected {self.config.input_size} finite numbers, got {value}")
        if not bool((scale > 0).all()):
            raise ValueError(f"scale: expected numbers above 0, got {scale}")
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, state: State | None = None) -> RNNOutput:
        """Predictions of the next step at every step, and their loss.

        Args:
            inputs: tokens, ints (B, T); or values, floats (B, T, input_size).
            targets: what came next, already shifted: int64 (B, T), where -100 does not count, or floats
                (B, T, input_size).
            state: `RNNOutput.state` of the window before; None for zeros. It is not detached.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it. The range of the tokens is
                looked at on the CPU only, elsewhere it would stall the device.
        """
        self._check_steps("inputs", inputs)
        embedded = self.embedding(inputs) if self.is_text else self.standardised(inputs)
        if state is not None:
            self._check_state(state, embedded)
        hidden, state = self.rnn(self._dropped(embedded), state)
        predicted = self.head(self._dropped(hidden))
        loss = None
        if self.is_text:
            if targets is not None:
                self._check_targets(inputs, targets)
                loss = F.cross_entropy(at_least_float32(predicted).flatten(0, 1), targets.flatten())
            return RNNOutput(loss, predicted, None, state)
        distribution = self.density(predicted)
        if targets is not None:
            self._check_targets(inputs, targets)
            assert isinstance(self.head, _MixtureHead)
            # Standardised, as float32 has no digits to spare for an offset; the scale is the Jacobian.
            log_prob = self.head.mixture(predicted).log_prob(self.standardised(targets, distribution.means.dtype))
            loss = self.scale.log().sum() - log_prob.mean()
        return RNNOutput(loss, None, distribution, state)

    def _generation(
        self,
        prompt: Any,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stop,
        seed: Seed,
        n: int,
        state: Any,
        logits_processor: LogitsProcessor | None,
        one_by_one: bool,
    ) -> Generation:
        if self.is_text:
            return super()._generation(
                prompt, max_new_tokens, sampling, stop, seed, n, state, logits_processor, one_by_one
            )
        for name, default in dataclasses.asdict(Sampling()).items():
            value = getattr(sampling, name)
            if name != "temperature" and value != default:
                expected = "1" if name == "repetition_penalty" else "None"
                raise ValueError(f"{name}: expected {expected} for a model of numbers, got {value!r}")
        for name, value in (("stop", stop), ("logits_processor", logits_processor)):
            if value is not None:
                raise ValueError(f"{name}: expected None for a model of numbers, got {value!r}")
        return generate_values(self, prompt, max_new_tokens, sampling.temperature, seed, n, state)

    def generation_weights(self) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor, Tensor]:
        """Detached: the embedding, the layers' weights, projection, output weight and bias, as `rnn_generate` takes."""
        rnn: Any = self.rnn
        names: list[str] = []
        for layer in range(self.config.num_layers):
            names += rnn._flat_weights_names[4 * layer : 4 * layer + 4] + list(
                rnn._norm_names[4 * layer : 4 * layer + 4]
            )
        layers: list[Tensor] = [getattr(rnn, name).detach() for name in names]
        if isinstance(self.head, _TokenHead):
            projection = None if self.head.projection is None else self.head.projection.weight.detach()
            output = (projection, self.head.output_weight.detach(), self.head.bias.detach())
            return self.embedding.weight.detach(), layers, *output
        weight, bias = self.head.weight.detach(), self.head.bias.detach()
        return weight.new_empty(0), layers, None, weight, bias

    def generation_options(self) -> tuple[float, float, float]:
        """norm_eps, zoneout_c and zoneout_h, as `rnn_generate` takes."""
        zoneout, lstm = self.config.zoneout, self.config.cell == "lstm"
        of_c, of_h = zoneout if isinstance(zoneout, tuple) else (zoneout if lstm else 0.0, zoneout)
        rnn: Any = self.rnn
        return rnn.layer_norm_eps, of_c, of_h

    def standardised(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Values (..., input_size) as the layers take them, in `dtype` (default: the model's)."""
        # In the dtype of the data: a half type would lose digits before the mean is gone.
        values = at_least_float32(values)
        standardised = (values - self.mean.to(values.dtype)) / self.scale.to(values.dtype)
        return standardised.to(self.dtype if dtype is None else dtype)

    def density(self, parameters: Tensor) -> GaussianMixture:
        """The density, in the units of the data, from the outputs of the head."""
        assert isinstance(self.head, _MixtureHead)
        standardised = self.head.mixture(parameters)
        means, scales = standardised.means, standardised.scales
        mean, scale = self.mean.to(means.dtype), self.scale.to(means.dtype)
        return GaussianMixture(standardised.log_weights, means * scale + mean, scales * scale)

    def _dropped(self, x: Tensor) -> Tensor:
        """x (B, T, D) under dropout, in training."""
        p = self.config.dropout
        if not self.training or p == 0:
            return x
        if not self.config.locked_dropout:
            return F.dropout(x, p)
        mask = dropout_mask(x.shape[0], 1, x.shape[2], p=p, dtype=x.dtype, device=x.device)
        return x * mask * (1 / (1 - p))

    def _check_steps(self, name: str, x: Tensor) -> None:
        if self.is_text:
            self._check_tokens(name, x)
            return
        _validate.floats(name, x)
        if x.dim() != 3 or x.shape[2] != self.config.input_size or x.numel() == 0:
            raise ValueError(
                f"{name}: expected shape (B, T, {self.config.input_size}), none of them 0, got {tuple(x.shape)}"
            )

    def _check_state(self, state: Any, embedded: Tensor) -> None:
        config = self.config
        parts = state if config.cell == "lstm" else (state,)
        if not isinstance(parts, (tuple, list)) or (config.cell == "lstm" and len(parts) != 2):
            raise TypeError(f"state: expected a pair of tensors (h, c), got {type(state).__name__}")
        shape = (config.num_layers, embedded.shape[0], config.hidden_size)
        for value in parts:
            if _validate.tensor("state", value).shape != shape:
                raise ValueError(f"state: expected shape {shape}, (layers, B, hidden_size), got {tuple(value.shape)}")
            if value.dtype != embedded.dtype and not torch._C._is_any_autocast_enabled():
                raise TypeError(f"state: expected {dtype_name(embedded.dtype)}, got {dtype_name(value.dtype)}")

    def _check_targets(self, inputs: Tensor, targets: Tensor) -> None:
        if _validate.tensor("targets", targets).shape != inputs.shape:
            raise ValueError(
                f"targets: expected the shape of inputs, {tuple(inputs.shape)}, got {tuple(targets.shape)}"
            )
        if self.is_text and targets.dtype != torch.int64:
            raise TypeError(f"targets: expected int64 tokens, got {dtype_name(targets.dtype)}")
        if not self.is_text:
            _validate.floats("targets", targets)


class _TokenHead(nn.Module):
    """(..., hidden_size) -> (..., vocab_size): logits, by weights of its own or by those of the embedding."""

    weight: Tensor
    projection: nn.Linear | None

    def __init__(self, config: RNNConfig, embedding: nn.Embedding | None) -> None:
        super().__init__()
        self.projection = None
        width = config.hidden_size
        if embedding is not None:
            if config.hidden_size != config.embedding_dim:
                self.projection = nn.Linear(config.hidden_size, config.embedding_dim, bias=False)
            width = config.embedding_dim
            # As an output, a standard normal embedding would start with logits of size sqrt(width).
            nn.init.normal_(embedding.weight, std=width**-0.5)
        output = nn.Linear(width, config.vocab_size)
        self.bias = output.bias
        if embedding is None:
            self.weight = output.weight
        # In a tuple, which hides it from the module: the state dict, and with it the file, has a weight once.
        self._tied = (embedding,)

    @property
    def output_weight(self) -> Tensor:
        """(vocab_size, hidden_size or embedding_dim)."""
        embedding = self._tied[0]
        return self.weight if embedding is None else embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        if self.projection is not None:
            hidden = self.projection(hidden)
        return functional.linear(hidden, self.output_weight, self.bias)


class _MixtureHead(nn.Linear):
    """(..., hidden_size) -> (..., K (1 + 2 F)): what `mixture` makes a density over standardised values from."""

    def __init__(self, config: RNNConfig) -> None:
        self.shape = (config.num_components, config.input_size)
        self.min_scale = config.min_scale
        super().__init__(config.hidden_size, config.num_components * (1 + 2 * config.input_size))

    def mixture(self, parameters: Tensor) -> GaussianMixture:
        """K logits, K F means and K F scales, which a softplus keeps above `min_scale`."""
        components, features = self.shape
        sizes = (components, components * features, components * features)
        logits, means, scales = at_least_float32(parameters).split(sizes, dim=-1)
        return GaussianMixture(
            torch.log_softmax(logits, dim=-1),
            means.unflatten(-1, self.shape),
            F.softplus(scales.unflatten(-1, self.shape)) + self.min_scale,
        )


def detach_state(state: State) -> State:
    """The state without its history: where truncated back-propagation through time cuts."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return state.detach()
