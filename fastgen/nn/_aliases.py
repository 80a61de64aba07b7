"""`fastgen.nn.X` is the module `torch.nn.X`, at any depth, unless this package has a file X of its own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["install"]

_OURS, _TORCHS = "fastgen.nn.", "torch.nn."


@functools.cache
def _own_files() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules([os.path.dirname(__file__)]))


def _is_own(name: str) -> bool:
    """Whether `name`, which starts with `fastgen.nn.`, lies in a file of this package."""
    return name.removeprefix(_OURS).split(".")[0] in _own_files()


def _share_loaded() -> None:
    """Enter all modules of torch.nn that are loaded into `sys.modules` under their name here.

    After it has loaded a submodule, Python sets it as an attribute of the parent. Our parents are
    PyTorch's modules, and in some of them a function has the name of the submodule that it is from
    (`torch.nn.utils.spectral_norm`): it would be overwritten. Modules entered here are not loaded again.
    """
    for name, module in list(sys.modules.items()):
        alias = _OURS + name.removeprefix(_TORCHS)
        if name.startswith(_TORCHS) and not _is_own(alias):
            sys.modules.setdefault(alias, module)


class _AliasFinder(MetaPathFinder, Loader):
    """Imports `torch.nn.X` for `fastgen.nn.X`; it is asked first, as parents with PyTorch's path bypass us."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_OURS) or _is_own(fullname):
            return None
        found = importlib.util.find_spec(_TORCHS + fullname.removeprefix(_OURS))
        if found is None:
            return None
        return ModuleSpec(fullname, self, is_package=found.submodule_search_locations is not None)

    def exec_module(self, module: ModuleType) -> None:
        # The fresh module gives way to PyTorch's, whose own __spec__ and __name__ stay as they are.
        name = module.__name__
        sys.modules[name] = importlib.import_module(_TORCHS + name.removeprefix(_OURS))
        _share_loaded()


def install() -> None:
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())
    _share_loaded()
