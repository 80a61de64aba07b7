"""What the models of text share: a tokenizer that lies beside the weights, and the checks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from fastgen.models._pretrained import Folder, PretrainedConfig, PretrainedModel
from fastgen.random import Device
from fastgen.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer

__all__ = ["TextModel"]


class TextModel(PretrainedModel):
    """A model with a `vocab_size` in its configuration and perhaps a tokenizer."""

    tokenizer: Tokenizer | None

    def __init__(
        self, config: PretrainedConfig | None = None, *, tokenizer: Tokenizer | None = None, **fields: Any
    ) -> None:
        super().__init__(config, **fields)
        self.tokenizer = tokenizer
        self._check_tokenizer("tokenizer")

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows; 0 for a model of numbers."""
        size: int = self.config.vocab_size  # type: ignore[attr-defined]
        return size

    def save_pretrained(self, directory: Folder) -> None:
        """As `PretrainedModel.save_pretrained`; the tokenizer, if there is one, goes into `tokenizer.json`."""
        self._save_tokenizer(Path(directory))
        super().save_pretrained(directory)

    @classmethod
    def from_pretrained(cls, directory: Folder, device: Device = None, dtype: torch.dtype | None = None) -> Self:
        """As `PretrainedModel.from_pretrained`, with the tokenizer where the folder has one."""
        model = super().from_pretrained(directory, device, dtype)
        model._load_tokenizer(Path(directory))
        return model

    def _save_tokenizer(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FILE)
        else:
            (folder / TOKENIZER_FILE).unlink(missing_ok=True)  # that of a model saved here before

    def _load_tokenizer(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        if path.exists():
            self.tokenizer = load_tokenizer(path)
            self._check_tokenizer(path)

    def _check_tokenizer(self, name: object) -> None:
        if self.tokenizer is not None and self.tokenizer.vocab_size != self.vocab_size:
            raise ValueError(f"{name}: expected {self.vocab_size} tokens as the model has, got {self.tokenizer!r}")

    def _check_tokens(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32 tokens, got {str(x.dtype).removeprefix('torch.')}")
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"{name}: expected shape (B, T), neither of them 0, got {tuple(x.shape)}")
        # Not on a device that would have to be waited for, nor while it is traced.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(value) for value in torch.aminmax(x))
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"{name}: expected tokens 0 to {self.vocab_size - 1}, got {wrong}")
