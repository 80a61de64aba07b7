"""Model folders: what is written comes back bit for bit, and what is damaged is named in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgen
from fastgen.models import RNN, VAE, PretrainedModel, VAEConfig, from_pretrained
from fastgen.tokenizers import CharTokenizer

FIELDS = {"input_shape": (1, 8, 8), "latent_dim": 2, "hidden_sizes": (4,), "channels": (3,), "likelihood": "gaussian"}


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(**FIELDS)


@pytest.fixture
def folder(model: VAE, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("load", [VAE.from_pretrained, from_pretrained])
def test_round_trip_is_exact(load: object, model: VAE, folder: Path) -> None:
    state_before = torch.get_rng_state()
    loaded = load(folder)
    assert torch.equal(torch.get_rng_state(), state_before)
    assert type(loaded) is VAE
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.generate(3, seed=1), model.generate(3, seed=1))
    loaded(torch.zeros(2, 1, 8, 8)).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype(dtype: torch.dtype, model: VAE, folder: Path, tmp_path: Path) -> None:
    converted = from_pretrained(folder, dtype=dtype)
    assert {tensor.dtype for tensor in converted.state_dict().values()} == {dtype}
    converted.save_pretrained(tmp_path / "converted")
    assert from_pretrained(tmp_path / "converted").dtype == dtype


def test_files_are_plain_and_whole(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "vae"
    assert config["fastgen_version"] == fastgen.__version__
    assert VAEConfig.from_dict(config) == VAEConfig(**FIELDS)


def test_saving_again_replaces(model: VAE, folder: Path) -> None:
    with torch.no_grad():
        model.log_variance.fill_(3.0)
    model.save_pretrained(str(folder))
    assert VAE.from_pretrained(str(folder)).log_variance == 3.0
    assert len(list(folder.iterdir())) == 2


def test_interrupted_save_leaves_the_old_files(model: VAE, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with torch.no_grad():
        model.log_variance.fill_(3.0)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_user_subclass_loads_as_itself_and_leaves_the_family_alone(folder: Path) -> None:
    class MyVAE(VAE):
        pass

    assert type(MyVAE.from_pretrained(folder)) is MyVAE
    assert type(from_pretrained(folder)) is VAE


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite_weights(folder: Path, drop: str = "", **changes: torch.Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    state.pop(drop, None)
    save_file({**state, **changes}, folder / "model.safetensors")


def truncate(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda d: (d / "config.json").unlink(), FileNotFoundError, "config.json: no such file"),
        (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors: no such file"),
        (lambda d: (d / "config.json").write_text("{"), ValueError, "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), ValueError, "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[]"), ValueError, "config.json: expected a JSON object, got list"),
        (lambda d: rewrite_config(d, model_type="flow"), ValueError, "config.json: model_type: expected"),
        (lambda d: rewrite_config(d, model_type=["vae"]), ValueError, "config.json: model_type: expected"),
        (lambda d: rewrite_config(d, latent_dim=0), ValueError, "config.json: latent_dim: expected an int"),
        (lambda d: rewrite_config(d, colour=1), ValueError, "config.json: VAEConfig: no field 'colour'"),
        (
            lambda d: rewrite_config(d, colour=1, fastgen_version="99.0"),
            ValueError,
            f"(written by fastgen 99.0, this is {fastgen.__version__})",
        ),
        (
            lambda d: rewrite_config(d, latent_dim=3),
            ValueError,
            "model.safetensors: the weights do not fit the configuration: decoder.head.layers.0.weight expected shape "
            "(4, 3), got (4, 2)",
        ),
        (
            lambda d: rewrite_weights(d, drop="log_variance", other=torch.zeros(1)),
            ValueError,
            "model.safetensors: the weights do not fit the configuration: missing log_variance; unexpected other",
        ),
        (lambda d: truncate(d, 0), ValueError, "model.safetensors: damaged or not a safetensors file"),
        (lambda d: truncate(d, 5), ValueError, "model.safetensors: damaged or not a safetensors file"),
        (lambda d: truncate(d, 900), ValueError, "model.safetensors: damaged or not a safetensors file"),
        (
            lambda d: (d / "model.safetensors").write_text("not weights at all"),
            ValueError,
            "model.safetensors: damaged or not a safetensors file",
        ),
    ],
)
@pytest.mark.parametrize("load", [VAE.from_pretrained, from_pretrained])
def test_damage_is_one_line(load: object, damage: object, error: type[Exception], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [VAE.from_pretrained, from_pretrained])
def test_missing_folder(load: object, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no such folder$"):
        load(tmp_path / "none")


@pytest.mark.parametrize("load", [VAE.from_pretrained, from_pretrained])
def test_a_run_folder_says_where_its_model_is(load: object, model: VAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run" / "model")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"run: expected a model folder, got a folder around one; load .*run/model$"
        ):
            load(tmp_path / "run")
        (tmp_path / "run" / "config.json").write_text('{"format": 1, "model_type": "vae"}')
    model.save_pretrained(tmp_path / "run")  # is a model folder now, whatever else is in it
    load(tmp_path / "run")


def test_a_tokenizer_is_not_written_over_a_file_either(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken: expected a folder to save the model in, got a file"):
        RNN(vocab_size=3, hidden_size=4, tokenizer=CharTokenizer("abc")).save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_over_a_file(model: VAE, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken: expected a folder to save the model in, got a file"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_missing_safetensors_names_the_extra(model: VAE, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: model.save_pretrained(folder), lambda: from_pretrained(folder)):
        with pytest.raises(ImportError, match=r"pip install 'fastgen-torch\[models\]'$"):
            call()


def test_base_class_reads_the_family(folder: Path) -> None:
    assert isinstance(from_pretrained(folder), PretrainedModel)
