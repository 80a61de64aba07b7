from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import needs_inductor
from torch import Tensor
from torch.nn import functional as F

from fastgen.functional import cross_entropy, linear_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few logits at a time that a few rows make several chunks, the last of them shorter."""
    monkeypatch.setattr(cross_entropy, "_CHUNK", 21)


def plain(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    logits = F.linear(input, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)


def arguments(
    rows: int = 11, width: int = 5, classes: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((rows, width), (classes, width), (classes,))
    ]
    x, weight, bias = (value.to(dtype).requires_grad_() for value in made)
    target = torch.randint(classes, (rows,), generator=draw)
    target[torch.rand(rows, generator=draw) < 0.3] = -100
    return x, weight, target, bias


@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 9),
    classes=st.integers(1, 30),
    chunk=st.integers(1, 100),
    with_bias=st.booleans(),
    ignore_index=st.sampled_from([-100, 0, 1000]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 99),
)
def test_it_is_cross_entropy_of_the_linear_layer(
    rows: int, width: int, classes: int, chunk: int, with_bias: bool, ignore_index: int, reduction: str, seed: int
) -> None:
    x, weight, target, bias = arguments(rows, width, classes, seed=seed)
    target[target == -100] = ignore_index
    given = [x, weight, *([bias] if with_bias else [])]
    options = {"ignore_index": ignore_index, "reduction": reduction}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_CHUNK", chunk)
        ours = linear_cross_entropy(x, weight, target, bias if with_bias else None, **options)
        factor = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(seed))
        gradients = torch.autograd.grad(ours, given, factor)
    theirs = plain(x, weight, target, bias if with_bias else None, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for gradient, expected in zip(gradients, torch.autograd.grad(theirs, given, factor), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_of_both_orders(reduction: str) -> None:
    x, weight, target, bias = arguments()

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, bias, reduction=reduction)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


@pytest.mark.usefixtures("small_chunks")
def test_an_input_that_comes_from_the_weight() -> None:
    _, weight, target, _ = arguments()

    def loss(weight: Tensor) -> Tensor:
        return linear_cross_entropy(weight[target.clamp(min=0)].tanh(), weight, target)

    assert torch.autograd.gradcheck(loss, weight)
    assert torch.autograd.gradgradcheck(loss, weight)


@pytest.mark.usefixtures("small_chunks")
def test_only_what_is_wanted_gets_a_gradient() -> None:
    x, weight, target, bias = arguments()
    for chosen in ([x], [weight], [bias], [x, bias]):
        for value in (x, weight, bias):
            value.requires_grad_(any(value is other for other in chosen))
        gradients = torch.autograd.grad(linear_cross_entropy(x, weight, target, bias), chosen)
        expected = torch.autograd.grad(plain(x, weight, target, bias), chosen)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("small_chunks")
def test_a_graph_may_be_gone_through_twice() -> None:
    x, weight, target, bias = arguments()
    loss = linear_cross_entropy(x, weight, target, bias)
    first = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    for once, again in zip(first, torch.autograd.grad(3 * loss, (x, weight, bias)), strict=True):
        torch.testing.assert_close(3 * once, again)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_torch(dtype: torch.dtype) -> None:
    x, weight, target, bias = arguments(50, 16, 20, dtype)
    exact = [value.detach().double().requires_grad_() for value in (x, weight, bias)]
    expected = plain(*exact[:2], target, exact[2])
    wanted = (expected, *torch.autograd.grad(expected, exact))

    def errors(loss: Tensor) -> list[float]:
        found = (loss, *torch.autograd.grad(loss, (x, weight, bias)))
        return [float((a.detach().double() - b.detach()).abs().max()) for a, b in zip(found, wanted, strict=True)]

    ours, theirs = (errors(function(x, weight, target, bias)) for function in (linear_cross_entropy, plain))
    assert linear_cross_entropy(x, weight, target, bias).dtype == torch.float32
    for error, limit in zip(ours, theirs, strict=True):
        assert error <= 2 * limit + torch.finfo(dtype).eps


def test_leading_dimensions_and_strides() -> None:
    x, weight, target, bias = arguments(12)
    folded = x.detach().view(3, 4, 5).transpose(0, 1)
    assert not folded.is_contiguous()
    rows = linear_cross_entropy(folded, weight, target.view(3, 4).t(), bias, reduction="none")
    torch.testing.assert_close(rows.t().flatten(), plain(x, weight, target, bias, reduction="none"))


@pytest.mark.usefixtures("small_chunks")
def test_autocast_makes_the_products_in_its_dtype() -> None:
    x, weight, target, bias = arguments(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(x, weight, target, bias)
        theirs = F.cross_entropy(F.linear(x, weight, bias).float(), target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    halves = [value.detach().bfloat16().requires_grad_() for value in (x, weight, bias)]
    linear_cross_entropy(*halves[:2], target, halves[2]).backward()
    ours.backward()
    for value, half in zip((x, weight, bias), halves, strict=True):
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        assert torch.equal(value.grad, half.grad.float())


@pytest.mark.usefixtures("small_chunks")
def test_under_torch_func() -> None:
    x, weight, target, bias = arguments()
    target = target.clamp(min=0)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, bias)

    rows = torch.func.vmap(torch.func.grad(loss))(x.unsqueeze(1), target.unsqueeze(1))
    expected = torch.autograd.grad(plain(x, weight, target, bias, reduction="sum"), x)[0]
    torch.testing.assert_close(rows.squeeze(1), expected)


@needs_inductor
@pytest.mark.usefixtures("small_chunks")
def test_compiled() -> None:
    x, weight, target, bias = arguments(dtype=torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    loss = compiled(x, weight, target, bias)
    torch.testing.assert_close(loss, linear_cross_entropy(x, weight, target, bias))
    gradients = torch.autograd.grad(loss, (x, weight, bias))
    expected = torch.autograd.grad(plain(x, weight, target, bias), (x, weight, bias))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_logits_are_not_all_there_at_once() -> None:
    """What autograd keeps between the passes, and the largest tensor on the way, are far below rows x classes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, Tensor):
                    self.numel = max(self.numel, value.numel())
            return result

    x, weight, target, bias = arguments(4096, 8, 500, torch.float32)
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr(cross_entropy, "_CHUNK", 1 << 16)
        linear_cross_entropy(x, weight, target, bias).backward()
    assert largest.numel <= 1 << 16


def test_all_rows_ignored() -> None:
    x, weight, target, bias = arguments()
    loss = linear_cross_entropy(x, weight, torch.full_like(target, -100), bias)
    assert math.isnan(loss.item())
    loss.backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"target": torch.zeros(11)}, "target: expected int64, got float32"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: expected shape \(11,\), got \(3,\)"),
        ({"target": torch.full((11,), 7)}, "target: expected 0 to 6 or -100, got 7"),
        ({"weight": torch.zeros(7, 4).double()}, r"weight: expected shape \(V, 5\), V at least 1, got \(7, 4\)"),
        ({"weight": torch.zeros(7, 5)}, "weight: expected float64 as input is, got float32"),
        ({"bias": torch.zeros(5).double()}, r"bias: expected shape \(7,\), got \(5,\)"),
        ({"input": torch.zeros(5).double()}, r"input: expected floats \(..., D\), got float64 \(5,\)"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    x, weight, target, bias = arguments()
    given = {"input": x, "weight": weight, "target": target, "bias": bias, **change}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        linear_cross_entropy(**given)
