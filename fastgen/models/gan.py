"""Generative adversarial network (Goodfellow et al., "Generative Adversarial Nets", 2014).

A generator G makes examples of latents z ~ N(0, I), a discriminator D gives logits that tell them from data;
each is trained against the other. `docs/gan.md` has the losses and penalties and where they come from.

Example:
    >>> model = GAN(input_shape=(1, 28, 28), latent_dim=64)
    >>> model.discriminator_loss(images).loss.backward()  # images: (B, 1, 28, 28) floats in [0, 1]
    >>> model.generator_loss(images).loss.backward()
    >>> pictures = model.generate(64, seed=1)  # (64, 1, 28, 28)
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

import fastgen.nn as nn
from fastgen import _validate
from fastgen._dtypes import at_least_float32, dtype_name
from fastgen.functional import adversarial
from fastgen.models._gan_networks import NORMALIZATIONS, discriminator_of, generator_of
from fastgen.models._layers import (
    ACTIVATIONS,
    Labels,
    check_data,
    conv_channels,
    no_channels,
    noise_source,
    one_hot,
)
from fastgen.models._pretrained import Folder, PretrainedConfig, PretrainedModel
from fastgen.random import AnyGenerator, Device, bits, normal, uniform

__all__ = ["GAN", "GANConfig", "GANOutput"]

_ARCHITECTURES = ("mlp", "conv", "lstm", "custom")
_HIDDEN_SIZES = {"mlp": (512, 256), "conv": (), "lstm": (128,), "custom": ()}


@dataclasses.dataclass(frozen=True)
class GANConfig(PretrainedConfig):
    """Everything that defines a GAN but its weights (and the modules of "custom").

    Args:
        input_shape: shape of one example: (C, H, W) for images, (T, F) for sequences of T steps with F
            numbers each, any for "mlp" and "custom".
        latent_dim: dimensions of z.
        architecture: "conv" takes images with sides of at least 8 (DCGAN) and sequences of at least 8 steps
            (its 1-d form); "mlp" takes any input; "lstm" takes sequences; "custom" stands for modules of
            the user's own, see `GAN`.
        hidden_sizes: widths of the dense layers of the discriminator, from the input on; the generator
            mirrors them. For "lstm" the widths of the LSTM layers of each. Default (512, 256) for "mlp", ()
            for "conv", (128,) for "lstm".
        channels: widths of the discriminator's convolutions, each of which halves the sides; the generator
            mirrors them. Default: 32, 64, 128, 256, 256 ... until the smallest side is under 8. For "conv"
            alone.
        activation: "elu", "gelu", "leaky_relu" (of slope 0.2), "relu", "silu" or "tanh"; an LSTM has its own.
        normalization: of the generator's hidden layers: "batch", "layer" (over all features of an example)
            or "none"; an LSTM has none.
        discriminator_normalization: the same of the discriminator. "batch" makes an example's logit depend
            on the others, which the gradient penalties do not allow for.
        spectral_norm: whether the discriminator's weights are divided by their largest singular value
            (Miyato et al., "Spectral normalization for generative adversarial networks", 2018).
        data_range: least and greatest value of the data. The generator ends in a sigmoid scaled to it, and the
            discriminator scales it to [-1, 1]. None for unbounded data.
        loss: one of `fastgen.functional.ADVERSARIAL_LOSSES`.
        num_classes: labels are 0 .. num_classes - 1; 0 for an unconditional model. The generator's dense
            layers add an embedding of the label, the discriminator is a projection discriminator (Miyato &
            Koyama, "cGANs with projection discriminator", 2018).

    Raises:
        ValueError: for a field out of range, naming it.
    """

    model_type: ClassVar[str] = "gan"

    input_shape: tuple[int, ...] = (1, 28, 28)
    latent_dim: int = 64
    architecture: str = "conv"
    hidden_sizes: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    activation: str = "leaky_relu"
    normalization: str = "batch"
    discriminator_normalization: str = "none"
    spectral_norm: bool = False
    data_range: tuple[float, float] | None = (0.0, 1.0)
    loss: str = "non_saturating"
    num_classes: int = 0

    def __post_init__(self) -> None:
        normalizations = ("normalization", "discriminator_normalization")
        checked: dict[str, Any] = {
            "input_shape": _validate.integers("input_shape", self.input_shape, 1),
            "latent_dim": _validate.integer("latent_dim", self.latent_dim, 1),
            "architecture": _validate.choice("architecture", self.architecture, _ARCHITECTURES),
            "activation": _validate.choice("activation", self.activation, ACTIVATIONS),
            **{name: _validate.choice(name, getattr(self, name), NORMALIZATIONS) for name in normalizations},
            "spectral_norm": _validate.boolean("spectral_norm", self.spectral_norm),
            "data_range": self._data_range(),
            "loss": _validate.choice("loss", self.loss, adversarial.ADVERSARIAL_LOSSES),
            "num_classes": _validate.integer("num_classes", self.num_classes, 0),
        }
        lstm, shape = self.architecture == "lstm", checked["input_shape"]
        if lstm and len(shape) != 2:
            raise ValueError(f"input_shape: expected (T, F) for 'lstm', got {shape}")
        hidden = _HIDDEN_SIZES[self.architecture] if self.hidden_sizes is None else self.hidden_sizes
        checked["hidden_sizes"] = _validate.integers("hidden_sizes", hidden, 1, allow_empty=not lstm)
        if self.architecture == "conv":
            sides = shape[1:] if len(shape) == 3 else shape[:1]
            if len(shape) not in (2, 3) or min(sides) < 8:
                raise ValueError(
                    f"input_shape: expected (C, H, W) or (T, F) with H, W, T of at least 8 for 'conv', got {shape}"
                )
            checked["channels"] = conv_channels(self.channels, shape, sides)
        else:
            checked["channels"] = no_channels(self.channels, self.architecture)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _data_range(self) -> tuple[float, float] | None:
        if self.data_range is None:
            return None
        limits = self.data_range
        if not isinstance(limits, Sequence) or isinstance(limits, str) or len(limits) != 2:
            raise ValueError(f"data_range: expected (low, high) or None, got {limits!r}")
        low, high = (_validate.number("data_range", limit) for limit in limits)
        if not low < high:
            raise ValueError(f"data_range: expected low < high, got {limits!r}")
        return low, high


@dataclasses.dataclass
class GANOutput:
    """What a training step's half gives: of `GAN.discriminator_loss` or of `GAN.generator_loss`; B examples.

    Attributes:
        loss: scalar, to be minimised.
        real_logits: (B,), the discriminator's output on the data, at least float32; None in the
            generator's half unless the loss is "relativistic".
        fake_logits: (B,), its output on the generated examples.
        fake: (B, *input_shape), the generated examples, before augmentation.
        penalty: scalar, what the regularisers added to the discriminator's loss; None without.
    """

    loss: Tensor
    real_logits: Tensor | None
    fake_logits: Tensor
    fake: Tensor
    penalty: Tensor | None = None


class GAN(PretrainedModel):
    """Generative adversarial network; `GAN(config)` or `GAN(**fields)` with the fields of `GANConfig`.

    `GAN(config, generator=module, discriminator=module)` has the user's own modules, and "custom" as its
    architecture. The generator maps (B, latent_dim) to (B, *input_shape), the discriminator maps those to
    logits (B,); with `num_classes` both are also given the labels as one-hot, (B, num_classes), which may be
    blends of two. Neither may change its input in place. `activation`, `normalization` and `spectral_norm`
    then say nothing. `from_pretrained` wants the same two modules again.

    `generator` and `discriminator` are trained, each with its own optimiser; `ema` is an average over the
    generator's past weights, kept by `update_ema`, which `generate` and `interpolate` use once there is one.
    Losses are at least float32, also in a half-precision model and under autocast. The weights draw their
    initial values from torch's default generator.
    """

    config_class = GANConfig
    config: GANConfig
    ema_updates: Tensor

    def __init__(
        self,
        config: GANConfig | None = None,
        *,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        **fields: Any,
    ) -> None:
        own = generator is not None and discriminator is not None
        if not own and (generator is not None or discriminator is not None):
            missing = "discriminator" if discriminator is None else "generator"
            raise ValueError(f"{missing}: expected a module beside the other of the two, got None")
        if own and config is None:
            fields["architecture"] = "custom"
        super().__init__(config, **fields)
        if own:
            self.config = dataclasses.replace(self.config, architecture="custom", hidden_sizes=None, channels=None)
        elif self.config.architecture == "custom":
            raise ValueError("generator, discriminator: expected two modules for 'custom', got None")
        self.generator = generator_of(self.config) if generator is None else generator
        self.discriminator = discriminator_of(self.config) if discriminator is None else discriminator
        try:
            self.ema = copy.deepcopy(self.generator).requires_grad_(False)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "generator: expected a module that can be copied; call a lazy one once before, and take weight norm "
                f"from torch.nn.utils.parametrizations ({error})"
            ) from error
        self.register_buffer("ema_updates", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_pretrained(
        cls,
        directory: Folder,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
    ) -> Self:
        """As `PretrainedModel.from_pretrained`; a "custom" model wants modules like those that it was saved with.

        Their weights are replaced by those of the folder.
        """
        given = {"generator": generator, "discriminator": discriminator}
        modules = {name: module for name, module in given.items() if module is not None}
        return cls._from_folder(Path(directory), device, dtype, **modules)

    @property
    def noise_per_sample(self) -> int:
        """Elements of a random stream that the latent of one example takes."""
        return self.config.latent_dim

    def noise(
        self, n: int, *, seed: int | None = None, generator: AnyGenerator = None, truncation: float | None = None
    ) -> Tensor:
        """(n, latent_dim) float32: latents, `noise_per_sample` elements of the stream each.

        Args:
            n: how many, at least 0.
            seed: shorthand for `generator=fastgen.random.Generator(seed)`.
            generator: source of the latents; default torch's default generator.
            truncation: if given, each number is that of a normal distribution truncated to
                [-truncation, truncation] (Brock et al., "BigGAN", 2019, section 3.1), by its inverse
                distribution function rather than by drawing again: so each latent keeps its place in
                the stream. The lower, the more typical and the less varied.
        """
        _validate.integer("n", n, 0)
        generator = noise_source(seed, generator)
        size = (n, self.config.latent_dim)
        if truncation is None:
            # float32 whatever the model's dtype: float64 draws come from another stream.
            return normal(size, generator=generator, dtype=torch.float32, device=self.device)
        _validate.number("truncation", truncation, above=0)
        # The middles of 2^32 equal parts of (-1, 1); float64, as a truncated tail is where float32 has few numbers.
        u = (bits(size, generator=generator, device=self.device).double() + 0.5) / 2**31
        return (math.sqrt(2) * torch.erfinv(u * math.erf(truncation / math.sqrt(2)))).float()

    def forward(self, z: Tensor, labels: Labels = None) -> Tensor:
        """(B, *input_shape): what the generator makes of latents z (B, latent_dim), in its present mode.

        Args:
            z: (B, latent_dim) floats.
            labels: (B,) ints, or one int for all, for a conditional model; else None.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it.
        """
        self._check_latents("z", z)
        return self._generated(self.generator, z, self._condition(labels, len(z)))

    def discriminator_loss(
        self,
        real: Tensor,
        labels: Labels = None,
        *,
        fake: Tensor | None = None,
        generator: AnyGenerator = None,
        augment: str = "",
        r1_gamma: float = 0.0,
        r2_gamma: float = 0.0,
        gradient_penalty_weight: float = 0.0,
    ) -> GANOutput:
        """The discriminator's half of a training step.

        loss = the configuration's `fastgen.functional.discriminator_loss` + r1_gamma * R1 + r2_gamma * R2
        + gradient_penalty_weight * gradient penalty, the last three of `zero_centered_gradient_penalty`
        on data and on generated examples and of `gradient_penalty`, all taken where the discriminator
        sees them: after augmentation. Only the discriminator gets gradients.

        Args:
            real: (B, *input_shape) floats in the configuration's `data_range`.
            labels: (B,) ints, or one int for all, for a conditional model; else None. The generated
                examples get the same.
            fake: (B, *input_shape), generated examples to use instead of new ones, such as
                `model(model.noise(B), labels)` for both halves of a step.
            generator: source of the noise: B * latent_dim elements for the latents, unless `fake` is given;
                then, if there is an augmentation or a gradient penalty, B rows of 2 k uniform elements,
                with k = `augmentation_size(augment, ...)`, and one more for the gradient penalty.
            augment: policy of `fastgen.functional.diff_augment`; "" for none.
            r1_gamma, r2_gamma, gradient_penalty_weight: at least 0. For an augmentation or penalty that is
                to act every few steps only, call with it in those.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it. The range of `real` and of
                `labels` is looked at on the CPU only, elsewhere it would stall the device.
        """
        for name, value in (
            ("r1_gamma", r1_gamma),
            ("r2_gamma", r2_gamma),
            ("gradient_penalty_weight", gradient_penalty_weight),
        ):
            _validate.number(name, value, minimum=0)
        self._check_data("real", real)
        condition = self._condition(labels, len(real))
        fake = self._fake(fake, len(real), condition, generator, gradients=False)
        columns = 1 if gradient_penalty_weight else 0
        u_real, u_fake, u = self._row_noise(real, augment, generator, columns)
        seen_real = self._augmented(real.to(self.dtype), augment, u_real)
        seen_fake = self._augmented(fake, augment, u_fake)

        if self._at_once and bool(r1_gamma) == bool(r2_gamma):
            both = None if condition is None else torch.cat((condition, condition))
            logits, squares = self._judged(torch.cat((seen_real, seen_fake)), both, gradients=r1_gamma > 0)
            (real_logits, fake_logits), (r1, r2) = logits.chunk(2), squares.chunk(2)
        else:
            real_logits, r1 = self._judged(seen_real, condition, gradients=r1_gamma > 0)
            fake_logits, r2 = self._judged(seen_fake, condition, gradients=r2_gamma > 0)
        penalties = [0.5 * gamma * squares.mean() for gamma, squares in ((r1_gamma, r1), (r2_gamma, r2)) if gamma > 0]
        if gradient_penalty_weight:
            penalty = adversarial.gradient_penalty(
                lambda x: self._logits(x, condition), seen_real, seen_fake, noise=u[:, 0]
            )
            penalties.append(gradient_penalty_weight * penalty)
        loss = adversarial.discriminator_loss(real_logits, fake_logits, self.config.loss)
        if not penalties:
            return GANOutput(loss, real_logits, fake_logits, fake)
        total = torch.stack(penalties).sum()
        return GANOutput(loss + total, real_logits, fake_logits, fake, total)

    def generator_loss(
        self,
        real: Tensor,
        labels: Labels = None,
        *,
        fake: Tensor | None = None,
        generator: AnyGenerator = None,
        augment: str = "",
    ) -> GANOutput:
        """The generator's half of a training step: the configuration's `fastgen.functional.generator_loss`.

        Only the generator gets gradients: none of the discriminator's weights are computed.

        Args:
            real: (B, *input_shape), as for `discriminator_loss`. Its values matter to "relativistic" alone,
                its size to all.
            labels: as there.
            fake: (B, *input_shape), generated examples with their graph instead of new ones; those given to
                `discriminator_loss` may be given again, which saves a pass of the generator.
            generator: source of the noise: B * latent_dim elements for the latents, unless `fake` is given;
                then, if there is an augmentation, B rows of 2 k uniform elements.
            augment: as there.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it.
        """
        self._check_data("real", real)
        condition = self._condition(labels, len(real))
        fake = self._fake(fake, len(real), condition, generator, gradients=True)
        u_real, u_fake, _ = self._row_noise(real, augment, generator, 0)
        fake_logits = self._logits(self._augmented(fake, augment, u_fake), condition, frozen=True)
        real_logits = None
        if self.config.loss == "relativistic":
            with torch.no_grad():
                real_logits = self._logits(self._augmented(real.to(self.dtype), augment, u_real), condition)
        loss = adversarial.generator_loss(fake_logits, self.config.loss, real_logits)
        return GANOutput(loss, real_logits, fake_logits, fake)

    @torch.no_grad()
    def update_ema(self, decay: float = 0.999) -> None:
        """Move `ema` towards the generator: ema <- d ema + (1 - d) generator, once after each of its steps.

        d = min(decay, t / (t + 10)) at update t, counted from 0: while there are few the average is over the
        last tenth of them, and the first one copies (Karras et al., "Progressive growing of GANs", 2018,
        use such an average, of a fixed decay). Buffers of floats, such as the statistics of batch norm, are
        averaged as weights are, others are copied.

        Args:
            decay: 0 <= decay < 1; 0 copies.
        """
        _validate.number("decay", decay, minimum=0, below=1)
        if self.dtype in (torch.bfloat16, torch.float16):  # whose numbers lie further apart than an average moves
            name = dtype_name(self.dtype)
            raise TypeError(f"generator: expected float32 or float64 weights to average, got {name}; use autocast")
        weight = (10 / (10 + self.ema_updates.double())).clamp_min(1 - decay)  # no wait for a device
        now = [*self.generator.parameters(), *self.generator.buffers()]
        for average, value in zip([*self.ema.parameters(), *self.ema.buffers()], now, strict=True):
            if average.is_floating_point():
                average.lerp_(value, weight.to(average.dtype))
            else:
                average.copy_(value)
        self.ema_updates += 1

    def generate(
        self,
        n: int,
        *,
        seed: int | None = None,
        labels: Labels = None,
        generator: AnyGenerator = None,
        truncation: float | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """(n, *input_shape): examples of the averaged generator; evaluation mode, no gradients.

        The latents of a seed have the same bits on every device, in every dtype of the model and for every
        `batch_size`, and those of a smaller n are the first of a larger one; what is made of them agrees up to
        the rounding of the network. (Truncated latents agree between devices up to a rounding.) A model whose
        `update_ema` was never called generates with its generator.

        Args:
            n: how many, at least 1.
            seed: shorthand for `generator=fastgen.random.Generator(seed)`.
            labels: the class of each: one int for all, or n ints; default for a conditional model:
                0, 1, ..., num_classes - 1, 0, 1, ...
            generator: source of the latents; default torch's default generator.
            truncation: see `noise`.
            batch_size: examples made at once.
        """
        _validate.integer("n", n, 1)
        _validate.integer("batch_size", batch_size, 1)
        if labels is None and self.config.num_classes:
            labels = torch.arange(n, device=self.device) % self.config.num_classes
        condition = self._condition(labels, n)
        return self._averaged(
            self.noise(n, seed=seed, generator=generator, truncation=truncation), condition, batch_size
        )

    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        steps: int = 8,
        labels: Labels = None,
        labels_b: Labels = None,
        *,
        batch_size: int = 256,
    ) -> Tensor:
        """(B, steps, *input_shape): what the averaged generator makes on the way from latents a to latents b.

        The way is along the great circle, as White, "Sampling generative networks", 2016, section 2.1, has it:
        latents of many dimensions lie near a sphere, and a straight line between them leaves it. A conditional
        model moves from `labels` to `labels_b` (default: the same) in proportion. Evaluation mode, no gradients.

        Args:
            a, b: (B, latent_dim) each, such as `model.noise(B, seed=1)`.
            steps: examples a row, both ends included, at least 2.
            labels, labels_b: as for `generate`, but needed by a conditional model.
            batch_size: examples made at once.
        """
        _validate.integer("steps", steps, 2)
        _validate.integer("batch_size", batch_size, 1)
        self._check_latents("a", a)
        self._check_latents("b", b)
        if len(a) != len(b):
            raise ValueError(f"b: expected as many latents as a, {len(a)}, got {len(b)}")
        start = self._condition(labels, len(a))
        end = start if labels_b is None else self._condition(labels_b, len(b))
        weight = torch.linspace(0, 1, steps, device=self.device).view(1, steps, 1)
        z = _slerp(a.to(self.device).float().unsqueeze(1), b.to(self.device).float().unsqueeze(1), weight)
        condition = None
        if start is not None and end is not None:
            condition = torch.lerp(start.unsqueeze(1), end.unsqueeze(1), weight.to(start.dtype)).flatten(0, 1)
        made = self._averaged(z.flatten(0, 1), condition, batch_size)
        return made.view(len(a), steps, *self.config.input_shape)

    @property
    def _at_once(self) -> bool:
        """Whether data and generated examples may and should go through the discriminator in one pass.

        They may where the logit of an example depends on no other of the batch. On a CPU they should not
        through convolutions: twice the batch falls out of its caches (a fifth slower, at 64 digits).
        """
        if self.config.architecture == "custom" or self.config.discriminator_normalization == "batch":
            return False
        return self.config.architecture != "conv" or self.device.type != "cpu"

    def _averaged(self, z: Tensor, condition: Tensor | None, batch_size: int) -> Tensor:
        network = self.ema if int(self.ema_updates) else self.generator
        with self.inference():
            batches = [
                self._generated(network, z[rows], None if condition is None else condition[rows])
                for rows in (slice(start, start + batch_size) for start in range(0, len(z), batch_size))
            ]
            return torch.cat(batches)

    def _generated(self, network: nn.Module, z: Tensor, condition: Tensor | None) -> Tensor:
        z = z.to(self.dtype)
        made: Tensor = network(z) if condition is None else network(z, condition)
        if made.shape != (len(z), *self.config.input_shape):
            raise ValueError(
                f"generator: expected examples of shape {(len(z), *self.config.input_shape)}, got {tuple(made.shape)}"
            )
        return made

    def _fake(
        self, fake: Tensor | None, n: int, condition: Tensor | None, generator: AnyGenerator, gradients: bool
    ) -> Tensor:
        """The examples given, or new ones; with their graph only where it is wanted."""
        if fake is None:
            with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
                return self._generated(self.generator, self.noise(n, generator=generator), condition)
        check_data("fake", fake, self.config.input_shape, None)
        if len(fake) != n:
            raise ValueError(f"fake: expected as many examples as real, {n}, got {len(fake)}")
        return (fake if gradients else fake.detach()).to(self.dtype)

    def _row_noise(
        self, real: Tensor, policy: str, generator: AnyGenerator, columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform numbers: (B, k) for the augmentation of data, (B, k) for that of fakes, and (B, columns) more."""
        k = adversarial.augmentation_size(policy, real.dim()) if policy else 0
        size = (len(real), 2 * k + columns)
        if size[1] == 0:
            u = real.new_empty(size)
        else:
            u = uniform(size, generator=generator, dtype=torch.float32, device=real.device)
        return u[:, :k], u[:, k : 2 * k], u[:, 2 * k :]

    def _augmented(self, x: Tensor, policy: str, noise: Tensor) -> Tensor:
        return adversarial.diff_augment(x, policy, data_range=self.config.data_range, noise=noise) if policy else x

    def _judged(self, x: Tensor, condition: Tensor | None, gradients: bool) -> tuple[Tensor, Tensor]:
        """(B,) logits and, if gradients are asked for, (B,) squared norms of theirs with respect to x."""
        if not gradients:
            logits = self._logits(x, condition)
            return logits, torch.zeros_like(logits)
        x = x.detach().requires_grad_()
        logits = self._logits(x, condition)
        return logits, adversarial.squared_gradient_norms(logits, x)

    def _logits(self, x: Tensor, condition: Tensor | None, frozen: bool = False) -> Tensor:
        """(B,) at least float32; frozen: as a function of x alone, so that no gradient of a weight is computed."""
        inputs = (x,) if condition is None else (x, condition)
        if frozen:
            # Not requires_grad_(False), which torch.compile cannot follow.
            weights = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
            logits = torch.func.functional_call(self.discriminator, weights, inputs)
        else:
            logits = self.discriminator(*inputs)
        if logits.shape != (len(x),):
            raise ValueError(f"discriminator: expected logits of shape ({len(x)},), got {tuple(logits.shape)}")
        return at_least_float32(logits)

    def _check_data(self, name: str, x: Tensor) -> None:
        check_data(name, x, self.config.input_shape, self.config.data_range, " (data_range)")

    def _check_latents(self, name: str, z: Tensor) -> None:
        _validate.tensor(name, z)
        if z.dim() != 2 or z.shape[1] != self.config.latent_dim:
            raise ValueError(f"{name}: expected shape (B, {self.config.latent_dim}), got {tuple(z.shape)}")

    def _condition(self, labels: Labels, batch: int) -> Tensor | None:
        return one_hot(labels, batch, self.config.num_classes, next(self.parameters()))


def _slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b with the angle w between a and b, along the last dimension."""
    cosine = F.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-4  # of one direction, or of opposite ones, which have no great circle of their own
    sine = sine.masked_fill(straight, 1)
    curved = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / sine
    return torch.where(straight, torch.lerp(a, b, weight), curved)
