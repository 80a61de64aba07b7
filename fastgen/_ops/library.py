"""The op library `torch.ops.fastgen`: one way to register an op, and one to make it differentiable.

The schemas stand in this package and nowhere else, so that fastgen imports and compiles with or without
the binary; `csrc/torch/` adds kernels for the CPU and CUDA dispatch keys, and `fastgen.reference` serves
every device that has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SCHEMAS: dict[str, str] = {}  # every op that is registered

library = torch.library.Library("fastgen", "DEF")


def register(schemas: dict[str, str], plain: ModuleType, fakes: dict[str, Callable[..., Any]]) -> None:
    """Define ops by schema, with their functions in plain PyTorch and their shapes, each by the op's name.

    The overload `plain` is the function in plain PyTorch on every device: where the kernels of one (CUDA's) do not take
    all that the op may be given, they hand the rest to it.
    """
    for name, schema in schemas.items():
        for op in (name, f"{name}.plain"):
            library.define(op + schema)
            library.impl(op, getattr(plain, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastgen::{name}", fakes[name], lib=library)
    SCHEMAS.update(schemas)


# The ops themselves are not differentiable; `differentiable` puts an autograd.Function around one.
# (`torch.library.register_autograd` would do, at 4 us more for each call without a gradient and 8 us with:
# as much as the whole of a small op.)


def differentiable(
    op: Callable[..., Any],
    plain: Callable[..., Any],
    gradient: Callable[..., tuple[Tensor | None, ...]],
    keep: tuple[int, ...],
) -> Callable[..., Any]:
    """`op` with a gradient.

    Args:
        op: takes tensors (or None) only.
        plain: the same in plain PyTorch. Under torch.func and in forward-mode differentiation it runs in place
            of the op, so that vmap, jvp, jacfwd and hessian nest as they like; the noise is the op's.
        gradient: (ctx, *grads) -> gradients of the inputs; undefined gradients come as None.
        keep: which inputs `gradient` finds in ctx.saved_tensors.
    """

    class Op(torch.autograd.Function):
        backward = staticmethod(gradient)

        @staticmethod
        def forward(ctx: Any, *args: Tensor | None) -> Any:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*[args[i] for i in keep])
            return op(*args)

    recording = torch.is_grad_enabled

    def call(*args: Tensor | None) -> Any:
        if plain_only():
            return plain(*args)
        if recording():
            for value in args:
                if value is not None and value.requires_grad:
                    return Op.apply(*args)
        return op(*args)

    return call


# Private to torch; without it every call is taken for a transformed one, which is right, only slower.
transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def plain_only() -> bool:
    """Whether a call must be made of PyTorch's own ops: under torch.func, and in forward-mode differentiation."""
    return transforming() or forward_ad._current_level >= 0


# For families whose backward is an op without a gradient. Where more is asked for (create_graph=True, batched
# gradients), the gradient is taken by autograd through the reference instead, whose own derivatives of every
# order follow: correct everywhere, at the speed of plain PyTorch.


def higher_order() -> bool:
    """Whether the gradient that a backward pass is about to give will itself be differentiated, or is batched."""
    # A compiled graph has first derivatives only.
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transforming())


def through(
    forward: Callable[..., tuple[Tensor, ...]],
    operands: Sequence[Tensor | None],
    wanted: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward` by autograd, differentiable themselves."""
    with torch.enable_grad():
        # Views, so that what one operand owes to another (or to the same tensor passed twice) is not followed.
        views = [None if x is None else x.view_as(x) for x in operands]
        pairs = [(y, g) for y, g in zip(forward(*views), grads, strict=True) if g is not None]
        found = torch.autograd.grad(
            [y for y, _ in pairs],
            [x for x, want in zip(views, wanted, strict=True) if want and x is not None],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    remaining = iter(found)
    return tuple(next(remaining) if want else None for want in wanted)


def distinct(operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The operands, in a graph as views: Dynamo does not take one tensor twice, such as (h, h) for the states."""
    if not torch.compiler.is_compiling():
        return operands
    return tuple(None if x is None else x.view_as(x) for x in operands)
