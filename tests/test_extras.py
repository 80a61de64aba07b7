from __future__ import annotations

import pytest

from fastgen._extras import extra, require


def test_a_missing_package_names_its_extra() -> None:
    with (
        pytest.raises(ImportError, match=r"^absent is not installed: pip install 'fastgen-torch\[train\]'$"),
        extra("train"),
    ):
        import absent.submodule  # noqa: F401
    with pytest.raises(ImportError, match=r"^absent is not installed: pip install 'fastgen-torch\[demo\]'$"):
        require("demo", "torch", "absent")
    require("demo", "torch")


def test_a_fault_of_our_own_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fastgen\.absent"), extra("train"):
        import fastgen.absent  # noqa: F401
