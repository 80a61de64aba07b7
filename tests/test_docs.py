"""Every code block of README.md, CONTRIBUTING.md, docs/ and benchmarks/README.md is run, or checked by a rule.

A page is run from top to bottom, in an empty folder and one namespace, as a reader would who follows it:

* `python` blocks run as they stand; an `output` block is what the block above it prints, to the letter;
* `sh` blocks go by the first word of each line to a rule of `RULES`. `fastgen` lines run for real, and so do the
  trainings of `make demo`. What would install, download or take minutes is checked against what it names: targets
  of the Makefile, extras, options, variables, tests;
* `toml` and `json` blocks are parsed; one that begins with a comment of a file's name is that file;
* `text` blocks are for reading. A language or a command without a rule fails.

The trainings are made short here, so that the pages need not show it: `short_runs` replaces the data sets of the
extra `demo` by small ones and ends each run after a few steps, and `SMALL` gives models to the command line that are
smaller than the default where a line does not say how large. Files that a reader has (photos, a novel) are `GIVEN`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from markdown import PAGES, Block, anchors, blocks, command_lines, links, spans
from support import ROOT

import fastgen.benchmark
import fastgen.cli.bench
from fastgen.benchmark.bounds import IN_PLACE, NEW_MEMORY
from fastgen.cli import main
from fastgen.cli.app import app
from fastgen.data import TextSet, images, text
from fastgen.models import GPT, GPTConfig
from fastgen.report import speed
from fastgen.tokenizers import CharTokenizer
from fastgen.train import Trainer, TrainingConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

# Options of models and runs, taken where a line has none of its own.
SMALL = {
    "vae": {"--importance-samples": "2"},
    "rnn": {"--hidden-size": "16", "--sample-length": "20"},
    "gpt": {
        "--hidden-size": "24",
        "--num-layers": "1",
        "--num-heads": "2",
        "--batch-size": "2",
        "--sample-length": "20",
    },
    "gan": {},
}
OF_THE_MODEL = {"--hidden-size", "--num-layers", "--num-heads"}  # an existing model has its own
SHORT_SCRIPTS = {
    "benchmarks/vae_parity.py": "--data digits.npy --test 8 --epochs 3 --seeds 1 --samples 2 --batch-size 16",
    "scripts/measure_accuracy.py": "--points 1048576",
}
WORDS = (
    *("JULIET:", "king", "queen", "night", "fool", "my", "lord"),
    *("crown", "speaks", "comes", "and", "to", "with"),
)


def words(count: int) -> str:
    """Lines of words, no two alike."""
    drawn = np.random.default_rng(0).integers(len(WORDS), size=count)
    return "".join(WORDS[word] + ("\n" if place % 8 == 7 else " ") for place, word in enumerate(drawn))


def pixels(count: int, height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, height, width, channels), dtype=np.uint8)


def short_runs(patch: pytest.MonkeyPatch) -> None:
    """Small data under the built-in names, and two steps a run: two more where it goes on."""

    def packaged(name: str) -> images._Part:
        shown = pixels(200, *images._PACKAGED[name].shape)[..., 0]
        return images._Part(images._ArrayPixels(shown, Path(name)), np.arange(200) % 10)

    def start(self: Trainer, recipe: Any, config: TrainingConfig | None = None, **options: Any) -> None:
        config = config or TrainingConfig()
        steps = 4 if options.get("resume") else 2
        config = dataclasses.replace(config, max_steps=min(config.max_steps or steps, steps))
        begin(self, recipe, config, **options)

    begin = Trainer.__init__
    patch.setattr(Trainer, "__init__", start)
    patch.setattr(images, "_read_packaged", packaged)
    patch.setattr(text, "_shakespeare", lambda: TextSet(words(12_000), "shakespeare"))
    # Benchmarks: the cases that the line asks for, the first of them on little data.
    select, measure = fastgen.benchmark.select, fastgen.benchmark.measure
    patch.setattr(fastgen.benchmark, "select", lambda **options: select(**options)[:1])
    patch.setattr(
        fastgen.benchmark,
        "measure",
        lambda case, **options: measure(case.shrunk(), **{**options, "budget": 0.0, "min_rounds": 2, "compile": False}),
    )
    patch.setattr(speed, "_SECONDS", 0.0)
    patch.setattr(speed, "_ROUNDS", 2)
    copies = dict.fromkeys((IN_PLACE, NEW_MEMORY), 1e10)
    patch.setattr(fastgen.benchmark, "bandwidth", lambda threads, **options: copies)


# --- What a reader has before reading ------------------------------------------------------------------


def photos(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    for number, shown in enumerate(pixels(40, 70, 80, 3)):
        Image.fromarray(shown).save(folder / f"{number}.png")


def notes(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(words(4000))


def weather(path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(1500, 2)).cumsum(0)
    lines = [f"{1900 + row},{a:.3f},{b:.3f}" for row, (a, b) in enumerate(rows)]
    path.write_text("date,temperature,pressure\n" + "\n".join(lines) + "\n")


def gpt2(folder: Path) -> None:
    tokenizer = CharTokenizer(sorted(set(words(1000))))
    config = GPTConfig(tokenizer.vocab_size, 24, 1, 2, max_position_embeddings=64)
    model = GPT(config, tokenizer=tokenizer)
    model.save_pretrained(folder, layout="huggingface")


GIVEN: dict[str, Callable[[Path], object]] = {
    "photos": photos,
    "notes": notes,
    "novel.txt": lambda path: path.write_text(words(8000)),
    "weather.csv": weather,
    "gpt2": gpt2,
    "runs/demo": lambda path: run_make(["demo"]),
    "encoder.pt": lambda path: torch.save(torch.nn.LSTM(128, 256, num_layers=2, bidirectional=True).state_dict(), path),
    "digits.npy": lambda path: np.save(path, pixels(40, 28, 28)[..., 0]),
}


# --- Rules of shell commands ---------------------------------------------------------------------------


class Wrong(AssertionError):
    """A page says what is not so."""


def require(true: object, message: str) -> None:
    if not true:
        raise Wrong(message)


@cache
def python_output(*arguments: str) -> str:
    """What `python ARGUMENTS` prints, in the root of the repository."""
    ended = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    require(ended.returncode == 0, f"python {' '.join(arguments)}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
    return ended.stdout


def check_options(arguments: list[str], help: str) -> None:
    for argument in arguments:
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            require(re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help), f"{option}: no such option")


def run_fastgen(arguments: list[str]) -> None:
    """Run the command line, a training with a model of `SMALL`."""
    if arguments[0] == "train" and "--help" not in arguments:
        exists = {"--resume", "--init-from", "--config"} & {*arguments}
        for option, value in {**SMALL[arguments[1]], "--no-tensorboard": None}.items():
            if option not in arguments and not (exists and (option in OF_THE_MODEL or "--resume" in exists)):
                arguments = [*arguments, option, *([value] if value else [])]
    if ("--device", "cuda") in itertools.pairwise(arguments) and not torch.cuda.is_available():
        return parse_fastgen(arguments)
    code = main(arguments)
    require(code == 0, f"fastgen {' '.join(arguments)}: exit code {code}")


def parse_fastgen(arguments: list[str]) -> None:
    """Check that the command line takes these arguments, without doing what they say."""
    command: Any = typer.main.get_command(app)
    while isinstance(command, typer.core.TyperGroup) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        require(name in command.commands, f"fastgen {name}: no such command")
        command = command.commands[name]
    try:
        command.make_context("fastgen", list(arguments), resilient_parsing=not arguments)
    except SystemExit:  # --help
        pass
    except Exception as error:
        if type(error).__name__ not in ("Exit", "NoArgsIsHelpError"):
            raise Wrong(f"fastgen {arguments}: {error}") from error


def run_python(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-c":
        exec(compile(rest[0], "python -c", "exec"), {"__name__": "__main__"})
    elif first == "-m" and rest[0] == "pip":
        check_pip(rest[1:])
    elif first == "-m" and rest[0] == "build":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        require("build" in extras["dev"], "build: not in the extra dev")
        require(set(rest[1:]) <= {"--sdist", "--wheel"}, f"build: {rest[1:]}")
    elif first == "-m" and rest[0] in ("fastgen", "fastgen.cli"):
        run_fastgen(rest[1:])
    else:
        require(first in SHORT_SCRIPTS, f"python {first}: a script that SHORT_SCRIPTS does not know")
        command = [sys.executable, str(ROOT / first), *rest, *SHORT_SCRIPTS[first].split()]
        ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        require(ended.returncode == 0, f"{' '.join(command)}:\n{ended.stderr[-2000:]}")


def run_torchrun(arguments: list[str]) -> None:
    """One process instead of several (tests/train/test_processes.py starts two)."""
    from torch.distributed.run import get_args_parser

    given, unknown = get_args_parser().parse_known_args(arguments)
    require(given.module and not unknown, f"torchrun: {arguments}")
    run_python(["-m", given.training_script, *given.training_script_args])


def run_make(arguments: list[str]) -> None:
    """The target exists; what it and its parts (demo-text of demo) have `fastgen` do is run."""
    if not shutil.which("make"):
        pytest.skip("needs make")
    makefile = (ROOT / "Makefile").read_text()
    variables = [argument for argument in arguments if "=" in argument]
    (target,) = [argument for argument in arguments if "=" not in argument]
    for variable in variables:
        name = variable.partition("=")[0]
        require(re.search(rf"^{name} *\?=", makefile, re.MULTILINE), f"{name}: no such variable")
    # As if the environment were set up already: this Python's own.
    environment = Path(sys.executable).parents[1]
    parts = re.findall(rf"^({target}-\w+):", makefile, re.MULTILINE)
    dry = ["make", "-n", "--no-print-directory", f"VENV={environment}", *variables, target, *parts]
    ended = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    require(ended.returncode == 0, f"{' '.join(dry)}:\n{ended.stderr}")
    commands = re.split(r"[;\n]|&&", ended.stdout.replace("\\\n", " "))
    program = re.compile(rf"\s*(?:then |else )?\s*{re.escape(str(environment))}/bin/fastgen (.*)")
    for command in dict.fromkeys(match[1] for match in map(program.match, commands) if match):
        if "--resume" not in command and not command.startswith(("bench", "doctor")):
            run_fastgen(shlex.split(command))


def check_pip(arguments: list[str]) -> None:
    """The subcommand, its options, and the extras of this package exist."""
    command, *rest = arguments
    check_options(rest, python_output("-m", "pip", command, "--help"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in rest:
        if match := re.fullmatch(r"(?:\.|fastgen-torch)\[(.*)\]", argument):
            missing = {*match[1].split(",")} - extras.keys()
            require(not missing, f"pip: no extra {missing}")


def check_pytest(arguments: list[str]) -> None:
    """The options, files and markers exist, and what is asked for by -k does select tests."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    check_options(
        [argument for argument in arguments if argument not in ("-k", "-m")], python_output("-m", "pytest", "-h")
    )
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before == "-m":
            missing = {*re.findall(r"\w+", argument)} - markers - {"not", "and", "or"}
            require(not missing, f"pytest: no marker {missing}")
        elif "/" in argument:
            require((ROOT / argument).exists(), f"pytest {argument}: no such file")
    if "-k" in arguments:
        python_output("-m", "pytest", "--collect-only", "-q", *arguments)


def check_variable(assignment: str) -> None:
    """The build or the package reads it, or it is one of the tools'."""
    name = assignment.partition("=")[0]
    if name not in ("LD_PRELOAD", "ASAN_OPTIONS"):
        sources = [ROOT / "setup.py", *(ROOT / "fastgen").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
        read = any(re.search(rf"\b{name}\b", path.read_text()) for path in sources)
        require(read or name in ("OMP_NUM_THREADS",), f"{name}: nothing reads it")


def run_shell(line: str) -> None:
    """A line with pipes or substitutions, by bash in the root of the repository: it is to succeed."""
    if not (ROOT / "fastgen/_C.so").exists():
        pytest.skip("looks at the kernels, which are not built")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = ["bash", "-o", "pipefail", "-c", line]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    require(ended.returncode == 0, f"{line}: status {ended.returncode}\n{ended.stdout}{ended.stderr[-2000:]}")


def run_compute_sanitizer(arguments: list[str]) -> None:
    require(arguments[0] == "--tool" and arguments[1] in ("memcheck", "racecheck", "synccheck"), str(arguments))
    run_line(arguments[2:])


RULES: dict[str, Callable[[list[str]], None]] = {
    "fastgen": run_fastgen,
    "python": run_python,
    "torchrun": run_torchrun,
    "make": run_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "export": lambda assignments: [check_variable(assignment) for assignment in assignments] and None,
    "compute-sanitizer": run_compute_sanitizer,
}


def run_line(line: list[str]) -> None:
    """One command, by the rule of its program; assignments in front of it are checked, not made."""
    while re.match(r"[A-Z_]+=", line[0]):
        check_variable(line[0])
        line = line[1:]
    require(line[0] in RULES, f"{line[0]}: no rule of tests/test_docs.py runs or checks it")
    RULES[line[0]](line[1:])


# --- Pages -------------------------------------------------------------------------------------------------


def run_page(found: list[Block]) -> None:
    """Run the blocks of a page, in the present folder.

    Raises:
        Wrong: for a block that does not do what it says, or that nothing covers. What goes wrong in a block of
            Python is raised as it is, with the place in the page in its traceback.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    for block in found:
        try:
            if block.language == "python":
                code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
                with contextlib.redirect_stdout(io.StringIO()) as stream:
                    exec(code, namespace)
                printed = stream.getvalue()
                continue
            if block.language == "output":
                require(printed is not None, "an output without a block of Python above it")
                require(printed == block.text, f"the block above prints\n{printed}instead of\n{block.text}")
            elif block.language == "sh":
                for line, command in command_lines(block):
                    run_shell(line) if re.search(r"[|`]|\$\(", line) else run_line(command)
            elif block.language in ("toml", "json"):
                parse = tomllib.loads if block.language == "toml" else json.loads
                parse(block.text)
                if name := re.match(r"# ([\w./-]+\.toml)\n", block.text):
                    Path(name[1]).write_text(block.text)
            else:
                require(block.language == "text", f"{block.language or 'no language'}: nothing runs or checks it")
        except (Wrong, ValueError) as error:
            raise Wrong(f"{block.place}: {error}") from error
        printed = None


SLOW = {"README.md", "numerics.md"}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] if page.name in SLOW else [])
        for page in PAGES
    ],
)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short_runs(monkeypatch)
    content = "".join(block.text for block in blocks(page))
    for name, make in GIVEN.items():
        if (name in content and f"make {Path(name).name}" not in content) or name == "digits.npy":
            make(Path(name))
    run_page(blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_are_taken_by_the_command_line(page: Path) -> None:
    for span in spans(page):
        if re.match(r"(python -m )?fastgen [a-z]+(?!\|)", span) and "|" not in span and "..." not in span:
            parse_fastgen(span.removeprefix("python -m ").removeprefix("fastgen ").split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}: no such heading"


# --- The rules themselves -------------------------------------------------------------------------------


def page_of(*fenced: tuple[str, str]) -> list[Block]:
    return blocks(PAGES[0], "\n".join(f"words\n```{language}\n{text}\n```" for language, text in fenced))


def test_right_pages_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python = ("python", "x = 3\nprint(x)")
    run_page(page_of(python, ("output", "3"), ("python", "assert x == 3"), ("text", "4")))
    run_page(
        page_of(("sh", "pip install '.[train]'   # with all\nFASTGEN_NO_EXT=1 \\\n  pip install -e ."), ("json", "{}"))
    )
    run_page(page_of(("toml", "# a.toml\nx = 1")))
    assert (tmp_path / "a.toml").read_text() == "# a.toml\nx = 1\n"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (("", "x"), "no language: nothing runs"),
        (("yaml", "x: 1"), "yaml: nothing runs"),
        (("sh", "curl example.org"), "curl: no rule"),
        (("sh", "pip install --no-such-option ."), "--no-such-option: no such option"),
        (("sh", "pip install '.[nonsense]'"), "no extra {'nonsense'}"),
        (("sh", "FASTGEN_NONSENSE=1 pip install ."), "FASTGEN_NONSENSE: nothing reads it"),
        (("sh", "make nonsense"), "nonsense"),
        (("sh", "make demo NONSENSE=1"), "NONSENSE: no such variable"),
        (("sh", "fastgen train vae --nonsense"), "exit code 2"),
        (("sh", "fastgen bench --filter nonsense"), "exit code 2"),
        (("sh", "pytest tests/nonsense"), "no such file"),
        (("sh", "pytest -k nonsense tests/test_extras.py"), "--collect-only"),
        (("sh", "pytest -m 'not nonsense'"), "no marker {'nonsense'}"),
        (("sh", "python nonsense.py"), "SHORT_SCRIPTS"),
        (("sh", "nonsense | cat"), "status 127"),
        (("toml", "x = "), "README.md:3"),
        (("json", "{"), "README.md:3"),
        (("output", "x"), "without a block of Python"),
    ],
)
def test_wrong_blocks_are_found(
    block: tuple[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Wrong, match=re.escape(message)):
        run_page(page_of(block))


def test_wrong_output_and_python_are_found() -> None:
    with pytest.raises(Wrong, match="the block above prints\n3\ninstead of\n4"):
        run_page(page_of(("python", "print(3)"), ("output", "4")))
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(page_of(("text", "x"), ("python", "x = 0\n1 / x")))
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno + 1) == (PAGES[0], 8)


def test_commands_are_parsed() -> None:
    parse_fastgen(["train", "vae", "--resume", "runs/digits", "--epochs", "3"])
    for wrong in (["train", "vae", "--nonsense"], ["nonsense"], ["train", "nonsense"], ["bench", "--threads", "many"]):
        with pytest.raises(Wrong):
            parse_fastgen(wrong)


def test_blocks_of_markdown() -> None:
    found = blocks(PAGES[0], "a\n```sh\nx \\\n  y # z\n\n# only words\n```\n- b\n  ~~~python\n  if x:\n    y\n  ~~~\n")
    assert [(block.line, block.language, block.text) for block in found] == [
        (3, "sh", "x \\\n  y # z\n\n# only words\n"),
        (10, "python", "if x:\n  y\n"),
    ]
    assert [command for _, command in command_lines(found[0])] == [["x", "y"]]
    with pytest.raises(ValueError, match="a block that does not end"):
        blocks(PAGES[0], "```\nx")
