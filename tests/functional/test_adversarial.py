"""Adversarial losses, penalties and augmentation against their formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgen.functional import (
    ADVERSARIAL_LOSSES,
    augmentation_size,
    diff_augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    zero_centered_gradient_penalty,
)
from fastgen.random import Generator, uniform

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def real_logits_for(kind: str, real: Tensor) -> Tensor | None:
    return real if kind == "relativistic" else None


# ---------------------------------------------------------------------------------------------------
# Losses


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


DISCRIMINATOR = {
    "minimax": lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
    "non_saturating": lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)),
    "least_squares": lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2,
    "hinge": lambda r, f: max(0.0, 1 - r) + max(0.0, 1 + f),
    "wasserstein": lambda r, f: f - r,
    "relativistic": lambda r, f: -math.log(sigmoid(r - f)),
}
GENERATOR = {
    "minimax": lambda r, f: math.log(1 - sigmoid(f)),
    "non_saturating": lambda r, f: -math.log(sigmoid(f)),
    "least_squares": lambda r, f: 0.5 * (f - 1) ** 2,
    "hinge": lambda r, f: -f,
    "wasserstein": lambda r, f: -f,
    "relativistic": lambda r, f: -math.log(sigmoid(f - r)),
}


def test_every_loss_has_a_formula_here() -> None:
    assert set(DISCRIMINATOR) == set(GENERATOR) == set(ADVERSARIAL_LOSSES)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_losses_are_their_formulas(kind: str) -> None:
    real, fake = 2 * torch.randn(2, 50, dtype=torch.float64)
    pairs = list(zip(real.tolist(), fake.tolist(), strict=True))
    expected = math.fsum(DISCRIMINATOR[kind](r, f) for r, f in pairs) / 50
    assert discriminator_loss(real, fake, kind).item() == pytest.approx(expected, rel=1e-13, abs=1e-14)
    expected = math.fsum(GENERATOR[kind](r, f) for r, f in pairs) / 50
    loss = generator_loss(fake, kind, real_logits_for(kind, real))
    assert loss.item() == pytest.approx(expected, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_losses_of_other_dtypes_are_computed_in_float32(kind: str, dtype: torch.dtype) -> None:
    real, fake = (2 * torch.randn(2, 300)).to(dtype)
    for loss, exact in (
        (discriminator_loss(real, fake, kind), discriminator_loss(real.double(), fake.double(), kind)),
        (
            generator_loss(fake, kind, real_logits_for(kind, real)),
            generator_loss(fake.double(), kind, real_logits_for(kind, real.double())),
        ),
    ):
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_gradients_are_the_derivatives(kind: str) -> None:
    real, fake = torch.randn(2, 5, dtype=torch.float64).requires_grad_().unbind(0)
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind), (real, fake))
    assert torch.autograd.gradcheck(lambda r, f: generator_loss(f, kind, real_logits_for(kind, r)), (real, fake))


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_huge_logits_have_finite_losses_and_gradients(kind: str) -> None:
    for sign in (1.0, -1.0):
        real = torch.full((3,), sign * 1e4, requires_grad=True)
        fake = torch.full((3,), -sign * 1e4, requires_grad=True)
        for loss in (discriminator_loss(real, fake, kind), generator_loss(fake, kind, real_logits_for(kind, real))):
            gradients = torch.autograd.grad(loss, (real, fake), allow_unused=True)
            assert torch.isfinite(loss)
            assert all(torch.isfinite(g).all() for g in gradients if g is not None)


def test_only_the_minimax_generator_saturates_where_the_discriminator_is_sure() -> None:
    for kind in ADVERSARIAL_LOSSES:
        real, fake = torch.full((4,), 20.0), torch.full((4,), -20.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(generator_loss(fake, kind, real_logits_for(kind, real)), fake)
        # Of the mean of 4; falling fake logits always raise the loss.
        assert (gradient < 0).all(), kind
        if kind == "minimax":
            assert gradient.abs().max() < 1e-8
        else:
            assert gradient.abs().min() > 0.2, kind


def test_losses_at_equilibrium_and_at_their_least() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    for kind in ("minimax", "non_saturating"):
        assert discriminator_loss(zero, zero, kind).item() == pytest.approx(2 * math.log(2))  # -V = log 4
    assert discriminator_loss(zero, zero, "relativistic").item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero + 1, zero, "least_squares").item() == 0
    assert discriminator_loss(zero + 1, zero - 1, "hinge").item() == 0
    assert discriminator_loss(zero + 7, zero - 7, "hinge").item() == 0  # no more to gain beyond the margin
    assert generator_loss(zero + 1, "least_squares").item() == 0


def test_value_function_is_that_of_the_optimal_discriminator() -> None:
    # D*(x) = p / (p + q) of two discrete distributions gives V = 2 JSD(p, q) - log 4 (theorem 1 of the paper).
    p = torch.tensor([1, 2, 3, 2], dtype=torch.float64)
    q = torch.tensor([4, 1, 1, 2], dtype=torch.float64)
    logits = (p / q).log()
    value = -discriminator_loss(logits.repeat_interleave(p.long()), logits.repeat_interleave(q.long()), "minimax")
    p, q = p / 8, q / 8
    middle = (p + q) / 2
    divergence = 0.5 * ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum())
    torch.testing.assert_close(value, 2 * divergence - math.log(4))


def test_relativistic_loss_depends_on_differences_of_pairs_alone() -> None:
    real, fake = torch.randn(2, 6, dtype=torch.float64)
    loss = discriminator_loss(real, fake, "relativistic")
    torch.testing.assert_close(discriminator_loss(real + 5, fake + 5, "relativistic"), loss)
    assert not torch.allclose(discriminator_loss(real, fake.flip(0), "relativistic"), loss)
    torch.testing.assert_close(generator_loss(real, "relativistic", fake), loss)  # the two roles exchanged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: discriminator_loss(x, x, "wgan"), r"kind: expected one of minimax, .*, got 'wgan'"),
        (lambda x: generator_loss(x, "wgan"), r"kind: expected one of minimax, .*, got 'wgan'"),
        (lambda x: discriminator_loss(x, x[:2], "relativistic"), r"fake_logits: expected the shape .* got \(2,\)"),
        (lambda x: generator_loss(x, "relativistic"), "real_logits: expected the logits of the data .* got None"),
        (lambda x: generator_loss(x, "hinge", x), "real_logits: expected None for 'hinge', got a value"),
        (lambda x: discriminator_loss(x.long(), x), "real_logits: expected floating-point values, got int64"),
        (lambda x: generator_loss([1.0]), "fake_logits: expected a tensor, got list"),
    ],
)
def test_errors_of_losses_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(torch.zeros(3))


# ---------------------------------------------------------------------------------------------------
# Penalties


def quadratic(matrix: Tensor):
    """D(x) = x' A x / 2 of flattened rows, whose gradient is A x for a symmetric A."""
    return lambda x: 0.5 * ((x.flatten(1) @ matrix) * x.flatten(1)).sum(1)


def test_penalties_of_a_discriminator_whose_gradient_is_known() -> None:
    matrix = torch.randn(6, 6, dtype=torch.float64)
    matrix = matrix + matrix.T
    real, fake = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    r1 = zero_centered_gradient_penalty(quadratic(matrix), real)
    torch.testing.assert_close(r1, 0.5 * (real.flatten(1) @ matrix).square().sum(1).mean())

    u = uniform(4, generator=Generator(3)).double().view(4, 1, 1)
    norms = (u * real + (1 - u) * fake).flatten(1).matmul(matrix).norm(dim=1)
    for target in (0.0, 1.0, 2.5):
        penalty = gradient_penalty(quadratic(matrix), real, fake, target=target, generator=Generator(3))
        torch.testing.assert_close(penalty, (norms - target).square().mean())
    median = norms.median().item()
    penalty = gradient_penalty(quadratic(matrix), real, fake, target=median, one_sided=True, noise=u.float().flatten())
    torch.testing.assert_close(penalty, (norms - median).clamp_min(0).square().mean())
    assert penalty > 0


def test_gradient_penalty_is_zero_for_a_critic_of_slope_one_and_finite_for_a_flat_one() -> None:
    direction = torch.tensor([0.6, 0.8], requires_grad=True)
    real, fake = torch.randn(2, 5, 2)
    assert gradient_penalty(lambda x: x @ direction, real, fake).item() == pytest.approx(0, abs=1e-12)
    flat = torch.zeros(2, requires_grad=True)
    penalty = gradient_penalty(lambda x: x @ flat, real, fake)
    penalty.backward()
    assert penalty.item() == 1
    assert torch.isfinite(flat.grad).all()


def critic_of(kind: str, features: int = 3) -> nn.Module:
    if kind == "lstm":
        return LSTMCritic(features)
    return nn.Sequential(nn.Flatten(), nn.Linear(4 * features, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))


class LSTMCritic(nn.Module):
    def __init__(self, features: int, lstm: type[nn.LSTM] | None = None) -> None:
        import fastgen.nn

        super().__init__()
        self.lstm = (lstm or fastgen.nn.LSTM)(features, 4, batch_first=True)
        self.output = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0].mean(1)).squeeze(-1)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_gradients_of_penalties_in_the_weights(kind: str) -> None:
    critic = critic_of(kind).double()
    real, fake = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    weights = dict(critic.named_parameters())

    def call(penalty):
        def of(*values: Tensor) -> Tensor:
            state = dict(zip(weights, values, strict=True))
            return penalty(lambda x: torch.func.functional_call(critic, state, (x,)))

        return of

    values = tuple(value.detach().requires_grad_() for value in weights.values())
    noise = torch.rand(3)
    for penalty in (
        lambda d: gradient_penalty(d, real, fake, noise=noise),
        lambda d: zero_centered_gradient_penalty(d, real),
    ):
        assert torch.autograd.gradcheck(call(penalty), values)
        assert torch.autograd.gradgradcheck(call(penalty), values, atol=1e-4) if kind == "mlp" else True


def test_penalty_of_an_lstm_critic_is_that_of_torchs_lstm() -> None:
    ours, theirs = LSTMCritic(3).double(), LSTMCritic(3, nn.LSTM).double()
    theirs.load_state_dict(ours.state_dict())
    real, fake = torch.randn(2, 6, 9, 3, dtype=torch.float64)
    for penalty in (
        lambda d: gradient_penalty(d, real, fake, generator=Generator(5)),
        lambda d: zero_centered_gradient_penalty(d, real),
    ):
        values = [penalty(critic) for critic in (ours, theirs)]
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)
        gradients = [
            torch.autograd.grad(value, tuple(critic.parameters()), allow_unused=True)
            for value, critic in zip(values, (ours, theirs), strict=True)
        ]
        for name, a, b in zip(dict(ours.named_parameters()), *gradients, strict=True):
            if name == "output.bias":
                assert a is None
            else:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=name)


def test_penalties_of_half_precision_are_sums_in_float32() -> None:
    critic = critic_of("mlp").bfloat16()
    x = torch.randn(8, 4, 3, dtype=torch.bfloat16)
    exact = zero_centered_gradient_penalty(critic_like(critic), x.double())
    penalty = zero_centered_gradient_penalty(critic, x)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty.double(), exact, rtol=0.05, atol=0)


def critic_like(critic: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(critic).double()


def test_penalties_do_not_reach_the_examples() -> None:
    critic = critic_of("mlp")
    real, fake = (torch.randn(2, 4, 3, requires_grad=True) for _ in range(2))
    (gradient_penalty(critic, real, fake) + zero_centered_gradient_penalty(critic, real)).backward()
    assert real.grad is None
    assert fake.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: gradient_penalty(len, x, x[:1]), r"fake: expected the shape of real, \(3, 2\), got \(1, 2\)"),
        (lambda x: gradient_penalty(len, x, x, target=-1), "target: expected a finite number of at least 0, got -1"),
        (lambda x: gradient_penalty(len, x.long(), x), "real: expected floating-point values, got int64"),
        (lambda x: gradient_penalty(len, x, x, noise=x), r"noise: expected shape \(3,\), got \(3, 2\)"),
        (
            lambda x: gradient_penalty(len, x, x, noise=x[:, 0], generator=Generator(0)),
            "generator: expected None where noise is given, got both",
        ),
        (lambda x: zero_centered_gradient_penalty(len, 1), "x: expected a tensor, got int"),
    ],
)
def test_errors_of_penalties_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(torch.zeros(3, 2))


# ---------------------------------------------------------------------------------------------------
# Augmentation

IMAGES, SEQUENCES = "color,translation,cutout", "translation,cutout"


def test_augmentation_is_the_papers_row_by_row() -> None:
    x = torch.rand(5, 3, 17, 24, dtype=torch.float64)
    noise = torch.rand(5, augmentation_size(IMAGES, 4), dtype=torch.float64)
    augmented = diff_augment(x, IMAGES, noise=noise)
    for row, u, result in zip(x, noise.tolist(), augmented, strict=True):
        y = row + (u[0] - 0.5) / 2  # a range of 1 instead of the paper's of 2
        y = (y - y.mean(0)) * 2 * u[1] + y.mean(0)
        y = (y - y.mean()) * (u[2] + 0.5) + y.mean()
        moved = torch.zeros_like(y)
        down, right = (math.floor(a * (2 * most + 1)) - most for a, most in zip(u[3:5], (2, 3), strict=True))
        for i in range(17):
            for j in range(24):
                if 0 <= i - down < 17 and 0 <= j - right < 24:
                    moved[:, i, j] = y[:, i - down, j - right]
        top, left = math.floor(u[5] * (17 + 0)) - 4, math.floor(u[6] * (24 + 1)) - 6
        moved[:, max(top, 0) : max(top + 9, 0), max(left, 0) : max(left + 12, 0)] = 0
        torch.testing.assert_close(result, moved)


def test_sequences_move_and_lose_a_span_along_time() -> None:
    x = 1 + torch.rand(64, 16, 2)
    moved = diff_augment(x, "translation", generator=Generator(1))
    shifts = set()
    for before, after in zip(x, moved, strict=True):
        padded = torch.cat((torch.zeros(2, 2), before, torch.zeros(2, 2)))
        (shift,) = (s for s in range(-2, 3) if torch.equal(after, padded[2 - s : 18 - s]))
        assert (after != 0).all(1).sum() == 16 - abs(shift)
        shifts.add(shift)
    assert shifts == {-2, -1, 0, 1, 2}
    cut = diff_augment(x, "cutout", generator=Generator(1))
    gone = (cut == 0).all(2).sum(1)
    assert gone.max() == 8
    assert gone.min() >= 4
    assert torch.equal(cut[cut != 0], x[cut != 0])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(0, 4),
    policy=st.permutations(["color", "translation", "cutout"]).flatmap(
        lambda names: st.integers(0, 3).map(lambda n: ",".join(names[:n]))
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_augmentation_keeps_shape_and_dtype_and_rows_keep_their_noise(
    shape: tuple[int, ...], batch: int, policy: str, dtype: torch.dtype
) -> None:
    x = torch.rand(batch, *shape).to(dtype)
    generator = Generator(9)
    whole = diff_augment(x, policy, generator=generator)
    assert whole.shape == x.shape
    assert whole.dtype == dtype
    size = augmentation_size(policy, 4)
    assert generator.offset == batch * size
    rest = diff_augment(x[1:], policy, generator=Generator(9, offset=size))
    torch.testing.assert_close(rest, whole[1:])


def test_no_policy_changes_nothing() -> None:
    x = torch.rand(2, 1, 8, 8)
    assert augmentation_size("", 4) == 0
    assert torch.equal(diff_augment(x, "", generator=Generator(0)), x)


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 9, 2)])
def test_augmentation_is_differentiable_twice(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    policy = IMAGES if len(shape) == 4 else SEQUENCES
    noise = torch.rand(2, augmentation_size(policy, len(shape)))
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, policy, noise=noise).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: diff_augment(x, policy, noise=noise).square(), (x,))


def test_autocast_changes_no_bit_of_an_augmentation() -> None:
    x = torch.rand(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        augmented = diff_augment(x, generator=Generator(2))
    assert torch.equal(augmented, diff_augment(x, generator=Generator(2)))


def test_brightness_follows_the_range_of_the_data() -> None:
    x, noise = torch.zeros(1, 1, 8, 8), torch.tensor([[1.0, 0.5, 0.5]])
    for data_range, most in (((0.0, 1.0), 0.25), ((-1.0, 1.0), 0.5), ((0.0, 255.0), 63.75)):
        assert diff_augment(x, "color", data_range=data_range, noise=noise).max() == most


def test_greatest_uniform_number_stays_within_the_picture() -> None:
    x = torch.ones(1, 1, 64, 64)
    noise = torch.full((1, 2), 1 - 2.0**-24)
    assert (diff_augment(x, "translation", noise=noise) == 0).any(3).sum() == 64
    moved = diff_augment(x, "translation", noise=noise)
    assert moved.sum() == 56 * 56
    assert diff_augment(x, "cutout", noise=noise)[0, 0, -16:, -16:].sum() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: diff_augment(x, "colour"), "policy: expected one of color, translation, cutout, got 'colour'"),
        (lambda x: diff_augment(x, "cutout,cutout"), "policy: expected each name once, got 'cutout,cutout'"),
        (lambda x: diff_augment(x[0], "color"), r"policy: expected translation, cutout for sequences .* got 'color'"),
        (lambda x: diff_augment(x[0, 0]), "x: expected images .* or sequences .* got 2 dimensions"),
        (lambda x: diff_augment(x.long()), "x: expected floating-point values, got int64"),
        (lambda x: diff_augment(x, data_range=None), r"data_range: expected \(low, high\) .* got None"),
        (lambda x: diff_augment(x, data_range=(1, 1)), r"data_range: expected .* low < high .* got \(1, 1\)"),
        (lambda x: diff_augment(x, "cutout", noise=x[:, 0, 0]), r"noise: expected shape \(2, 2\), got \(2, 8\)"),
    ],
)
def test_errors_of_augmentation_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(torch.rand(2, 1, 8, 8))
