"""`fastgen train rnn`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from fastgen.cli.train import options
from fastgen.cli.train.options import option
from fastgen.cli.train.run import Family, Options, run, size, tell
from fastgen.cli.train.text import TOKENIZERS, encode, load_texts, make_tokenizer, text_summary, tokens_again
from fastgen.data import SeriesSet, load_series
from fastgen.models import RNNConfig
from fastgen.train import RNNRecipe, RNNSeriesRecipe, RNNTextRecipe, TrainingConfig, TrainingResult

__all__ = ["load_series_split", "train_rnn"]

_MODEL = RNNConfig(vocab_size=1)
_SERIES = RNNConfig(input_size=1, hidden_size=64, num_layers=1)
_FORMULAS = ("sine", "mackey-glass")


def _both(field: str) -> str:
    """The default of a field, for text and for a series."""
    defaults = []
    for model, recipe in ((_MODEL, RNNTextRecipe), (_SERIES, RNNSeriesRecipe)):
        value = getattr(model if hasattr(model, field) else recipe.training_config(), field)
        defaults.append("none" if value is None else str(value))
    text, series = defaults
    return text if text == series else f"{text}; {series} for a series"


def train_rnn(
    context: typer.Context,
    data: Annotated[
        str | None,
        option(
            "Text: a file in UTF-8, a folder of such files, or the built-in name shakespeare. A series: a .csv, .tsv, "
            ".npy or .npz file with a row a step, or the built-in names sine and mackey-glass.",
            panel="Data",
            metavar="PATH|NAME",
        ),
    ] = None,
    test_size: Annotated[
        str | None,
        option(
            "The end of the data to hold out: a count of characters or steps, or a fraction such as 0.1.",
            default="0.05; 0.1 for a series",
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
    vocab_size: options.VocabSize = None,
    columns: Annotated[
        str | None,
        option("The columns of the series, by name, with commas between them.", default="all", panel="Data"),
    ] = None,
    time_column: Annotated[
        str | None, option("The column to leave out, as it holds the time.", panel="Data", metavar="NAME")
    ] = None,
    cell: Annotated[str | None, option("lstm, gru, rnn_tanh or rnn_relu.", default=_MODEL.cell, panel="Model")] = None,
    hidden_size: Annotated[int | None, option("Width of a layer.", default=_both("hidden_size"), panel="Model")] = None,
    num_layers: Annotated[int | None, option("Recurrent layers.", default=_both("num_layers"), panel="Model")] = None,
    embedding_dim: Annotated[
        int | None, option("Width of the embedding of a token.", default="the hidden size", panel="Model")
    ] = None,
    tie_weights: Annotated[
        bool | None,
        option("Let the output use the embedding.", default="no", panel="Model"),
    ] = None,
    num_components: Annotated[
        int | None,
        option("Gaussians in the density of the next step of a series.", default=_MODEL.num_components, panel="Model"),
    ] = None,
    dropout: Annotated[
        float | None,
        option(
            "Of the embedding and of what leaves a layer, from 0 to under 1.", default=_MODEL.dropout, panel="Model"
        ),
    ] = None,
    locked_dropout: Annotated[
        bool | None,
        option("Keep its mask over a window.", default="no", panel="Model"),
    ] = None,
    state_dropout: Annotated[
        float | None, option("Of the state between steps, locked.", default=_MODEL.state_dropout, panel="Model")
    ] = None,
    weight_dropout: Annotated[
        float | None, option("Of the recurrent weights.", default=_MODEL.weight_dropout, panel="Model")
    ] = None,
    zoneout: Annotated[
        str | None,
        option(
            "How often a unit of the state keeps its last value; of an LSTM, P_C,P_H for cells and states.",
            default=str(_MODEL.zoneout),
            panel="Model",
            metavar="P",
        ),
    ] = None,
    layer_norm: Annotated[
        bool | None,
        option("Normalise within the LSTM layers.", default="no", panel="Model"),
    ] = None,
    epochs: Annotated[int | None, option("Passes over the data.", default=_both("epochs"), panel="Training")] = None,
    max_steps: options.MaxSteps = None,
    max_seconds: options.MaxSeconds = None,
    patience: options.Patience = None,
    batch_size: Annotated[
        int | None,
        option("Streams to read in parallel, over all processes.", default=_both("batch_size"), panel="Training"),
    ] = None,
    seq_len: Annotated[
        int | None,
        option("Steps that gradients flow through.", default="128; 50 for a series", panel="Training"),
    ] = None,
    lr: Annotated[
        float | None, option("Highest learning rate.", default=_both("learning_rate"), panel="Training")
    ] = None,
    schedule: options.Schedule = None,
    warmup_steps: Annotated[
        int | None, option("Steps up to the highest rate.", default=_both("warmup_steps"), panel="Training")
    ] = None,
    weight_decay: options.WeightDecay = None,
    max_grad_norm: Annotated[
        float | None, option("Clip gradients to this norm.", default=_both("max_grad_norm"), panel="Training")
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.DType = None,
    compile: options.Compile = None,
    out: options.Out = None,
    resume: options.Resume = None,
    config: options.Config = None,
    print_config: options.PrintConfig = False,
    log_every: options.LogEvery = None,
    evaluate_every: Annotated[
        int | None, option("Epochs between evaluations.", default=_both("evaluate_every"), panel="Run")
    ] = None,
    evaluate_steps: Annotated[
        int | None,
        option("Steps between further evaluations within an epoch.", default=_both("evaluate_steps"), panel="Run"),
    ] = None,
    save_every: options.SaveEvery = None,
    keep_checkpoints: options.KeepCheckpoints = None,
    prompt: Annotated[
        str | None, option("What the samples of text continue.", default="a new line", panel="Run", metavar="TEXT")
    ] = None,
    sample_length: Annotated[
        int | None, option("Steps of a sample.", default="500; 200 for a series", panel="Run")
    ] = None,
    tensorboard: options.Tensorboard = None,
    quiet: options.Quiet = False,
) -> None:
    """Train a recurrent network to continue text or a series of numbers.

    It reads the data in parallel streams, a window after the other, and learns what comes next: the probability of
    the next token of a text, the density of the next row of a series. Each evaluation gives the loss on the held-out
    end, in nats a step, and a sample. For text it also gives the perplexity (the exponential of the loss) and bits a
    character (comparable between tokenizers), for a series the root mean square error.

    The run folder gets checkpoints, metrics.csv, samples and, in model/, the weights of the best checkpoint with
    their tokenizer. Ctrl-C saves a checkpoint first. The same command and seed give the same run; on the CPU also if
    it was killed and resumed in between.

    Examples:

        fastgen train rnn --data shakespeare

        fastgen train rnn --data novel.txt --tokenizer bpe --hidden-size 512 --dropout 0.2 --out runs/novel

        fastgen train rnn --data notes/ --cell gru --num-layers 1 --epochs 30 --patience 3

        fastgen train rnn --data weather.csv --time-column date --num-components 3

        fastgen train rnn --resume runs/novel --epochs 20

        torchrun --nproc-per-node 2 -m fastgen train rnn --data shakespeare
    """
    run(_RNN(), context.params)


class _RNN(Family):
    recipe = RNNRecipe
    expected_data = "a file, a folder, shakespeare, sine or mackey-glass"
    paths: ClassVar = {"data": ("shakespeare", *_FORMULAS), "tokenizer": TOKENIZERS}
    source = ("data", "test_size", "tokenizer", "vocab_size", "columns", "time_column")
    report = ("prompt", "sample_length")

    def training_config(self, source: Options, fields: Options) -> TrainingConfig:
        return (RNNSeriesRecipe if _is_series(source) else RNNTextRecipe).training_config(**fields)

    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> RNNRecipe:
        if "zoneout" in model:
            model["zoneout"] = _zoneout(model["zoneout"])
        of_recipe = {name: model.pop(name) for name in ("seq_len",) if name in model} | report
        if _is_series(source):
            _refuse("a series", {**source, **report}, ("tokenizer", "vocab_size", "prompt"))
            _refuse("a series", model, ("embedding_dim", "tie_weights"))
            series, held_out = load_series_split(source, quiet)
            widths = {"hidden_size": _SERIES.hidden_size, "num_layers": _SERIES.num_layers}
            rnn = RNNConfig(input_size=len(series.columns), **{**widths, **model})
            return RNNSeriesRecipe(rnn, series, held_out, seed=config.seed, **of_recipe)
        _refuse("text", {**source, **model}, ("columns", "time_column", "num_components"))
        texts = load_texts(source, quiet)
        tokenizer = make_tokenizer(source, *texts, "chars")
        train, test = encode(*texts, tokenizer, quiet)
        rnn = RNNConfig(vocab_size=tokenizer.vocab_size, **model)
        return RNNTextRecipe(rnn, train, test, seed=config.seed, **of_recipe)

    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> RNNRecipe:
        model, source, report = RNNConfig.from_dict(record["model"]), record["source"], record["evaluation"]
        fixed = {"seq_len": record["data"]["seq_len"], "seed": config.seed}
        if _is_series(source):
            series, held_out = load_series_split(source, quiet)
            return RNNSeriesRecipe(model, series, held_out, **fixed, **report)
        train, test = tokens_again(folder, source, quiet)
        return RNNTextRecipe(model, train, test, **fixed, **report)

    def summary(self, result: TrainingResult) -> str:
        metrics = result.metrics
        if "rmse" not in metrics:
            return text_summary(result)
        weights = f"weights of step {result.best_step} of {result.step}"
        return f"test loss {metrics['loss']:.3f} nats a step, error {metrics['rmse']:.4g} one step ahead, {weights}"

    def next_command(self, result: TrainingResult) -> list[str]:
        more = ["--out", "ahead.png"] if "rmse" in result.metrics else ["--temperature", "0.6", "--stream"]
        return ["generate", str(result.out), *more]


def _zoneout(value: str) -> float | tuple[float, ...]:
    """A number, or several with commas between them."""
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        raise ValueError(
            f"--zoneout: expected a number, or one for c and one for h such as 0.5,0.05, got {value!r}"
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _is_series(source: Mapping[str, Any]) -> bool:
    return source["data"] in _FORMULAS or Path(source["data"]).suffix.lower() in (".csv", ".tsv", ".npy", ".npz")


def _refuse(kind: str, options: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name in options:
            raise ValueError(f"{name}: expected none for {kind}, got {options[name]!r}")


def load_series_split(source: Mapping[str, Any], quiet: bool) -> tuple[SeriesSet, SeriesSet]:
    """The series to train on, and what is held out at its end."""
    columns = source.get("columns")
    series = load_series(source["data"], columns=columns and columns.split(","), time_column=source.get("time_column"))
    train, test = series.split(size("test-size", source.get("test_size", "0.1")))
    tell(f"{series}; {len(train):,} to train on, {len(test):,} to test", quiet)
    return train, test
