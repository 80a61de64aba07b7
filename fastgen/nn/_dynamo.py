"""Lets `torch.compile` into fastgen's LSTM, GRU and RNN.

Dynamo breaks the graph at every instance of torch.nn.LSTM, GRU and RNN, subclasses included, because their
ops would be unrolled over time. It has a switch for that, `torch._dynamo.config.allow_rnn`, but for the
whole process, and PyTorch's own modules then fail to train. So the switch is thrown while Dynamo looks at
one of ours, whose forward is an op that nobody unrolls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastgen.nn.recurrent import has_kernels

__all__ = ["install"]

_BUILDER = "torch._dynamo.variables.builder"


def _open(builder: ModuleType) -> None:
    """Wrap the method of `builder` that asks for the switch."""
    wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
    if wrap_module is None or not hasattr(builder.config, "allow_rnn"):
        return  # another PyTorch: it may break the graph, as at its own modules

    @functools.wraps(wrap_module)
    def wrap(self: Any, value: Any) -> Any:
        with builder.config.patch(allow_rnn=True) if has_kernels(value) else contextlib.nullcontext():
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap


class _OnImport(MetaPathFinder):
    """Opens the builder when it is imported: to import Dynamo takes longer than all of fastgen."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_open(module: ModuleType) -> None:
                execute(module)
                _open(module)

            spec.loader.exec_module = execute_and_open  # type: ignore[method-assign]
        return spec


def install() -> None:
    if _BUILDER in sys.modules:
        _open(sys.modules[_BUILDER])
    else:
        sys.meta_path.insert(0, _OnImport())
