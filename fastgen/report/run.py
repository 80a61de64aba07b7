"""What the page tells of a run, read from its folder."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.train.logging import read_metrics
from fastgen.train.run_folder import read_run

__all__ = ["Frame", "Metric", "Run", "read"]

FAMILIES = {
    "vae": "Variational autoencoder",
    "rnn": "Recurrent network",
    "gpt": "GPT",
    "gan": "Generative adversarial network",
}
# Frames that a page shows of a run, and the bytes of pictures that it may take for them.
MAX_FRAMES, MAX_BYTES = 24, 4 << 20
_NO_METRICS = {"split", "epoch", "step", "learning_rate", "seconds"}
_TITLES = {
    "kl": "KL divergence",
    "negative_elbo": "negative ELBO",
    "negative_iwae": "negative importance-weighted bound",
    "reconstruction_loss": "reconstruction loss",
    "bits_per_character": "bits a character",
    "rmse": "error one step ahead",
    "accuracy": "discriminator's accuracy on pairs",
    "diversity": "diversity of samples (of the data: 1)",
    "frechet_distance": "Frechet distance to the data",
    "noise_floor": "the same between held-out and training data",
}
_UNITS = {
    "perplexity": "",
    "bits_per_character": "bits",
    "rmse": "units of the data",
}
_CAPTIONS = {
    "samples.png": "Drawn from the best weights",
    "reconstructions.png": "Held-out examples (above) and their reconstructions (below)",
    "interpolation.png": "From one example to the next, a row each",
    "continuation.png": "The held-out end of the series, and how the model goes on",
}


@dataclass(frozen=True)
class Frame:
    """A sample: a picture (PNG) or a text.

    Attributes:
        caption: where it is from, such as "step 71".
        step: of the training; None for what was made at the end.
        picture: the bytes of a PNG, or None.
        text: where it is no picture.
        width, height: of the picture, in pixels.
    """

    caption: str
    step: int | None
    picture: bytes | None = None
    text: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Metric:
    """A column of metrics.csv.

    Attributes:
        name: of the column.
        title, unit: in words; the unit may be empty.
        train, test: (step, value) in the order of the file.
        final: of the best weights at the end, or None.
    """

    name: str
    title: str
    unit: str
    train: tuple[tuple[int, float], ...]
    test: tuple[tuple[int, float], ...]
    final: float | None


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: as it was given.
        model_type: names the family.
        title, architecture, data: in words.
        record: the config.json.
        machine: that it was started on, in words; empty where the record does not tell.
        weights: numbers in the model's file, or None where there is none yet.
        steps, seconds: of the training so far.
        finished: whether it came to its final evaluation.
        metrics: those with any value, those that are evaluated first.
        frames: samples over time, first to last.
        results: pictures of the end.
    """

    folder: str
    model_type: str
    title: str
    architecture: str
    data: str
    record: dict[str, Any]
    machine: str
    weights: int | None
    steps: int
    best_step: int | None
    seconds: float
    finished: bool
    metrics: tuple[Metric, ...]
    frames: tuple[Frame, ...]
    results: tuple[Frame, ...]

    @property
    def is_text(self) -> bool:
        return any(frame.picture is None for frame in self.frames)

    @property
    def is_wide(self) -> bool:
        """Whether the samples are pictures that want the width of the page."""
        return any(frame.width > 1.6 * frame.height for frame in self.frames if frame.picture is not None)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """(what for, command line)."""
        name = Path(self.folder).name or "run"
        if self.is_text:
            options = ["--temperature", "0.6", "--seed", "1", "--stream"]
        elif "columns" in _section(self.record, "data"):
            options = ["--n", "20", "--seed", "1", "--out", f"{name}.png"]
        else:
            options = ["--n", "64", "--seed", "1", "--out", f"{name}.png"]
        found = []
        if self.weights is not None:
            found.append(("Sample from it", shlex.join(["fastgen", "generate", self.folder, *options])))
        if not self.finished and "source" in self.record:
            resume = ["fastgen", "train", self.model_type, "--resume", self.folder]
            found.append(("Go on with it", shlex.join(resume)))
        if command := self.record.get("command"):
            found.append(("How it was started", shlex.join(map(str, command))))
        return found


def read(folder: str | os.PathLike[str]) -> Run:
    """Read the run in `folder`, finished or not.

    Raises:
        FileNotFoundError: no such folder, or not that of a run.
        ValueError: a file in it is damaged, with its path.
    """
    path = Path(folder)
    record = read_run(path)
    model_type = str(record.get("model_type", "model"))
    rows = _rows(path / "metrics.csv")
    final = next((row for row in rows if row["split"] == "final"), None)
    name = str(_section(record, "data").get("name", "data"))
    frames = _frames(path / "samples")
    return Run(
        folder=str(folder),
        model_type=model_type,
        title=f"{FAMILIES.get(model_type, model_type.upper())} on {name}",
        architecture=_architecture(model_type, _section(record, "model")),
        data=_data(_section(record, "data"), _section(record, "model")),
        record=record,
        machine=_machine(_section(record, "machine")),
        weights=_count_weights(path / "model" / "model.safetensors"),
        steps=max((row["step"] for row in rows if row["split"] != "final"), default=0),
        best_step=final["step"] if final else None,
        seconds=max((row.get("seconds") or 0.0 for row in rows), default=0.0),
        finished=final is not None,
        metrics=_metrics(rows, final, _unit(model_type, record)),
        frames=frames,
        results=_results(path, {frame.picture for frame in frames}),
    )


def _section(record: dict[str, Any], name: str) -> dict[str, Any]:
    section = record.get(name)
    return section if isinstance(section, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.csv: split a str, step an int, the rest a float or None."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    try:
        table = read_metrics(path)
    except (ValueError, UnicodeError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    for number, row in enumerate(table, 2):
        try:
            values: dict[str, Any] = {
                name: float(text) if text else None for name, text in row.items() if name != "split"
            }
            rows.append({**values, "split": row["split"], "step": int(row["step"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged in line {number} ({type(error).__name__}: {error})") from None
    return rows


def _metrics(rows: list[dict[str, Any]], final: dict[str, Any] | None, unit: str) -> tuple[Metric, ...]:
    found = []
    for name in rows[0] if rows else ():
        if name in _NO_METRICS or name.endswith("_per_second"):
            continue
        train, test = (
            tuple(
                (row["step"], row[name])
                for row in rows
                if row["split"] == split and row[name] is not None and math.isfinite(row[name])
            )
            for split in ("train", "test")
        )
        value = final[name] if final else None
        if train or test or value is not None:
            title = _TITLES.get(name, name.replace("_", " "))
            known = name in _TITLES or name.endswith("loss")
            found.append(Metric(name, title, _UNITS.get(name, unit if known else ""), train, test, value))
    return tuple(sorted(found, key=lambda metric: not metric.test))


def _unit(model_type: str, record: dict[str, Any]) -> str:
    """What losses are counted in."""
    data = _section(record, "data")
    if model_type == "gan":
        return ""
    if "tokenizer" in data:
        return "nats a token"
    return "nats a step" if "columns" in data else "nats an image"


def _architecture(model_type: str, model: dict[str, Any]) -> str:
    """The model in words, as far as its configuration is known here."""

    def field(name: str) -> str:
        return str(model.get(name, "?")).replace("_", " ")

    if model_type in ("vae", "gan"):
        parts = {"vae": "encoder and decoder", "gan": "generator and discriminator"}[model_type]
        words = [f"{field('architecture')} {parts}", f"{field('latent_dim')} latent dimensions"]
        loss = field("loss").replace(" ", "-")
        words.append(f"{field('likelihood')} likelihood" if model_type == "vae" else f"{loss} loss")
        if model.get("num_classes"):
            words.append(f"{field('num_classes')} classes")
        return ", ".join(words)
    if model_type == "rnn":
        layers = int(model.get("num_layers", 0))
        return f"{field('cell').upper()}, {layers} layer{'' if layers == 1 else 's'} of {field('hidden_size')} units"
    if model_type == "gpt":
        return (
            f"{field('num_hidden_layers')} layers of width {field('hidden_size')}, "
            f"{field('num_attention_heads')} heads, {field('position_embedding')} positions, "
            f"context of {field('max_position_embeddings')} tokens"
        )
    return ""


def _data(data: dict[str, Any], model: dict[str, Any]) -> str:
    """The data in words."""
    if "train" not in data:
        return str(data.get("name", "unknown"))
    unit = "steps" if "columns" in data else "images" if len(model.get("input_shape") or ()) == 3 else "examples"
    if "tokenizer" in data:
        unit = {"chars": "characters", "bytes": "bytes"}.get(str(data["tokenizer"]), "tokens")
    return f"{data['name']}: {data['train']:,} {unit} to train on, {data.get('test', 0):,} held out"


def _machine(machine: dict[str, Any]) -> str:
    if "cpu" not in machine:
        return ""
    threads, device = machine.get("threads", "?"), str(machine.get("device", "cpu"))
    words = f"{machine['cpu']}, {threads} thread{'' if threads == 1 else 's'}"
    return words if device == "cpu" else f"{words}, {device}"


def _count_weights(path: Path) -> int | None:
    """The numbers in a safetensors file, from its header."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(size))
        # The average of a GAN's generator is a copy of it.
        own = (tensor for name, tensor in header.items() if name != "__metadata__" and not name.startswith("ema."))
        return sum(math.prod(tensor["shape"]) for tensor in own)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: damaged ({error})") from None


def _frames(folder: Path) -> tuple[Frame, ...]:
    """Samples of the training, the first, the last and as many evenly between them as a page can take."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)\.(png|txt)", path.name):
            found[int(match[1])] = path
    steps = sorted(found)
    pictures = sum(path.stat().st_size for path in found.values() if path.suffix == ".png")
    allowed = min(MAX_FRAMES, MAX_FRAMES if not pictures else int(MAX_BYTES * len(steps) / pictures))
    frames = []
    for step in _evenly(steps, max(3, allowed)):
        path, caption = found[step], f"step {step:,}" if step else "before training"
        if path.suffix == ".png":
            frames.append(_picture(path, caption, step))
        else:
            frames.append(Frame(caption, step, text=path.read_text(encoding="utf-8", errors="replace")))
    return tuple(frames)


def _results(folder: Path, shown: set[bytes | None]) -> tuple[Frame, ...]:
    """The pictures of the end, but for those shown already and the curves, which are drawn anew."""
    found = []
    for path in sorted(folder.glob("[!.]*.png"), key=lambda path: (path.name != "samples.png", path.name)):
        caption = _CAPTIONS.get(path.name, path.stem.replace("_", " ").capitalize())
        if path.name != "loss.png" and (frame := _picture(path, caption, None)).picture not in shown:
            found.append(frame)
    return tuple(found)


def _evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` >= 2 of the items, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _picture(path: Path, caption: str, step: int | None) -> Frame:
    content = path.read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or content[-8:-4] != b"IEND":
        raise ValueError(f"{path}: damaged, expected a PNG")
    width, height = struct.unpack(">II", content[16:24])
    return Frame(caption, step, content, "", width, height)
