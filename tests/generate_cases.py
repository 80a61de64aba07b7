"""Calls of `rnn_generate` for the tests of each device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from support import assert_same_bits
from torch import Tensor

from fastgen import random
from fastgen.random import Generator
from fastgen.reference.recurrent import Mode

INF, NAN = float("inf"), float("nan")


def normal(g: Generator, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return random.normal(*shape, std=std, generator=g).to(dtype)


@dataclasses.dataclass
class Call:
    """The arguments of `rnn_generate`, by name."""

    mode: Mode
    tokens: Tensor
    position: Tensor
    given: Tensor
    end: Tensor
    status: Tensor
    h: Tensor
    c: Tensor | None
    seen: Tensor | None
    embedding: Tensor
    weights: list[Tensor]
    projection: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    seed_offset: Tensor
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: Tensor
    steps: int

    def arguments(self) -> list:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    def copy(self, **changes) -> Call:
        values = dict(zip((f.name for f in dataclasses.fields(self)), self.arguments(), strict=True)) | changes
        return Call(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()})

    def rows(self, which: Sequence[int]) -> Call:
        """The same for some rows alone."""
        by_row = ("tokens", "position", "given", "end", "status", "seen", "seed_offset")
        picked = {k: None if (v := getattr(self, k)) is None else v[which] for k in by_row}
        return self.copy(h=self.h[:, which], c=None if self.c is None else self.c[:, which], **picked)

    def run(self, function: Callable[..., None] | None = None) -> Call:
        (function or torch.ops.fastgen.rnn_generate)(*self.arguments())
        return self

    def to(self, put: Callable[[Tensor], Tensor]) -> Call:
        """The same with every tensor where `put` puts it."""
        moved = self.copy(weights=[put(w) for w in self.weights])
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(moved, field.name), Tensor):
                setattr(moved, field.name, put(value))
        return moved

    def state(self) -> dict[str, Tensor | None]:
        return {k: getattr(self, k) for k in ("tokens", "position", "status", "h", "c", "seen")}


def assert_same(a: Call, b: Call) -> None:
    for name, value in a.state().items():
        other = b.state()[name]
        if value is None:
            assert other is None
        else:
            assert_same_bits(value, other)


def model_call(
    mode: Mode = Mode.LSTM,
    n: int = 3,
    layers: int = 2,
    hidden: int = 19,
    embedding: int = 7,
    vocabulary: int = 23,
    *,
    bias: bool = True,
    projected: bool = False,
    dtype: torch.dtype = torch.float32,
    room: int = 8,
    steps: int = 50,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[int] = (),
) -> Call:
    """A random model whose logits spread, and prompts of different lengths."""
    g = Generator(seed)
    given_ = torch.tensor([1 + 2 * r % 5 for r in range(n)])
    tokens = torch.full((n, 5 + room), -1)
    for r, length in enumerate(given_.tolist()):
        tokens[r, :length] = random.bits(length, generator=g, dtype=torch.int32).long() % vocabulary
    width = 5 if projected else hidden
    weights = []
    for layer in range(layers):
        inputs = hidden if layer else embedding
        weights += [normal(g, mode.gates * hidden, k, std=2 * k**-0.5, dtype=dtype) for k in (inputs, hidden)]
        weights += [normal(g, mode.gates * hidden, dtype=dtype) for _ in range(2 * bias)]
    seen = torch.zeros(n, vocabulary, dtype=torch.bool)
    for r in range(n):
        seen[r, tokens[r, : given_[r]]] = True
    return Call(
        mode,
        tokens,
        torch.zeros(n, dtype=torch.int64),
        given_,
        given_ + torch.tensor([max(room - r % 3, 1) for r in range(n)]),
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(layers, n, hidden, dtype=dtype),
        torch.zeros(layers, n, hidden, dtype=dtype) if mode == Mode.LSTM else None,
        seen if repetition_penalty != 1 else None,
        normal(g, vocabulary, embedding, dtype=dtype),
        weights,
        normal(g, width, hidden, dtype=dtype) if projected else None,
        normal(g, vocabulary, width, std=3 * width**-0.5, dtype=dtype),
        normal(g, vocabulary, dtype=dtype) if bias else None,
        torch.tensor([[seed + r, (1 << 62) + 3 * r] for r in range(n)]),
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        torch.tensor(list(stop), dtype=torch.int64),
        steps,
    )


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 22, 100]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3, 1e-9]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
        "stop": st.sampled_from([(), (3,), (1, 4, 20)]),
    }
)


def with_scores(logits: Tensor, n: int = 1, **options) -> Call:
    """A model that has these scores whatever it reads."""
    call = model_call(Mode.RNN_RELU, n, 1, 1, 1, len(logits), dtype=logits.dtype, room=1, **options)
    for weight in call.weights:
        weight.zero_()
    return call.copy(output_bias=logits, output_weight=torch.zeros(len(logits), 1, dtype=logits.dtype))


SCORES = {
    "one": [0.5],
    "equal": [1.0] * 40,
    "two groups": [2.0] * 5 + [1.0] * 30 + [2.0] * 5,
    "never": [-INF, 0.0, -INF, 1.0, -INF, -INF, 0.5],
    "wide": [float(x) for x in range(-60, 61, 3)],
    "tiny": [0.0, -27.7, -27.8, -28.0, -28.1, -5e-324, -0.0],
    "large": [1e38, 1e38, -1e38, 3e38],
}
