"""What the tests of attention share: cases, the answer written out step by step, and the path that the ops take."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from unittest import mock

import torch
from emulated import Gpu
from hypothesis import strategies as st
from torch import Tensor

from fastgen import _load, random, reference
from fastgen._ops import attention as ops
from fastgen.functional import scaled_dot_product_attention
from fastgen.random import Generator


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Both attention ops by one path: "reference" or an instruction set."""
    with contextlib.ExitStack() as stack:
        if path == "reference":
            for name in ops.SCHEMAS:
                stack.enter_context(mock.patch.object(ops, f"_{name}", getattr(reference, name)))
        else:
            stack.enter_context(_load.use_cpu_isa(path))
        yield


@contextlib.contextmanager
def on(gpu: Gpu) -> Iterator[None]:
    """Both attention ops by the CUDA kernels of this device."""
    with contextlib.ExitStack() as stack:
        for name in ops.SCHEMAS:
            stack.enter_context(mock.patch.object(ops, f"_{name}", getattr(gpu.ops, name).default))
        yield


def boundaries(lengths: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One call of scaled_dot_product_attention, with its operands as a function of `seed`."""

    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    queries: int = 5
    keys: int = 7
    width: int = 4
    value_width: int = 3
    mask: str = ""  # "bool" or "float", then the axes of (B, H, Lq, Lk) in which it is of size 1: "float-02"
    slopes: str = ""  # "heads" or "rows"
    window: int | tuple[int | None, int | None] | None = None
    causal: bool = False
    softcap: float | None = None
    dropout: float = 0.0
    lower_right: bool = False
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of ragged sequences; batch is 1 then
    layout: str = "dense"  # in memory, of query, key and value: dense, heads inside rows, cut out of more, or repeated
    seed: int = 0

    def __str__(self) -> str:
        """What differs from the plain case."""
        others = (f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return "-".join(others) or "plain"

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.queries, self.keys

    def operands(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """query, key, value, and the mask and the slopes if there are any; the numbers are float64's, rounded."""
        draw = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

        tensors = []
        for heads, length, width in (
            (self.heads, self.queries, self.width),
            (self.key_heads, self.keys, self.width),
            (self.key_heads, self.keys, self.value_width),
        ):
            if self.layout == "rows":
                x = normal(self.batch, length, heads, width).transpose(1, 2)
            elif self.layout == "cut":
                x = normal(self.batch, heads, length + 2, 2 * width + 3)[..., 1:-1, 2 : 2 * width + 2 : 2]
            elif self.layout == "repeated":
                x = normal(1, heads, length, width).expand(self.batch, -1, -1, -1)
            else:
                x = normal(self.batch, heads, length, width)
            tensors.append(x)
        if self.mask:
            kind, _, ones = self.mask.partition("-")
            mask = normal(*(1 if str(axis) in ones else size for axis, size in enumerate(self.scores)))
            tensors.append(mask > -0.5 if kind == "bool" else mask)
        if self.slopes:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            tensors.append(normal(*self.scores[0 if self.slopes == "rows" else 1 : 2]).abs().to(wide) / 4)
        return tensors

    def leaves(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The operands; those that can have gradients require them."""
        return [x.detach().requires_grad_(x.is_floating_point()) for x in self.operands(dtype)]

    def _named(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        query, key, value, *rest = tensors
        rest = list(rest)  # older Dynamos have made a tuple of it
        mask = rest.pop(0) if self.mask else None
        slopes = rest.pop(0) if self.slopes else None
        return query, key, value, mask, slopes

    def ours(self, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        """(out, lse) by fastgen.functional."""
        query, key, value, mask, slopes = self._named(tensors)
        cu_q, cu_k = (None, None) if self.lengths is None else map(boundaries, self.lengths)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            self.dropout,
            self.causal,
            None,
            self.key_heads != self.heads,
            alibi_slopes=slopes,
            window_size=self.window,
            softcap=self.softcap,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            alignment="lower_right" if self.lower_right else "upper_left",
            return_lse=True,
            **{"generator": Generator(self.seed, 3) if self.dropout else None, **options},
        )

    def theirs(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) written out in the dtype of the operands, one sequence after the other."""
        query, key, value, mask, slopes = self._named(tensors)
        keep = torch.ones(self.scores, dtype=torch.bool)
        if self.dropout:
            keep = random.dropout_mask(self.scores, p=self.dropout, generator=Generator(self.seed, 3))
        if self.lengths is None:
            return self._one(query, key, value, mask, slopes, keep)
        pieces, q, k = [], 0, 0
        for n, m in zip(*self.lengths, strict=True):
            part = query[:, :, q : q + n], key[:, :, k : k + m], value[:, :, k : k + m]
            pieces.append(self._one(*part, None, slopes, keep[:, :, q : q + n, k : k + m]))
            q, k = q + n, k + m
        out, lse = zip(*pieces, strict=True)
        return torch.cat(out, 2), torch.cat(lse, 2)

    def seen(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        """(which keys each query sees by its position, how far they are), pair by pair."""
        window = self.window if isinstance(self.window, tuple) else (self.window, self.window)
        behind, ahead = (math.inf if side is None else side for side in window)
        ahead = min(ahead, 0) if self.causal else ahead
        offset = keys - queries if self.lower_right else 0
        distance = [[i + offset - j for j in range(keys)] for i in range(queries)]
        seen = [[-ahead <= d <= behind for d in row] for row in distance]
        shape = queries, keys
        far = torch.tensor([[abs(d) for d in row] for row in distance], dtype=torch.float64)
        return torch.tensor(seen, dtype=torch.bool).reshape(shape), far.reshape(shape)

    def _one(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        repeats = self.heads // self.key_heads
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
        seen, far = self.seen(query.shape[2], key.shape[2])
        scores = query @ key.transpose(-1, -2) * self.width**-0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            scores = scores + mask
        if slopes is not None:
            scores = scores - (slopes[..., None, None] * far.to(slopes.dtype)).to(scores.dtype)
        seen = seen.expand_as(scores)
        blind = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen & ~blind, -math.inf)
        if scores.shape[-1] == 0:
            return query.new_zeros((*query.shape[:-1], self.value_width)) + 0 * query.sum(), scores.logsumexp(-1)
        weights = scores.softmax(-1) * ~blind
        lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -math.inf)
        return (weights * keep / (1 - self.dropout)) @ value, lse


def outputs_and_gradients(function, leaves: list[Tensor], seed: int) -> list[Tensor]:
    """out, lse and the gradient of each leaf that has one, for random gradients of out and, where finite, lse."""
    out, lse = function(*leaves)
    draw = torch.Generator().manual_seed(seed)
    to_out, to_lse = (torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y) for y in (out, lse))
    to_lse = torch.where(lse.isfinite(), to_lse, 0.0)
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad([out, lse], wanted, [to_out, to_lse], allow_unused=True)
    return [
        out.detach(),
        lse.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True)),
    ]


def assert_no_worse(
    mine: Tensor, theirs: Tensor, exact: Tensor, dtype: torch.dtype, units: float = 0.5, size: float = 0.0
) -> None:
    """Mean and largest error at most twice PyTorch's in the same dtype; in float32 also some units at most.

    units: what is allowed besides in the mean; by itself the rounding of the result.
    size: of what may cancel; units are those of the largest number, or of this.
    dtype: of the operands; lse and the gradient of the slopes stay in float32 beside half types.
    """
    finite = exact.isfinite()
    assert torch.equal(finite, mine.isfinite())
    mine, theirs, exact = mine[finite], theirs[finite], exact[finite]
    if exact.numel() == 0:
        return
    unit = torch.finfo(mine.dtype).eps * max(size, float(exact.abs().max()))
    mine_off, theirs_off = ((y.double() - exact).abs() for y in (mine, theirs))
    assert float(mine_off.mean()) <= 2 * float(theirs_off.mean()) + units * unit
    assert float(mine_off.max()) <= 2 * float(theirs_off.max()) + 4 * unit  # one of many: partly luck
    if dtype == torch.float32:
        assert float(mine_off.max()) <= 64 * max(unit, torch.finfo(mine.dtype).eps)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    key_heads = draw(st.integers(1, 3))
    ragged = draw(st.booleans())
    size = st.sampled_from((0, 1, 2, 3, 5, 6, 7, 15, 16, 17, 18, 33))
    lengths = None
    queries, keys, batch = draw(size), draw(size), draw(st.integers(0, 3))
    if ragged:
        pairs = draw(st.lists(st.tuples(size, size), min_size=1, max_size=4))
        lengths = tuple(n for n, _ in pairs), tuple(m for _, m in pairs)
        queries, keys, batch = sum(lengths[0]), sum(lengths[1]), 1
    side = st.none() | st.integers(0, 9)
    masks = [
        "",
        *(f"{kind}-{ones}" for kind in ("bool", "float") for ones in ("", "0", "01", "012", "13", "2", "0123")),
    ]
    return Case(
        batch=batch,
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        queries=queries,
        keys=keys,
        width=draw(st.sampled_from((1, 2, 3, 8, 16, 17, 33))),
        value_width=draw(st.sampled_from((1, 2, 3, 8, 16, 17, 33))),
        mask="" if ragged else draw(st.sampled_from(masks)),
        slopes=draw(st.sampled_from(("", "heads") if ragged else ("", "heads", "rows"))),
        window=draw(st.none() | st.integers(0, 9) | st.tuples(side, side)),
        causal=draw(st.booleans()),
        softcap=draw(st.none() | st.sampled_from((0.5, 3.0))),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3))),
        lower_right=draw(st.booleans()),
        lengths=lengths,
        layout=draw(st.sampled_from(("dense", "rows", "cut", "repeated"))),
        seed=draw(st.integers(0, 2**31)),
    )


# One case for each thing that can be asked for, small enough for numerical gradients.
EXAMPLES = [
    Case(),
    Case(causal=True),
    Case(causal=True, lower_right=True, queries=3),
    Case(heads=4, key_heads=2, layout="rows", causal=True),
    Case(heads=3, key_heads=1, layout="cut", value_width=5),
    Case(mask="float", layout="cut"),
    Case(mask="float-02", slopes="heads"),
    Case(mask="bool-1", causal=True),
    Case(slopes="rows", window=(2, 1)),
    Case(window=1, causal=True, queries=7, keys=3),  # the last queries see nothing
    Case(softcap=1.5, dropout=0.4, mask="float-3"),
    Case(batch=1, lengths=((3, 0, 2), (2, 4, 1)), queries=5, keys=7, slopes="heads", softcap=2.0),
    Case(batch=1, lengths=((3, 2, 1), (4, 0, 3)), queries=6, keys=7, causal=True, dropout=0.3, lower_right=True),
]


def edges(lengths: tuple[int, ...], widths: tuple[int, ...]) -> list[Case]:
    """As many cases as there are lengths, and widths, which all have each of them; pairs differ from case to case."""
    count = len(lengths)  # has no divisor in common with the steps
    return [
        Case(
            batch=1,
            heads=2,
            key_heads=1 + i % 2,
            queries=lengths[i],
            keys=lengths[(13 * i + 3) % count],
            width=widths[(7 * i + 2) % count],
            value_width=widths[(17 * i + 1) % count],
            causal=i % 3 > 0,
            lower_right=i % 3 > 1,
            layout=("dense", "rows", "cut")[i % 3],
            seed=i,
        )
        for i in range(count)
    ]


# Around the sides of fragments, of strips, of tiles of keys and of tiles of rows of the CUDA kernels.
CUDA_EDGES = edges(
    (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129),
    (1, 7, 8, 16, 24, 33, 63, 64, 65, 72, 80, 96, 120, 127, 128),
)
