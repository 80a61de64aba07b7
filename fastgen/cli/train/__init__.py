"""`fastgen train`: a command for each family of models."""

from __future__ import annotations

import typer

from fastgen.cli.command import Command
from fastgen.cli.train.config_file import configurable
from fastgen.cli.train.gan import train_gan
from fastgen.cli.train.gpt import train_gpt
from fastgen.cli.train.rnn import train_rnn
from fastgen.cli.train.vae import train_vae

__all__ = ["train"]

train = typer.Typer(no_args_is_help=True, help="Train a model.")
for name, command in (("vae", train_vae), ("gan", train_gan), ("rnn", train_rnn), ("gpt", train_gpt)):
    train.command(name, cls=Command)(configurable(command))
