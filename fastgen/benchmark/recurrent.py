"""Cases of `fastgen.nn.LSTM`, `GRU`, `RNN` and `LSTMCell` against those of `torch.nn`.

PyTorch has no layer-norm LSTM: there the rival is a loop over its ops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastgen.nn
from fastgen.benchmark.case import COMPILED, EAGER, OURS, ProductCase, WrongResult, compiled

__all__ = ["RecurrentCase", "cases"]

_SEED = 19_971_115
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "LSTMCell": 4}


@dataclass(frozen=True, kw_only=True)
class RecurrentCase(ProductCase):
    """One call of a module with a loss on its outputs.

    Shape: (T, B, I, H), of a cell (B, I, H): steps, batch, features of the input, hidden units.

    Attributes:
        module: the class in `torch.nn` and `fastgen.nn`.
        direction: `inference` (no parameter wants a gradient) or `training` (forward and backward, to the input
            and all parameters, from a dense gradient of the output).
        layers, bidirectional, proj_size, layer_norm: of the module.
        valid: the share of B x T that is not padding; below 1 the input is packed.
    """

    module: Literal["LSTM", "GRU", "RNN", "LSTMCell"] = "LSTM"
    direction: Literal["inference", "training"] = "training"
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    layer_norm: bool = False
    valid: float = 1.0

    @property
    def workload(self) -> str:
        """Such as `recurrent/LSTM+packed/training`."""
        marks = [
            "packed" if self.valid < 1 else "",
            f"proj{self.proj_size}" if self.proj_size else "",
            "layer_norm" if self.layer_norm else "",
            f"{self.layers}layers" if self.layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
        ]
        return f"recurrent/{'+'.join([self.module, *filter(None, marks)])}/{self.direction}"

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        steps, batch, features, hidden = self.shape if len(self.shape) == 4 else (1, *self.shape)
        return steps, batch, features, hidden

    @property
    def lengths(self) -> list[int]:
        """Of the sequences, descending: evenly spread, the longest T, so that their sum is `valid` of B x T."""
        steps, batch, *_ = self._sizes
        shortest = 2 * self.valid - 1
        spread = [1 - (1 - shortest) * b / max(1, batch - 1) for b in range(batch)]
        return [max(1, round(steps * share)) for share in spread]

    @property
    def elements(self) -> int:
        """Tokens of the input."""
        return sum(self.lengths)

    @property
    def flops(self) -> int:
        _, _, features, hidden = self._sizes
        directions, out = 2 if self.bidirectional else 1, self.proj_size or hidden
        total = 0
        for layer in range(self.layers):
            depth = (features if layer == 0 else directions * out) + out
            total += directions * (_GATES[self.module] * hidden * depth + self.proj_size * hidden)
        # Each product has two of its size in the backward pass.
        return 2 * self.elements * total * (3 if self.direction == "training" else 1)

    @property
    def weights(self) -> tuple[int, int]:
        """The weights of the recurrence of one layer and direction at each step, forward and backward."""
        steps, _, features, hidden = self._sizes
        depth = hidden + features if self.module == "LSTMCell" else self.proj_size or hidden
        size = (_GATES[self.module] * depth + self.proj_size) * hidden * self.dtype.itemsize
        times = steps * self.layers * (2 if self.bidirectional else 1)
        return size, times * (2 if self.direction == "training" else 1)

    @property
    def bytes(self) -> int:
        """Of parameters, input and output."""
        _, _, features, hidden = self._sizes
        parameters = sum(p.numel() for p in self._module(torch.nn, meta=True).parameters())
        out = (self.proj_size or hidden) * (2 if self.bidirectional else 1)
        return (parameters + self.elements * (features + out)) * self.dtype.itemsize

    def shrunk(self) -> RecurrentCase:
        return replace(self, shape=tuple(min(n, 12) for n in self.shape), proj_size=min(self.proj_size, 4))

    def _module(self, package: ModuleType, *, meta: bool = False, **options: Any) -> torch.nn.Module:
        """The module of one package, of the same weights each time, or without memory."""
        _, _, features, hidden = self._sizes
        if self.module != "LSTMCell":
            options |= {"num_layers": self.layers, "bidirectional": self.bidirectional}
        if self.proj_size:
            options["proj_size"] = self.proj_size
        kind = getattr(package, self.module)
        if self.layer_norm:
            options["layer_norm"] = True
            kind = kind if package is fastgen.nn else _LayerNormLoop
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            # The weights are drawn on the CPU, whatever the device.
            module: torch.nn.Module = kind(features, hidden, device="meta" if meta else "cpu", **options)
        training = self.direction == "training"
        return module.to("meta" if meta else self.device, self.dtype).train(training).requires_grad_(training)

    def _call(self, module: Callable[..., Any], parameters: list[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """(input, [states,] [gradient of the output]) -> (output, [gradients of input and parameters])."""
        batch_sizes = None
        if self.valid < 1:
            lengths = torch.tensor(self.lengths)
            batch_sizes = pack_padded_sequence(torch.empty(max(self.lengths), len(self.lengths)), lengths).batch_sizes
        cell = self.module == "LSTMCell"

        def forward(x: Tensor, states: list[Tensor]) -> Tensor:
            if cell:
                result: Tensor = module(x, (states[0], states[1]))[0]
                return result
            if batch_sizes is None:
                return module(x)[0]
            return module(PackedSequence(x, batch_sizes))[0].data

        if self.direction == "inference":
            return lambda x, *states: (forward(x, list(states)),)

        def step(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            *states, gradient = rest
            output = forward(x, states)
            return output, *torch.autograd.grad(output, [x, *parameters], gradient)

        return step

    def _named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = [
            "output",
            "grad_input",
            *(name for name, _ in self._module(torch.nn, meta=True).named_parameters()),
        ]
        return dict(zip(names, results, strict=False))

    def inputs(self) -> tuple[Tensor, ...]:
        """The input ((T, B, I), packed (N, I), of a cell (B, I)), a cell's states, the gradient of the output."""
        steps, batch, features, hidden = self._sizes
        normal = self.normals(_SEED)
        cell = self.module == "LSTMCell"
        leading = (self.elements,) if self.valid < 1 else (batch,) if cell else (steps, batch)
        given = [normal(*leading, features).requires_grad_(self.direction == "training")]
        if cell:
            given += [normal(batch, hidden) for _ in range(2)]
        if self.direction == "training":
            given.append(normal(*leading, (self.proj_size or hidden) * (2 if self.bidirectional else 1)))
        return tuple(given)

    def rivals(self) -> dict[str, Callable[..., Any]]:
        """Ours and PyTorch's; torch.compile of the cell alone, as Dynamo refuses PyTorch's sequence modules."""
        ours, eager = self._module(fastgen.nn), self._module(torch.nn)
        functions = {
            OURS: self._call(ours, list(ours.parameters())),
            EAGER: self._call(eager, list(eager.parameters())),
        }
        if self.module == "LSTMCell":
            functions[COMPILED] = self._call(compiled(eager), list(eager.parameters()))
        return functions

    def check(self, rival: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        """Ours may be twice as far from double precision as PyTorch is, in each result; rivals 64 roundings.

        So may ours in float64, which is itself what others are measured by. To both is added what roundings of the
        inputs do to the exact results: layer normalisation over many steps multiplies them a thousandfold.
        """
        expected, errors, moved = _expected(self)
        eps = torch.finfo(self.dtype).eps
        for name, result in self._named(function(*inputs)).items():
            exact = expected[name]
            if result.shape != exact.shape or result.dtype != self.dtype:
                raise WrongResult(f"{self.name}, {rival}, {name}: {result.dtype} {tuple(result.shape)}")
            scale = float(exact.abs().max())
            limit = 64 * eps * scale
            if rival == OURS and self.dtype is not torch.float64:
                limit = 2 * errors[name] + 4 * eps * scale
            limit += 16 * moved[name]
            error = float((result.detach().double() - exact).abs().max())
            if not error <= limit:  # also a NaN
                raise WrongResult(f"{self.name}, {rival}, {name}: off by {error:.3g}, allowed are {limit:.3g}")


class _LayerNormLoop(fastgen.nn.LSTM):
    """A layer-norm LSTM as one writes it with PyTorch's ops: a loop over the steps of one layer."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        x: Tensor = input
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "norm_weight_ih", "norm_weight_hh", "norm_weight_c")
        w_ih, w_hh, b_ih, b_hh, norm_ih, norm_hh, norm_c = (self.get_parameter(f"{name}_l0") for name in names)
        bias_c, eps = self.get_parameter("norm_bias_c_l0"), 1e-5
        wide, narrow = list(norm_ih.shape), list(norm_c.shape)
        from_input = layer_norm(x @ w_ih.T, wide, norm_ih, b_ih + b_hh, eps)
        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        outputs = []
        for step in from_input:
            i, f, g, o = (step + layer_norm(h @ w_hh.T, wide, norm_hh, None, eps)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * layer_norm(c, narrow, norm_c, bias_c, eps).tanh()
            outputs.append(h)
        return torch.stack(outputs), None


@functools.lru_cache(maxsize=1)
def _expected(case: RecurrentCase) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """The results by PyTorch in double precision, and the largest distances from them of two others.

    The second is PyTorch in the case's dtype. The third is the exact results where each number of weights and inputs
    is moved by up to a rounding: what the problem itself makes of such an error, whoever computes it.
    """
    draw = torch.Generator().manual_seed(_SEED)
    eps = torch.finfo(case.dtype).eps

    def exact(x: Tensor) -> Tensor:
        # Double precision holds the weights and inputs of the case exactly.
        return x.detach().double().requires_grad_(x.requires_grad)

    def rounded(x: Tensor) -> Tensor:
        within = 2 * torch.rand(x.shape, generator=draw, dtype=torch.float64) - 1
        return (x.detach().double() * (1 + eps * within)).requires_grad_(x.requires_grad)

    def results(convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        module = case._module(torch.nn)
        for parameter in module.parameters():
            parameter.data = convert(parameter).detach()
        returned = case._call(module, list(module.parameters()))(*map(convert, case.inputs()))
        return {name: t.detach().double() for name, t in case._named(returned).items()}

    expected = results(exact)

    def distances(others: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((others[name] - t).abs().max()) for name, t in expected.items()}

    return expected, distances(results(lambda x: x)), distances(results(rounded))


def cases(*, full: bool) -> list[RecurrentCase]:
    """The cases of `fastgen bench`: a few that tell most, or all of them, each in both directions."""
    usual, alone = (64, 32, 128, 256), (100, 1, 512, 512)
    chosen = [
        RecurrentCase(shape=usual),
        RecurrentCase(shape=usual, valid=0.68),
        RecurrentCase(shape=alone, direction="inference"),
        RecurrentCase(module="LSTMCell", shape=(1, 256, 256), direction="inference"),
    ]
    if full:
        every = [
            RecurrentCase(shape=usual),
            RecurrentCase(shape=(64, 64, 1024, 1024)),
            RecurrentCase(shape=(100, 1, 128, 128)),
            RecurrentCase(shape=alone),
            RecurrentCase(shape=usual, valid=0.68),
            RecurrentCase(shape=usual, proj_size=64),
            RecurrentCase(shape=usual, layer_norm=True),
            RecurrentCase(shape=usual, dtype=torch.bfloat16),
            RecurrentCase(shape=usual, dtype=torch.float64),
            RecurrentCase(module="GRU", shape=usual),
            RecurrentCase(module="RNN", shape=usual),
            RecurrentCase(shape=usual, layers=2, bidirectional=True),
            RecurrentCase(module="LSTMCell", shape=(1, 256, 256)),
        ]
        both = [replace(case, direction=direction) for case in every for direction in ("inference", "training")]
        chosen += [case for case in both if case not in chosen]
    return chosen


def cuda_cases(*, full: bool) -> list[RecurrentCase]:
    """The cases of `fastgen bench --device cuda`: sizes around those where cuDNN changes its algorithm."""
    usual = RecurrentCase(shape=(128, 16, 768, 768), dtype=torch.bfloat16)
    chosen = [usual, replace(usual, valid=0.68), replace(usual, dtype=torch.float32)]
    if full:
        small = replace(usual, shape=(128, 64, 128, 192))
        wide = replace(usual, shape=(128, 64, 1024, 1024))
        chosen += [
            replace(usual, module="GRU"),
            replace(usual, module="RNN"),
            *(replace(case, dtype=dtype) for case in (small, wide) for dtype in (torch.bfloat16, torch.float32)),
            replace(usual, proj_size=64),
            replace(usual, layer_norm=True),
            replace(usual, layers=2),
            replace(usual, shape=(128, 1, 768, 768)),
            *(replace(usual, module="LSTMCell", shape=(batch, 768, 768)) for batch in (1, 16, 256)),
        ]
    return [replace(case, direction=direction) for case in chosen for direction in ("inference", "training")]
