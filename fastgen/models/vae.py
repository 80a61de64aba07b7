"""Variational autoencoder (Kingma & Welling, "Auto-Encoding Variational Bayes", 2014).

The encoder gives a diagonal Gaussian q(z | x), the prior p(z) is N(0, I), and the decoder gives either
the logits of a Bernoulli p(x | z) or the means of a Gaussian one. With `num_classes` both networks are
told the label of the example (Sohn et al., "Learning structured output representation using deep
conditional generative models", 2015).

Example:
    >>> model = VAE(input_shape=(1, 28, 28), latent_dim=16)
    >>> model(images).loss.backward()  # images: (B, 1, 28, 28) floats in [0, 1]
    >>> pictures = model.generate(64, seed=1)  # (64, 1, 28, 28)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import fastgen.nn as nn
from fastgen import _validate
from fastgen._dtypes import at_least_float32
from fastgen.functional import reparameterize, reparameterize_kl
from fastgen.models._layers import (
    ACTIVATIONS,
    ConditionalLinear,
    Labels,
    check_data,
    conv_channels,
    no_channels,
    noise_source,
    one_hot,
    pyramid,
)
from fastgen.models._pretrained import PretrainedConfig, PretrainedModel
from fastgen.random import AnyGenerator, Generator, normal, seed_offset_for

__all__ = ["VAE", "VAEConfig", "VAEOutput"]

_LOG_2PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class VAEConfig(PretrainedConfig):
    """Everything that defines a VAE but its weights.

    Args:
        input_shape: shape of one example: (C, H, W) for images, any other for "mlp".
        latent_dim: dimensions of z.
        architecture: "mlp" takes any input; "conv" takes images with sides of at least 8.
        hidden_sizes: widths of the dense layers, from the input to the latent; the decoder mirrors them.
            May be empty. Default (512, 256) for "mlp"; (256,), between the convolutions and the latent,
            for "conv".
        channels: widths of the convolutions, each of which halves the picture; the decoder mirrors them.
            Default: 32, 64, 128, 256, 256 ... until the smaller side is under 8. Empty for "mlp".
        activation: "elu", "gelu", "leaky_relu", "relu", "silu" or "tanh".
        dropout: probability of dropping an activation of a dense hidden layer, 0 <= dropout < 1.
        likelihood: "bernoulli" for data in [0, 1], "gaussian" for any real data.
        learn_variance: whether the Gaussian's variance is a parameter. It is one number for all elements
            of all examples: that calibrates reconstruction against KL without the collapse of a variance
            for each pixel (Rybkin et al., "Simple and effective VAE training with calibrated decoders", 2021).
        variance: the Gaussian's variance, in squared units of the data; where it starts if it is learned.
        beta: weight of the KL divergence (Higgins et al., "beta-VAE", 2017); 1 gives the ELBO.
        kl_warmup_steps: training steps over which the weight rises linearly from 0 to beta.
        free_bits: nats of KL that each latent dimension may use at no cost (Kingma et al., "Improved
            variational inference with inverse autoregressive flow", 2016, section C.8).
        num_classes: labels are 0 .. num_classes - 1; 0 for an unconditional model.

    Raises:
        ValueError: for a field out of range, naming it.
    """

    model_type: ClassVar[str] = "vae"

    # The defaults had the best held-out bound of what two minutes on two cores can train on 4,500 digits.
    input_shape: tuple[int, ...] = (1, 28, 28)
    latent_dim: int = 16
    architecture: str = "conv"
    hidden_sizes: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    likelihood: str = "bernoulli"
    learn_variance: bool = True
    variance: float = 0.1
    beta: float = 1.0
    kl_warmup_steps: int = 0
    free_bits: float = 0.0
    num_classes: int = 0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "input_shape": _validate.integers("input_shape", self.input_shape, 1),
            "latent_dim": _validate.integer("latent_dim", self.latent_dim, 1),
            "architecture": _validate.choice("architecture", self.architecture, ("mlp", "conv")),
            "activation": _validate.choice("activation", self.activation, ACTIVATIONS),
            "dropout": _validate.number("dropout", self.dropout, minimum=0, below=1),
            "likelihood": _validate.choice("likelihood", self.likelihood, ("bernoulli", "gaussian")),
            "learn_variance": _validate.boolean("learn_variance", self.learn_variance),
            "variance": _validate.number("variance", self.variance, above=0),
            "beta": _validate.number("beta", self.beta, minimum=0),
            "kl_warmup_steps": _validate.integer("kl_warmup_steps", self.kl_warmup_steps, 0),
            "free_bits": _validate.number("free_bits", self.free_bits, minimum=0),
            "num_classes": _validate.integer("num_classes", self.num_classes, 0),
        }
        convolutional = self.architecture == "conv"
        hidden = ((256,) if convolutional else (512, 256)) if self.hidden_sizes is None else self.hidden_sizes
        checked["hidden_sizes"] = _validate.integers("hidden_sizes", hidden, 1, allow_empty=True)
        shape = checked["input_shape"]
        if convolutional:
            if len(shape) != 3 or min(shape[1:]) < 8:
                raise ValueError(f"input_shape: expected (C, H, W) with H, W of at least 8 for 'conv', got {shape}")
            checked["channels"] = conv_channels(self.channels, shape, shape[1:])
        else:
            checked["channels"] = no_channels(self.channels, self.architecture)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass
class VAEOutput:
    """What `VAE.forward` gives; B examples, all losses in nats.

    Attributes:
        loss: scalar, the mean over the batch of reconstruction + weight * KL, to be minimised.
        reconstruction_loss: (B,), -log p(x | z).
        kl: (B,), KL(q(z | x) || p(z)).
        mu, logvar: (B, latent_dim), mean and log-variance of q(z | x).
        z: (B, latent_dim), the sample of it.
        decoded: (B, *input_shape), the decoder's output: logits ("bernoulli") or means ("gaussian").
        likelihood: which of the two.
    """

    loss: Tensor
    reconstruction_loss: Tensor
    kl: Tensor
    mu: Tensor
    logvar: Tensor
    z: Tensor
    decoded: Tensor
    likelihood: str

    @property
    def elbo(self) -> Tensor:
        """(B,): the single-sample lower bound of log p(x), whatever beta and free bits did to `loss`."""
        return -(self.reconstruction_loss + self.kl)

    @property
    def reconstruction(self) -> Tensor:
        """(B, *input_shape): the means of p(x | z)."""
        return _means(self.decoded, self.likelihood)

    @property
    def kl_per_dimension(self) -> Tensor:
        """(latent_dim,): the KL of each dimension, averaged over the batch; near 0 where it is unused."""
        return _elementwise_kl(self.mu, self.logvar).mean(0)


class VAE(PretrainedModel):
    """Variational autoencoder; `VAE(config)` or `VAE(**fields)` with the fields of `VAEConfig`.

    Losses, latents and their statistics are at least float32, also in a half-precision model and under
    autocast. The weights draw their initial values from torch's default generator.
    """

    config_class = VAEConfig
    config: VAEConfig

    def __init__(self, config: VAEConfig | None = None, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.encoder = _Encoder(self.config)
        self.decoder = _Decoder(self.config)
        if self.config.likelihood == "gaussian":
            log_variance = torch.tensor(math.log(self.config.variance))
            if self.config.learn_variance:
                self.log_variance = nn.Parameter(log_variance)
            else:
                self.register_buffer("log_variance", log_variance)

    @property
    def noise_per_sample(self) -> int:
        """Elements of the random stream that one example takes in `forward`.

        Row r of a batch gets elements [r * noise_per_sample, (r + 1) * noise_per_sample) from the
        generator's offset on, so a rank that starts at its first row sees what one process would.
        """
        return self.config.latent_dim

    def kl_weight(self, step: int | None = None) -> float:
        """Weight of the KL divergence at training step `step`, counted from 0; None: after the warm-up."""
        warmup = self.config.kl_warmup_steps
        if step is None or step >= warmup:
            return self.config.beta
        return self.config.beta * (step / warmup)

    def forward(
        self, x: Tensor, labels: Labels = None, *, step: int | None = None, generator: AnyGenerator = None
    ) -> VAEOutput:
        """Loss and everything on the way to it.

        loss = mean over the batch of -log p(x | z) + kl_weight(step) * KL(q(z | x) || p(z)). With free
        bits f > 0 the KL term is the sum over dimensions of max(f, mean KL of the dimension) instead.

        Args:
            x: (B, *input_shape) floats; in [0, 1] for "bernoulli", whose values are taken as they are, as
                probabilities of a pixel being on.
            labels: (B,) ints, or one int for all, for a conditional model; else None.
            step: training step, for the KL warm-up.
            generator: source of the noise; see `fastgen.functional.reparameterize`.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it. The range of `x` and of
                `labels` is looked at on the CPU only, elsewhere it would stall the device.
        """
        self._check_input("x", x)
        condition = self._condition(labels, len(x))
        mu, logvar = self._encode(x, condition)
        if self.config.free_bits > 0:
            z = reparameterize(mu, logvar, generator=generator)
            elementwise = _elementwise_kl(mu, logvar)
            kl = elementwise.sum(-1)
            kl_term = elementwise.mean(0).clamp_min(self.config.free_bits).sum()
        else:
            z, kl = reparameterize_kl(mu, logvar, generator=generator)
            kl_term = kl.mean()
        decoded = self._decode(z, condition)
        reconstruction_loss = self._reconstruction_loss(x, decoded)
        loss = reconstruction_loss.mean() + self.kl_weight(step) * kl_term
        return VAEOutput(loss, reconstruction_loss, kl, mu, logvar, z, decoded, self.config.likelihood)

    def encode(self, x: Tensor, labels: Labels = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of q(z | x), each (B, latent_dim); x and labels as for `forward`."""
        self._check_input("x", x)
        return self._encode(x, self._condition(labels, len(x)))

    def decode(self, z: Tensor, labels: Labels = None) -> Tensor:
        """(B, *input_shape): the means of p(x | z) for z (B, latent_dim)."""
        _validate.tensor("z", z)
        if z.dim() != 2 or z.shape[1] != self.config.latent_dim:
            raise ValueError(f"z: expected shape (B, {self.config.latent_dim}), got {tuple(z.shape)}")
        return _means(self._decode(z, self._condition(labels, len(z))), self.config.likelihood)

    def reconstruct(self, x: Tensor, labels: Labels = None) -> Tensor:
        """(B, *input_shape): x through the mean of its posterior and back; evaluation mode, no gradients."""
        with self.inference():
            mu, _ = self.encode(x, labels)
            return self.decode(mu, labels)

    def interpolate(
        self, a: Tensor, b: Tensor, steps: int = 8, labels: Labels = None, labels_b: Labels = None
    ) -> Tensor:
        """(B, steps, *input_shape): pictures on the way from the reconstruction of a to that of b.

        The way is the straight line between the posterior means: unlike prior samples these do not lie on
        a sphere, and the line stays where the decoder was trained. A conditional model moves from `labels`
        to `labels_b` (default: the same) in the same proportion. Evaluation mode, no gradients.

        Args:
            a, b: (B, *input_shape) each.
            steps: pictures a row, both ends included, at least 2.
        """
        _validate.integer("steps", steps, 2)
        self._check_input("a", a)
        self._check_input("b", b)
        if len(a) != len(b):
            raise ValueError(f"b: expected as many examples as a, {len(a)}, got {len(b)}")
        with self.inference():
            condition_a = self._condition(labels, len(a))
            condition_b = condition_a if labels_b is None else self._condition(labels_b, len(b))
            start, end = self._encode(a, condition_a)[0], self._encode(b, condition_b)[0]
            weight = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device).view(1, steps, 1)
            z = torch.lerp(start.unsqueeze(1), end.unsqueeze(1), weight).flatten(0, 1)
            if condition_a is not None and condition_b is not None:
                blend = weight.to(condition_a.dtype)
                condition_a = torch.lerp(condition_a.unsqueeze(1), condition_b.unsqueeze(1), blend).flatten(0, 1)
            means = _means(self._decode(z, condition_a), self.config.likelihood)
            return means.view(len(a), steps, *self.config.input_shape)

    def generate(
        self,
        n: int,
        *,
        seed: int | None = None,
        labels: Labels = None,
        generator: AnyGenerator = None,
        temperature: float = 1.0,
        batch_size: int = 256,
    ) -> Tensor:
        """(n, *input_shape): means of p(x | z) for z drawn from the prior; evaluation mode, no gradients.

        The latents of a seed have the same bits on every device, in every dtype of the model and for every
        `batch_size`, and those of a smaller n are the first of a larger one; pictures agree up to the
        rounding of the network.

        Args:
            n: how many, at least 1.
            seed: shorthand for `generator=fastgen.random.Generator(seed)`.
            labels: the class of each: one int for all, or n ints; default for a conditional model:
                0, 1, ..., num_classes - 1, 0, 1, ...
            generator: source of the latents; default torch's default generator.
            temperature: standard deviation of the latents, at least 0. Under 1: more typical, less varied.
            batch_size: pictures decoded at once.
        """
        _validate.integer("n", n, 1)
        _validate.integer("batch_size", batch_size, 1)
        _validate.number("temperature", temperature, minimum=0)
        generator = noise_source(seed, generator)
        if labels is None and self.config.num_classes:
            labels = torch.arange(n, device=self.device) % self.config.num_classes
        with self.inference():
            condition = self._condition(labels, n)
            # float32 whatever the model's dtype: float64 draws come from another stream.
            size = (n, self.config.latent_dim)
            z = normal(size, std=temperature, generator=generator, dtype=torch.float32, device=self.device)
            batches = [
                self._decode(z[rows], None if condition is None else condition[rows])
                for rows in (slice(start, start + batch_size) for start in range(0, n, batch_size))
            ]
            return _means(torch.cat(batches), self.config.likelihood)

    def importance_weighted_bound(
        self,
        x: Tensor,
        labels: Labels = None,
        *,
        num_samples: int = 100,
        generator: AnyGenerator = None,
        chunk_size: int = 1024,
    ) -> Tensor:
        """(B,): lower bound of log p(x) in nats (Burda et al., "Importance weighted autoencoders", 2016, eq. 8).

        log of the mean over K samples z_k of q(z | x) of p(x, z_k) / q(z_k | x). K = 1 is the ELBO; the
        bound rises with K, towards log p(x). Evaluation mode, no gradients. Noise is taken example by
        example, so the result depends neither on `chunk_size` nor on how a data set is split into batches.

        Args:
            x, labels: as for `forward`.
            num_samples: K, at least 1.
            generator: source of the noise, num_samples * noise_per_sample elements an example.
            chunk_size: (example, sample) pairs decoded at once, which bounds the memory.
        """
        _validate.integer("num_samples", num_samples, 1)
        _validate.integer("chunk_size", chunk_size, 1)
        self._check_input("x", x)
        with self.inference():
            condition = self._condition(labels, len(x))
            mu, logvar = self._encode(x, condition)
            if not isinstance(generator, Generator):  # one draw from torch's for all chunks
                state = seed_offset_for(generator, 0, x.device)
                generator = Generator(0, device=x.device).set_state(state)
            pairs = torch.arange(len(x), device=x.device).repeat_interleave(num_samples)
            chunks = []
            for rows in torch.split(pairs, chunk_size):
                z = reparameterize(mu[rows], logvar[rows], generator=generator)
                decoded = self._decode(z, None if condition is None else condition[rows])
                log_likelihood = -self._reconstruction_loss(x[rows], decoded)
                chunks.append(log_likelihood + _log_prior_ratio(z, mu[rows], logvar[rows]))
            log_weights = torch.cat(chunks).view(len(x), num_samples)
            return torch.logsumexp(log_weights, dim=1) - math.log(num_samples)

    def _encode(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        mu, logvar = at_least_float32(self.encoder(x.to(self.dtype), condition)).chunk(2, dim=-1)
        return mu, logvar

    def _decode(self, z: Tensor, condition: Tensor | None) -> Tensor:
        decoded: Tensor = self.decoder(z.to(self.dtype), condition)
        return decoded

    def _reconstruction_loss(self, x: Tensor, decoded: Tensor) -> Tensor:
        """(B,): -log p(x | z)."""
        decoded = at_least_float32(decoded.flatten(1))
        x = x.flatten(1).to(decoded.dtype)
        if self.config.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum(-1)
        log_variance = at_least_float32(self.log_variance)
        squares = (x - decoded).square().sum(-1)
        return 0.5 * (squares * torch.exp(-log_variance) + x.shape[1] * (_LOG_2PI + log_variance))

    def _check_input(self, name: str, x: Tensor) -> None:
        bernoulli = self.config.likelihood == "bernoulli"
        check_data(name, x, self.config.input_shape, (0.0, 1.0) if bernoulli else None, " for 'bernoulli'")

    def _condition(self, labels: Labels, batch: int) -> Tensor | None:
        return one_hot(labels, batch, self.config.num_classes, next(self.parameters()))


class _Encoder(nn.Module):
    """(B, *input_shape) -> (B, 2 * latent_dim): mu and logvar side by side."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        shapes = pyramid(config.input_shape, config.channels or ())
        self.features = nn.Sequential()
        for before, after in itertools.pairwise(shapes):
            self.features.append(nn.Conv2d(before[0], after[0], kernel_size=4, stride=2, padding=1))
            self.features.append(ACTIVATIONS[config.activation]())
        sizes = (math.prod(shapes[-1]), *(config.hidden_sizes or ()), 2 * config.latent_dim)
        self.head = _Dense(sizes, config)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        statistics: Tensor = self.head(self.features(x).flatten(1), condition)
        return statistics


class _Decoder(nn.Module):
    """(B, latent_dim) -> (B, *input_shape): the encoder's layers mirrored."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        shapes = pyramid(config.input_shape, config.channels or ())[::-1]
        sizes = (config.latent_dim, *reversed(config.hidden_sizes or ()), math.prod(shapes[0]))
        self.head = _Dense(sizes, config)
        self.features = nn.Sequential(nn.Unflatten(1, shapes[0]))
        for before, after in itertools.pairwise(shapes):
            self.features.append(ACTIVATIONS[config.activation]())
            odd = (after[1] % 2, after[2] % 2)  # gives back the row or column that the halving dropped
            self.features.append(
                nn.ConvTranspose2d(before[0], after[0], kernel_size=4, stride=2, padding=1, output_padding=odd)
            )

    def forward(self, z: Tensor, condition: Tensor | None) -> Tensor:
        decoded: Tensor = self.features(self.head(z, condition))
        return decoded


class _Dense(nn.Module):
    """Linear layers with activation and dropout between them."""

    def __init__(self, sizes: Sequence[int], config: VAEConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConditionalLinear(size, following, config.num_classes) for size, following in itertools.pairwise(sizes)
        )
        self.between = nn.Sequential(ACTIVATIONS[config.activation](), nn.Dropout(config.dropout))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        for depth, layer in enumerate(self.layers):
            x = layer(self.between(x) if depth else x, condition)
        return x


def _means(decoded: Tensor, likelihood: str) -> Tensor:
    return torch.sigmoid(decoded) if likelihood == "bernoulli" else decoded


def _elementwise_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each element (Kingma & Welling, 2014, appendix B)."""
    return 0.5 * (mu.square() + (torch.expm1(logvar) - logvar))


def _log_prior_ratio(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """(B,): log p(z) - log q(z | x)."""
    noise_square = (z - mu).square() * torch.exp(-logvar)
    return 0.5 * (noise_square + logvar - z.square()).sum(-1)
