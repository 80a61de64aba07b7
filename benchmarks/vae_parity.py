"""fastgen's VAE against the same model in plain PyTorch: do both learn equally well, and how fast?

Both have the default configuration, the same initial weights, batches, optimiser and schedule; only the
noise differs. Their epochs alternate in one process. Both are scored by the same code on the same noise:
the weights of the plain model are loaded into fastgen's.

    python benchmarks/vae_parity.py --epochs 30 --seeds 5
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastgen.benchmark.vae import PlainVAE
from fastgen.data import ImageSet, load_images
from fastgen.models import VAE, VAEConfig
from fastgen.random import Generator, normal

CONFIG = VAEConfig(input_shape=(1, 28, 28))


def as_fastgen(plain: PlainVAE) -> VAE:
    model = VAE(CONFIG)
    state = zip(model.state_dict(), plain.state_dict().values(), strict=True)
    model.load_state_dict(dict(state))
    return model


def check_equal(x: Tensor) -> None:
    """Same weights, same noise: same loss and same gradients, before anything is compared or timed."""
    plain = PlainVAE()
    ours = as_fastgen(plain)
    out = ours(x, generator=Generator(0))
    loss = plain(x, normal(len(x), CONFIG.latent_dim, generator=Generator(0)))
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=0)
    out.loss.backward()
    loss.backward()
    for ours_parameter, plain_parameter in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours_parameter.grad, plain_parameter.grad, rtol=1e-3, atol=1e-4)


class Run:
    """One model in training: its optimiser, its schedule and the seconds of its epochs."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor], Tensor], steps: int, args: argparse.Namespace
    ) -> None:
        self.model, self.loss, self.seconds = model, loss, list[float]()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
        warmup = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * s / steps))
        )

    def epoch(self, batches: Iterator[Tensor]) -> None:
        start = time.perf_counter()
        for x in batches:
            self.optimizer.zero_grad()
            self.loss(x).backward()
            self.optimizer.step()
            self.schedule.step()
        self.seconds.append(time.perf_counter() - start)


def batches(images: Tensor, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """The same batches for both models; a last one that would be smaller is left out."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for start in range(0, len(images) - batch_size + 1, batch_size):
        yield images[order[start : start + batch_size]]


@dataclass
class Score:
    """Of one trained model, in nats an image; `seconds` of each epoch but the first, which warms up."""

    negative_elbo: float
    bound: float
    seconds: list[float]


def compare(
    train: Tensor, test: Tensor, seed: int, args: argparse.Namespace, advance: Callable[[], None]
) -> dict[str, Score]:
    torch.manual_seed(seed)
    ours, noise = VAE(CONFIG), Generator(seed)
    plain = PlainVAE(ours)
    steps = args.epochs * (len(train) // args.batch_size)
    runs = {
        "fastgen": Run(ours, lambda x: ours(x, generator=noise).loss, steps, args),
        "plain PyTorch": Run(plain, plain, steps, args),
    }
    for epoch in range(args.epochs):
        for name in sorted(runs, reverse=epoch % 2 == 1):  # neither is always first
            runs[name].epoch(batches(train, args.batch_size, seed, epoch))
            advance()

    scores = {}
    for name, model in (("fastgen", ours), ("plain PyTorch", as_fastgen(plain))):
        with model.inference():
            elbo = torch.stack([model(test, generator=Generator(k)).elbo.mean() for k in range(10)]).mean()
        bound = model.importance_weighted_bound(test, num_samples=args.samples, generator=Generator(0)).mean()
        scores[name] = Score(-elbo.item(), -bound.item(), runs[name].seconds[1:])
    return scores


def mean_and_deviation(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def median_and_quartiles(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="mnist", help="what fastgen.data.load_images takes, 28x28 grey (default: mnist)"
    )
    parser.add_argument("--test", type=int, default=500, help="held-out images (default: 500)")
    parser.add_argument("--seeds", type=int, default=5, help="training runs of each model (default: 5)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs a run, at least 3 (default: 30)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a step (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW (default: 0)")
    parser.add_argument("--samples", type=int, default=100, help="K of the importance-weighted bound (default: 100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    args = parser.parse_args()
    for name, least in (("test", 1), ("seeds", 1), ("epochs", 3), ("batch_size", 1), ("samples", 1), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    return args


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images = load_images(args.data)
    if images.shape != CONFIG.input_shape:
        raise SystemExit(f"--data: expected images of shape {CONFIG.input_shape}, got {images.shape}")

    def floats(part: ImageSet) -> Tensor:
        return part.batch(torch.arange(len(part)))[0]

    train, test = images.split(args.test)
    return floats(train), floats(test)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    train, test = load(args)
    check_equal(train[:32])

    scores: dict[str, list[Score]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("epochs", total=2 * args.epochs * args.seeds)
        for seed in range(args.seeds):
            for name, score in compare(train, test, seed, args, lambda: progress.advance(task)).items():
                scores.setdefault(name, []).append(score)
    seconds = {name: [value for run in runs for value in run.seconds] for name, runs in scores.items()}

    print(f"{len(train)} training and {len(test)} test images of {args.data}, {args.epochs} epochs of batches of")
    print(
        f"{args.batch_size}, {args.seeds} seeds (mean +- standard deviation), lr {args.lr:g}; {args.threads} threads,"
    )
    print(f"torch {torch.__version__}, {platform.machine()}; seconds are median (quartiles), epochs alternating.\n")
    print(f"| VAE | test -ELBO (nats) | test -bound, K={args.samples} (nats) | seconds an epoch |")
    print("|---|---|---|---|")
    for name, runs in scores.items():
        elbo = mean_and_deviation([run.negative_elbo for run in runs])
        bound = mean_and_deviation([run.bound for run in runs])
        print(f"| {name} | {elbo} | {bound} | {median_and_quartiles(seconds[name])} |")
    ratios = [plain / ours for ours, plain in zip(seconds["fastgen"], seconds["plain PyTorch"], strict=True)]
    print(f"\nPlain PyTorch's seconds over fastgen's, epoch by epoch: {median_and_quartiles(ratios)}.")


if __name__ == "__main__":
    main()
