"""Options that several commands of `fastgen train` have. Those whose defaults differ are in the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastgen.train import TrainingConfig

__all__ = [
    "Compile",
    "Conditional",
    "Config",
    "DType",
    "Device",
    "EvaluateEvery",
    "EvaluateSteps",
    "ImageChannels",
    "ImageSize",
    "KeepCheckpoints",
    "LogEvery",
    "MaxSeconds",
    "MaxSteps",
    "Out",
    "Patience",
    "PrintConfig",
    "Quiet",
    "Resume",
    "SaveEvery",
    "Schedule",
    "Seed",
    "Tensorboard",
    "VocabSize",
    "WarmupSteps",
    "WeightDecay",
    "option",
]

_DEFAULT = TrainingConfig()


def option(help: str, *, default: object = None, panel: str, metavar: str | None = None) -> Any:
    """An option that is None unless it is given; `default` is what the library then takes.

    An option of bools is a pair of switches, --name and --no-name.
    """
    if default is not None:
        help += f"  [default: {default}]"
    return typer.Option(help=help, show_default=False, rich_help_panel=panel, metavar=metavar)


ImageSize = Annotated[int | None, option("Resize to so many pixels a side.", default="as they are", panel="Data")]
ImageChannels = Annotated[int | None, option("1 grey, 3 colour.", default="as they are", panel="Data")]
Conditional = Annotated[
    bool | None,
    option("Tell the model the labels: generate can then be asked for a class.", default="no", panel="Model"),
]
VocabSize = Annotated[int | None, option("Tokens of bpe at most.", default=1024, panel="Data")]
MaxSteps = Annotated[int | None, option("Stop after so many steps.", panel="Training")]
MaxSeconds = Annotated[
    float | None, option("Stop after so many seconds. Such a run cannot be repeated exactly.", panel="Training")
]
Patience = Annotated[
    int | None,
    option("Stop after so many evaluations without a better one.", default="goes on to the end", panel="Training"),
]
Schedule = Annotated[
    str | None, option("cosine (falls to 0) or constant.", default=_DEFAULT.schedule, panel="Training")
]
WarmupSteps = Annotated[
    int | None, option("Steps up to the highest rate.", default=_DEFAULT.warmup_steps, panel="Training")
]
WeightDecay = Annotated[float | None, option("Of AdamW, decoupled.", default=_DEFAULT.weight_decay, panel="Training")]
Seed = Annotated[int | None, option("Of weights, split, order and noise.", default=_DEFAULT.seed, panel="Training")]
Device = Annotated[str | None, option("auto, cpu or cuda.", default=_DEFAULT.device, panel="Training")]
DType = Annotated[
    str | None,
    option(
        "What to compute products in: float32, bfloat16 or float16; weights stay float32.",
        default=_DEFAULT.dtype,
        panel="Training",
    ),
]
Compile = Annotated[
    bool | None,
    option("Put the training step through torch.compile (needs a C++ compiler).", default="no", panel="Training"),
]
Out = Annotated[Path | None, option("New folder for the run.", default="runs/MODEL-DATA-TIME", panel="Run")]
Resume = Annotated[
    Path | None,
    option("Continue the run in this folder, with its own data and settings.", panel="Run", metavar="RUN"),
]
Config = Annotated[
    Path | None,
    option(
        "Take the options of this file (TOML, see --print-config), or those that a run was started with. What else is "
        "on the command line comes before them.",
        panel="Run",
        metavar="FILE|RUN",
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Print all options as such a file, with the values they have, and end.",
        rich_help_panel="Run",
    ),
]
LogEvery = Annotated[int | None, option("Steps between rows of metrics.", default=_DEFAULT.log_every, panel="Run")]
EvaluateEvery = Annotated[
    int | None, option("Epochs between evaluations.", default=_DEFAULT.evaluate_every, panel="Run")
]
EvaluateSteps = Annotated[int | None, option("Steps between further evaluations within an epoch.", panel="Run")]
SaveEvery = Annotated[int | None, option("Steps between checkpoints.", default="after evaluations", panel="Run")]
KeepCheckpoints = Annotated[
    int | None, option("Latest checkpoints to keep.", default=_DEFAULT.keep_checkpoints, panel="Run")
]
Tensorboard = Annotated[bool | None, option("Write events.", default="yes", panel="Run")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors alone.", rich_help_panel="Run")]
