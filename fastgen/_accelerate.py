"""Swaps PyTorch's modules in an existing model for fastgen's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from fastgen import nn

__all__ = ["Swap", "accelerate"]

Model = TypeVar("Model", bound=torch.nn.Module)

_FASTER: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.RNN: nn.RNN,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
    torch.nn.RNNCell: nn.RNNCell,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
    torch.nn.TransformerEncoderLayer: nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: nn.TransformerDecoderLayer,
    torch.nn.Linear: nn.Linear,
}


@dataclass(frozen=True)
class Swap:
    """What `accelerate` did with one module.

    Attributes:
        name: in the model; empty for the model itself.
        before: the module's class.
        left: why it was left as it is; None if it was swapped.
    """

    name: str
    before: type[torch.nn.Module]
    left: str | None = None

    def __str__(self) -> str:
        what = f"{self.name or '(the model)'}: {self.before.__name__}"
        return f"{what} swapped" if self.left is None else f"{what} left, {self.left}"


def accelerate(module: Model, *, report: Callable[[Swap], object] | None = None) -> Model:
    """Give LSTMs, GRUs, RNNs, their cells, the Transformer's layers and linear layers in `module` fastgen's `forward`,
    in place.

    A module that is swapped stays the object that it is; only its class changes. So parameters and their
    optimiser state, buffers, hooks, names, parametrisations, training mode and whatever refers to the module
    are untouched, a module that is used twice is swapped once, and a second call finds nothing to do.
    Subclasses are left alone, as their `forward` may differ.

    A model of Hugging Face's transformers gets fastgen's attention as its `attn_implementation`.

    Args:
        module: the model, or an LSTM itself.
        report: called with a `Swap` for each module of these kinds, swapped or left; `print` prints a line each, a
            list's `append` collects them.

    Returns:
        `module`.

    Example:
        >>> model = fastgen.accelerate(model, report=print)
        encoder.rnn: LSTM swapped
        decoder.rnn: AttentiveLSTM left, it is a subclass of LSTM
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if report is not None and not callable(report):
        raise TypeError(f"report: expected a function of a Swap, such as print, got {report!r}")
    pretrained: tuple[str, ...] = ()  # models of transformers, which look after what is in them
    for name, child in module.named_modules():
        if _is_pretrained(child) and not name.startswith(pretrained):
            pretrained += (name + "." if name else "",)
            swap: Swap | None = _set_attention(name, child)
        else:
            swap = _consider(name, child)
            if swap is not None and swap.left is None:
                _swap(child)
        if swap is not None and report is not None:
            report(swap)
    return module


def _is_pretrained(module: torch.nn.Module) -> bool:
    """Whether it is a PreTrainedModel of transformers; that library is not imported for the answer."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def _set_attention(name: str, model: torch.nn.Module) -> Swap:
    from fastgen import huggingface

    left = huggingface.why_not(model)
    if left is None:
        model.set_attn_implementation(huggingface.NAME)  # type: ignore[operator]
    return Swap(name, type(model), left)


def _consider(name: str, module: torch.nn.Module) -> Swap | None:
    """What to do with a module; None if it is none of those that fastgen has."""
    before: type[torch.nn.Module] = parametrize.type_before_parametrizations(module)
    base = next((base for base in _FASTER if issubclass(before, base)), None)
    if base is None:
        return None
    if issubclass(before, _FASTER[base]):
        return Swap(name, before, "it is fastgen's already")
    if before is not base and before.__module__.startswith("torch."):
        return None  # one of PyTorch's own, such as the output layer of MultiheadAttention, which that multiplies by
    if before is not base:
        return Swap(name, before, f"it is a subclass of {base.__name__}")
    if "forward" in module.__dict__:
        return Swap(name, before, "its forward has been replaced")
    return Swap(name, before)


def _swap(module: torch.nn.Module) -> None:
    module.__dict__.pop("_flat_weights", None)  # fastgen's is a property
    if not parametrize.is_parametrized(module):
        module.__class__ = _FASTER[type(module)]
        return
    # PyTorch gives each parametrised module a class of its own, that holds the properties.
    own = type(module)
    (base,) = own.__bases__
    names = {"__dict__", "__weakref__", "__doc__"}
    module.__class__ = type(own.__name__, (_FASTER[base],), {k: v for k, v in vars(own).items() if k not in names})
