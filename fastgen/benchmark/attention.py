"""Cases of `fastgen.functional.scaled_dot_product_attention` against PyTorch's."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.benchmark.case import CUDNN, EAGER, EFFICIENT, FLASH, OURS, ProductCase, WrongResult
from fastgen.functional import scaled_dot_product_attention

__all__ = ["AttentionCase", "cases"]

_SEED = 20_170_612
_WINDOW = 256
_SHARES = (0.41, 0.27, 0.19, 0.13)  # of the ragged sequences in the length

Kind = Literal["causal", "full", "dropout", "alibi", "window", "bias", "ragged", "decode"]


@dataclass(frozen=True, kw_only=True)
class AttentionCase(ProductCase):
    """One call with a loss on its output.

    Shape: (B, H, Lq, Lk, D).

    Attributes:
        kind: `causal`; `full`; causal with `dropout` of 0.1, with ALiBi (`alibi`), in a sliding window of 256
            (`window`), with an additive mask that has a gradient (`bias`); `ragged`: four causal sequences in one row;
            `decode`: causal, the queries standing at the last keys. PyTorch's gets masks ready made where it has no
            option, and goes through the ragged sequences in a loop.
        direction: `inference` or `training` (forward and backward, from a dense gradient of the output).
        key_heads: of key and value; 0 for H.
    """

    kind: Kind = "causal"
    direction: Literal["inference", "training"] = "training"
    key_heads: int = 0

    @property
    def workload(self) -> str:
        """Such as `attention/causal/training`."""
        grouped = f"+{self.key_heads}kv" if self.key_heads else ""
        return f"attention/{self.kind}{grouped}/{self.direction}"

    @property
    def elements(self) -> int:
        """Queries, those of all heads as one."""
        return self.shape[0] * self.shape[2]

    @property
    def boundaries(self) -> list[int]:
        """Of the ragged sequences, from 0 to the length."""
        length = self.shape[2]
        inner = [round(length * share) for share in itertools.accumulate(_SHARES[:-1])]
        return [0, *inner, length]

    @property
    def pairs(self) -> int:
        """Queries and keys that see each other, in one head of one row."""
        queries, keys = self.shape[2:4]
        if self.kind == "full":
            return queries * keys
        if self.kind == "ragged":
            return sum(n * (n + 1) // 2 for n in (b - a for a, b in itertools.pairwise(self.boundaries)))
        first = keys - queries if self.kind == "decode" else 0
        seen = [min(first + i + 1, keys) for i in range(queries)]
        return sum(min(n, _WINDOW + 1) if self.kind == "window" else n for n in seen)

    @property
    def flops(self) -> int:
        batch, heads, *_, width = self.shape
        # Two products forward, five backward: the scores again, and four gradients.
        products = 7 if self.direction == "training" else 2
        return 2 * products * batch * heads * self.pairs * width

    @property
    def weights(self) -> tuple[int, int]:
        """Keys and values, read once."""
        batch, heads, _, keys, width = self.shape
        return 2 * batch * (self.key_heads or heads) * keys * width * self.dtype.itemsize, 1

    @property
    def bytes(self) -> int:
        """Of query, key, value and output, and of their gradients."""
        batch, heads, queries, _, width = self.shape
        size = self.weights[0] + 2 * batch * heads * queries * width * self.dtype.itemsize
        return size * (2 if self.direction == "training" else 1)

    def shrunk(self) -> AttentionCase:
        batch, heads, queries, keys, width = self.shape
        return replace(self, shape=(min(batch, 2), heads, min(queries, 12), min(keys, 12), min(width, 8)))

    def inputs(self) -> tuple[Tensor, ...]:
        """query, key, value, the bias if there is one, and in training the gradient of the output."""
        batch, heads, queries, keys, width = self.shape
        normal = self.normals(_SEED)
        key_heads, training = self.key_heads or heads, self.direction == "training"
        given = [normal(batch, heads, queries, width)]
        given += [normal(batch, key_heads, keys, width) for _ in range(2)]
        if self.kind == "bias":
            given.append(normal(heads, queries, keys))
        for x in given:
            x.requires_grad_(training)
        if training:
            given.append(normal(batch, heads, queries, width))
        return tuple(given)

    @property
    def _slopes(self) -> Tensor:
        """Of ALiBi: 2^(-8 / H), 2^(-16 / H), ..., 2^-8."""
        heads = self.shape[1]
        return torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=self.device)

    def _ours(self) -> Callable[..., Tensor]:
        options: dict[Kind, dict[str, Any]] = {
            "dropout": {"dropout_p": 0.1},
            "alibi": {"alibi_slopes": self._slopes},
            "window": {"window_size": _WINDOW},
            "ragged": {"cu_seqlens_q": torch.tensor(self.boundaries)},
            "decode": {"alignment": "lower_right"},
        }
        return functools.partial(
            scaled_dot_product_attention,
            is_causal=self.kind != "full",
            enable_gqa=self.key_heads > 0,
            **options.get(self.kind, {}),
        )

    def _theirs(self, dtype: torch.dtype, *, exact: bool = False) -> Callable[..., Tensor]:
        """PyTorch's, with its mask in `dtype`; `exact`: without dropout."""
        _, _, queries, keys, _ = self.shape
        attention: Callable[..., Tensor] = functools.partial(
            F.scaled_dot_product_attention, enable_gqa=self.key_heads > 0
        )
        if self.kind == "ragged":
            cuts = list(itertools.pairwise(self.boundaries))

            def loop(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                parts = [[x[:, :, a:b] for x in (query, key, value)] for a, b in cuts]
                return torch.cat([attention(*part, is_causal=True) for part in parts], 2)

            return loop
        places = torch.arange(max(queries, keys), device=self.device)
        distance = places[:queries].unsqueeze(1) - places[:keys]
        hidden = distance < 0
        if self.kind == "bias":

            def biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
                return attention(query, key, value, bias.masked_fill(hidden, -math.inf))

            return biased
        if self.kind == "alibi":
            mask = (-self._slopes[:, None, None] * distance.abs()).masked_fill(hidden, -math.inf).to(dtype)
            return functools.partial(attention, attn_mask=mask)
        if self.kind == "window":
            return functools.partial(attention, attn_mask=~hidden & (distance <= _WINDOW))
        if self.kind == "decode":
            seen = distance + (keys - queries) >= 0
            return functools.partial(attention, attn_mask=None if queries == 1 else seen)
        dropout = 0.1 if self.kind == "dropout" and not exact else 0.0
        return functools.partial(attention, is_causal=self.kind != "full", dropout_p=dropout)

    def _call(self, function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """inputs -> (output, [gradients of query, key, value and bias])."""
        if self.direction == "inference":
            return lambda *given: (function(*given),)

        def step(*given: Tensor) -> tuple[Tensor, ...]:
            *operands, gradient = given
            out = function(*operands)
            return out, *torch.autograd.grad(out, operands, gradient)

        return step

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """Ours and PyTorch's own, whose FlexAttention trains on no CPU; on CUDA each of its kernels too."""
        theirs = self._call(self._theirs(self.dtype))
        functions = {OURS: self._call(self._ours()), EAGER: theirs}
        if self.device != "cpu":
            for name, backend in _BACKENDS.items():
                function = _with_backend(backend, theirs)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        function(*self.inputs())
                    except RuntimeError as error:
                        if "No available kernel" not in str(error):  # it takes no such call
                            raise
                    else:
                        functions[name] = function
        return functions

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """Ours may be twice as far from double precision as PyTorch is, in the mean of each result, and four times in
        the worst of its up to millions of numbers; rivals 64 roundings.

        With dropout no two agree: the mean over what is kept has to, within what chance allows.
        """
        expected, errors = _expected(self)
        eps = torch.finfo(self.dtype).eps
        names = ("output", "grad_query", "grad_key", "grad_value", "grad_bias")
        for name, result, exact, error in zip(names, function(*inputs), expected, errors, strict=False):
            if result.shape != exact.shape or result.dtype != self.dtype:
                raise WrongResult(f"{self.name}, {rival}, {name}: {result.dtype} {tuple(result.shape)}")
            difference = result.detach().double() - exact
            scale = max(1.0, float(exact.abs().max()))
            if self.kind == "dropout":
                off = abs(float(difference.mean()))
                limit = 6 * float(difference.std()) / math.sqrt(difference[..., 0].numel()) + eps * scale
            else:
                off, limit = float(difference.abs().max()), 64 * eps * scale
                if rival == OURS:
                    limit = 4 * error.worst + 4 * eps * scale
                    mean = float(difference.abs().mean())
                    if not mean <= 2 * error.mean + 2 * eps * scale:
                        raise WrongResult(
                            f"{self.name}, {name}: off by {mean:.3g} in the mean, PyTorch {error.mean:.3g}"
                        )
            if not off <= limit:  # also a NaN
                raise WrongResult(f"{self.name}, {rival}, {name}: off by {off:.3g}, allowed are {limit:.3g}")


_BACKENDS = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}


def _with_backend(backend: SDPBackend, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with one kernel alone; to choose it takes some microseconds of a call, which short ones show."""

    def call(*given: Tensor) -> Any:
        with sdpa_kernel(backend):
            return function(*given)

    return call


class _Error(NamedTuple):
    mean: float
    worst: float


@functools.lru_cache(maxsize=1)
def _expected(case: AttentionCase) -> tuple[list[Tensor], list[_Error]]:
    """The results by PyTorch in double precision, and how far PyTorch in the case's dtype is from them."""
    inputs = case.inputs()
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    exact = [x.detach() for x in case._call(case._theirs(torch.float64, exact=True))(*wide)]
    plain = case._call(case._theirs(case.dtype, exact=True))(*inputs)
    off = [(a.detach().double() - b).abs() for a, b in zip(plain, exact, strict=True)]
    return exact, [_Error(float(x.mean()), float(x.max())) for x in off]


def cases(*, full: bool) -> list[AttentionCase]:
    """The cases of `fastgen bench`: a few that tell most, or all of them, each in both directions."""
    nano, long = (8, 6, 256, 256, 64), (1, 12, 1024, 1024, 64)
    chosen = [
        AttentionCase(shape=nano),
        AttentionCase(shape=long, dtype=torch.bfloat16, direction="inference"),
        AttentionCase(kind="window", shape=long),
        AttentionCase(kind="decode", shape=(1, 9, 1, 4096, 64), key_heads=3, direction="inference"),
    ]
    if full:
        plain: list[tuple[Kind, tuple[int, ...]]] = [
            ("causal", nano),
            ("causal", long),
            ("full", long),
            ("causal", (1, 8, 4096, 4096, 128)),
        ]
        every = [AttentionCase(kind=k, shape=s, dtype=d) for d in (torch.float32, torch.bfloat16) for k, s in plain]
        options: tuple[Kind, ...] = ("dropout", "alibi", "window", "bias", "ragged")
        every += [AttentionCase(kind=kind, shape=long) for kind in options]
        every += [AttentionCase(shape=(b, 4, n, n, 64)) for b in (1, 256) for n in (1, 16, 64)]
        both = [replace(case, direction=direction) for case in every for direction in ("inference", "training")]
        decode = AttentionCase(kind="decode", shape=(1, 9, 1, 1024, 64), key_heads=3, direction="inference")
        both += [replace(decode, shape=(1, 9, 1, keys, 64)) for keys in (1024, 8192)]
        chosen += [case for case in both if case not in chosen]
    return chosen


def cuda_cases(*, full: bool) -> list[AttentionCase]:
    """The cases of `fastgen bench --device cuda`: short sequences of small heads, in both directions; and decode."""
    lengths = (128, 256, 512, 1024, 4096) if full else (512, 1024)
    plain = [AttentionCase(shape=(max(1, 16384 // n), 12, n, n, 64), dtype=torch.bfloat16) for n in lengths]
    if full:
        long = (4, 16, 4096, 4096, 128)
        plain += [AttentionCase(kind=kind, shape=long, dtype=torch.bfloat16) for kind in ("causal", "full")]
        kinds: tuple[Kind, ...] = ("full", "dropout", "alibi", "window", "bias")
        plain += [AttentionCase(kind=kind, shape=(8, 12, 1024, 1024, 64), dtype=torch.bfloat16) for kind in kinds]
        plain.append(AttentionCase(kind="ragged", shape=(1, 12, 8192, 8192, 64), dtype=torch.bfloat16))
        plain.append(AttentionCase(shape=(8, 12, 1024, 1024, 64)))
    both = [replace(case, direction=direction) for case in plain for direction in ("inference", "training")]
    decode = AttentionCase(kind="decode", shape=(), dtype=torch.bfloat16, key_heads=8, direction="inference")
    both += [replace(decode, shape=(8, 32, 1, keys, 128)) for keys in ((512, 2048, 8192) if full else (2048,))]
    return both
