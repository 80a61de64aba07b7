"""`fastgen train rnn`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.cli.train import options
from fastgen.cli.train.options import option
from fastgen.cli.train.run import Family, Options, run, size, tell
from fastgen.data import TextSet, TokenSet, load_text
from fastgen.models import RNNConfig
from fastgen.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer, train_tokenizer
from fastgen.train import RNNRecipe, RNNTextRecipe, TrainingConfig, TrainingResult

__all__ = ["train_rnn"]

_MODEL = RNNConfig(vocab_size=1)
_TRAINING = RNNRecipe.training_config()


def train_rnn(
    context: typer.Context,
    data: Annotated[
        str | None,
        option(
            "Text: a file in UTF-8, a folder of such files, or the built-in name shakespeare.",
            panel="Data",
            metavar="PATH|NAME",
        ),
    ] = None,
    test_size: Annotated[
        str | None,
        option(
            "The end of the data to hold out: a count (of characters), or a fraction such as 0.1.",
            default=0.05,
            panel="Data",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "chars (those that occur), bytes, bpe (pieces of words, learned from the text), or a tokenizer.json.",
            default="chars",
            panel="Data",
            metavar="KIND|FILE",
        ),
    ] = None,
    vocab_size: Annotated[int | None, option("Tokens of bpe at most.", default=1024, panel="Data")] = None,
    cell: Annotated[str | None, option("lstm, gru, rnn_tanh or rnn_relu.", default=_MODEL.cell, panel="Model")] = None,
    hidden_size: Annotated[int | None, option("Width of a layer.", default=_MODEL.hidden_size, panel="Model")] = None,
    num_layers: Annotated[int | None, option("Recurrent layers.", default=_MODEL.num_layers, panel="Model")] = None,
    embedding_dim: Annotated[
        int | None, option("Width of the embedding of a token.", default="the hidden size", panel="Model")
    ] = None,
    tie_weights: Annotated[
        bool | None,
        typer.Option("--tie-weights", help="Let the output use the embedding.", rich_help_panel="Model"),
    ] = None,
    dropout: Annotated[
        float | None,
        option(
            "Of the embedding and of what leaves a layer, from 0 to under 1.", default=_MODEL.dropout, panel="Model"
        ),
    ] = None,
    locked_dropout: Annotated[
        bool | None,
        typer.Option("--locked-dropout", help="Keep its mask over a window.", rich_help_panel="Model"),
    ] = None,
    state_dropout: Annotated[
        float | None, option("Of the state between steps, locked.", default=_MODEL.state_dropout, panel="Model")
    ] = None,
    weight_dropout: Annotated[
        float | None, option("Of the recurrent weights.", default=_MODEL.weight_dropout, panel="Model")
    ] = None,
    epochs: Annotated[int | None, option("Passes over the data.", default=_TRAINING.epochs, panel="Training")] = None,
    max_steps: options.MaxSteps = None,
    max_seconds: options.MaxSeconds = None,
    patience: options.Patience = None,
    batch_size: Annotated[
        int | None,
        option("Streams to read in parallel, over all processes.", default=_TRAINING.batch_size, panel="Training"),
    ] = None,
    seq_len: Annotated[
        int | None, option("Steps of a window, through which gradients flow.", default=128, panel="Training")
    ] = None,
    lr: Annotated[
        float | None, option("Highest learning rate.", default=_TRAINING.learning_rate, panel="Training")
    ] = None,
    schedule: options.Schedule = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: options.WeightDecay = None,
    max_grad_norm: Annotated[
        float | None, option("Clip gradients to this norm.", default=_TRAINING.max_grad_norm, panel="Training")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    mixed_precision: options.MixedPrecision = None,
    out: options.Out = None,
    resume: options.Resume = None,
    log_every: options.LogEvery = None,
    evaluate_every: options.EvaluateEvery = None,
    evaluate_steps: Annotated[
        int | None,
        option("Steps between further evaluations within an epoch.", default=_TRAINING.evaluate_steps, panel="Run"),
    ] = None,
    save_every: options.SaveEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    prompt: Annotated[
        str | None, option("What the samples continue.", default="a new line", panel="Run", metavar="TEXT")
    ] = None,
    sample_length: Annotated[int | None, option("Tokens of a sample.", default=500, panel="Run")] = None,
    tensorboard: options.Tensorboard = None,
    quiet: options.Quiet = False,
) -> None:
    """Train a recurrent network to continue text.

    It reads the text in parallel streams, a window after the other, and learns to give the next token its
    probability. Each evaluation reports the loss on the held-out end (nats a token), the perplexity (its
    exponential) and bits a character (comparable between tokenizers), and prints a sample. The run folder gets
    checkpoints, metrics.csv, samples and, in model/, the weights of the best checkpoint with their tokenizer.
    Ctrl-C saves a checkpoint first. The same command and seed give the same run; on the CPU also if it was killed
    and resumed in between.

    Examples:

        fastgen train rnn --data shakespeare

        fastgen train rnn --data novel.txt --tokenizer bpe --hidden-size 512 --dropout 0.2 --out runs/novel

        fastgen train rnn --data notes/ --cell gru --num-layers 1 --epochs 30 --patience 3

        fastgen train rnn --resume runs/novel --epochs 20

        torchrun --nproc-per-node 2 -m fastgen.cli train rnn --data shakespeare
    """
    run(_RNN(), context.params)


class _RNN(Family):
    recipe = RNNRecipe
    expected_data = "a file, a folder or shakespeare"
    built_in = ("shakespeare",)
    source = ("data", "test_size", "tokenizer", "vocab_size")
    report = ("prompt", "sample_length")

    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> RNNRecipe:
        recipe_options = {name: model.pop(name) for name in ("seq_len",) if name in model} | report
        texts = _load(source, quiet)
        tokenizer = _tokenizer(source, *texts)
        train, test = _encode(*texts, tokenizer, quiet)
        rnn = RNNConfig(vocab_size=tokenizer.vocab_size, **model)
        return RNNTextRecipe(rnn, train, test, seed=config.seed, **recipe_options)

    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> RNNRecipe:
        model, source = RNNConfig.from_dict(record["model"]), record["source"]
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        try:
            train, test = _encode(*_load(source, quiet), tokenizer, quiet)
        except ValueError as error:
            raise ValueError(f"--data: no longer what {folder} was started with: {error}") from error
        return RNNTextRecipe(
            model, train, test, seq_len=record["data"]["seq_len"], seed=config.seed, **record["evaluation"]
        )

    def summary(self, result: TrainingResult) -> str:
        metrics = result.metrics
        return (
            f"test perplexity {metrics['perplexity']:.3f} a token, "
            f"{metrics['bits_per_character']:.3f} bits a character, weights of step {result.best_step} of {result.step}"
        )

    def next_command(self, result: TrainingResult) -> list[str]:
        return ["fastgen", "generate", str(result.out), "--prompt", "The ", "--stream"]


def _load(source: Mapping[str, Any], quiet: bool) -> tuple[TextSet, TextSet]:
    """The text to train on, and what is held out at its end."""
    text = load_text(source["data"])
    train, test = text.split(size("test-size", source.get("test_size", "0.05")))
    tell(f"{text}; {len(train):,} to train on, {len(test):,} to test", quiet)
    return train, test


def _tokenizer(source: Mapping[str, Any], train: TextSet, test: TextSet) -> Tokenizer:
    kind = source.get("tokenizer", "chars")
    if kind != "bpe" and "vocab_size" in source:
        raise ValueError(f"--vocab-size: expected with --tokenizer bpe only, got it with {kind}")
    if kind == "chars":  # also those that only the held-out text has: it could not be read otherwise
        return train_tokenizer(kind, train.text + test.text)
    if kind in ("bytes", "bpe"):
        return train_tokenizer(kind, train.text, source.get("vocab_size", 1024))
    try:
        return load_tokenizer(kind)
    except FileNotFoundError:
        raise ValueError(f"--tokenizer: expected chars, bytes, bpe or a tokenizer.json, got {kind!r}") from None


def _encode(train: TextSet, test: TextSet, tokenizer: Tokenizer, quiet: bool) -> tuple[TokenSet, TokenSet]:
    tokens = train.encode(tokenizer), test.encode(tokenizer)
    tell(f"{len(tokens[0]):,} tokens of {tokenizer.vocab_size:,} ({tokenizer.kind})", quiet)
    return tokens
