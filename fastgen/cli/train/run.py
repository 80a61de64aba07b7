"""What the commands of `fastgen train` have in common: from the options given to a finished run."""

from __future__ import annotations

import abc
import dataclasses
import os
import shlex
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import typer

from fastgen.cli.command import FIELDS, option_of, program
from fastgen.train import Interrupted, Recipe, Trainer, TrainingConfig, TrainingResult, read_run
from fastgen.train.config import CHANGEABLE
from fastgen.train.run_folder import check_new_folder

__all__ = ["Family", "Options", "integers", "run", "size", "tell"]

Options = dict[str, Any]

# Options about the command, not about the run.
_NOT_OF_THE_RUN = ("config", "print_config", "resume", "out", "quiet")
_TRAINING = {field.name for field in dataclasses.fields(TrainingConfig)}


class Family(abc.ABC):
    """How one family of models is made from the options of its command."""

    recipe: ClassVar[type[Recipe]]
    expected_data: ClassVar[str]
    """What `--data` may be, in words."""
    paths: ClassVar[Mapping[str, tuple[str, ...]]]
    """The options that take a path, `--data` among them, and the names that stand for something else there."""
    source: ClassVar[tuple[str, ...]]
    """The options that say what the data is: a run keeps them to find it again."""
    report: ClassVar[tuple[str, ...]]
    """The fields of evaluation and report; what is neither in them, the source nor training is the model's."""

    def training_config(self, source: Options, fields: Options) -> TrainingConfig:
        """The fields given, and for the others the defaults of the recipe that the data needs."""
        return self.recipe.training_config(**fields)

    @abc.abstractmethod
    def new(self, source: Options, model: Options, report: Options, config: TrainingConfig, quiet: bool) -> Recipe:
        """The recipe of a new run."""

    @abc.abstractmethod
    def again(self, folder: Path, record: Mapping[str, Any], config: TrainingConfig, quiet: bool) -> Recipe:
        """The recipe of the run in `folder`, whose config.json is `record`.

        Raises:
            KeyError, TypeError: where that is not of this version.
        """

    @abc.abstractmethod
    def summary(self, result: TrainingResult) -> str:
        """The result in a line."""

    @abc.abstractmethod
    def next_command(self, result: TrainingResult) -> list[str]:
        """What to do with the result: the words after the name of the program."""


def run(family: Family, options: Mapping[str, Any]) -> None:
    """Train as the options of the command say; those not given are None."""
    quiet, out, resume = options["quiet"], options["out"], options["resume"]
    given = {name: value for name, value in options.items() if value is not None and name not in _NOT_OF_THE_RUN}
    for name, words in family.paths.items():  # so that they are found again from elsewhere
        value = given.get(name)
        if value is not None and value not in words and (name == "data" or Path(value).exists()):
            given[name] = str(Path(value).absolute())
    if resume is None:
        trainer = _new(family, given, out, quiet)
    else:
        changeable = (*CHANGEABLE, *family.report)
        for name in (*given, *(["out"] if out is not None else [])):
            if FIELDS.get(name, name) not in changeable:
                may = ", ".join(map(option_of, changeable))
                raise ValueError(
                    f"--resume: goes on with the run as it was started, but {option_of(name)} was given too; what may "
                    f"change is {may}"
                )
        trainer = _resumed(family, given, resume, quiet)
    try:
        result = trainer.fit()
    except Interrupted as stopped:
        command = shlex.join([program(), "train", family.recipe.model_type, "--resume", str(stopped.out)])
        if trainer.accelerator.is_main_process:
            typer.echo(f"{stopped}; to go on: {command}", err=True)
        raise typer.Exit(128 + stopped.signal) from None
    if trainer.accelerator.is_main_process and not quiet:
        typer.echo(family.summary(result))
        for path in result.files:
            typer.echo(f"  {path}")
        typer.echo(f"next: {shlex.join([program(), *family.next_command(result)])}")


def _new(family: Family, given: Options, out: Path | None, quiet: bool) -> Trainer:
    fields = {FIELDS.get(name, name): value for name, value in given.items()}
    training = _of(fields, _TRAINING)
    source, report = _of(fields, family.source), _of(fields, family.report)
    model = _of(fields, fields.keys() - {*training, *source, *report})
    if "data" not in source:
        raise ValueError(f"--data: expected {family.expected_data}; or --resume RUN")
    if out is not None:
        check_new_folder(out)  # before the data is read, which may take minutes
    config = family.training_config(source, training)
    record = {"source": source, "options": given, "command": ["fastgen", *sys.argv[1:]]}
    recipe = family.new(source, model, report, config, quiet)
    return Trainer(recipe, config, out=out, record=record, progress="quiet" if quiet else "auto")


def _resumed(family: Family, given: Options, folder: Path, quiet: bool) -> Trainer:
    record = read_run(folder)
    if "source" not in record:
        raise ValueError(f"{folder}: was started from Python; continue it there, with fit(..., out=..., resume=True)")
    if record.get("model_type", family.recipe.model_type) != family.recipe.model_type:
        command = shlex.join([program(), "train", str(record["model_type"]), "--resume", str(folder)])
        raise ValueError(f"{folder}: holds a run of another model; continue it with: {command}")
    fields = {FIELDS.get(name, name): value for name, value in given.items()}
    try:
        config = TrainingConfig(**{**record["training"], **_of(fields, _TRAINING)})
        record["evaluation"].update(_of(fields, family.report))
        recipe = family.again(folder, record, config, quiet)
        options = {"options": {**record.get("options", {}), **given}}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its config.json is not of this version of fastgen ({error})") from None
    return Trainer(recipe, config, out=folder, resume=True, record=options, progress="quiet" if quiet else "auto")


def _of(fields: Options, names: Collection[str]) -> Options:
    return {name: value for name, value in fields.items() if name in names}


def tell(text: str, quiet: bool) -> None:
    """A line on stderr, of one process."""
    if not quiet and os.environ.get("RANK", "0") == "0":
        typer.echo(text, err=True)


def integers(name: str, text: str) -> tuple[int, ...]:
    """The ints of an option such as 512,256."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--{name}: expected ints with commas between them, got {text!r}") from None


def size(name: str, text: str) -> int | float:
    """A count (int) or a fraction (float)."""
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    raise ValueError(f"--{name}: expected a count or a fraction, got {text!r}")
