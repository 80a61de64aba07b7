"""Commands whose errors name the options that were typed, not the fields and arguments that these set."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

__all__ = ["Command", "option_name"]

# Fields whose options have other names.
_OPTIONS = {
    "kl_warmup_steps": "--kl-warmup",
    "learning_rate": "--lr",
    "num_importance_samples": "--importance-samples",
}


def option_name(field: str) -> str:
    """The option that sets a field or an argument of the library."""
    return _OPTIONS.get(field) or "--" + field.replace("_", "-")


class Command(TyperCommand):
    """A command that translates the errors of the library: `learning_rate: ...` is `--lr: ...` here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, ArithmeticError, OSError) as error:
            options = {option for parameter in self.params for option in parameter.opts}
            text = str(error)
            translated = _with_options(text, options)
            if translated == text:
                raise
            raise ValueError(translated) from error


def _with_options(text: str, options: set[str]) -> str:
    """`text` with the fields of `options` replaced: the one that it begins with, and further on those that only
    a field can be, by their underscore, and that are no part of a path or a quotation."""

    def replace(match: re.Match[str]) -> str:
        option = option_name(match[0])
        return option if option in options else match[0]

    text = re.sub(r"^[a-z_]+(?=:)", replace, text)
    return re.sub(r"(?<![\w/.'-])[a-z]+(_[a-z]+)+(?![\w/.'-])", replace, text)
