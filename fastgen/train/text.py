"""What the recipes of text share: the data's tokenizer, the figures, the samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fastgen import _validate
from fastgen._files import write_text
from fastgen.data import TokenSet
from fastgen.models import PretrainedConfig
from fastgen.models._text import TextModel
from fastgen.tokenizers import TOKENIZER_FILE, Tokenizer
from fastgen.train.plots import save_curves
from fastgen.train.recipe import checksum

__all__ = ["TextTask"]


class TextTask:
    """Part of a recipe that trains a model of text; see `RNNTextRecipe` and `GPTRecipe`.

    Metrics: `loss`, in nats a token; `perplexity`, its exponential; `bits_per_character`, which can be
    compared between tokenizers.
    """

    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_character")
    criterion: ClassVar[str] = "loss"
    unit = "tokens"
    sample_suffix = ".txt"

    title: ClassVar[str]
    """What the model is called in titles."""
    model: Any
    tokenizer: Tokenizer
    data_name: str
    _seed: int

    def _set_text(
        self,
        model: TextModel | PretrainedConfig,
        train: TokenSet,
        test: TokenSet,
        prompt: str | None,
        sample_length: int,
    ) -> None:
        """Check that model and tokens fit each other, and keep what samples and figures need."""
        for name, tokens in (("train", train), ("test", test)):
            if not isinstance(tokens, TokenSet):
                raise TypeError(f"{name}: expected a TokenSet, got {type(tokens).__name__}")
        self.tokenizer = train.tokenizer
        config: Any = model.config if isinstance(model, TextModel) else model
        self._check_vocabulary(config.vocab_size)
        if test.tokenizer != self.tokenizer:
            raise ValueError(f"test: expected tokens of {self.tokenizer!r} as in train, got {test.tokenizer!r}")
        if isinstance(model, TextModel) and model.tokenizer not in (None, self.tokenizer):
            raise ValueError(f"train: expected tokens of the model's {model.tokenizer!r}, got {self.tokenizer!r}")
        self._sample_length = _validate.integer("sample_length", sample_length, 1)
        self._prompt = _default_prompt(train) if prompt is None else prompt
        try:
            if not self.tokenizer.encode(self._prompt):
                raise ValueError("expected at least one token, got none")
        except ValueError as error:
            raise ValueError(f"prompt: {error}") from None
        self._tokens_per_character = len(test) / test.num_characters

    def _check_vocabulary(self, vocab_size: int) -> None:
        if vocab_size != self.tokenizer.vocab_size:
            raise ValueError(f"vocab_size: expected {self.tokenizer.vocab_size} as the tokenizer has, got {vocab_size}")

    def _text_figures(self, loss: float) -> dict[str, float]:
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_character": loss / math.log(2) * self._tokens_per_character,
        }

    def _describe_text(self, train: Tensor, test: Tensor, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model.config.to_dict(),
            "data": {
                "name": self.data_name,
                "train": len(train),
                "test": len(test),
                "tokenizer": self.tokenizer.kind,
                **more,
                "checksum": checksum(train, test),
            },
            "evaluation": {"prompt": self._prompt, "sample_length": self._sample_length},
        }

    def begin(self, folder: Path) -> None:
        self.tokenizer.save(folder / TOKENIZER_FILE)

    def save_sample(self, path: Path) -> str | None:
        text = self._generate(1)[0]
        write_text(path, text + "\n")
        return text

    def save_report(self, folder: Path, rows: list[dict[str, str]]) -> list[Path]:
        """samples.txt and loss.png."""
        samples, loss = folder / "samples.txt", folder / "loss.png"
        rule = "\n" + "-" * 80 + "\n"
        write_text(samples, rule.join(self._generate(4)) + "\n")
        titles = {"loss": "loss (nats a token)", "bits_per_character": "bits a character"}
        save_curves(loss, rows, titles, title=f"{self.title} on {self.data_name}", units="")
        return [samples, loss]

    def _generate(self, n: int) -> list[str]:
        """Continuations of the prompt. Under temperature 1, as an unlikely token leads a small model astray."""
        texts: list[str] = self.model.generate(
            [self._prompt] * n, max_new_tokens=self._sample_length, temperature=0.6, seed=self._seed
        )
        return [text.removeprefix(self._prompt) for text in texts]


def _default_prompt(train: TokenSet) -> str:
    try:
        train.tokenizer.encode("\n")
    except ValueError:  # an alphabet without new lines
        return train.tokenizer.decode(train.tokens[:1].tolist())
    return "\n"
