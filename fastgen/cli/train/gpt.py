"""`fastgen train gpt`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from fastgen.cli.train import options
from fastgen.cli.train.options import option
from fastgen.cli.train.run import Family, Options, run
from fastgen.cli.train.text import TOKENIZERS, encode, load_texts, make_tokenizer, text_summary, tokens_again
from fastgen.models import GPT, GPTConfig
from fastgen.models import from_pretrained as load_model
from fastgen.train import GPTRecipe, TrainingConfig, TrainingResult

__all__ = ["train_gpt"]

_MODEL = GPTConfig(vocab_size=1)
_TRAINING = GPTRecipe.training_config()
_ARCHITECTURES = ("gpt2", "llama")
# Options of the recipe, and of the model where there is none to start from.
_RECIPE = (*("seq_len", "separate_documents", "gradient_accumulation_steps", "gradient_checkpointing", "lora_rank"),)
_NEW_MODEL = (
    *("architecture", "hidden_size", "num_layers", "num_heads", "num_key_value_heads", "intermediate_size"),
    *("tie_weights",),
)


def train_gpt(
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
            "The end of the text to hold out: a count of characters, or a fraction such as 0.1.",
            default="0.05",
            panel="Data",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "bpe (pieces of words, learned from the text), chars (those that occur), bytes, or a tokenizer.json.",
            default="bpe; with --init-from that of the checkpoint",
            panel="Data",
            metavar="KIND|FILE",
        ),
    ] = None,
    vocab_size: options.VocabSize = None,
    separate_documents: Annotated[
        bool | None,
        option("Let no file of the folder see the one before it.", default="no", panel="Data"),
    ] = None,
    init_from: Annotated[
        Path | None,
        option(
            "Go on from these weights: a run of train gpt, a model folder, or one of Hugging Face's with a GPT-2 or "
            "Llama in it.",
            panel="Model",
            metavar="FOLDER",
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        option("Train matrices of this rank beside frozen weights.", default="trains all weights", panel="Model"),
    ] = None,
    architecture: Annotated[
        str | None,
        option(
            "gpt2 (learned positions, layer norm, GELU) or llama (rotary positions, RMS norm, SwiGLU).",
            default="gpt2",
            panel="Model",
        ),
    ] = None,
    hidden_size: Annotated[int | None, option("Width of a layer.", default=_MODEL.hidden_size, panel="Model")] = None,
    num_layers: Annotated[int | None, option("Layers.", default=_MODEL.num_hidden_layers, panel="Model")] = None,
    num_heads: Annotated[
        int | None, option("Heads of a layer.", default=_MODEL.num_attention_heads, panel="Model")
    ] = None,
    num_key_value_heads: Annotated[
        int | None, option("Heads of keys and values, which query heads share.", default="as heads", panel="Model")
    ] = None,
    intermediate_size: Annotated[
        int | None, option("Width of the MLP.", default="4 hidden sizes, llama 8/3", panel="Model")
    ] = None,
    tie_weights: Annotated[
        bool | None,
        option("Let the output use the embedding.", default="gpt2 yes, llama no", panel="Model"),
    ] = None,
    dropout: Annotated[
        float | None,
        option(
            "Of the embedding, attention and what a layer adds, from 0 to under 1.",
            default="0; with --init-from that of the checkpoint",
            panel="Model",
        ),
    ] = None,
    epochs: Annotated[int | None, option("Passes over the data.", default=_TRAINING.epochs, panel="Training")] = None,
    max_steps: options.MaxSteps = None,
    max_seconds: options.MaxSeconds = None,
    patience: options.Patience = None,
    batch_size: Annotated[
        int | None, option("Windows a step, over all processes.", default=_TRAINING.batch_size, panel="Training")
    ] = None,
    seq_len: Annotated[
        int | None,
        option(
            "Tokens of a window, and the context of a new model.",
            default=f"{_MODEL.max_position_embeddings}, or the context if that is shorter",
            panel="Training",
        ),
    ] = None,
    lr: Annotated[
        float | None, option("Highest learning rate.", default=_TRAINING.learning_rate, panel="Training")
    ] = None,
    schedule: options.Schedule = None,
    warmup_steps: options.WarmupSteps = None,
    weight_decay: Annotated[
        float | None, option("Of AdamW, decoupled, of matrices.", default=_TRAINING.weight_decay, panel="Training")
    ] = None,
    max_grad_norm: Annotated[
        float | None, option("Clip gradients to this norm.", default=_TRAINING.max_grad_norm, panel="Training")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, option("Parts of a batch, one after the other.", default=1, panel="Training")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        option("Save memory: run each layer again in the backward pass.", default="no", panel="Training"),
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
    """Train a Transformer to continue text, from scratch or from a checkpoint.

    It reads windows of the text in a random order and learns the probability of the next token. Each evaluation gives
    the loss on the held-out end, in nats a token, the perplexity (its exponential), bits a character (comparable
    between tokenizers) and a sample.

    The run folder gets checkpoints, metrics.csv, samples and, in model/, the weights of the best checkpoint with
    their tokenizer. Ctrl-C saves a checkpoint first. The same command and seed give the same run; on the CPU also if
    it was killed and resumed in between.

    Examples:

        fastgen train gpt --data shakespeare --seq-len 128 --max-steps 2000

        fastgen train gpt --data notes/ --architecture llama --separate-documents --out runs/notes

        fastgen train gpt --data novel.txt --init-from gpt2/ --lr 1e-4 --epochs 1 --out runs/novel

        fastgen train gpt --data novel.txt --init-from gpt2/ --lora-rank 8 --gradient-checkpointing

        fastgen train gpt --resume runs/novel --epochs 2

        torchrun --nproc-per-node 2 -m fastgen train gpt --data shakespeare
    """
    run(_GPT(), context.params)


class _GPT(Family):
    recipe = GPTRecipe
    expected_data = "a file, a folder or shakespeare"
    paths: ClassVar = {"data": ("shakespeare",), "tokenizer": TOKENIZERS, "init_from": ()}
    source = ("data", "test_size", "tokenizer", "vocab_size", "init_from")
    report = ("prompt", "sample_length")

    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> GPTRecipe:
        of_recipe = {name: model.pop(name) for name in _RECIPE if name in model} | report
        dropout = model.pop("dropout", None)
        start = None
        if "init_from" in source:
            for name in _NEW_MODEL:
                if name in model:
                    raise ValueError(f"{name}: expected none with --init-from, got {model[name]!r}")
            start = _checkpoint(source["init_from"], {} if dropout is None else _dropouts(dropout))
        elif of_recipe.get("lora_rank"):
            raise ValueError(f"lora_rank: expected a checkpoint to adapt (--init-from), got {of_recipe['lora_rank']}")
        architecture = model.pop("architecture", "gpt2")
        if architecture not in _ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(_ARCHITECTURES)}, got {architecture!r}")
        texts = load_texts(source, quiet)
        if start is None or start.tokenizer is None:
            if start is not None and source.get("tokenizer") is None:
                raise ValueError(f"--tokenizer: expected one, as {source['init_from']} has none")
            tokenizer = make_tokenizer(source, *texts, "bpe")
        else:
            for name in ("tokenizer", "vocab_size"):
                if name in source:
                    raise ValueError(f"{name}: expected none, as the checkpoint has a tokenizer, got {source[name]!r}")
            tokenizer = start.tokenizer
        train, test = encode(*texts, tokenizer, quiet)
        if start is not None:
            limit = min(start.config.max_position_embeddings, _MODEL.max_position_embeddings)
            return GPTRecipe(start, train, test, seed=config.seed, **{"seq_len": limit, **of_recipe})
        names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
        names["tie_weights"] = "tie_word_embeddings"
        fields = {names.get(name, name): value for name, value in model.items()}
        if "seq_len" in of_recipe:
            fields["max_position_embeddings"] = of_recipe["seq_len"]
        if dropout is not None:
            fields |= _dropouts(dropout)
        make = GPTConfig.llama if architecture == "llama" else GPTConfig
        return GPTRecipe(make(tokenizer.vocab_size, **fields), train, test, seed=config.seed, **of_recipe)

    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> GPTRecipe:
        source, data = record["source"], record["data"]
        fixed = {name: data[name] for name in ("seq_len", "separate_documents")} | record["recipe"]
        model: GPT | GPTConfig = GPTConfig.from_dict(record["model"])
        if "init_from" in source and not any((folder / "checkpoints").glob("*.safetensors")):
            # Stopped before its first checkpoint: from the same weights again.
            model = _checkpoint(source["init_from"], record["model"])
        train, test = tokens_again(folder, source, quiet)
        return GPTRecipe(model, train, test, seed=config.seed, **fixed, **record["evaluation"])

    def summary(self, result: TrainingResult) -> str:
        return text_summary(result)

    def next_command(self, result: TrainingResult) -> list[str]:
        return ["generate", str(result.out), "--temperature", "0.6", "--stream"]


def _checkpoint(path: str, fields: Mapping[str, Any]) -> GPT:
    """The model of a run, or of a model folder, with these fields of its configuration changed."""
    folder = Path(path)
    inside = folder / "model"
    model = load_model(inside if (inside / "config.json").is_file() else folder)
    if not isinstance(model, GPT):
        raise ValueError(f"init_from: expected a GPT, {path} has a model of the type {model.config.model_type}")
    changed = GPT(GPTConfig.from_dict({**model.config.to_dict(), **fields}), tokenizer=model.tokenizer)
    changed.load_state_dict(model.state_dict())
    return changed


def _dropouts(p: float) -> dict[str, float]:
    return {"dropout": p, "attention_dropout": p, "embedding_dropout": p}
