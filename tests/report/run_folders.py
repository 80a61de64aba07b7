"""Run folders of all kinds and timings, written by hand."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from fastgen.benchmark import Result, Spread
from fastgen.report.speed import Timing

MODELS: dict[str, dict[str, Any]] = {
    "vae": {"input_shape": [1, 28, 28], "architecture": "conv", "latent_dim": 16, "likelihood": "bernoulli"},
    "rnn": {"cell": "lstm", "num_layers": 1, "hidden_size": 24},
    "gpt": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "position_embedding": "rotary",
        "max_position_embeddings": 128,
    },
    "gan": {"input_shape": [3, 32, 32], "architecture": "conv", "latent_dim": 64, "loss": "non_saturating"},
}
TOKENS = {"name": "plays", "train": 1_234_567, "test": 999, "tokenizer": "chars"}
IMAGES = {"name": "mnist", "train": 4500, "test": 500, "classes": ["0", "1"]}


def png(width: int = 6, height: int = 4, shade: int = 0) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes([(shade + 9 * row) % 256] * width) for row in range(height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def safetensors(shapes: dict[str, list[int]]) -> bytes:
    """Float32 zeros of these shapes, by name."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    entries: dict[str, Any] = dict(header)
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def make_run(
    folder: Path,
    model_type: str = "vae",
    *,
    data: dict[str, Any] | None = None,
    evaluations: int = 4,
    finished: bool = True,
    text: str | None = None,
    **record: Any,
) -> Path:
    """A run folder with samples of `text`, or pictures; the losses fall from 100 to 20."""
    folder.mkdir(parents=True)
    described = {
        "model_type": model_type,
        "model": MODELS[model_type],
        "data": data or (IMAGES if text is None else TOKENS),
        "training": {"epochs": evaluations},
        "source": {"data": "mnist"},
        "command": ["fastgen", "train", model_type, "--data", "two words"],
        **record,
    }
    (folder / "config.json").write_text(json.dumps(described))
    rows = ["split,epoch,step,loss,kl,final_only,learning_rate,examples_per_second,seconds"]
    (folder / "samples").mkdir()
    for epoch in range(1, evaluations + 1):
        loss = 20 + 80 / epoch
        rows.append(f"train,{epoch},{10 * epoch},{loss},{loss / 10},,0.001,123.4,{epoch * 30 - 1}")
        rows.append(f"test,{epoch},{10 * epoch},{loss + 1},,,,,{epoch * 30}")
        sample = folder / "samples" / f"step-{10 * epoch:08d}"
        if text is None:
            sample.with_suffix(".png").write_bytes(png(60, 60, epoch))
        else:
            sample.with_suffix(".txt").write_text(f"{text} {epoch}\n")
    if finished:
        rows.append(f"final,{evaluations},{10 * evaluations},41.5,,7.25,,,{evaluations * 30 + 5}")
        if text is None:
            (folder / "samples.png").write_bytes(png(60, 60, evaluations))  # the last sample again
            (folder / "interpolation.png").write_bytes(png(90, 60))
            (folder / "loss.png").write_bytes(png(50, 50))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if evaluations:
        (folder / "model").mkdir()
        shapes = {"body.weight": [100, 20], "body.bias": [20], "ema.weight": [7, 7]}
        (folder / "model" / "model.safetensors").write_bytes(safetensors(shapes))
    return folder


def timed(family: str, ours: float, theirs: float, q1: float, q3: float) -> Timing:
    """A family whose training step takes so many seconds; the ratio has these quartiles."""
    spreads = {"fastgen": Spread(ours, ours, ours), "eager": Spread(theirs, theirs, theirs)}
    ratio = Spread(theirs / ours, q1, q3)
    result = Result(f"{family}/training/fp32", 2, 1, 1, "L1", rounds=9, seconds=spreads, speedups={"eager": ratio})
    return Timing(family, result)
