"""Commands whose errors name the options that were typed, not the fields and arguments that these set."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

__all__ = ["FIELDS", "Command", "option_of", "program"]

# Options that are named otherwise than the fields they set.
FIELDS = {
    "critic_steps": "num_critic_steps",
    "discriminator_lr": "discriminator_learning_rate",
    "gradient_penalty": "gradient_penalty_weight",
    "importance_images": "num_importance_images",
    "importance_samples": "num_importance_samples",
    "kl_warmup": "kl_warmup_steps",
    "lr": "learning_rate",
    "pictures": "num_pictures",
    "r1": "r1_gamma",
    "r2": "r2_gamma",
}
# Fields that an option sets by another name in one command, though it is a field's own name in another.
_NAMES = {field: name for name, field in FIELDS.items()} | {
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "seq_len",
    "tie_word_embeddings": "tie_weights",
}


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
        option = option_of(match[0])
        return option if option in options else match[0]

    text = re.sub(r"^[a-z0-9_]+(?=:)", replace, text)
    return re.sub(r"(?<![\w/.'-])[a-z][a-z0-9]*(_[a-z]+)+(?![\w/.'-])", replace, text)


def option_of(field: str) -> str:
    """The option that sets a field: `--lr` of `learning_rate`."""
    return "--" + _NAMES.get(field, field).replace("_", "-")


def program() -> str:
    """How to call the command line once more: `fastgen`, or as it was called where the shell finds another or none."""
    called = Path(sys.argv[0])
    if called.name != "fastgen" or not called.is_file():
        return "fastgen"
    found = shutil.which("fastgen")
    return "fastgen" if found is not None and called.samefile(found) else sys.argv[0]
