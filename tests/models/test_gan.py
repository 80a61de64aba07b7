"""The GAN against its formulas, its promises about gradients and random numbers, and small problems it must solve."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import fastgen.nn
from fastgen.functional import (
    ADVERSARIAL_LOSSES,
    augmentation_size,
    diff_augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    zero_centered_gradient_penalty,
)
from fastgen.models import GAN, GANConfig, GANOutput, from_pretrained
from fastgen.models._gan_networks import NORMALIZATIONS
from fastgen.models._layers import ACTIVATIONS
from fastgen.random import Generator, normal, uniform

SMALL = {"input_shape": (1, 8, 9), "latent_dim": 4, "channels": (4,)}
KINDS = {
    "conv": {},
    "conv-classes-spectral": {"num_classes": 3, "spectral_norm": True, "hidden_sizes": (6,)},
    "conv-sequence": {"input_shape": (11, 2), "normalization": "layer", "data_range": None},
    "mlp": {"architecture": "mlp", "hidden_sizes": (16, 8), "channels": None},
    "mlp-relativistic": {"architecture": "mlp", "hidden_sizes": (16,), "channels": None, "loss": "relativistic"},
    "lstm": {"architecture": "lstm", "input_shape": (7, 2), "hidden_sizes": (5, 6), "channels": None},
    "lstm-spectral": {
        "architecture": "lstm",
        "input_shape": (7, 2),
        "hidden_sizes": (5,),
        "channels": None,
        "spectral_norm": True,
    },
    "batch-norm-in-both": {"discriminator_normalization": "batch", "num_classes": 2, "channels": (3, 5)},
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
PENALTIES: dict[str, dict[str, object]] = {
    "none": {},
    "r1": {"r1_gamma": 2.0},
    "r1-r2": {"r1_gamma": 2.0, "r2_gamma": 0.5},
    "gradient-penalty": {"gradient_penalty_weight": 10.0},
    "augmented": {"augment": "translation,cutout", "r1_gamma": 1.0, "gradient_penalty_weight": 1.0},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(**fields: object) -> GAN:
    return GAN(**{**SMALL, **fields})


def batch_for(model: GAN, size: int = 4) -> tuple[Tensor, Tensor | None]:
    config = model.config
    x = torch.rand(size, *config.input_shape, dtype=model.dtype)
    if config.data_range is not None:
        low, high = config.data_range
        x = low + (high - low) * x
    return x, torch.arange(size) % config.num_classes if config.num_classes else None


def one_hot(model: GAN, labels: Tensor | None) -> tuple[Tensor, ...]:
    return () if labels is None else (torch.eye(model.config.num_classes, dtype=model.dtype)[labels],)


def frozen_statistics(model: GAN) -> GAN:
    """Where two passes must agree: power iteration and batch statistics stand still."""
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# Shapes and configurations


@st.composite
def configurations(draw: st.DrawFn) -> GANConfig:
    architecture = draw(st.sampled_from(["mlp", "conv", "lstm"]))
    channels, hidden = None, draw(st.lists(st.integers(1, 6), max_size=2).map(tuple))
    if architecture == "conv":
        sides = draw(st.lists(st.integers(8, 21), min_size=1, max_size=2))
        features = draw(st.integers(1, 3))
        shape = (features, *sides) if len(sides) == 2 else (*sides, features)
        levels = min(sides).bit_length() - 1
        channels = draw(st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=levels).map(tuple))
    elif architecture == "lstm":
        shape, hidden = (draw(st.integers(1, 9)), draw(st.integers(1, 3))), hidden or (3,)
    else:
        shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    return GANConfig(
        input_shape=shape,
        latent_dim=draw(st.integers(1, 5)),
        architecture=architecture,
        hidden_sizes=hidden,
        channels=channels,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        discriminator_normalization=draw(st.sampled_from(NORMALIZATIONS)),
        spectral_norm=draw(st.booleans()),
        data_range=draw(st.sampled_from([None, (0, 1), (-1.0, 1.0), (-3.0, 250.0)])),
        loss=draw(st.sampled_from(ADVERSARIAL_LOSSES)),
        num_classes=draw(st.sampled_from([0, 3])),
    )


@settings(max_examples=40, deadline=None)
@given(config=configurations(), batch=st.integers(2, 4))
def test_every_configuration_has_the_documented_shapes_and_round_trips(config: GANConfig, batch: int) -> None:
    assert GANConfig.from_json(config.to_json()) == config
    model, shape = GAN(config), config.input_shape
    x, labels = batch_for(model, batch)
    condition = one_hot(model, labels)

    z = model.noise(batch)
    assert z.shape == (batch, config.latent_dim)
    assert model(z, labels).shape == model.generator(z, *condition).shape == (batch, *shape)
    assert model.discriminator(x, *condition).shape == (batch,)
    for out in (model.discriminator_loss(x, labels), model.generator_loss(x, labels)):
        assert out.loss.shape == ()
        assert torch.isfinite(out.loss)
        assert out.fake.shape == (batch, *shape)
        assert out.fake_logits.shape == (batch,)
        assert out.penalty is None
    model.update_ema()
    made = model.generate(5, batch_size=2)
    assert made.shape == (5, *shape)
    if config.data_range is not None:
        low, high = config.data_range
        assert low <= made.min()
        assert made.max() <= high
    ends = model.noise(2), model.noise(2)
    assert model.interpolate(*ends, 3, labels=0 if condition else None).shape == (2, 3, *shape)


def test_dcgan_of_digits_has_the_layers_it_should_have() -> None:
    model = GAN(latent_dim=10, discriminator_normalization="batch")
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if not name.startswith("ema.")}
    assert shapes == {
        "generator.head.layers.0.weight": (64 * 7 * 7, 10),
        "generator.head.layers.0.bias": (64 * 7 * 7,),
        "generator.features.1.weight": (64,),
        "generator.features.1.bias": (64,),
        "generator.features.3.weight": (64, 32, 4, 4),
        "generator.features.4.weight": (32,),
        "generator.features.4.bias": (32,),
        "generator.features.6.weight": (32, 1, 4, 4),
        "generator.features.6.bias": (1,),
        "discriminator.features.layers.0.weight": (32, 1, 4, 4),
        "discriminator.features.layers.0.bias": (32,),
        "discriminator.features.layers.2.weight": (64, 32, 4, 4),
        "discriminator.features.layers.3.weight": (64,),
        "discriminator.features.layers.3.bias": (64,),
        "discriminator.output.weight": (1, 64 * 7 * 7),
        "discriminator.output.bias": (1,),
    }
    average = {name.removeprefix("ema.") for name in model.state_dict() if name.startswith("ema.")}
    assert average == set(model.generator.state_dict())


def test_dense_layers_of_the_generator_mirror_those_of_the_discriminator() -> None:
    model = small(architecture="mlp", hidden_sizes=(20, 10, 5), channels=None)

    def widths(network: nn.Module) -> list[int]:
        return [layer.out_features for layer in network.modules() if isinstance(layer, nn.Linear)]

    assert widths(model.discriminator) == [20, 10, 5, 1]
    assert widths(model.generator) == [5, 10, 20, 72]
    assert all(isinstance(layer, fastgen.nn.Linear) for layer in model.modules() if isinstance(layer, nn.Linear))


@every_kind
def test_generator_gives_the_range_of_the_data_and_discriminator_scales_it(fields: dict[str, object]) -> None:
    def at(data_range: tuple[float, float]) -> GAN:
        torch.manual_seed(3)
        return small(**{**fields, "data_range": data_range}).double().eval()

    unit, bytes_ = at((0.0, 1.0)), at((-5.0, 250.0))
    x, labels = batch_for(unit)
    made, other = unit.generate(4, seed=1), bytes_.generate(4, seed=1)
    torch.testing.assert_close(other, made * 255 - 5)
    torch.testing.assert_close(
        bytes_.discriminator(x * 255 - 5, *one_hot(bytes_, labels)), unit.discriminator(x, *one_hot(unit, labels))
    )


# ---------------------------------------------------------------------------------------------------
# Losses and who gets gradients


@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES)
@every_kind
def test_losses_are_those_of_the_functions(fields: dict[str, object], penalties: dict[str, object]) -> None:
    """Whatever is done in one pass here, the pieces of `fastgen.functional` give one by one."""
    model = frozen_statistics(small(**fields).double())
    x, labels = batch_for(model)
    condition = one_hot(model, labels)
    kind, generator, source = model.config.loss, Generator(7), Generator(7)

    out = model.discriminator_loss(x, labels, generator=generator, **penalties)
    policy = str(penalties.get("augment", ""))
    size = augmentation_size(policy, x.dim())
    fake = model(normal(4, 4, generator=source).double(), labels).detach()
    torch.testing.assert_close(out.fake, fake)
    columns = 2 * size + ("gradient_penalty_weight" in penalties)
    u = uniform(4, columns, generator=source)
    assert generator.offset == source.offset == 4 * (4 + columns)
    seen_real, seen_fake = x, fake
    if policy:
        seen_real, seen_fake = (
            diff_augment(x, policy, noise=u[:, :size]),
            diff_augment(fake, policy, noise=u[:, size : 2 * size]),
        )

    def judge(value: Tensor) -> Tensor:
        logits: Tensor = model.discriminator(value, *condition)
        return logits

    torch.testing.assert_close(out.real_logits, judge(seen_real))
    torch.testing.assert_close(out.fake_logits, judge(seen_fake))
    loss = discriminator_loss(judge(seen_real), judge(seen_fake), kind)
    penalty = torch.zeros(())
    if "r1_gamma" in penalties:
        penalty = penalty + penalties["r1_gamma"] * zero_centered_gradient_penalty(judge, seen_real)
    if "r2_gamma" in penalties:
        penalty = penalty + penalties["r2_gamma"] * zero_centered_gradient_penalty(judge, seen_fake)
    if "gradient_penalty_weight" in penalties:
        value = gradient_penalty(judge, seen_real, seen_fake, noise=u[:, -1])
        penalty = penalty + penalties["gradient_penalty_weight"] * value
    if penalties:
        assert penalty > 0
        torch.testing.assert_close(out.penalty, penalty)
    torch.testing.assert_close(out.loss, loss + penalty)

    weights = tuple(model.discriminator.parameters())
    for ours, expected in zip(
        torch.autograd.grad(out.loss, weights), torch.autograd.grad(loss + penalty, weights), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)


@every_kind
def test_generator_loss_is_that_of_the_function(fields: dict[str, object]) -> None:
    model = frozen_statistics(small(**fields).double())
    x, labels = batch_for(model)
    policy = "translation" if x.dim() > 2 else ""
    size = augmentation_size(policy, x.dim())
    out = model.generator_loss(x, labels, generator=Generator(7), augment=policy)
    source = Generator(7)
    fake = model(normal(4, 4, generator=source).double(), labels)
    u = uniform(4, 2 * size, generator=source)
    condition = one_hot(model, labels)
    fake_logits = model.discriminator(diff_augment(fake, policy, noise=u[:, size:]), *condition)
    real_logits = None
    if model.config.loss == "relativistic":
        real_logits = model.discriminator(diff_augment(x, policy, noise=u[:, :size]), *condition)
        torch.testing.assert_close(out.real_logits, real_logits)
    else:
        assert out.real_logits is None
    loss = generator_loss(fake_logits, model.config.loss, real_logits)
    torch.testing.assert_close(out.loss, loss)
    weights = tuple(model.generator.parameters())
    for ours, expected in zip(torch.autograd.grad(out.loss, weights), torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss", ADVERSARIAL_LOSSES)
@every_kind
def test_each_half_of_a_step_gives_gradients_to_its_own_network_alone(fields: dict[str, object], loss: str) -> None:
    model = small(**{**fields, "loss": loss}).train()
    x, labels = batch_for(model)
    halves = (
        (model.discriminator_loss, model.discriminator, model.generator),
        (model.generator_loss, model.generator, model.discriminator),
    )
    for half, trained, other in halves:
        model.zero_grad()
        half(x, labels).loss.backward()
        assert all(parameter.grad is None for parameter in [*other.parameters(), *model.ema.parameters()])
        for name, parameter in trained.named_parameters():
            assert parameter.grad is not None, name
            # A batch norm takes a constant away, and so does a difference of two logits.
            assert parameter.grad.abs().sum() > 0 or name.endswith("bias"), name
        assert all(parameter.requires_grad for parameter in other.parameters())


def test_no_graph_of_the_generator_is_built_for_the_discriminator_and_no_weight_gradients_for_the_generator() -> None:
    model = small()
    x, _ = batch_for(model)
    out = model.discriminator_loss(x)
    assert not out.fake.requires_grad
    reached = leaves(model.generator_loss(x).loss)
    assert reached == {id(parameter) for parameter in model.generator.parameters()}
    assert leaves(out.loss) == {id(parameter) for parameter in model.discriminator.parameters()}


def leaves(loss: Tensor) -> set[int]:
    """The leaf tensors of the graph of a loss."""
    seen, found, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return found


@every_kind
def test_examples_may_be_made_once_for_both_halves(fields: dict[str, object]) -> None:
    model = frozen_statistics(small(**fields))
    x, labels = batch_for(model)
    fake = model(model.noise(4, seed=7), labels)
    shared = model.discriminator_loss(x, labels, fake=fake), model.generator_loss(x, labels, fake=fake)
    apart = [half(x, labels, generator=Generator(7)) for half in (model.discriminator_loss, model.generator_loss)]
    for out, expected in zip(shared, apart, strict=True):
        torch.testing.assert_close(out.loss, expected.loss)
    shared[0].loss.backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())
    shared[1].loss.backward()
    gradients = [parameter.grad for parameter in model.generator.parameters()]
    expected = torch.autograd.grad(apart[1].loss, tuple(model.generator.parameters()))
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)


def test_projection_discriminator_is_the_papers() -> None:
    model = small(num_classes=3)
    x, labels = batch_for(model, 6)
    network = model.discriminator
    phi = network.features(2 * x - 1)
    expected = [
        (network.output.weight[0] + network.projection.weight[label]) @ row + network.output.bias[0]
        for row, label in zip(phi, labels, strict=True)
    ]
    torch.testing.assert_close(network(x, torch.eye(3)[labels]), torch.stack(expected))


def test_spectral_norm_leaves_no_singular_value_above_one() -> None:
    for name, count in (("conv-classes-spectral", 4), ("lstm", 5)):
        model = small(**{**KINDS[name], "spectral_norm": True})
        with torch.no_grad():  # weights that are far too large
            for parameter in model.discriminator.parameters():
                parameter.mul_(30)
            model.train()
            for _ in range(60):  # of power iteration
                model.discriminator_loss(*batch_for(model))
        matrices = [
            getattr(module, name).flatten(1)
            for module in model.discriminator.modules()
            if hasattr(module, "parametrizations")
            for name in module.parametrizations
        ]
        assert len(matrices) == count
        for matrix in matrices:
            assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(
                1, abs=0.05
            )  # as far as power iteration got


# ---------------------------------------------------------------------------------------------------
# The averaged generator


def test_average_over_the_weights_of_the_past() -> None:
    model = small().double()
    history: list[Tensor] = []
    weight, statistic = model.generator.head.layers[0].weight, model.generator.features[1].running_mean
    for step in range(40):
        with torch.no_grad():
            weight.normal_()
            statistic.normal_()
        history.append(torch.cat((weight.detach().flatten(), statistic)).clone())
        model.update_ema(decay=0.7)
        expected = history[0]
        for t, value in enumerate(history[1:], start=1):
            decay = min(0.7, t / (t + 10))
            expected = decay * expected + (1 - decay) * value
        ema = model.ema
        got = torch.cat((ema.head.layers[0].weight.flatten(), ema.features[1].running_mean))
        torch.testing.assert_close(got, expected)
        assert int(model.ema_updates) == step + 1
    assert not any(parameter.requires_grad for parameter in model.ema.parameters())
    model.generator.features[1].num_batches_tracked.fill_(9)
    model.update_ema()
    assert int(model.ema.features[1].num_batches_tracked) == 9


def test_generate_uses_the_average_once_there_is_one() -> None:
    model = small()
    z = model.noise(3, seed=1)

    def of(network: nn.Module) -> Tensor:
        with torch.no_grad():
            made: Tensor = copy.deepcopy(network).eval()(z)
        return made

    with torch.no_grad():
        model.generator.features[-1].weight.mul_(3)
    assert not torch.allclose(of(model.generator), of(model.ema))
    torch.testing.assert_close(model.generate(3, seed=1), of(model.generator))
    model.update_ema()
    with torch.no_grad():
        model.generator.features[-1].weight.mul_(3)
    torch.testing.assert_close(model.generate(3, seed=1), of(model.ema))
    assert not torch.allclose(of(model.generator), of(model.ema))


# ---------------------------------------------------------------------------------------------------
# Randomness


def test_noise_is_the_stream_row_by_row() -> None:
    model = small()
    assert model.noise_per_sample == 4
    for truncation in (None, 0.7):
        whole = model.noise(9, seed=3, truncation=truncation)
        assert whole.dtype == torch.float32
        torch.testing.assert_close(model.noise(4, seed=3, truncation=truncation), whole[:4], rtol=0, atol=0)
        rest = model.noise(5, generator=Generator(3, offset=4 * 4), truncation=truncation)
        torch.testing.assert_close(rest, whole[4:], rtol=0, atol=0)
    assert torch.equal(model.noise(9, seed=3), normal(9, 4, generator=Generator(3)))
    assert model.noise(0).shape == (0, 4)


@pytest.mark.parametrize("truncation", [0.05, 0.5, 2.0, 40.0])
def test_truncated_noise_is_a_truncated_normal_distribution(truncation: float) -> None:
    z = GAN(input_shape=(4,), architecture="mlp", latent_dim=200).noise(500, seed=1, truncation=truncation)
    assert z.abs().max() <= truncation
    assert torch.isfinite(z).all()
    mass = math.erf(truncation / math.sqrt(2))
    ordered = z.double().flatten().sort().values
    cdf = (torch.special.ndtr(ordered) - (1 - mass) / 2) / mass
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the bound for p = 0.001.
    assert (cdf - torch.arange(1, 100_001, dtype=torch.float64) / 100_000).abs().max() < 1.95 / math.sqrt(100_000)


def test_truncation_keeps_the_order_of_the_latents() -> None:
    """Latents of one seed are those of another threshold drawn together, not others."""
    model = small()
    wide, narrow = (model.noise(50, seed=1, truncation=t).flatten() for t in (2.0, 0.3))
    assert torch.equal(wide.argsort(), narrow.argsort())
    assert torch.equal(wide.sign(), narrow.sign())
    assert (narrow.abs() < wide.abs()).all()


@every_kind
def test_generate_repeats_and_is_prefix_stable(fields: dict[str, object]) -> None:
    model = small(**fields)
    model.update_ema()
    for truncation in (None, 0.5):
        made = model.generate(7, seed=1, truncation=truncation)
        assert torch.equal(made, model.generate(7, seed=1, truncation=truncation))
        assert torch.equal(made, model.generate(7, generator=Generator(1), truncation=truncation))
        torch.testing.assert_close(model.generate(7, seed=1, truncation=truncation, batch_size=2), made)
        torch.testing.assert_close(model.generate(3, seed=1, truncation=truncation), made[:3])
        assert not torch.allclose(made, model.generate(7, seed=2, truncation=truncation))


def test_generate_continues_the_stream_of_its_generator() -> None:
    model, generator = small(), Generator(8)
    parts = torch.cat([model.generate(2, generator=generator), model.generate(3, generator=generator)])
    torch.testing.assert_close(parts, model.generate(5, seed=8))


def test_latents_have_the_same_bits_for_any_number_of_threads() -> None:
    model = GAN(input_shape=(4,), architecture="mlp", latent_dim=64)
    threads = torch.get_num_threads()
    try:
        for truncation in (None, 0.8):
            latents = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                latents.append(model.noise(2000, seed=1, truncation=truncation))
            assert all(torch.equal(other, latents[0]) for other in latents)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("truncation", [None, 0.5])
def test_generate_draws_the_same_latents_in_every_dtype(
    dtype: torch.dtype, tolerance: float, truncation: float | None
) -> None:
    model = small()
    made = model.generate(4, seed=1, truncation=truncation)
    converted = copy.deepcopy(model).to(dtype).generate(4, seed=1, truncation=truncation)
    assert converted.dtype == dtype
    torch.testing.assert_close(converted.to(made.dtype), made, rtol=0, atol=tolerance)


def test_deterministic_under_manual_seed() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        model = small(spectral_norm=True)
        x, _ = batch_for(model)
        options = PENALTIES["augmented"]
        out = model.discriminator_loss(x, **options)
        out.loss.backward()
        model.generator_loss(x, augment="color").loss.backward()
        model.update_ema()
        return [out.loss, model.generate(3), *(p.grad for p in model.parameters() if p.grad is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------
# Inference


def test_inference_leaves_modes_gradients_and_statistics_as_they_were() -> None:
    model = small(spectral_norm=True)
    model.discriminator.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    z = model.noise(2)
    assert not model.generate(2).requires_grad
    assert not model.interpolate(z, z).requires_grad
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_interpolation_is_along_the_great_circle() -> None:
    model = small(architecture="mlp", hidden_sizes=(), channels=None, data_range=None).double()
    with torch.no_grad():  # so that the examples tell the latents
        layer = model.generator.head.layers[0]
        layer.bias.zero_()
        layer.weight.copy_(torch.linalg.qr(torch.randn(72, 4, dtype=torch.float64)).Q)
    a, b = torch.tensor([[3.0, 0, 0, 0], [1, 1, 0, 0]]), torch.tensor([[0.0, 3, 0, 0], [-2, 2, 0, 0]])
    way = model.interpolate(a, b, 5).flatten(2) @ layer.weight.detach()
    angle = torch.linspace(0, math.pi / 2, 5, dtype=torch.float64)
    circle = 3 * torch.stack((angle.cos(), angle.sin(), 0 * angle, 0 * angle), 1)
    torch.testing.assert_close(way[0], circle, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(way[1, 0], a[1].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(way[1, -1], b[1].double(), rtol=1e-6, atol=1e-6)

    for other in (a, 2 * a, -a):  # no angle to speak of: straight
        way = model.interpolate(a, other, 3).flatten(2) @ layer.weight.detach()
        torch.testing.assert_close(way[:, 1], (0.5 * (a + other)).double(), rtol=1e-6, atol=1e-6)


def test_interpolation_starts_and_ends_at_what_is_generated() -> None:
    model = small(num_classes=3)
    a, b = model.noise(4, seed=1), model.noise(4, seed=2)
    rows = model.interpolate(a, b, 5, 1, 2, batch_size=3)
    torch.testing.assert_close(rows[:, 0], model.generate(4, seed=1, labels=1))
    torch.testing.assert_close(rows[:, -1], model.generate(4, seed=2, labels=2))


def test_labels_matter_and_default_to_each_class_in_turn() -> None:
    for fields in (
        KINDS["conv-classes-spectral"],
        {**KINDS["mlp"], "num_classes": 3},
        {**KINDS["lstm"], "num_classes": 3},
    ):
        model = small(**fields)
        by_class = [model.generate(5, seed=0, labels=label) for label in range(3)]
        assert not torch.allclose(by_class[0], by_class[1])
        cycle = model.generate(5, seed=0)
        torch.testing.assert_close(cycle, torch.stack([by_class[i % 3][i] for i in range(5)]))
        for labels in ([0, 1, 2, 0, 1], torch.tensor([0, 1, 2, 0, 1], dtype=torch.uint8)):
            torch.testing.assert_close(model.generate(5, seed=0, labels=labels), cycle)


# ---------------------------------------------------------------------------------------------------
# Precision, compilation, copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_autocast_keeps_losses_in_float32(dtype: torch.dtype, fields: dict[str, object]) -> None:
    model = frozen_statistics(small(**fields))
    x, labels = batch_for(model)
    for half in (model.discriminator_loss, model.generator_loss):
        expected = half(x, labels, generator=Generator(1))
        with torch.autocast("cpu", dtype=dtype):
            out = half(x, labels, generator=Generator(1))
        assert out.loss.dtype == out.fake_logits.dtype == torch.float32
        torch.testing.assert_close(out.loss, expected.loss, rtol=2e-2, atol=1e-3)
        out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_kind
def test_converted_models(dtype: torch.dtype, fields: dict[str, object]) -> None:
    model = frozen_statistics(small(**fields))
    x, labels = batch_for(model)
    expected = model.discriminator_loss(x, labels, generator=Generator(1), r1_gamma=1.0)
    model = model.to(dtype)
    out = model.discriminator_loss(x, labels, generator=Generator(1), r1_gamma=1.0)
    out.loss.backward()
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.loss.float(), expected.loss, rtol=5e-2, atol=0)
    assert model.generate(2).dtype == model(model.noise(2), 0 if labels is not None else None).dtype == dtype


@pytest.mark.parametrize(
    ("half", "name"),
    [
        ("generator", "conv-classes-spectral"),
        ("generator", "lstm"),
        ("discriminator", "mlp-relativistic"),
        ("discriminator", "batch-norm-in-both"),
    ],
)
def test_halves_of_a_step_compile_to_one_graph(half: str, name: str) -> None:
    torch._dynamo.reset()
    model = frozen_statistics(small(**KINDS[name]))
    x, labels = batch_for(model)
    policy = "translation"
    loss = getattr(model, f"{half}_loss")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weights = tuple(getattr(model, half).parameters())
    outs = [call(x, labels, generator=Generator(2), augment=policy) for call in (loss, compiled)]
    torch.testing.assert_close(outs[1].loss, outs[0].loss)
    gradients = [torch.autograd.grad(out.loss, weights) for out in outs]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


def test_generator_compiles() -> None:
    torch._dynamo.reset()
    model = small().eval()
    z = model.noise(3)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(z), model(z))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_same_seed_same_examples_and_losses_on_the_gpu(fields: dict[str, object]) -> None:
    model = frozen_statistics(small(**fields))
    x, labels = batch_for(model)
    condition = None if labels is None else labels.cuda()

    def run(model: GAN, x: Tensor, labels: Tensor | None) -> list[Tensor]:
        made = [model.generate(5, seed=1), model.generate(5, seed=1, truncation=0.5)]
        halves = model.discriminator_loss, model.generator_loss
        return [*made, *(half(x, labels, generator=Generator(2)).loss for half in halves)]

    expected = run(model, x, labels)
    for ours, value in zip(run(model.cuda(), x.cuda(), condition), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), value, rtol=1e-3, atol=1e-3)


def test_deepcopy_is_independent() -> None:
    model = small(spectral_norm=True, num_classes=2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.allclose(model.generate(2, seed=0), twin.generate(2, seed=0))


# ---------------------------------------------------------------------------------------------------
# Folders, and the user's own modules


@pytest.mark.parametrize("load", [GAN.from_pretrained, from_pretrained])
@every_kind
def test_folder_round_trip(load, fields: dict[str, object], tmp_path: Path) -> None:
    model = small(**fields).train()
    x, labels = batch_for(model)
    model.discriminator_loss(x, labels)
    model.generator_loss(x, labels)  # statistics and power iterations away from where they start
    model.update_ema()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    state_before = torch.get_rng_state()
    loaded = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert type(loaded) is GAN
    assert loaded.config == model.config
    assert not loaded.training
    state = model.state_dict()
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys() == loaded.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, parameter in loaded.named_parameters():
        assert parameter.requires_grad != name.startswith("ema."), name
    torch.testing.assert_close(loaded.generate(3, seed=1), model.generate(3, seed=1))
    loaded.train().discriminator_loss(x, labels, r1_gamma=1.0).loss.backward()
    loaded.update_ema()
    assert int(loaded.ema_updates) == 2


class OwnGenerator(nn.Module):
    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(3 + classes, 10)

    def forward(self, z: Tensor, *condition: Tensor) -> Tensor:
        made: Tensor = self.layer(torch.cat((z, *condition), 1)).view(-1, 5, 2)
        return made


class OwnDiscriminator(nn.Module):
    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.layer = nn.Linear(10 + classes, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        logits: Tensor = self.norm(self.layer(torch.cat((x.flatten(1), *condition), 1))).squeeze(1)
        return logits


OWN = {"input_shape": (5, 2), "latent_dim": 3, "data_range": None}


@pytest.mark.parametrize("classes", [0, 2])
def test_own_modules(classes: int, tmp_path: Path) -> None:
    generator, discriminator = OwnGenerator(classes), OwnDiscriminator(classes)
    model = GAN(**OWN, num_classes=classes, generator=generator, discriminator=discriminator)
    assert model.generator is generator
    assert model.discriminator is discriminator
    assert model.config.architecture == "custom"
    config = GANConfig(**OWN, num_classes=classes, architecture="mlp", hidden_sizes=(3,))
    assert GAN(config, generator=OwnGenerator(classes), discriminator=discriminator).config == model.config
    x, labels = torch.randn(4, 5, 2), torch.arange(4) % classes if classes else None
    out = model.discriminator_loss(x, labels, generator=Generator(1))
    # Its batch norm sees data and generated examples apart, as two calls of it.
    condition = one_hot(model, labels)
    torch.testing.assert_close(out.real_logits, discriminator(x, *condition))
    torch.testing.assert_close(out.fake_logits, discriminator(out.fake, *condition))
    out.loss.backward()
    assert generator.layer.weight.grad is None
    model.generator_loss(x, labels).loss.backward()
    assert generator.layer.weight.grad is not None
    model.update_ema()

    model.save_pretrained(tmp_path)
    assert GANConfig.from_json((tmp_path / "config.json").read_text()) == model.config
    loaded = GAN.from_pretrained(
        tmp_path, generator=OwnGenerator(classes), discriminator=OwnDiscriminator(classes), dtype=torch.float64
    )
    assert loaded.dtype == torch.float64
    torch.testing.assert_close(loaded.generate(3, seed=1).float(), model.generate(3, seed=1))
    for load in (GAN.from_pretrained, from_pretrained):
        with pytest.raises(ValueError, match=r"generator, discriminator: expected two modules for 'custom', got None"):
            load(tmp_path)


def test_own_discriminator_of_torchs_lstm_gets_no_gradients_of_the_generators_loss() -> None:
    """That module keeps a list of its weights beside the weights."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.output = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.output(self.lstm(x)[0].mean(1)).squeeze(-1)
            return logits

    model = GAN(**OWN, generator=OwnGenerator(), discriminator=Critic())
    x = torch.randn(4, 5, 2)
    model.generator_loss(x).loss.backward()
    assert all(parameter.grad is None for parameter in model.discriminator.parameters())
    model.discriminator_loss(x).loss.backward()
    assert all(parameter.grad is not None for parameter in model.discriminator.parameters())


def test_own_modules_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"^discriminator: expected a module beside .* got None"):
        GAN(**OWN, generator=OwnGenerator())
    with pytest.raises(ValueError, match=r"^generator: expected a module beside .* got None"):
        GAN(**OWN, discriminator=OwnDiscriminator())
    model = GAN(**OWN, generator=nn.Linear(3, 10), discriminator=OwnDiscriminator())
    with pytest.raises(ValueError, match=r"^generator: expected examples of shape \(2, 5, 2\), got \(2, 10\)"):
        model(torch.zeros(2, 3))
    model = GAN(**OWN, generator=OwnGenerator(), discriminator=nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"^discriminator: expected logits of shape \(4,\), got \(4, 5, 1\)"):
        model.discriminator_loss(torch.zeros(4, 5, 2))


# ---------------------------------------------------------------------------------------------------
# It learns


def train(model: GAN, batches, steps: int, lr: float = 2e-3, **penalties: float) -> GANOutput:
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.99))
        for network in (model.discriminator, model.generator)
    ]
    for step in range(steps):
        x, labels = batches(step)
        for optimizer, half in zip(
            optimizers,
            (lambda *a: model.discriminator_loss(*a, **penalties), model.generator_loss),
            strict=True,
        ):
            optimizer.zero_grad()
            out = half(x, labels)
            out.loss.backward()
            optimizer.step()
        model.update_ema(0.99)
    return out


@pytest.mark.parametrize("loss", ["non_saturating", "least_squares", "relativistic"])
def test_learns_a_ring_of_eight_modes(loss: str) -> None:
    """The usual test for collapse: a generator that finds only some of eight points on a circle."""
    angles = torch.arange(8) * math.pi / 4
    modes = torch.stack((angles.cos(), angles.sin()), 1)

    def batches(step: int) -> tuple[Tensor, None]:
        g = Generator(step)
        which = (uniform(64, generator=g) * 8).long()
        return modes[which] + normal(64, 2, std=0.05, generator=g), None

    model = GAN(
        input_shape=(2,),
        latent_dim=4,
        architecture="mlp",
        hidden_sizes=(64,),
        normalization="none",
        data_range=None,
        loss=loss,
    )
    train(model, batches, 300, lr=5e-3, r1_gamma=0.2, r2_gamma=0.2 if loss == "relativistic" else 0.0)
    distance, nearest = torch.cdist(model.generate(800, seed=0), modes).min(1)
    assert (distance < 0.4).float().mean() > 0.6
    assert (torch.bincount(nearest, minlength=8) > 30).all()


def test_examples_of_a_class_are_of_that_class() -> None:
    centres = torch.tensor([[1.0, 1], [-1, 1], [0, -1]])

    def batches(step: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(96) % 3
        return centres[labels] + normal(96, 2, std=0.1, generator=Generator(step)), labels

    model = GAN(input_shape=(2,), latent_dim=4, architecture="mlp", hidden_sizes=(32,), data_range=None, num_classes=3)
    train(model, batches, 200, r1_gamma=0.2)
    wanted = torch.arange(300) % 3
    nearest = torch.cdist(model.generate(300, seed=0), centres).argmin(1)
    assert (nearest == wanted).float().mean() > 0.95


# ---------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected an int of at least 1, got 0"),
        ({"architecture": "transformer"}, "architecture: expected one of mlp, conv, lstm, custom, got 'transformer'"),
        ({"architecture": "custom"}, "generator, discriminator: expected two modules for 'custom', got None"),
        ({"input_shape": (1, 7, 28)}, r"input_shape: expected \(C, H, W\) or \(T, F\) .* 'conv', got \(1, 7, 28\)"),
        ({"input_shape": (7, 2)}, r"input_shape: expected .* for 'conv', got \(7, 2\)"),
        ({"input_shape": (9,)}, r"input_shape: expected .* for 'conv', got \(9,\)"),
        ({"architecture": "lstm"}, r"input_shape: expected \(T, F\) for 'lstm', got \(1, 28, 28\)"),
        (
            {"architecture": "lstm", "input_shape": (9, 1), "hidden_sizes": ()},
            "hidden_sizes: expected a sequence of ints of at least 1, got an empty one",
        ),
        ({"architecture": "mlp", "channels": (4,)}, r"channels: expected none for 'mlp', got \(4,\)"),
        ({"channels": (4,) * 5}, r"channels: expected at most 4 for \(1, 28, 28\), got 5"),
        ({"activation": "maxout"}, "activation: expected one of .*, got 'maxout'"),
        ({"normalization": "instance"}, "normalization: expected one of batch, layer, none, got 'instance'"),
        ({"discriminator_normalization": 1}, "discriminator_normalization: expected one of .*, got 1"),
        ({"spectral_norm": 1}, "spectral_norm: expected True or False, got 1"),
        ({"data_range": (1, 0)}, r"data_range: expected low < high, got \(1, 0\)"),
        ({"data_range": 1}, r"data_range: expected \(low, high\) or None, got 1"),
        ({"data_range": (0, math.inf)}, "data_range: expected a finite number, got inf"),
        ({"loss": "wgan"}, "loss: expected one of minimax, .*, got 'wgan'"),
        ({"num_classes": -1}, "num_classes: expected an int of at least 0, got -1"),
        ({"latent_dims": 3}, "GANConfig: no field 'latent_dims'; did you mean 'latent_dim'?"),
    ],
)
def test_errors_of_configurations_name_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GAN(**fields)


IMAGE = torch.zeros(2, 1, 8, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.discriminator_loss(IMAGE[0]), r"real: expected shape \(B, 1, 8, 9\), got \(1, 8, 9\)"),
        (lambda m: m.discriminator_loss([0]), "real: expected a tensor, got list"),
        (lambda m: m.generator_loss(IMAGE.long()), "real: expected floating-point values, got int64"),
        (lambda m: m.discriminator_loss(IMAGE + 2), r"real: expected values in \[0, 1\] \(data_range\), got 2 to 2"),
        (lambda m: m.discriminator_loss(IMAGE * math.nan), r"real: expected values in \[0, 1\] .* got nan to nan"),
        (lambda m: m.discriminator_loss(IMAGE, 1), "labels: expected None, the model is unconditional"),
        (lambda m: m.discriminator_loss(IMAGE, r1_gamma=-1), "r1_gamma: expected a finite number of at least 0, got"),
        (lambda m: m.discriminator_loss(IMAGE, r2_gamma=math.inf), "r2_gamma: expected a finite number .*, got inf"),
        (
            lambda m: m.discriminator_loss(IMAGE, gradient_penalty_weight=-1),
            "gradient_penalty_weight: expected a finite number of at least 0, got -1",
        ),
        (lambda m: m.discriminator_loss(IMAGE, augment="blur"), "policy: expected one of color, .*, got 'blur'"),
        (lambda m: m.discriminator_loss(IMAGE, fake=IMAGE[:1]), "fake: expected as many examples as real, 2, got 1"),
        (lambda m: m.generator_loss(IMAGE, fake=IMAGE[0]), r"fake: expected shape \(B, 1, 8, 9\), got \(1, 8, 9\)"),
        (lambda m: m(torch.zeros(2, 5)), r"z: expected shape \(B, 4\), got \(2, 5\)"),
        (lambda m: m(5), "z: expected a tensor, got int"),
        (lambda m: m.noise(-1), "n: expected an int of at least 0, got -1"),
        (lambda m: m.noise(1, truncation=0), "truncation: expected a finite number above 0, got 0"),
        (lambda m: m.noise(1, seed=1, generator=Generator(1)), "seed: expected None where a generator is given"),
        (lambda m: m.generate(0), "n: expected an int of at least 1, got 0"),
        (lambda m: m.generate(1, batch_size=0), "batch_size: expected an int of at least 1, got 0"),
        (lambda m: m.generate(2, labels=1), "labels: expected None, the model is unconditional"),
        (lambda m: m.interpolate(torch.zeros(1, 4), torch.zeros(2, 4)), "b: expected as many latents as a, 1, got 2"),
        (lambda m: m.interpolate(torch.zeros(1, 4), torch.zeros(4)), r"b: expected shape \(B, 4\), got \(4,\)"),
        (lambda m: m.interpolate(torch.zeros(1, 4), torch.zeros(1, 4), 1), "steps: expected an int of at least 2"),
        (lambda m: m.update_ema(1), "decay: expected a finite number of at least 0 and below 1, got 1"),
    ],
)
def test_errors_of_calls_name_the_argument(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call(small())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels: expected 2 labels for a conditional model, got None"),
        ([0, 3], "labels: expected 0 to 2, got 3"),
        ([0], r"labels: expected shape \(2,\), got \(1,\)"),
        ([0.5, 1.0], "labels: expected ints, got float32"),
        ("ab", "labels: expected ints, got 'ab'"),
    ],
)
def test_errors_of_labels(labels: object, message: str) -> None:
    model = small(num_classes=3)
    for half in (model.discriminator_loss, model.generator_loss):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            half(IMAGE, labels)


class Tied(nn.Module):
    """A generator whose two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 6)
        self.second.weight = self.first.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.second(torch.relu(self.first(z))))


def test_shared_weights_of_own_modules_are_saved_and_stay_shared(tmp_path: Path) -> None:
    def modules() -> dict[str, nn.Module]:
        return {"generator": Tied(), "discriminator": nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))}

    model = GAN(input_shape=(6,), latent_dim=3, **modules())
    model.save_pretrained(tmp_path)
    loaded = GAN.from_pretrained(tmp_path, dtype=torch.float64, **modules())
    assert loaded.generator.second.weight is loaded.generator.first.weight
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.double().state_dict()[name]), name


def test_fakes_of_another_dtype_are_taken() -> None:
    model = small(**KINDS["mlp"]).bfloat16()
    x, labels = batch_for(model)
    fake = torch.rand(x.shape, dtype=torch.float32)
    assert model.discriminator_loss(x, labels, fake=fake).loss.isfinite()
    assert model.generator_loss(x, labels, fake=fake.requires_grad_()).loss.isfinite()


def test_half_weights_are_not_averaged() -> None:
    with pytest.raises(TypeError, match="generator: expected float32 or float64 weights to average, got bfloat16"):
        small(**KINDS["mlp"]).bfloat16().update_ema()


def test_a_generator_that_cannot_be_copied() -> None:
    lazy = nn.LazyLinear(6)
    with pytest.raises(ValueError, match="generator: expected a module that can be copied; call a lazy one once"):
        GAN(input_shape=(6,), latent_dim=3, generator=lazy, discriminator=nn.Linear(6, 1))
