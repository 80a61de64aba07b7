"""What every model shares: a configuration that survives JSON, and weights in a folder.

A model folder holds `config.json` (the configuration, its `model_type` and the fastgen version that
wrote it), `model.safetensors` (the state dict) and, if the model has one, its `tokenizer.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastgen import _files
from fastgen._dtypes import dtype_name
from fastgen._extras import extra
from fastgen._version import __version__
from fastgen.random import Device

__all__ = [
    "PretrainedConfig",
    "PretrainedModel",
    "check_folder",
    "check_state",
    "existing",
    "from_pretrained",
    "read_config",
    "read_json",
    "read_tensors",
    "write_tensors",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

Folder = str | os.PathLike[str]

_FLOATS = {torch.float32, torch.float64, torch.bfloat16, torch.float16}  # what weights may be of

_model_classes: dict[str, type[PretrainedModel]] = {}


@dataclasses.dataclass(frozen=True)
class PretrainedConfig:
    """Base of the model configurations: frozen dataclasses of JSON values, checked when made."""

    model_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The configuration of a `to_dict`, of a `config.json` or of plain fields; the rest keep their defaults.

        Raises:
            ValueError: for another model_type, a key that is no field, or a value out of range.
        """
        fields = dict(fields)
        version = fields.pop("fastgen_version", __version__)
        model_type = fields.pop("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"model_type: expected {cls.model_type!r} for {cls.__name__}, got {model_type!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
                origin = "" if version == __version__ else f" (written by fastgen {version}, this is {__version__})"
                raise ValueError(f"{cls.__name__}: no field {key!r}; {hint}{origin}")
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in fields:
                raise ValueError(f"{field.name}: expected a value in {cls.__name__}, got none")
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls.from_dict(parse_json(text, "the text"))


class PretrainedModel(nn.Module):
    """Base of the models: `Model(config)` or `Model(**fields)`, `save_pretrained`, `from_pretrained`.

    A subclass names its configuration class and has no other state than parameters and persistent
    buffers, so that the two files are the whole model.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    other_model_types: ClassVar[tuple[str, ...]] = ()
    """Further names in a config.json that the class reads, of other programs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "config_class" in cls.__dict__:
            for model_type in (cls.config_class.model_type, *cls.other_model_types):
                _model_classes[model_type] = cls

    def __init__(self, config: PretrainedConfig | None = None, **fields: Any) -> None:
        super().__init__()
        if config is None:
            config = self.config_class.from_dict(fields)
        elif fields:
            raise ValueError(f"config: expected either a configuration or fields, got both ({', '.join(fields)})")
        elif not isinstance(config, self.config_class):
            raise TypeError(f"config: expected a {self.config_class.__name__}, got {type(config).__name__}")
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode and no gradients for a block; every submodule's mode is put back afterwards."""
        training = [module for module in self.modules() if module.training]
        if training:
            self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def save_pretrained(self, directory: Folder) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, which is made if missing.

        Each file is replaced whole or not at all. The configuration comes last: a folder of an
        interrupted first save is not taken for a model.
        """
        header = {"model_type": self.config.model_type, "fastgen_version": __version__}
        self._save(Path(directory), {**header, **self.config.to_dict()}, self._saved_state())

    def _saved_state(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def _save(self, folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        check_folder(folder)
        write_tensors(folder / WEIGHTS_FILE, tensors)
        _files.write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, directory: Folder, device: Device = None, dtype: torch.dtype | None = None) -> Self:
        """The model of a folder written by `save_pretrained`, in evaluation mode.

        Args:
            directory: the folder.
            device: where to put it (default: the CPU).
            dtype: what to convert floating-point weights to (default: as they were saved).

        Raises:
            FileNotFoundError: for a missing folder or file.
            ValueError: for a damaged file, another model type, or weights that do not fit the configuration.
            ImportError: without safetensors.
        """
        return cls._from_folder(Path(directory), device, dtype)

    @classmethod
    def _from_folder(cls, folder: Path, device: Device, dtype: torch.dtype | None, **modules: nn.Module) -> Self:
        """`from_pretrained`, with the modules that the constructor wants beside a configuration."""
        fields = read_config(folder)
        names = (cls.config_class.model_type, *cls.other_model_types)
        if (found := fields.get("model_type", names[0])) not in names:
            expected = f"{' or '.join(names)} for {cls.__name__}"
            raise ValueError(f"{folder / CONFIG_FILE}: model_type: expected {expected}, got {found!r}")
        try:
            config = cls.config_class.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        path = existing(folder, WEIGHTS_FILE)
        state = read_tensors(path, torch.device("cpu" if device is None else device))
        return cls._loaded(config, path, state, dtype, **modules)

    @classmethod
    def _loaded(
        cls,
        config: PretrainedConfig,
        path: Path,
        state: Mapping[str, Tensor],
        dtype: torch.dtype | None,
        **modules: nn.Module,
    ) -> Self:
        """The model of these weights, which came from `path`."""
        # On the meta device nothing is initialised, so torch's generator stays where it was. Modules of the caller's
        # are filled where they are: what they share stays shared.
        with torch.device("cpu" if modules else "meta"):
            model = cls(config, **modules)
        check_state(path, state, model.state_dict())
        if modules:
            like = next(tensor for tensor in state.values() if tensor.is_floating_point())
            model.to(like)
        model.load_state_dict(state, assign=not modules)
        return model.eval().to(dtype=dtype)  # in training mode spectral norm iterates when its weights are looked at


def from_pretrained(directory: Folder, device: Device = None, dtype: torch.dtype | None = None) -> PretrainedModel:
    """The model of a folder, of whatever family its `config.json` names; see `PretrainedModel.from_pretrained`."""
    folder = Path(directory)
    model_type = read_config(folder).get("model_type")
    if not isinstance(model_type, str) or model_type not in _model_classes:
        known = ", ".join(sorted(_model_classes))
        raise ValueError(f"{folder / CONFIG_FILE}: model_type: expected one of {known}, got {model_type!r}")
    return _model_classes[model_type].from_pretrained(folder, device, dtype)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; whole or not at all."""
    safetensors = _safetensors()
    with _files.atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(own_memory(tensors), temporary, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk, say
            raise OSError(f"cannot write the weights: {error}") from error  # atomic_path adds the path


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory (tied weights do), as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        result[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return result


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file, with an error that names it."""
    safetensors = _safetensors()
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from None
    return tensors


def _safetensors() -> Any:
    with extra("models"):
        import safetensors.torch
    return safetensors


def parse_json(text: str, source: object) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def check_folder(folder: Path) -> None:
    """That a model can be saved there."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to save the model in, got a file")


def existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    return path


def read_config(folder: Path) -> dict[str, Any]:
    inner = folder / "model"  # where a run folder, whose config.json is another, has its model
    if (inner / CONFIG_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder}: expected a model folder, got a folder around one; load {inner}")
    return read_json(existing(folder, CONFIG_FILE))


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file, with errors that name it."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not valid JSON (not UTF-8 text)") from None
    return parse_json(text, path)


def check_state(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        found = "; ".join(f"{what} {', '.join(names)}" for what, names in lists if names)
        raise ValueError(f"{path}: the weights do not fit the configuration: {found}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: the weights do not fit the configuration: {name} expected shape "
                f"{tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
            )
        dtype = expected[name].dtype
        if tensor.dtype != dtype and not {dtype, tensor.dtype} <= _FLOATS:
            what = "float32, float64, bfloat16 or float16" if dtype in _FLOATS else dtype_name(dtype)
            raise ValueError(f"{path}: {name} expected {what}, got {dtype_name(tensor.dtype)}")
