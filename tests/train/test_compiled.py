"""`TrainingConfig.compile`: the same run through torch.compile, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import needs_inductor
from torch import Tensor, nn
from toys import Regression, images

from fastgen.data import TextSet, TokenSet
from fastgen.models import GANConfig, GPTConfig, RNNConfig, VAEConfig
from fastgen.tokenizers import train_tokenizer
from fastgen.train import GANRecipe, GPTRecipe, Recipe, RNNTextRecipe, Trainer, TrainingConfig, VAERecipe, read_metrics
from fastgen.train.checkpoint import Checkpoint


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs are made, and collected here, but run as they are, without the minutes of C++."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda forward, *, fullgraph, options: compile(forward, fullgraph=fullgraph, backend=backend)
    )
    return made


def tokens() -> tuple[TokenSet, TokenSet]:
    text = "the cat sat on the mat.\n" * 20
    tokenizer = train_tokenizer("chars", text)
    return tuple(TextSet(part, "cats").encode(tokenizer) for part in (text[:400], text[400:]))


def vae() -> Recipe:
    config = VAEConfig(
        input_shape=(1, 8, 8), architecture="mlp", hidden_sizes=(16,), latent_dim=3, dropout=0.2, kl_warmup_steps=4
    )
    return VAERecipe(config, images(40), images(20, seed=1), num_importance_samples=2, num_pictures=4)


def rnn() -> Recipe:
    dropouts = {"dropout": 0.2, "locked_dropout": True, "state_dropout": 0.1, "weight_dropout": 0.1, "zoneout": 0.1}
    train, test = tokens()
    config = RNNConfig(train.tokenizer.vocab_size, hidden_size=8, num_layers=1, **dropouts)
    return RNNTextRecipe(config, train, test, seq_len=9, sample_length=5)


def gpt() -> Recipe:
    train, test = tokens()
    config = GPTConfig(
        *(train.tokenizer.vocab_size,),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=9,
        dropout=0.1,
        attention_dropout=0.1,
        embedding_dropout=0.1,
    )
    return GPTRecipe(config, train, test, gradient_accumulation_steps=2, sample_length=5)


def gan() -> Recipe:
    return GANRecipe(GANConfig(**GAN), images(40), images(20, seed=1), num_critic_steps=2, num_pictures=4)


GAN: dict[str, Any] = {"input_shape": (1, 8, 8), "architecture": "mlp", "hidden_sizes": (16,), "latent_dim": 3}


def train(recipe: Recipe, out: Path, *, resume: bool = False, **fields: Any) -> list[float]:
    """The losses of the steps: the first of their metrics."""
    defaults = {"batch_size": 4, "log_every": 1, "evaluate_steps": 3, "warmup_steps": 2, "schedule": "constant"}
    config = TrainingConfig(**{"max_steps": 6, "tensorboard": False, **defaults, **fields})
    Trainer(recipe, config, out=out, resume=resume, progress="quiet").fit()
    return [float(row[recipe.metrics[0]]) for row in read_metrics(out / "metrics.csv") if row["split"] == "train"]


@pytest.mark.parametrize("family", [vae, gan, rnn, gpt])
def test_the_same_run(family: Callable[[], Recipe], graphs: list[torch.fx.GraphModule], tmp_path: Path) -> None:
    plain, recipe = train(family(), tmp_path / "plain"), family()
    assert not graphs
    assert train(recipe, tmp_path / "run", compile=True) == pytest.approx(plain, rel=1e-5)
    assert len(plain) == 6
    assert 1 <= len(graphs) <= 7  # later steps take those of the first ones; evaluations and samples have none
    # What is saved has the names that it has without.
    names = [read(tmp_path / run).keys() for run in ("plain", "run")]
    assert names[0] == names[1]
    # Without graphs it may go on.
    train(family(), tmp_path / "run", resume=True, max_steps=7)


def read(run: Path, step: int = 6) -> dict[str, Tensor]:
    return Checkpoint.load(run / "checkpoints" / f"step-{step:08d}.safetensors").tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stop_in_between_changes_nothing(dtype: str, graphs: list[torch.fx.GraphModule], tmp_path: Path) -> None:
    recipe = Regression()
    train(recipe, tmp_path / "whole", dtype=dtype, compile=True)
    assert len(graphs) == 3  # the body, and the head with and without a gradient to the body
    assert all(("autocast" in graph.code) == (dtype == "bfloat16") for graph in graphs)
    train(Regression(), tmp_path / "run", dtype=dtype, compile=True, max_steps=3)
    train(Regression(), tmp_path / "run", dtype=dtype, compile=True, resume=True)
    whole, stopped = read(tmp_path / "whole"), read(tmp_path / "run")
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
    for module in recipe.modules().values():
        assert "forward" not in vars(module)  # the model is as it was


@pytest.mark.slow
@needs_inductor
def test_with_inductor(tmp_path: Path) -> None:
    """Dropout draws what it draws without torch.compile."""
    plain, compiled = Regression(), Regression()
    losses = train(plain, tmp_path / "plain", batch_size=6)
    assert train(compiled, tmp_path / "compiled", batch_size=6, compile=True) == pytest.approx(losses, rel=1e-5)
    for a, b in zip(plain.weights(), compiled.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Printing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class Broken(Regression):
    """Its forward pass is no one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Printing(8, 1)

    def compilable(self) -> tuple[nn.Module, ...]:
        return (self.head,)


class Refusing(Regression):
    def compilable(self) -> tuple[nn.Module, ...]:
        raise ValueError("compile: expected False for this loss, got True")


@pytest.mark.parametrize("recipe", [Broken, Refusing])
def test_there_is_no_way_back(recipe: type[Regression], graphs: list[torch.fx.GraphModule], tmp_path: Path) -> None:
    made = recipe()
    with pytest.raises(ValueError, match=r"^compile: expected False"):
        train(made, tmp_path / "run", compile=True)
    assert len(made.steps) <= 1
    assert "forward" not in vars(made.head)
    assert train(recipe(), tmp_path / "plain")  # nothing of it is left


def test_a_gradient_penalty_has_no_graph(tmp_path: Path) -> None:
    recipe = GANRecipe(GANConfig(**GAN), images(40), images(20, seed=1), r1_gamma=0.1)
    with pytest.raises(ValueError, match=r"^compile: expected none with a gradient penalty"):
        train(recipe, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["compiler", "header"])
def test_what_it_needs_is_named_before_the_run_begins(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
        message = r"compile: expected the C\+\+ compiler no-such-compiler \(apt install g\+\+, or set CXX\), found none"
    else:
        monkeypatch.setattr("shutil.which", lambda name: name)
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
        message = rf"compile: expected {tmp_path}/Python.h \(apt install python3-dev\), found none"
    with pytest.raises(ValueError, match=f"^{message}$"):
        train(Regression(), tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()
