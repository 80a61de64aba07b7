"""Text of `fastgen generate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from fastgen import _files
from fastgen.models import GPT, RNN

__all__ = ["write_text"]

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
_RULE = "-" * 80


def write_text(model: GPT | RNN, options: Mapping[str, Any]) -> None:
    """Continue the prompts as the options of the command say, to the terminal or into a file."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer (tokenizer.json), so it takes and gives tokens only, from Python")
    out: Path | None = options.get("out")
    if options.get("stream") and out is not None:
        raise ValueError("--stream: expected to show the text, but --out writes it to a file")
    if out is not None and out.is_dir():
        raise IsADirectoryError(f"{out}: expected a file for the text, got a folder")
    n, seed = options.get("n", 1), options["seed"]
    given: list[str] = options.get("prompt", [])
    # Without a prompt a new line is continued, which is not shown.
    prompts = given or [_new_line(model)]
    shown = [prompt for prompt in given or [""] for _ in range(n)]
    arguments = {name: options[name] for name in _SAMPLING if name in options}
    arguments["max_new_tokens"] = options.get("max_new_tokens", 500)
    if options.get("stream"):
        # One after the other: each has the seed, and so the text, that it has among the others.
        for row, prefix in enumerate(shown):
            if row:
                typer.echo(_RULE)
            typer.echo(prefix, nl=False)
            for piece in model.generate(prompts[row // n], seed=(seed + row) % 2**64, stream=True, **arguments):
                typer.echo(piece, nl=False)
                sys.stdout.flush()
            typer.echo()
        return
    texts = model.generate(prompts, seed=seed, n=n, **arguments)
    if not given:
        texts = [text.removeprefix(prompts[0]) for text in texts]
    text = f"\n{_RULE}\n".join(texts)
    if out is None:
        typer.echo(text)
    else:
        _files.write_text(out, text + "\n")
        typer.echo(out)


def _new_line(model: GPT | RNN) -> str:
    """What to continue where no prompt is given."""
    assert model.tokenizer is not None
    try:
        model.tokenizer.encode("\n")
    except ValueError:
        raise ValueError("--prompt: expected some text, as the model knows no new line to begin with") from None
    return "\n"
