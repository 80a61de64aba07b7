"""Configuration files of `fastgen train`: the options of a command in TOML, a table for each panel of its help.

`configurable` gives a command its --config and --print-config. It knows nothing of families: what may stand in a file
is read off the options of the command.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fastgen._extras import extra
from fastgen._version import __version__
from fastgen.train import read_run

__all__ = ["configurable"]

# Options that say what to do with a file or a run, not what run it is.
_NOT_IN_FILES = ("config", "print_config", "resume", "quiet")
_MODEL_TYPE = "model_type"
_DEFAULT = re.compile(r"\[default: (.*)\]$", re.DOTALL)
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an int",
    float: "a number",
    str: "text, a number or a list of these",
    Path: "a path in quotation marks",
}


@dataclass(frozen=True)
class _Option:
    """An option that a file may set: its name there, its table, what it takes, and its help."""

    name: str
    table: str
    type: type
    help: str

    def checked(self, value: object) -> Any:
        """The value as the command line gives it. Raises TypeError, with what was expected."""
        if type(value) is self.type:
            return value
        if self.type is Path and isinstance(value, str):
            return Path(value)
        if self.type is float and type(value) is int:
            return float(value)
        if self.type is str:  # 0.1 for "0.1" and [64, 32] for "64,32", as one would write them in a file
            values = value if isinstance(value, list) and value else [value]
            if all(type(part) in (str, int, float) for part in values):
                return ",".join(str(part) for part in values)
        raise TypeError(f"expected {_KINDS[self.type]}, got {value!r}")

    def default(self) -> Any:
        """The default that the help names, or None where that is words."""
        named = _DEFAULT.search(self.help)
        if named is None:
            return None
        if self.type is bool:
            return {"yes": True, "no": False}.get(named[1])
        if self.type is str:
            return None if " " in named[1] else named[1]
        if self.type in (int, float):
            try:
                return self.type(named[1])
            except ValueError:
                return None
        return None


def configurable(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with what --config and --print-config ask for.

    With --config, the options that a file or a run sets and the command line does not are put into the parameters of
    its context. With --print-config, all options are printed as such a file, and the command is not called.
    """
    options = _options(command)

    @functools.wraps(command)
    def wrapped(context: typer.Context, **parameters: Any) -> None:
        model_type, config = str(context.info_name), parameters.get("config")
        if config is not None:
            if parameters["resume"] is not None:
                raise ValueError(
                    f"--config: expected none with --resume, which has the options of the run, got {config}"
                )
            for name, value in _read(config, model_type, options).items():
                if parameters[name] is None:
                    parameters[name] = value
        if parameters.get("print_config"):
            if parameters["resume"] is not None:
                raise ValueError(
                    f"--print-config: expected --config {parameters['resume']}, which is a run, got --resume"
                )
            typer.echo(_printed(model_type, options, parameters), nl=False)
            return
        context.params.update(parameters)
        command(context, **parameters)

    return wrapped


def _options(command: Callable[..., None]) -> dict[str, _Option]:
    options = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name == "context" or name in _NOT_IN_FILES:
            continue
        annotated, info = typing.get_args(parameter.annotation)
        (kind,) = (part for part in typing.get_args(annotated) if part is not type(None))
        options[name] = _Option(name, str(info.rich_help_panel).lower(), kind, info.help)
    return options


def _read(path: Path, model_type: str, options: Mapping[str, _Option]) -> dict[str, Any]:
    """The options that a TOML file sets, or that the run of a folder was started with.

    Raises:
        OSError: no such file or run.
        ValueError: for what is not TOML, or for another family; for a key that is no option or has no such value.
    """
    values: dict[str, Any] = {}
    if path.is_dir():
        record = read_run(path)
        _expect(model_type, record.get(_MODEL_TYPE), path)
        if not isinstance(record.get("options"), dict):
            raise ValueError(f"{path}: has no options to take over, as `fastgen train` has not started it")
        for key, value in record["options"].items():
            values[key] = _value(path / "config.json", "options", key, value, model_type, options)
        return values
    tables = _parsed(path)
    _expect(model_type, tables.pop(_MODEL_TYPE, model_type), path)
    known = _tables(options)
    for table, keys in tables.items():
        if table in options and table not in known:
            raise ValueError(f"{path}: '{table}': expected in the table [{options[table].table}], got it before all")
        if table not in known:
            raise ValueError(f"{path}: [{table}]: no such table; {_hint(table, known)}")
        if not isinstance(keys, dict):
            raise ValueError(f"{path}: '{table}': expected a table, got {keys!r}")
        for key, value in keys.items():
            values[key] = _value(path, table, key, value, model_type, options)
            if options[key].table != table:
                raise ValueError(f"{path}: '{key}': expected in the table [{options[key].table}], got it in [{table}]")
    return values


def _expect(model_type: str, found: object, path: Path) -> None:
    if found != model_type:
        raise ValueError(f"{path}: expected options of train {model_type}, got those of train {found}")


def _value(path: Path, table: str, key: str, value: object, model_type: str, options: Mapping[str, _Option]) -> Any:
    if key not in options:
        raise ValueError(f"{path}: [{table}] '{key}': no such option of train {model_type}; {_hint(key, options)}")
    try:
        return options[key].checked(value)
    except TypeError as error:
        raise ValueError(f"{path}: [{table}] '{key}': {error}") from None


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{close[0]}'?" if close else "--print-config shows all"


def _parsed(path: Path) -> dict[str, Any]:
    with extra("train"):
        import tomlkit
    content = path.read_bytes()
    try:
        return dict(tomlkit.parse(content.decode("utf-8")).unwrap())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}") from None
    except tomlkit.exceptions.TOMLKitError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def _printed(model_type: str, options: Mapping[str, _Option], values: Mapping[str, Any]) -> str:
    """All options as a file, with their help. Those without a value are comments that show the default."""
    lines = [
        f"# Options of `fastgen train {model_type}`, fastgen {__version__}. To run them:",
        f"#     fastgen train {model_type} --config FILE",
        "# A line such as #name = value shows a default; take the # away to change it. Paths are taken from where the",
        "# command runs. What is on the command line comes before the file.",
        f"{_MODEL_TYPE} = {_toml(model_type)}",
    ]
    for table in _tables(options):
        lines += ["", "", f"[{table}]"]
        for option in options.values():
            if option.table == table:
                value, default = values[option.name], option.default()
                lines += ["", *textwrap.wrap(option.help, 110, initial_indent="# ", subsequent_indent="# ")]
                if value is not None:
                    lines.append(f"{option.name} = {_toml(value)}")
                else:
                    lines.append(f"#{option.name} = {'' if default is None else _toml(default)}".rstrip())
    return "\n".join(lines) + "\n"


def _tables(options: Mapping[str, _Option]) -> list[str]:
    return list(dict.fromkeys(option.table for option in options.values()))


def _toml(value: object) -> str:
    with extra("train"):
        import tomlkit
    return str(tomlkit.item(str(value) if isinstance(value, Path) else value).as_string())
