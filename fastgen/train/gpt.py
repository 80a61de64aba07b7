"""Training of GPTs: pretraining on windows of a text, and fine-tuning of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastgen import _validate
from fastgen.data import TokenSet, Windows
from fastgen.evaluate.sequences import read_windows
from fastgen.models import GPT, GPTConfig
from fastgen.random import Generator, bits, permutation
from fastgen.train.config import TrainingConfig
from fastgen.train.recipe import Recipe, Step, adamw, initialised
from fastgen.train.text import TextTask

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["GPTRecipe"]

_TOKENS_READ = 8192  # of the held-out text at a time


class GPTRecipe(TextTask, Recipe):
    """Trains a `GPT` with AdamW on windows of a text, judged by its loss on a held-out one.

    Each epoch cuts the text into windows anew, at a random phase, and takes them in a random order. Betas are
    (0.9, 0.95), as in the training of GPT-3 (Brown et al., "Language models are few-shot learners", 2020).

    The held-out text is read in windows of the same length, so what comes first in one is predicted from little: a
    longer `seq_len` scores better for that alone.

    Metrics: `loss`, in nats a token; `perplexity`, its exponential; `bits_per_character`, which can be
    compared between tokenizers.

    Args:
        model: a configuration: then the weights are drawn from `seed`; or a model, to go on from its weights. One
            without a tokenizer gets that of the data.
        train, test: tokens of one tokenizer.
        seq_len: tokens of a window, at most the context; None: the context.
        separate_documents: whether documents (`TokenSet.starts`) do not see each other. They are packed into the
            windows all the same, so nothing is padded.
        gradient_accumulation_steps: parts of a batch that go through the model one after the other.
        gradient_checkpointing: see `GPT`.
        lora_rank: 0 trains all weights, more only matrices of that rank beside those of the layers; see
            `GPT.add_lora`.
        seed: of the initial weights and of the samples.
        prompt: what the samples begin with, which are not shown with it; default a new line.
        sample_length: tokens of a sample.

    Raises:
        TypeError, ValueError: for a model and data that do not fit each other, or a text shorter than a window.
    """

    model_type = "gpt"
    title = "GPT"
    model: GPT
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 5,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "evaluate_steps": 1000,
    }

    def __init__(
        self,
        model: GPT | GPTConfig,
        train: TokenSet,
        test: TokenSet,
        *,
        seq_len: int | None = None,
        separate_documents: bool = False,
        gradient_accumulation_steps: int = 1,
        gradient_checkpointing: bool = False,
        lora_rank: int = 0,
        seed: int = 0,
        prompt: str | None = None,
        sample_length: int = 500,
    ) -> None:
        self._set_text(model, train, test, prompt, sample_length)
        config = model.config if isinstance(model, GPT) else model
        context = config.max_position_embeddings
        self.seq_len = self.units_per_example = _validate.integer("seq_len", context if seq_len is None else seq_len, 1)
        if self.seq_len > context:
            raise ValueError(f"seq_len: expected at most {context}, the context of the model, got {seq_len}")
        if len(train) <= self.seq_len:
            raise ValueError(f"seq_len: expected less than the {len(train):,} tokens to train on, got {self.seq_len}")
        if len(test) < 2:
            raise ValueError(f"test: expected at least 2 tokens, got {len(test)}")
        self._separate = _validate.boolean("separate_documents", separate_documents)
        self._train, self._test = (
            Windows(data.tokens, self.seq_len, data.starts if separate_documents else None) for data in (train, test)
        )
        self._parts = _validate.integer("gradient_accumulation_steps", gradient_accumulation_steps, 1)
        self._lora_rank = _validate.integer("lora_rank", lora_rank, 0)
        self.data_name = train.name
        self._seed = seed
        self.model = initialised(lambda: self._made(model), seed)
        self.model.tokenizer = self.tokenizer
        self.model.gradient_checkpointing = _validate.boolean("gradient_checkpointing", gradient_checkpointing)

    def _made(self, model: GPT | GPTConfig) -> GPT:
        made = model if isinstance(model, GPT) else GPT(model)
        if self._lora_rank:
            made.add_lora(self._lora_rank)
        return made

    def _check_vocabulary(self, vocab_size: int) -> None:
        size = self.tokenizer.vocab_size
        if vocab_size < size:
            raise ValueError(f"vocab_size: expected at least {size} as the tokenizer has, got {vocab_size}")

    @property
    def num_examples(self) -> int:
        """Windows, each with a target for its last token."""
        return (len(self._train.tokens) - 1) // self.seq_len

    def order(self, batch_size: int, generator: Generator) -> Tensor:
        """(steps, batch_size): where in the text the window of each row begins."""
        phase = int(bits(1, generator=generator, dtype=torch.int64)) % self.seq_len
        windows = permutation(self.num_examples, generator=generator) * self.seq_len + phase
        # The last window of the text may have to begin a little earlier.
        windows = windows.clamp(max=len(self._train.tokens) - 1 - self.seq_len)
        return windows[: self.num_examples // batch_size * batch_size].view(-1, batch_size)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def optimizers(self, config: TrainingConfig) -> dict[str, Optimizer]:
        return {"adamw": adamw(self.model, config, betas=(0.9, 0.95))}

    def train_step(self, step: Step) -> dict[str, Tensor]:
        losses = []

        def parts() -> Iterator[Tensor]:
            for rows in step.rows.chunk(self._parts):
                inputs, targets, cu_seqlens = self._train.batch(rows)
                inputs, targets = inputs.to(self.model.device), targets.to(self.model.device)
                output = step.modules["model"](inputs, targets, cu_seqlens=cu_seqlens)
                loss = output.loss * (len(rows) / len(step.rows))
                losses.append(loss.detach())
                yield loss

        step.update("adamw", parts())
        return {"loss": torch.stack(losses).sum()}

    def evaluate(self, accelerator: Accelerator, generator: Generator, *, final: bool = False) -> dict[str, float]:
        """Figures of the held-out text, which is read once from its beginning."""
        rows = max(1, _TOKENS_READ // self.seq_len)
        sums = read_windows(self.model, self._test, rows, accelerator.process_index, accelerator.num_processes)
        nats, count = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return self._text_figures(nats / count)

    def describe(self) -> dict[str, Any]:
        more = {"seq_len": self.seq_len, "separate_documents": self._separate}
        return {
            **self._describe_text(self._train.tokens, self._test.tokens, **more),
            "recipe": {
                "gradient_accumulation_steps": self._parts,
                "gradient_checkpointing": self.model.gradient_checkpointing,
                "lora_rank": self._lora_rank,
            },
        }

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
