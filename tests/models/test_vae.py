"""The VAE against the definitions of its loss and bounds, and against its promises about random numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from fastgen.data import load_images
from fastgen.functional import reparameterize
from fastgen.models import VAE, VAEConfig
from fastgen.models._layers import ACTIVATIONS
from fastgen.random import Generator

SMALL = {"input_shape": (1, 8, 9), "latent_dim": 3, "hidden_sizes": (16,)}
KINDS = [
    {"architecture": "mlp", "likelihood": "bernoulli"},
    {"architecture": "mlp", "likelihood": "gaussian"},
    {"architecture": "conv", "likelihood": "bernoulli", "num_classes": 3},
    {"architecture": "conv", "likelihood": "gaussian", "learn_variance": False, "variance": 0.3},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(**fields: object) -> VAE:
    return VAE(**{**SMALL, **fields})


def batch_for(model: VAE, size: int = 4) -> tuple[Tensor, Tensor | None]:
    x = torch.rand(size, *model.config.input_shape, dtype=model.dtype)
    classes = model.config.num_classes
    return x, torch.arange(size) % classes if classes else None


def linear_gaussian(orthogonal: bool = True) -> tuple[VAE, Tensor, Tensor, float]:
    """A VAE p(x | z) = N(W z + b, variance I) with its exact posterior (if W's columns are orthogonal), W and b."""
    data_dim, latent_dim, variance = 6, 3, 0.4
    model = VAE(
        input_shape=(data_dim,),
        latent_dim=latent_dim,
        architecture="mlp",
        hidden_sizes=(),
        likelihood="gaussian",
        learn_variance=False,
        variance=variance,
    ).double()
    model.log_variance.fill_(math.log(variance))  # exactly, in float64
    scales = torch.tensor([2.0, 1.0, 0.3], dtype=torch.float64)
    weight = torch.randn(data_dim, latent_dim, dtype=torch.float64)
    if orthogonal:
        weight = torch.linalg.qr(weight).Q * scales
    bias = torch.randn(data_dim, dtype=torch.float64)
    precision = torch.eye(latent_dim, dtype=torch.float64) + weight.T @ weight / variance
    to_mean = torch.linalg.solve(precision, weight.T / variance)
    encoder, decoder = model.encoder.head.layers[0], model.decoder.head.layers[0]
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(bias)
        encoder.weight.copy_(torch.cat((to_mean, torch.zeros_like(to_mean))))
        encoder.bias.copy_(torch.cat((-to_mean @ bias, -precision.diagonal().log())))
    return model, weight, bias, variance


def log_marginal(x: Tensor, weight: Tensor, bias: Tensor, variance: float) -> Tensor:
    covariance = weight @ weight.T + variance * torch.eye(len(bias), dtype=torch.float64)
    return MultivariateNormal(bias, covariance).log_prob(x)


# ---------------------------------------------------------------------------------------------------
# Shapes and configurations


@st.composite
def configurations(draw: st.DrawFn) -> VAEConfig:
    architecture = draw(st.sampled_from(["mlp", "conv"]))
    if architecture == "conv":
        sides = st.integers(8, 21)
        shape = (draw(st.sampled_from([1, 3])), draw(sides), draw(sides))
        levels = min(shape[1:]).bit_length() - 1
        channels = draw(st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=levels).map(tuple))
    else:
        shape, channels = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)), None
    return VAEConfig(
        input_shape=shape,
        latent_dim=draw(st.integers(1, 5)),
        architecture=architecture,
        hidden_sizes=draw(st.lists(st.integers(1, 6), max_size=2).map(tuple)),
        channels=channels,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        dropout=draw(st.sampled_from([0.0, 0.2])),
        likelihood=draw(st.sampled_from(["bernoulli", "gaussian"])),
        learn_variance=draw(st.booleans()),
        free_bits=draw(st.sampled_from([0.0, 0.1])),
        num_classes=draw(st.sampled_from([0, 4])),
    )


@settings(max_examples=40, deadline=None)
@given(config=configurations(), batch=st.integers(1, 4))
def test_every_configuration_has_the_documented_shapes_and_round_trips(config: VAEConfig, batch: int) -> None:
    assert VAEConfig.from_json(config.to_json()) == config
    model, shape, latent = VAE(config), config.input_shape, (batch, config.latent_dim)
    x, labels = batch_for(model, batch)

    out = model(x, labels)
    assert out.loss.shape == ()
    assert torch.isfinite(out.loss)
    assert out.reconstruction_loss.shape == out.kl.shape == out.elbo.shape == (batch,)
    assert out.mu.shape == out.logvar.shape == out.z.shape == latent
    assert out.reconstruction.shape == (batch, *shape)
    assert out.kl_per_dimension.shape == (config.latent_dim,)

    assert model.encode(x, labels)[1].shape == latent
    assert model.decode(torch.zeros(latent), labels).shape == (batch, *shape)
    assert model.reconstruct(x, labels).shape == (batch, *shape)
    assert model.interpolate(x, x.flip(0), 3, labels).shape == (batch, 3, *shape)
    assert model.generate(5, batch_size=2).shape == (5, *shape)
    assert model.importance_weighted_bound(x, labels, num_samples=2).shape == (batch,)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((1, 8, 8), (32,)),
        ((1, 28, 28), (32, 64)),
        ((3, 32, 40), (32, 64, 128)),
        ((3, 64, 64), (32, 64, 128, 256)),
        ((3, 25, 130), (32, 64)),
    ],
)
def test_default_convolutions_leave_a_side_of_four_to_seven(shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    assert VAEConfig(input_shape=shape).channels == channels
    assert 4 <= min(shape[1:]) >> len(channels) < 8


@pytest.mark.parametrize("fields", KINDS)
def test_gradients_reach_every_parameter(fields: dict[str, object]) -> None:
    model = small(**fields)
    model(*batch_for(model)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_empty_batch() -> None:
    model = small()
    out = model(torch.zeros(0, 1, 8, 9))
    assert out.kl.shape == (0,)
    assert model.importance_weighted_bound(torch.zeros(0, 1, 8, 9), num_samples=3).shape == (0,)


# ---------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_loss_is_that_of_torch_distributions(fields: dict[str, object], beta: float) -> None:
    model = small(**fields, beta=beta).double()
    x, labels = batch_for(model)
    if model.config.likelihood == "bernoulli":
        x = x.round()  # torch's Bernoulli scores bits only
    out = model(x, labels, generator=Generator(3))

    mu, logvar = model.encode(x, labels)
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    z = reparameterize(mu, logvar, generator=Generator(3))
    means = model.decode(z, labels).flatten(1)
    if model.config.likelihood == "bernoulli":
        log_likelihood = Bernoulli(probs=means).log_prob(x.flatten(1)).sum(1)
    else:
        log_likelihood = Normal(means, torch.exp(0.5 * model.log_variance)).log_prob(x.flatten(1)).sum(1)
    kl = kl_divergence(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu)))

    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.reconstruction.flatten(1), means)
    torch.testing.assert_close(out.reconstruction_loss, -log_likelihood)
    torch.testing.assert_close(out.kl, kl.sum(1))
    torch.testing.assert_close(out.kl_per_dimension, kl.mean(0))
    torch.testing.assert_close(out.loss, (beta * kl.sum(1) - log_likelihood).mean())
    torch.testing.assert_close(out.elbo, log_likelihood - kl.sum(1))


def test_pixels_between_0_and_1_are_taken_as_probabilities() -> None:
    model = small().double()
    x, _ = batch_for(model)
    out = model(x)
    p = out.reconstruction
    cross_entropy = -(x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    torch.testing.assert_close(out.reconstruction_loss, cross_entropy)


def test_gradient_of_the_loss_is_the_derivative_of_the_loss() -> None:
    model = small(architecture="mlp", activation="tanh").double()
    x, _ = batch_for(model)
    parameters = dict(model.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        state = dict(zip(parameters, values, strict=True))
        loss: Tensor = torch.func.functional_call(model, state, (x,), {"generator": Generator(5)}).loss
        return loss

    values = tuple(value.detach().requires_grad_() for value in parameters.values())
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_kl_warmup_is_linear_in_the_step() -> None:
    model = small(beta=2.0, kl_warmup_steps=10)
    assert [model.kl_weight(step) for step in (0, 5, 10, 11, None)] == [0.0, 1.0, 2.0, 2.0, 2.0]
    assert small(beta=2.0).kl_weight(0) == 2.0
    x, _ = batch_for(model)
    for step, weight in ((0, 0.0), (5, 1.0), (None, 2.0)):
        out = model(x, step=step)
        torch.testing.assert_close(out.loss, (out.reconstruction_loss + weight * out.kl).mean())


def test_free_bits_count_each_dimension_at_least_once_over_the_batch() -> None:
    free, model = 0.2, small(free_bits=0.2, beta=0.5)
    with torch.no_grad():  # one dimension that says much, two that say next to nothing
        model.encoder.head.layers[-1].weight.mul_(torch.tensor([9.0, 0.1, 0.1, 1.0, 0.1, 0.1])[:, None])
        model.encoder.head.layers[-1].bias.copy_(torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    x, _ = batch_for(model)
    out = model(x, generator=Generator(1))
    spent = out.kl_per_dimension
    assert spent[0] > free > spent[1:].max()
    torch.testing.assert_close(out.loss, out.reconstruction_loss.mean() + 0.5 * (spent[0] + 2 * free))

    unconstrained = VAE(**{**model.config.to_dict(), "free_bits": 0.0, "model_type": "vae"})
    unconstrained.load_state_dict(model.state_dict())
    reference = unconstrained(x, generator=Generator(1))
    for name in ("z", "kl", "reconstruction_loss"):
        torch.testing.assert_close(getattr(out, name), getattr(reference, name))


def test_learned_variance_finds_the_mean_square_error() -> None:
    model = VAE(input_shape=(50,), architecture="mlp", hidden_sizes=(), latent_dim=1, likelihood="gaussian", beta=0.0)
    with torch.no_grad():
        model.decoder.head.layers[0].weight.zero_()
        model.decoder.head.layers[0].bias.zero_()
    x = 0.7 * torch.randn(400, 50)
    optimizer = torch.optim.LBFGS([model.log_variance], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(model.log_variance.exp(), x.square().mean(), rtol=1e-3, atol=0)


def test_overfits_one_batch() -> None:
    model = small(input_shape=(1, 12, 12), latent_dim=4, hidden_sizes=(64,))
    x = (torch.rand(8, 1, 12, 12) > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = model(x).loss.item()
    for _ in range(250):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    assert first > 90  # 144 ln 2 = 99.8 nats: nothing known
    assert -model(x).elbo.mean() < 25
    assert ((model.reconstruct(x) > 0.5) == x.bool()).float().mean() > 0.97


# ---------------------------------------------------------------------------------------------------
# Bounds of the likelihood


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64])
def test_bound_is_the_exact_log_likelihood_with_the_exact_posterior(num_samples: int) -> None:
    model, weight, bias, variance = linear_gaussian()
    x = 2 * torch.randn(9, 6, dtype=torch.float64)
    bound = model.importance_weighted_bound(x, num_samples=num_samples, chunk_size=5)
    torch.testing.assert_close(bound, log_marginal(x, weight, bias, variance), rtol=1e-12, atol=1e-12)


def test_bound_rises_with_the_samples_to_the_log_likelihood() -> None:
    model, weight, bias, variance = linear_gaussian(orthogonal=False)  # a diagonal posterior is only near
    x = torch.randn(300, 6, dtype=torch.float64)
    exact = log_marginal(x, weight, bias, variance).mean()
    bounds = [
        model.importance_weighted_bound(x, num_samples=k, generator=Generator(k)).mean() for k in (1, 4, 32, 1000)
    ]
    assert bounds == sorted(bounds)
    # At one sample the gap is KL(q || p(z | x)) of two Gaussians with one mean.
    precision = torch.eye(3, dtype=torch.float64) + weight.T @ weight / variance
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.1
    assert abs(exact - bounds[0] - gap) < 0.03
    assert abs(exact - bounds[-1]) < 0.005


def test_bound_of_one_sample_is_the_elbo_on_average() -> None:
    model = small(num_classes=2).double()
    x, labels = batch_for(model, 2)
    repeats = 2000
    with torch.no_grad():
        elbo = model(x.repeat(repeats, 1, 1, 1), labels.repeat(repeats)).elbo.view(repeats, 2)
    bound = model.importance_weighted_bound(x.repeat(repeats, 1, 1, 1), labels.repeat(repeats), num_samples=1)
    difference = bound.view(repeats, 2) - elbo
    assert (difference.mean(0).abs() < 5 * difference.std(0) / math.sqrt(repeats)).all()


def test_bound_depends_neither_on_the_chunks_nor_on_the_batches() -> None:
    model = small(num_classes=3).double()
    x, labels = batch_for(model, 5)
    whole = model.importance_weighted_bound(x, labels, num_samples=6, generator=Generator(2))
    chunked = model.importance_weighted_bound(x, labels, num_samples=6, generator=Generator(2), chunk_size=4)
    torch.testing.assert_close(chunked, whole)
    rest = Generator(2, offset=2 * 6 * model.noise_per_sample)
    torch.testing.assert_close(
        model.importance_weighted_bound(x[2:], labels[2:], num_samples=6, generator=rest), whole[2:]
    )


@pytest.mark.parametrize("source", [None, torch.Generator()])
def test_bound_repeats_under_torch_seeds(source: torch.Generator | None) -> None:
    model = small()
    x, _ = batch_for(model)
    bounds = []
    for chunk_size in (3, 1024):
        (source or torch.default_generator).manual_seed(4)
        bounds.append(model.importance_weighted_bound(x, num_samples=5, generator=source, chunk_size=chunk_size))
    torch.testing.assert_close(*bounds)


# ---------------------------------------------------------------------------------------------------
# Randomness


@pytest.mark.parametrize("free_bits", [0.0, 0.1])
def test_ranks_that_skip_to_their_rows_see_the_noise_of_one_process(free_bits: float) -> None:
    model = small(free_bits=free_bits)
    x, _ = batch_for(model, 6)
    whole = model(x, generator=Generator(11))
    half = 3
    parts = [
        model(x[rows], generator=Generator(11, offset=rows.start * model.noise_per_sample))
        for rows in (slice(0, half), slice(half, 2 * half))
    ]
    for name in ("z", "kl", "reconstruction_loss"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    generator = Generator(11)
    model(x, generator=generator)
    assert generator.offset == 6 * model.noise_per_sample


def test_generate_repeats_and_is_prefix_stable() -> None:
    model = small(num_classes=3)
    pictures = model.generate(7, seed=1)
    assert torch.equal(pictures, model.generate(7, seed=1))
    assert torch.equal(pictures, model.generate(7, generator=Generator(1)))
    torch.testing.assert_close(model.generate(7, seed=1, batch_size=2), pictures)
    torch.testing.assert_close(model.generate(3, seed=1), pictures[:3])
    assert not torch.allclose(pictures, model.generate(7, seed=2))


def test_generate_continues_the_stream_of_its_generator() -> None:
    model, generator = small(), Generator(8)
    parts = torch.cat([model.generate(2, generator=generator), model.generate(3, generator=generator)])
    torch.testing.assert_close(parts, model.generate(5, seed=8))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
def test_generate_draws_the_same_latents_in_every_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model = small()
    pictures = model.generate(4, seed=1)
    converted = copy.deepcopy(model).to(dtype).generate(4, seed=1)
    torch.testing.assert_close(converted.to(pictures.dtype), pictures, rtol=0, atol=tolerance)


def test_temperature_scales_the_latents() -> None:
    model = small()
    centre = model.decode(torch.zeros(1, 3))
    torch.testing.assert_close(model.generate(2, temperature=0.0), centre.expand(2, -1, -1, -1))
    spread = [(model.generate(32, seed=0, temperature=t) - centre).abs().mean() for t in (0.3, 1.0)]
    assert 0 < spread[0] < spread[1]


def test_deterministic_under_manual_seed() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(5)
        model = small(dropout=0.3)
        out = model(*batch_for(model))
        out.loss.backward()
        return [out.loss, model.generate(3), *(p.grad for p in model.parameters() if p.grad is not None)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---------------------------------------------------------------------------------------------------
# Inference


def test_inference_leaves_modes_and_gradients_as_they_were() -> None:
    model = small(dropout=0.5)
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    x, _ = batch_for(model)
    results = [
        model.reconstruct(x),
        model.interpolate(x, x),
        model.generate(2),
        model.importance_weighted_bound(x, num_samples=2),
    ]
    assert not any(result.requires_grad for result in results)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))  # no dropout
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="labels"):
        model.generate(2, labels=[0, 1])
    assert [module.training for module in model.modules()] == before


def test_interpolation_starts_and_ends_at_the_reconstructions() -> None:
    model = small(num_classes=3)
    (a, labels), b = batch_for(model), torch.rand(4, 1, 8, 9)
    labels_b = (labels + 1) % 3
    rows = model.interpolate(a, b, 5, labels, labels_b)
    torch.testing.assert_close(rows[:, 0], model.reconstruct(a, labels))
    torch.testing.assert_close(rows[:, -1], model.reconstruct(b, labels_b))
    middle = (model.encode(a, labels)[0] + model.encode(b, labels)[0]) / 2
    torch.testing.assert_close(model.interpolate(a, b, 3, labels)[:, 1], model.decode(middle, labels))


def test_labels_matter_and_default_to_each_class_in_turn() -> None:
    model = small(num_classes=3)
    by_class = [model.generate(5, seed=0, labels=label) for label in range(3)]
    assert not torch.allclose(by_class[0], by_class[1])
    cycle = model.generate(5, seed=0)
    torch.testing.assert_close(cycle, torch.stack([by_class[i % 3][i] for i in range(5)]))
    for labels in ([0, 1, 2, 0, 1], torch.tensor([0, 1, 2, 0, 1], dtype=torch.uint8)):
        torch.testing.assert_close(model.generate(5, seed=0, labels=labels), cycle)
    x, _ = batch_for(model)
    assert not torch.allclose(model.encode(x, 0)[0], model.encode(x, 1)[0])


def test_a_new_model_hears_the_label_as_well_as_its_other_input() -> None:
    """A label that starts faint is ignored for long: z carries the class, and samples of a class miss it."""
    model = VAE(num_classes=10)
    (x, labels), z = batch_for(model, 10), torch.randn(10, 16)

    def effect(network: torch.nn.Module, value: Tensor) -> Tensor:
        with torch.no_grad():
            base, other_value, other_label = (
                network(v, torch.eye(10)[c])
                for v, c in ((value, labels), (value.flip(0), labels), (value, labels.flip(0)))
            )
        return (other_label - base).std() / (other_value - base).std()

    assert effect(model.encoder, x) > 1
    assert effect(model.decoder, z) > 1


def test_samples_of_a_class_are_of_that_class() -> None:
    digits = load_images("digits")
    x, labels = digits.batch(torch.arange(len(digits)))
    model = VAE(input_shape=(1, 8, 8), latent_dim=4, hidden_sizes=(64,), num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        model(x[rows], labels[rows]).loss.backward()
        optimizer.step()
    wanted = torch.arange(500) % 10
    pictures = model.generate(500, seed=0, labels=wanted)
    nearest = torch.cdist(pictures.flatten(1), x.flatten(1)).argmin(1)
    assert (labels[nearest] == wanted).float().mean() > 0.97


# ---------------------------------------------------------------------------------------------------
# Precision, compilation, copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", KINDS)
def test_autocast_keeps_the_loss_in_float32(dtype: torch.dtype, fields: dict[str, object]) -> None:
    model = small(**fields)
    x, labels = batch_for(model)
    expected = model(x, labels, generator=Generator(1))
    with torch.autocast("cpu", dtype=dtype):
        out = model(x, labels, generator=Generator(1))
    for name in ("loss", "reconstruction_loss", "kl", "mu", "logvar", "z"):
        assert getattr(out, name).dtype == torch.float32, name
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-2, atol=0)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_converted_models(dtype: torch.dtype) -> None:
    model = small(likelihood="gaussian")
    x, _ = batch_for(model)
    expected = model(x, generator=None).loss
    model = model.to(dtype)
    out = model(x)
    out.loss.backward()
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.loss.float(), expected, rtol=2e-2, atol=0)
    assert model.generate(2).dtype == dtype


@pytest.mark.parametrize("fields", [{**KINDS[0], "kl_warmup_steps": 100}, {**KINDS[2], "free_bits": 0.1}])
def test_compiles_to_one_graph(fields: dict[str, object]) -> None:
    torch._dynamo.reset()
    model = small(**fields)
    x, labels = batch_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(12):  # more steps than dynamo would recompile for
        expected = model(x, labels, step=step, generator=Generator(step))
        out = compiled(x, labels, step=step, generator=Generator(step))
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(out.kl_per_dimension, expected.kl_per_dimension)
    out.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    expected.loss.backward()
    for ours, theirs in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_deepcopy_is_independent() -> None:
    model = small()
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(2, seed=1), model.generate(2, seed=1))
    with torch.no_grad():
        model.decoder.head.layers[0].weight.add_(1)
    assert not torch.equal(twin.generate(2, seed=1), model.generate(2, seed=1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_seed_same_pictures_on_the_gpu() -> None:
    model = small()
    x, _ = batch_for(model)
    pictures, loss = model.generate(5, seed=1), model(x, generator=Generator(2)).loss
    model = model.cuda()
    torch.testing.assert_close(model.generate(5, seed=1).cpu(), pictures, rtol=0, atol=1e-3)
    torch.testing.assert_close(model(x.cuda(), generator=Generator(2)).loss.cpu(), loss, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected an int of at least 1, got 0"),
        ({"latent_dim": 2.0}, "latent_dim: expected an int of at least 1, got 2.0"),
        ({"latent_dim": True}, "latent_dim: expected an int of at least 1, got True"),
        ({"latent_dims": 2}, "VAEConfig: no field 'latent_dims'; did you mean 'latent_dim'?"),
        ({"input_shape": ()}, "input_shape: expected a sequence of ints of at least 1, got an empty one"),
        ({"input_shape": 784}, "input_shape: expected a sequence of ints of at least 1, got 784"),
        ({"input_shape": (1, 0, 8)}, "input_shape: expected a sequence of ints of at least 1, got (1, 0, 8)"),
        ({"input_shape": (784,)}, "input_shape: expected (C, H, W) with H, W of at least 8 for 'conv', got (784,)"),
        (
            {"input_shape": (1, 7, 9)},
            "input_shape: expected (C, H, W) with H, W of at least 8 for 'conv', got (1, 7, 9)",
        ),
        ({"architecture": "cnn"}, "architecture: expected one of mlp, conv, got 'cnn'"),
        ({"channels": (8,) * 5}, "channels: expected at most 4 for (1, 28, 28), got 5"),
        ({"architecture": "mlp", "channels": (8,)}, "channels: expected none for 'mlp', got (8,)"),
        ({"hidden_sizes": (8, -1)}, "hidden_sizes: expected a sequence of ints of at least 1, got (8, -1)"),
        ({"activation": "swish"}, "activation: expected one of elu, gelu, leaky_relu, relu, silu, tanh, got 'swish'"),
        ({"dropout": 1}, "dropout: expected a finite number of at least 0 and below 1, got 1"),
        ({"likelihood": "poisson"}, "likelihood: expected one of bernoulli, gaussian, got 'poisson'"),
        ({"learn_variance": 1}, "learn_variance: expected True or False, got 1"),
        ({"variance": 0}, "variance: expected a finite number above 0, got 0"),
        ({"beta": -1}, "beta: expected a finite number of at least 0, got -1"),
        ({"beta": math.nan}, "beta: expected a finite number of at least 0, got nan"),
        ({"kl_warmup_steps": -1}, "kl_warmup_steps: expected an int of at least 0, got -1"),
        ({"free_bits": "0.1"}, "free_bits: expected a finite number of at least 0, got '0.1'"),
        ({"num_classes": -1}, "num_classes: expected an int of at least 0, got -1"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        VAE(**fields)
    assert str(caught.value) == message


def test_config_or_fields_but_not_both() -> None:
    assert VAE(VAEConfig(latent_dim=2)).config == VAE(latent_dim=2).config
    with pytest.raises(ValueError, match=r"^config: expected either a configuration or fields, got both \(beta\)$"):
        VAE(VAEConfig(), beta=2.0)
    with pytest.raises(TypeError, match=r"^config: expected a VAEConfig, got dict$"):
        VAE({"latent_dim": 2})


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 72), ValueError, "x: expected shape (B, 1, 8, 9), got (2, 72)"),
        (torch.zeros(1, 8, 9), ValueError, "x: expected shape (B, 1, 8, 9), got (1, 8, 9)"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), TypeError, "x: expected floating-point values, got uint8"),
        ([[0.0]], TypeError, "x: expected a tensor, got list"),
        (torch.full((2, 1, 8, 9), 255.0), ValueError, "x: expected values in [0, 1] for 'bernoulli', got 255 to 255"),
        (torch.full((2, 1, 8, 9), -0.5), ValueError, "x: expected values in [0, 1] for 'bernoulli', got -0.5 to -0.5"),
        (
            torch.full((2, 1, 8, 9), math.nan),
            ValueError,
            "x: expected values in [0, 1] for 'bernoulli', got nan to nan",
        ),
    ],
)
def test_bad_examples(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        small()(x)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "labels: expected 2 labels for a conditional model, got None"),
        (torch.tensor([0, 3]), ValueError, "labels: expected 0 to 2, got 3"),
        (torch.tensor([0, -1]), ValueError, "labels: expected 0 to 2, got -1"),
        (7, ValueError, "labels: expected 0 to 2, got 7"),
        (torch.tensor([0]), ValueError, "labels: expected shape (2,), got (1,)"),
        (torch.tensor([0.0, 1.0]), TypeError, "labels: expected ints, got float32"),
        (["cat", "dog"], TypeError, "labels: expected ints, got ['cat', 'dog']"),
    ],
)
def test_bad_labels(labels: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        small(num_classes=3)(torch.zeros(2, 1, 8, 9), labels)
    assert str(caught.value) == message


def test_bad_arguments() -> None:
    model, x = small(), torch.zeros(2, 1, 8, 9)
    with pytest.raises(ValueError, match=r"^labels: expected None, the model is unconditional \(num_classes is 0\)$"):
        model(x, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^n: expected an int of at least 1, got 0$"):
        model.generate(0)
    with pytest.raises(ValueError, match=r"^batch_size: expected an int of at least 1, got 0$"):
        model.generate(1, batch_size=0)
    with pytest.raises(ValueError, match=r"^temperature: expected a finite number of at least 0, got -1$"):
        model.generate(1, temperature=-1)
    with pytest.raises(ValueError, match=r"^seed: expected None where a generator is given, got both$"):
        model.generate(1, seed=1, generator=Generator(1))
    with pytest.raises(ValueError, match=r"^z: expected shape \(B, 3\), got \(2, 4\)$"):
        model.decode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^steps: expected an int of at least 2, got 1$"):
        model.interpolate(x, x, 1)
    with pytest.raises(ValueError, match=r"^b: expected as many examples as a, 2, got 1$"):
        model.interpolate(x, x[:1])
    with pytest.raises(ValueError, match=r"^num_samples: expected an int of at least 1, got 0$"):
        model.importance_weighted_bound(x, num_samples=0)
