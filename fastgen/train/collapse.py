"""Signs of trouble in adversarial training: how varied samples are, and who is winning.

A GAN has no loss that tells how it fares. Two failures are common and show in cheap figures: the generator makes the
same few samples from all noise (mode collapse), or the discriminator tells real from fake with such ease that the
generator no longer learns from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["CollapseWatch", "Diversity", "gradient_norm", "pairwise_accuracy"]


class Diversity:
    """How varied samples are, as a share of how varied the data is: 1 as much, near 0 where they are all alike.

    It is a ratio of effective numbers of different samples, the Vendi score of order 2 (Friedman & Dieng, "The Vendi
    score", 2023; Pasarkar & Dieng, "Cousins of the Vendi score", 2024):

        V(x) = 1 / mean_ij k(x_i, x_j)^2,   k(x, y) = exp(-|x - y|^2 / s)

    V is n for n samples that have nothing in common and m for equal shares of m samples that have nothing in common.
    s is the median over the data of the squared distance to the nearest neighbour: what lies as close as two examples
    that resemble each other counts as alike. It is a figure of places in the space of the examples, not of meaning:
    one class of digits in all its handwritings has about half the diversity of all ten.

    Args:
        data: (n, ...) examples, at least 2; a few hundred are enough. Scores are compared between as many samples.
    """

    def __init__(self, data: Tensor) -> None:
        if len(data) < 2:
            raise ValueError(f"data: expected at least 2 examples, got {len(data)}")
        self._squares = 1.0
        distances = _squared_distances(data)
        nearest = distances.fill_diagonal_(torch.inf).amin(1)
        if bool((nearest > 0).any()):  # else there are only copies
            self._squares = float(nearest[nearest > 0].median())
        self.size = len(data)
        self.effective_size = self._score(data)

    def __call__(self, samples: Tensor) -> float:
        """V of the samples, (n, ...) with the n of the data, divided by that of the data."""
        if len(samples) != self.size:
            raise ValueError(f"samples: expected {self.size}, as many as of the data, got {len(samples)}")
        return self._score(samples) / self.effective_size

    def _score(self, samples: Tensor) -> float:
        return 1 / float(torch.exp(_squared_distances(samples) * (-2 / self._squares)).double().mean())


def _squared_distances(x: Tensor) -> Tensor:
    """(n, n) between the rows, in at least float32."""
    x = x.flatten(1)
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    x = x - x.mean(0)  # squares of the place would drown the distances
    return torch.cdist(x, x).square()


def pairwise_accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Scalar: the share of pairs of a real and a generated example in which the real one scores higher.

    Ties count half. It is the area under the discriminator's receiver operating characteristic: 1 where it tells all
    apart, 0.5 where it guesses. Unlike the share of logits on the right side of 0 it means the same for every loss,
    also for those of Wasserstein and relativistic critics, whose logits have no zero.
    """
    difference = real_logits.detach().unsqueeze(1) - fake_logits.detach()
    return (difference.sign().float().mean() + 1) / 2


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The Euclidean norm of the gradients that the last backward pass left."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


@dataclasses.dataclass
class _Sign:
    """A failure that lasts: when the figures began to show it, and whether that was told."""

    since: Mapping[str, float] | None = None
    rows: int = 0
    told: bool = False

    def lasts(self, row: Mapping[str, float], steps: int) -> bool:
        """Note a row that shows the failure; whether it is time to tell."""
        if self.since is None:
            self.since, self.rows = row, 0
        self.rows += 1
        return not self.told and self.rows >= 3 and row["step"] - self.since["step"] >= steps

    def over(self) -> None:
        self.since, self.told = None, False


class CollapseWatch:
    """Turns the figures of a run into a warning when the generator collapses or the discriminator runs away.

    It is shown each row of training figures in its turn, and says something once an episode: when a failure has shown
    in all rows of `patience` steps, and again only if it was over in between.

    The generator has collapsed where `diversity` stays under `collapsed`; that is over at twice as much. The
    discriminator runs away where `accuracy` stays at `unbeaten` or more while `score_gap` does not shrink: a
    discriminator that is ahead at the beginning, as most are, loses its lead when the generator learns.

    Args:
        warmup: steps before which nothing is judged: an untrained generator draws almost the same for all noise.
        patience: steps that a failure has to last.
        collapsed: a share of the data's diversity.
        unbeaten: a pairwise accuracy.
    """

    def __init__(
        self, *, warmup: int = 750, patience: int = 250, collapsed: float = 0.12, unbeaten: float = 0.99
    ) -> None:
        self.warmup, self.patience, self.collapsed, self.unbeaten = warmup, patience, collapsed, unbeaten
        self._collapse, self._runaway = _Sign(), _Sign()

    def __call__(self, row: Mapping[str, float]) -> list[str]:
        """Warnings in plain words, mostly none. row: `step`, `diversity`, `accuracy` and `score_gap`."""
        if row["step"] <= self.warmup:
            return []
        warnings = (self._collapse_warning(row), self._runaway_warning(row))
        return [warning for warning in warnings if warning is not None]

    def _collapse_warning(self, row: Mapping[str, float]) -> str | None:
        sign, diversity = self._collapse, row["diversity"]
        if diversity >= self.collapsed * (2 if sign.told else 1):
            sign.over()
        elif sign.lasts(row, self.patience):
            sign.told = True
            return (
                f"warning: the generator has collapsed by step {row['step']:.0f}: whatever the noise, its samples are "
                f"much alike (diversity {diversity:.2f}; that of the data is 1). Try DiffAugment, an R1 "
                f"penalty, the relativistic loss, or a lower learning rate of the generator"
            )
        return None

    def _runaway_warning(self, row: Mapping[str, float]) -> str | None:
        sign, accuracy, gap = self._runaway, row["accuracy"], row["score_gap"]
        if accuracy < self.unbeaten:
            sign.over()
        elif sign.since is not None and not sign.told and gap < 0.9 * sign.since["score_gap"]:
            sign.over()  # the generator is catching up
            sign.lasts(row, self.patience)
        elif sign.lasts(row, self.patience):
            sign.told = True
            return (
                f"warning: the discriminator has run away by step {row['step']:.0f}: it tells {accuracy:.1%} of pairs "
                f"of real and generated examples apart (score gap {gap:.1f}), so that the generator learns little from "
                f"it. Try a lower learning rate of the discriminator, DiffAugment, or an R1 penalty"
            )
        return None
