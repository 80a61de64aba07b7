"""What the models of text share: a tokenizer that lies beside the weights, and the checks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen.models._pretrained import Folder, PretrainedConfig, PretrainedModel, check_folder
from fastgen.models._sampling import (
    Generation,
    LogitsProcessor,
    RowState,
    Sampling,
    Seed,
    Stop,
    TokenRows,
    generate_tokens,
)
from fastgen.random import Device
from fastgen.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer

__all__ = ["TextModel"]


class TextModel(PretrainedModel):
    """A model with a `vocab_size` in its configuration and perhaps a tokenizer."""

    rows_class: ClassVar[type[TokenRows]]
    """What steps through the rows that `generate` continues."""
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

    def generate(
        self,
        prompt: str | Tensor | Sequence[str] | Sequence[Tensor],
        max_new_tokens: int = 100,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        stop: int | str | Sequence[int | str] | None = None,
        seed: int | Sequence[int] | None = None,
        n: int = 1,
        state: RowState | None = None,
        logits_processor: LogitsProcessor | None = None,
        return_state: bool = False,
        stream: bool = False,
    ) -> Any:
        """Continue texts, sequences of tokens or series.

        A row's continuation is a function of its own prompt and seed: it depends neither on the other rows nor
        on where a text was cut into a prompt and what followed it. (The products of a row have the same bits in
        every batch where the kernels make them; elsewhere it holds up to the rounding of PyTorch's.)

        Args:
            prompt: a string or several; tokens (L,) or (B, L), or a list of tensors (L,) of different lengths;
                for a series values (T, input_size) or (B, T, input_size), or a list of tensors (T, input_size).
            max_new_tokens: how many tokens, or steps of a series, to add to a row at most.
            temperature: scores are divided by it; 0 takes the likeliest token, or the mean of the density. Of a
                density it divides the logits of the components and multiplies the variances.
            top_k: draw from the k likeliest tokens and those that equal the last of them.
            top_p: draw from the fewest likeliest tokens with this share of the probability (Holtzman et al., 2020).
            min_p: draw from tokens at least this many times as likely as the likeliest (Nguyen et al., 2024).
            repetition_penalty: divides the positive scores, and multiplies the negative ones, of tokens that the
                row has, prompt included (Keskar et al., 2019). These four act in the order of Hugging Face's
                `generate`: penalty, temperature, top_k, top_p, min_p.
            stop: tokens, or strings, that end a row; they stay in the result, at its end.
            seed: of row 0; row r has seed + r. Or a seed for each row. None: from torch's default generator.
            n: continuations of each prompt; row p n + i is number i of prompt p.
            state: from an earlier call, to go on from; the prompt comes behind what it has, and may be empty. It
                is not changed.
            logits_processor: (tokens, logits) -> logits, called before every draw with the tokens so far (of
                this call, prompt included) of the k rows that draw, a list of (L,), and their logits
                (k, vocab_size), before any filter. The loop then runs in Python, with the same tokens.
            return_state: give (result, state), a `GenerationState` or `GPTState`.
            stream: give a `Generation`, an iterator over what is new.

        Returns:
            Prompt and continuation, in the form of the prompt: a string or a list of them, tokens (L',), tokens
            (rows, L') in which -100 fills up rows that ended early, a list of tensors, or values likewise. One
            prompt gives one result, without a dimension or a list around it, if n is 1.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it, or scores that are not finite.
        """
        if return_state and stream:
            raise ValueError("return_state: expected False where stream is True, a Generation has its state")
        state_class = self.rows_class.state_class
        if state is not None and not isinstance(state, state_class):
            raise TypeError(f"state: expected a {state_class.__name__}, got {type(state).__name__}")
        sampling = Sampling.checked(temperature, top_k, top_p, min_p, repetition_penalty)
        generation = self._generation(prompt, max_new_tokens, sampling, stop, seed, n, state, logits_processor, stream)
        if stream:
            return generation
        for _ in generation:
            pass
        return (generation.result, generation.state) if return_state else generation.result

    def _generation(
        self,
        prompt: Any,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Stop,
        seed: Seed,
        n: int,
        state: Any,
        logits_processor: LogitsProcessor | None,
        one_by_one: bool,
    ) -> Generation:
        return generate_tokens(
            self.rows_class, self, prompt, max_new_tokens, sampling, stop, seed, n, state, logits_processor, one_by_one
        )

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
        check_folder(folder)
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
        if _validate.tensor(name, x).dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name}: expected int64 or int32 tokens, got {dtype_name(x.dtype)}")
        if x.dim() != 2 or x.numel() == 0:
            raise ValueError(f"{name}: expected shape (B, T), neither of them 0, got {tuple(x.shape)}")
        # Not on a device that would have to be waited for, nor while it is traced.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(value) for value in torch.aminmax(x))
            if low < 0 or high >= self.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"{name}: expected tokens 0 to {self.vocab_size - 1}, got {wrong}")
