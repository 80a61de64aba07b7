"""Losses, penalties and augmentation for adversarial training; `docs/gan.md` has the equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen import _validate
from fastgen._dtypes import at_least_float32
from fastgen.random import AnyGenerator, uniform

__all__ = [
    "ADVERSARIAL_LOSSES",
    "augmentation_size",
    "diff_augment",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "zero_centered_gradient_penalty",
]

ADVERSARIAL_LOSSES = ("minimax", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic")

_SHIFT = 0.125  # Zhao et al., 2020, section 3.3: by up to an eighth of a side,
_HOLE = 0.5  # and a square hole of half of it


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str = "non_saturating") -> Tensor:
    """Scalar: what the discriminator minimises, a mean over the batch.

    Args:
        real_logits, fake_logits: the discriminator's output, (B,) or any shape, on data and on generated
            examples; float32, float64, bfloat16 or float16, computed in at least float32.
        kind: one of `ADVERSARIAL_LOSSES`, with r, f the logits, s the softplus, s(x) = log(1 + exp(x)):
            "minimax", "non_saturating": s(-r) + s(f) (Goodfellow et al., 2014, equation 1);
            "least_squares": ((r - 1)^2 + f^2) / 2 (Mao et al., 2017, equation 2 with a = 0, b = c = 1);
            "hinge": max(0, 1 - r) + max(0, 1 + f) (Lim & Ye, 2017);
            "wasserstein": f - r (Arjovsky et al., 2017), for a critic of bounded slope: `gradient_penalty`;
            "relativistic": s(f - r), row by row (Jolicoeur-Martineau, 2019; Huang et al., 2024).

    Raises:
        TypeError, ValueError: for an unknown kind, logits that are no float tensors, or, for "relativistic",
            not of one shape.
    """
    _validate.choice("kind", kind, ADVERSARIAL_LOSSES)
    real, fake = _logits("real_logits", real_logits), _logits("fake_logits", fake_logits)
    if kind == "relativistic":
        _check_pairs(real, fake)
        return -F.logsigmoid(real - fake).mean()
    if kind == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "wasserstein":
        return fake.mean() - real.mean()
    return -(F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean())  # logsigmoid(-f) = log(1 - D)


def generator_loss(fake_logits: Tensor, kind: str = "non_saturating", real_logits: Tensor | None = None) -> Tensor:
    """Scalar: what the generator minimises, a mean over the batch.

    Args:
        fake_logits: the discriminator's output on generated examples, as for `discriminator_loss`.
        kind: one of `ADVERSARIAL_LOSSES`, with r, f, s as there:
            "minimax": -s(f), the generator's part of the value function, whose gradient vanishes where the
            discriminator is sure; "non_saturating": s(-f) (Goodfellow et al., 2014, section 3);
            "least_squares": (f - 1)^2 / 2; "hinge", "wasserstein": -f; "relativistic": s(r - f).
        real_logits: the discriminator's output on data, of the shape of `fake_logits`; for "relativistic" alone.

    Raises:
        TypeError, ValueError: as `discriminator_loss`, and for real logits that are missing or not wanted.
    """
    _validate.choice("kind", kind, ADVERSARIAL_LOSSES)
    fake = _logits("fake_logits", fake_logits)
    if kind == "relativistic":
        if real_logits is None:
            raise ValueError("real_logits: expected the logits of the data for 'relativistic', got None")
        real = _logits("real_logits", real_logits)
        _check_pairs(real, fake)
        return -F.logsigmoid(fake - real).mean()
    if real_logits is not None:
        raise ValueError(f"real_logits: expected None for {kind!r}, got a value")
    if kind == "minimax":
        return F.logsigmoid(-fake).mean()
    if kind == "non_saturating":
        return -F.logsigmoid(fake).mean()
    if kind == "least_squares":
        return 0.5 * (fake - 1).square().mean()
    return -fake.mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    target: float = 1.0,
    one_sided: bool = False,
    generator: AnyGenerator = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Scalar: mean of (|grad D(x)| - target)^2 between data and generated examples (Gulrajani et al., 2017).

    x = u real + (1 - u) fake with u uniform in [0, 1) for each row, and the gradient is that with respect
    to x. The caller multiplies by a weight, 10 in the paper.

    Args:
        discriminator: gives the logits (B,) of (B, ...); row b must depend on row b alone, so no batch norm.
        real, fake: (B, ...), of one shape. Their own gradients are not followed.
        target: the norm that is not punished, at least 0.
        one_sided: punish only norms above `target` (ibid., section 4).
        generator: source of u, one element of the stream a row.
        noise: u itself, (B,), instead of a generator.

    Returns:
        The penalty in at least float32, differentiable in the weights of the discriminator.

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it.
    """
    _validate.number("target", target, minimum=0)
    _validate.floats("real", real)
    _validate.floats("fake", fake)
    if fake.shape != real.shape:
        raise ValueError(f"fake: expected the shape of real, {tuple(real.shape)}, got {tuple(fake.shape)}")
    u = _uniform(real, (), generator, noise).view(-1, *(1,) * (real.dim() - 1))
    x = torch.lerp(fake.detach(), real.detach().to(fake.dtype), u.to(fake.dtype)).requires_grad_()
    norm = torch.linalg.vector_norm(_rows(_gradient(discriminator(x), x)), dim=1)
    excess = norm - target
    return (F.relu(excess) if one_sided else excess).square().mean()


def zero_centered_gradient_penalty(discriminator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Scalar: half the mean of |grad D(x)|^2, R1 on data and R2 on generated examples (Mescheder et al., 2018).

    The caller multiplies by gamma. The gradient is that with respect to x, in the units of x: data in [0, 1]
    instead of [-1, 1] have gradients of twice the size, and want a quarter of the gamma.

    Args:
        discriminator: gives the logits (B,) of (B, ...); row b must depend on row b alone, so no batch norm.
        x: (B, ...). Its own gradient is not followed.

    Returns:
        The penalty in at least float32, differentiable in the weights of the discriminator.

    Raises:
        TypeError: for an x that is no float tensor.
    """
    _validate.floats("x", x)
    x = x.detach().requires_grad_()
    return 0.5 * squared_gradient_norms(discriminator(x), x).mean()


def squared_gradient_norms(logits: Tensor, x: Tensor) -> Tensor:
    """(B,): |grad D(x)|^2 of logits (B,) that were computed of `x`, which requires a gradient."""
    return _rows(_gradient(logits, x)).square().sum(1)


def augmentation_size(policy: str, dim: int) -> int:
    """Elements of noise that `diff_augment` takes for a row of a tensor of `dim` dimensions.

    Raises:
        ValueError: for an unknown policy, or one that has no meaning for such tensors.
    """
    return sum(size for _, size in _policies(policy, dim))


def diff_augment(
    x: Tensor,
    policy: str = "color,translation,cutout",
    *,
    data_range: tuple[float, float] | None = (0.0, 1.0),
    generator: AnyGenerator = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Random changes of examples through which the gradient flows (Zhao et al., "DiffAugment", 2020).

    Applied to whatever the discriminator sees, data and generated examples alike, they keep it from learning
    few data by heart. In the order of `policy`:

    * "color" (images): brightness by up to a quarter of the data's range either way, saturation by a factor
      of 0 to 2, contrast by a factor of 0.5 to 1.5;
    * "translation": by up to an eighth of each side either way, along time for a sequence;
    * "cutout": a square hole of half of each side, for a sequence a span of half of the time.

    What is moved in and what is cut out is 0.

    Args:
        x: (B, C, H, W) images or (B, T, F) sequences; float32, float64, bfloat16 or float16, finite.
        policy: names of them, with commas between; "" changes nothing.
        data_range: least and greatest value of the data, the scale of the brightness; images only.
        generator: source of the noise: `augmentation_size(policy, x.dim())` uniform elements a row, the rows
            one after the other, so that a process with a part of the batch can skip to it.
        noise: (B, augmentation_size) uniform numbers in [0, 1) instead of a generator.

    Returns:
        A tensor of the shape and dtype of x, differentiable to any order in x.

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it.
    """
    _validate.floats("x", x)
    policies = _policies(policy, x.dim())
    noise = _uniform(x, (sum(size for _, size in policies),), generator, noise)
    used = 0
    for name, size in policies:
        u, used = noise[:, used : used + size], used + size
        if name == "color":
            low, high = _range(data_range)
            x = _color(x, u.to(x.dtype), high - low)
        else:
            x = (_translation if name == "translation" else _cutout)(x, u)
    return x


def _policies(policy: str, dim: int) -> list[tuple[str, int]]:
    """(name, elements of noise a row) of each."""
    if dim not in (3, 4):
        raise ValueError(f"x: expected images (B, C, H, W) or sequences (B, T, F), got {dim} dimensions")
    sides = dim - 2
    sizes = {"color": 3, "translation": sides, "cutout": sides}
    names = [name.strip() for name in policy.split(",")] if policy.strip() else []
    for name in names:
        _validate.choice("policy", name, sizes)
        if name == "color" and sides == 1:
            raise ValueError("policy: expected translation, cutout for sequences (B, T, F), got 'color'")
    if len(set(names)) < len(names):
        raise ValueError(f"policy: expected each name once, got {policy!r}")
    return [(name, sizes[name]) for name in names]


def _range(data_range: tuple[float, float] | None) -> tuple[float, float]:
    if data_range is None or not data_range[0] < data_range[1]:
        raise ValueError(f"data_range: expected (low, high) with low < high for 'color', got {data_range!r}")
    return data_range


def _color(x: Tensor, u: Tensor, width: float) -> Tensor:
    """u: (B, 3), for brightness, saturation and contrast."""
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    x = x + (brightness - 0.5) * (0.5 * width)
    if x.shape[1] > 1:
        grey = x.mean(1, keepdim=True)
        x = torch.lerp(grey, x, 2 * saturation)
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast + 0.5)


def _translation(x: Tensor, u: Tensor) -> Tensor:
    """u: (B, sides). The shift is a product with a matrix of zeros and ones: exact, and cheap beside a convolution."""
    for axis, amount in zip(_sides(x), u.unbind(1), strict=True):
        side = x.shape[axis]
        most = int(side * _SHIFT + 0.5)
        shift = (amount * (2 * most + 1)).floor().long() - most
        to = torch.arange(side, device=x.device)
        moves = (to[:, None] - to == shift[:, None, None]).to(x.dtype)  # (B, to, from)
        with torch.autocast(x.device.type, enabled=False):  # which would round x
            x = torch.einsum("bij,b...j->b...i", moves, x.movedim(axis, -1)).movedim(-1, axis)
    return x


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """u: (B, sides). The middle of the hole is anywhere in the picture, so that a part of it may lie outside."""
    hole = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, place in zip(_sides(x), u.unbind(1), strict=True):
        side = x.shape[axis]
        size = int(side * _HOLE + 0.5)
        start = (place * (side + 1 - size % 2)).floor().long()[:, None] - size // 2
        at = torch.arange(side, device=x.device)
        inside = (at >= start) & (at < start + size)  # (B, side)
        hole = hole & inside.view(len(x), *(side if d == axis else 1 for d in range(1, x.dim())))
    return x.masked_fill(hole, 0)


def _sides(x: Tensor) -> tuple[int, ...]:
    """The axes of height and width, or of time."""
    return (2, 3) if x.dim() == 4 else (1,)


def _uniform(x: Tensor, columns: tuple[int, ...], generator: AnyGenerator, noise: Tensor | None) -> Tensor:
    """(B, *columns) uniform in [0, 1), float32 whatever the dtype of `x`, whose rows they are for."""
    shape = (len(x), *columns)
    if noise is None:
        return uniform(*shape, generator=generator, dtype=torch.float32, device=x.device)
    if generator is not None:
        raise ValueError("generator: expected None where noise is given, got both")
    _validate.floats("noise", noise)
    if noise.shape != shape:
        raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
    return noise


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    """The gradient of each row's logit with respect to the row, itself differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient


def _rows(gradient: Tensor) -> Tensor:
    return at_least_float32(gradient.flatten(1))


def _logits(name: str, value: Tensor) -> Tensor:
    return at_least_float32(_validate.floats(name, value))


def _check_pairs(real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise ValueError(
            f"fake_logits: expected the shape of real_logits for 'relativistic', {tuple(real.shape)}, "
            f"got {tuple(fake.shape)}"
        )
