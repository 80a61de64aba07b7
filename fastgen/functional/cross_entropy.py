"""Cross-entropy of a linear layer's output, without the logits of all rows at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen._ops.library import plain_only
from fastgen._ops.linear import linear, product
from fastgen.reference._work import work_dtype

_REDUCTIONS = ("mean", "sum", "none")
# Logits at a time: 64 MB in float32. The weights are read once for each chunk, so chunks should have many rows;
# more than this many logits gain nothing.
_CHUNK = 1 << 24

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`F.cross_entropy(F.linear(input, weight, bias), target)`, a part of the rows at a time.

    The logits of a language model are its largest tensor: rows times vocabulary, several times over with their
    gradient. Here at most some 64 MB of them are there at a time. Where a gradient will be wanted, that of a chunk is
    made while its logits are at hand, so nothing is computed twice:

        d loss / d logits = (softmax(logits) - onehot(target)) / count

    (With reduction "none" the factors of the rows are not known yet, and the backward pass makes the logits again.)

    Args:
        input: (..., D), floating-point.
        weight: (V, D) of the same dtype, or of another where autocast is on.
        target: int64 (...): the right class of each row, or `ignore_index` where the row does not count.
        bias: (V,) or None.
        ignore_index: see target.
        reduction: "mean" over the rows that count (NaN if there is none), "sum", or "none": (...), 0 for the others.

    Returns:
        The loss in nats, in float32, or float64 where input is. Under autocast the products are made in its dtype.
        Differentiable to any order; beyond the first the logits are stored.

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it. The range of the targets is looked at on
            the CPU only, elsewhere it would stall the device.
    """
    _check(input, weight, target, bias, ignore_index, reduction)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        if input.dtype != torch.float64:
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        rows, targets = input.flatten(0, -2), target.flatten()
        if plain_only():
            loss = _plain(rows, weight, bias, targets, ignore_index, reduction)
        else:
            loss = _LinearCrossEntropy.apply(rows, weight, bias, targets, ignore_index, reduction)
    return loss.view(target.shape) if reduction == "none" else loss


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, reduction: str
) -> None:
    _validate.choice("reduction", reduction, _REDUCTIONS)
    if not input.is_floating_point() or input.dim() < 2:
        raise ValueError(f"input: expected floats (..., D), got {dtype_name(input.dtype)} {tuple(input.shape)}")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (V, {input.shape[-1]}), V at least 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not torch.is_autocast_enabled(input.device.type):
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None and value.dtype != input.dtype:
                expected, got = dtype_name(input.dtype), dtype_name(value.dtype)
                raise TypeError(f"{name}: expected {expected} as input is, got {got}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {dtype_name(target.dtype)}")
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target: expected shape {tuple(input.shape[:-1])}, got {tuple(target.shape)}")
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling() and not plain_only():
        # The ignored rows, moved into the range, do not show.
        low, high = (int(x) for x in torch.aminmax(torch.where(target == ignore_index, 0, target)))
        if low < 0 or high >= weight.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"target: expected 0 to {weight.shape[0] - 1} or {ignore_index}, got {wrong}")


def _plain(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    logits = F.linear(input, weight, bias)
    logits = logits.to(work_dtype(logits.dtype))
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        ignored = target == ignore_index
        counted = (~ignored).to(work_dtype(input.dtype))
        # Where all rows are ignored torch's gradient is 0, though its loss is NaN.
        scale = counted / counted.sum().clamp(min=1) if reduction == "mean" else counted
        now = reduction != "none" and any(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[:3] if now else (False,) * 3
        classes = torch.where(ignored, 0, target)
        losses, gradients = _chunked(input, weight, bias, classes, scale, wanted)
        ctx.gradients = gradients if now else None
        ctx.save_for_backward(input, weight, bias, target, classes, scale)
        ctx.arguments = (ignore_index, reduction)
        losses = losses * counted
        if reduction == "none":
            return losses
        total = losses.sum()
        return total / counted.sum() if reduction == "mean" else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, classes, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # the gradient will be differentiated
            # Views, as input may itself come from weight: the gradient in one is not to run through the other.
            given: list[Any] = [None if x is None else x.view_as(x) for x in (input, weight, bias)]
            loss = _plain(given[0], given[1], given[2], target, *ctx.arguments)
            asked = [x for x, needed in zip(given, wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(loss, asked, grad, create_graph=True))
            return *(next(found) if needed else None for needed in wanted), None, None, None
        # Handed over, not kept: so autograd may take them for .grad without a copy. A second backward pass through
        # the same graph makes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _chunked(input, weight, bias, classes, scale * grad, wanted)
        elif not _is_one(grad):
            gradients = tuple(None if x is None else x * grad.to(x.dtype) for x in gradients)
        return *gradients, None, None, None


def _chunked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, _Gradients]:
    """The losses (N,) of all rows, and the gradients of sum(scale * losses) in input, weight and bias."""
    work = work_dtype(input.dtype)
    count, classes = input.shape[0], weight.shape[0]
    size = max(1, _CHUNK // classes)
    losses = torch.empty(count, dtype=work, device=input.device)
    needs_input, needs_weight, needs_bias = wanted
    grad_input = torch.empty_like(input) if needs_input else None
    # Sums over the chunks; of half types in float32.
    grad_weight = torch.zeros_like(weight, dtype=work) if needs_weight and count == 0 else None
    grad_bias = torch.zeros(classes, dtype=work, device=input.device) if needs_bias else None
    target = target.unsqueeze(1)
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        x, factor = input[rows], scale[rows].unsqueeze(1)
        log_p = torch.log_softmax(linear(x, weight, bias), dim=-1, dtype=work)
        losses[rows] = -log_p.gather(1, target[rows]).squeeze(1)
        if not any(wanted):
            continue
        # softmax - onehot. The factors of the rows go to the narrow side of each product.
        difference = log_p.exp_()
        difference.scatter_add_(1, target[rows], difference.new_full((1, 1), -1.0).expand(x.shape[0], 1))
        if grad_bias is not None:
            grad_bias += torch.mv(difference.t(), factor.squeeze(1))
        difference = difference.to(input.dtype)
        if grad_input is not None:
            grad_input[rows] = product(difference, weight).to(work).mul_(factor)
        if needs_weight:
            scaled = (x.to(work) * factor).to(input.dtype)
            part = product(difference.t(), scaled)
            grad_weight = part.to(work) if grad_weight is None else grad_weight.add_(part)
    return losses, (
        grad_input,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(weight.dtype),
    )


def _is_one(grad: Tensor) -> bool:
    """Whether a factor can be left out; asked only where the answer is at hand."""
    return grad.device.type == "cpu" and not torch.compiler.is_compiling() and float(grad) == 1.0
