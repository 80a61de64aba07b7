from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fastgen.data import SeriesSet, TextSet, TokenSet
from fastgen.models import RNN, RNNConfig, from_pretrained
from fastgen.random import Generator
from fastgen.tokenizers import ByteTokenizer, CharTokenizer, train_tokenizer
from fastgen.train import RNNSeriesRecipe, RNNTextRecipe, Trainer, TrainingResult, fit, read_metrics, read_run

LINE = "the cat sat on the mat. "
SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "embedding_dim": 8}


def tokens(text: str, tokenizer: Any = None) -> TokenSet:
    return TextSet(text, "cats").encode(tokenizer or CharTokenizer(LINE))


def recipe(train: str = LINE * 40, test: str = LINE * 5, seq_len: int = 10, **fields: Any) -> RNNTextRecipe:
    config = RNNConfig(vocab_size=len(set(LINE)), **{**SMALL, **fields})
    return RNNTextRecipe(config, tokens(train), tokens(test), seq_len=seq_len, sample_length=60)


def run(recipe: RNNTextRecipe, out: Path, resume: bool = False, **options: Any) -> TrainingResult:
    defaults = {"epochs": 2, "batch_size": 4, "log_every": 1, "tensorboard": False, "device": "cpu"}
    config = recipe.training_config(**{**defaults, **options})
    return Trainer(recipe, config, out=out, resume=resume, progress="quiet").fit()


def test_windows_follow_each_other_in_streams_that_cover_the_text() -> None:
    text = recipe(train=LINE * 40)  # 960 characters: 95 windows of 10 and a target, 23 of them in each of 4 streams
    assert text.num_examples == 95
    firsts = []
    for epoch in range(20):
        rows = text.order(4, Generator(0).fork(epoch))
        assert rows.shape == (23, 4)
        assert (rows.diff(dim=0) == 10).all()
        assert (rows.diff(dim=1) == 230).all()
        firsts.append(int(rows[0, 0]))
        assert firsts[-1] >= 0
        assert int(rows[-1, -1]) + 10 < 960  # the target of the last step is there
    assert firsts[0] == int(text.order(4, Generator(0).fork(0))[0, 0])
    assert len(set(firsts)) > 10
    assert max(firsts) <= 960 - 1 - 4 * 230


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_state_goes_on_from_window_to_window(cell: str, tmp_path: Path) -> None:
    """At a rate of next to nothing the losses are those of the untrained model, which reads each stream in one go."""
    text = recipe(cell=cell)
    run(text, tmp_path / "run", learning_rate=1e-12)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["split"] == "train"]
    assert len(rows) == 46
    torch.manual_seed(0)
    model = RNN(text.model.config).double().eval()
    sequence = tokens(LINE * 40).tokens.long()
    for epoch in range(2):
        starts = text.order(4, Generator(0).fork(0).fork(epoch))[0]
        streams = sequence[starts.unsqueeze(1) + torch.arange(231)]
        with torch.no_grad():
            logits = model(streams[:, :-1]).logits
        assert logits is not None
        losses = F.cross_entropy(logits.transpose(1, 2), streams[:, 1:], reduction="none")
        expected = losses.view(4, 23, 10).mean((0, 2)).tolist()
        assert [float(row["loss"]) for row in rows[23 * epoch :][:23]] == pytest.approx(expected, rel=1e-5)


def test_gradients_end_at_the_window(tmp_path: Path) -> None:
    """They are those of a state that is given as numbers."""
    text = recipe()
    run(text, tmp_path / "run", max_steps=4)
    weights, state = {name: p.detach().clone() for name, p in text.model.named_parameters()}, text.carried()
    assert {name: tuple(part.shape) for name, part in state.items()} == {"h": (4, 1, 16), "c": (4, 1, 16)}
    run(text, tmp_path / "run", max_steps=5, max_grad_norm=1.0, resume=True)

    rows = text.order(4, Generator(0).fork(0).fork(0))[4]
    window = tokens(LINE * 40).tokens.long()[rows.unsqueeze(1) + torch.arange(11)]
    model = RNN(text.model.config)
    model.load_state_dict({**text.model.state_dict(), **weights})
    loss = model(window[:, :-1], window[:, 1:], (state["h"].transpose(0, 1), state["c"].transpose(0, 1))).loss
    assert loss is not None
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for (name, ours), theirs in zip(text.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("length", [21, 331, 2500])
def test_the_held_out_text_is_read_in_streams_that_leave_nothing_out(length: int) -> None:
    from accelerate import Accelerator

    held_out = (LINE * 120)[:length]
    text = recipe(test=held_out)
    figures = text.evaluate(Accelerator(cpu=True), Generator(0))
    sequence = tokens(held_out).tokens.long()
    count = max(1, (length - 1) // 1000)
    steps = (length - 1) // count
    nats = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for stream in range(count):
            part = sequence[stream * steps :][: steps + 1]
            logits = text.model.eval()(part[None, :-1]).logits
            assert logits is not None
            nats += F.cross_entropy(logits[0].double(), part[1:], reduction="sum")
    loss = float(nats) / (count * steps)
    assert length - 1 - count * steps < count
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert figures["bits_per_character"] == pytest.approx(loss / math.log(2), rel=1e-5)


def test_bits_per_character_do_not_depend_on_what_a_token_is() -> None:
    from accelerate import Accelerator

    held_out = "Caf\u00e9 na\u00efve. " * 4  # 12 characters, 14 bytes each
    for tokenizer, per_character in ((ByteTokenizer(), 14 / 12), (train_tokenizer("bpe", held_out, 256), 14 / 12)):
        data = tokens(held_out, tokenizer)
        model = RNN(vocab_size=256, **SMALL)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.zero_()
        figures = RNNTextRecipe(model, data, data, seq_len=5).evaluate(Accelerator(cpu=True), Generator(0))
        assert figures["loss"] == pytest.approx(math.log(256))
        assert figures["bits_per_character"] == pytest.approx(8 * per_character)


def test_it_learns_a_line_by_heart_and_says_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    text = recipe(hidden_size=32)
    result = run(text, out, epochs=12, learning_rate=0.02, warmup_steps=10, log_every=5)
    assert result.metrics["loss"] < 0.2
    assert {path.name for path in result.files} == {"samples.txt", "loss.png", "metrics.csv", "model"}
    losses = [float(row["loss"]) for row in read_metrics(out / "metrics.csv") if row["split"] == "test"]
    assert losses[0] > 0.5
    assert result.metrics["loss"] == min(losses)
    assert sorted(path.name for path in (out / "samples").iterdir())[:2] == ["step-00000000.txt", "step-00000023.txt"]
    samples = (out / "samples.txt").read_text()
    assert samples.count("cat sat on the mat. ") >= 4
    assert samples.count("-" * 80) == 3

    saved = from_pretrained(out / "model")
    assert isinstance(saved, RNN)
    assert saved.tokenizer == CharTokenizer(LINE)
    assert saved.generate("the cat", max_new_tokens=41, temperature=0) == LINE * 2
    record = read_run(out)
    assert record["model_type"] == "rnn"
    assert record["data"]["train"] == 960
    assert record["data"]["seq_len"] == 10
    assert record["training"]["max_grad_norm"] == 1.0
    assert float(read_metrics(out / "metrics.csv")[0]["tokens_per_second"]) > 0


@pytest.mark.parametrize(("when", "fields"), [(23, {"cell": "gru"}), (31, {"dropout": 0.2, "num_layers": 2})])
def test_a_stopped_run_goes_on_with_the_same_bits(when: int, fields: dict[str, Any], tmp_path: Path) -> None:
    run(recipe(**fields), tmp_path / "whole")
    stopped = recipe(**fields)
    with pytest.MonkeyPatch.context() as patch:
        import signal

        step = RNNTextRecipe.train_step

        def stop(self: RNNTextRecipe, now: Any) -> Any:
            if now.index == when - 1:
                signal.raise_signal(signal.SIGINT)
            return step(self, now)

        patch.setattr(RNNTextRecipe, "train_step", stop)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {when} of 46"):
            run(stopped, tmp_path / "run")
    run(recipe(**fields), tmp_path / "run", resume=True)
    for name in ("model/model.safetensors", "model/tokenizer.json", "samples.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = "checkpoints/step-00000046.safetensors"
    from fastgen.train.checkpoint import Checkpoint

    ours, theirs = (Checkpoint.load(tmp_path / name / last) for name in ("run", "whole"))
    assert {name for name in ours.tensors if name.startswith("carried.")} == {
        f"carried.{name}" for name in ("h", "c")[: 1 if fields.get("cell") == "gru" else 2]
    }
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


def test_another_text_or_window_does_not_go_on(tmp_path: Path) -> None:
    run(recipe(), tmp_path / "run", max_steps=3)
    with pytest.raises(ValueError, match=r"data: expected checksum .* as .* was started with"):
        run(recipe(train=LINE * 39 + LINE.upper().lower()[::-1]), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"data: expected seq_len 10, as .* was started with, got 11"):
        run(recipe(seq_len=11), tmp_path / "run", resume=True)


def test_short_texts_have_short_streams(tmp_path: Path) -> None:
    result = run(recipe(train=LINE), tmp_path / "run")  # 24 characters: two windows, of a stream each
    assert result.step == 2


def test_the_default_prompt_is_in_the_alphabet() -> None:
    with_lines = TextSet("one\ntwo\n" * 9, "numbers").encode(CharTokenizer("one\ntwo"))
    config = RNNConfig(vocab_size=6, **SMALL)
    assert RNNTextRecipe(config, with_lines, with_lines, seq_len=4).describe()["evaluation"]["prompt"] == "\n"
    assert recipe().describe()["evaluation"]["prompt"] == "t"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": RNNConfig(vocab_size=5)}, ValueError, "vocab_size: expected 11 as the tokenizer has, got 5"),
        ({"test": tokens("abc", CharTokenizer("abc"))}, ValueError, "test: expected tokens of CharTokenizer"),
        ({"test": tokens("t")}, ValueError, "test: expected at least 2 tokens, got 1"),
        ({"train": LINE}, TypeError, "train: expected a TokenSet, got str"),
        ({"train": tokens(LINE[:10])}, ValueError, "seq_len: expected less than the 10 tokens to train on, got 10"),
        ({"seq_len": 0}, ValueError, "seq_len: expected an int of at least 1, got 0"),
        ({"sample_length": 0}, ValueError, "sample_length: expected an int of at least 1, got 0"),
        ({"prompt": ""}, ValueError, "prompt: expected at least one token, got none"),
        ({"prompt": "dog"}, ValueError, "prompt: .*'d' in line 1, column 1 is not among the 11 characters"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": RNNConfig(vocab_size=11, **SMALL), "train": tokens(LINE * 3), "test": tokens(LINE)}
    with pytest.raises(error, match=message):
        RNNTextRecipe(**{**arguments, "seq_len": 10, **change})


# ---------------------------------------------------------------------------------------------------
# Series


def wave(steps: int = 400, columns: int = 1) -> SeriesSet:
    t = torch.arange(steps, dtype=torch.float64)
    values = torch.stack([50 * (column + 1) + 10 * torch.sin(t / 3 + column) for column in range(columns)], -1)
    return SeriesSet(values.float(), tuple("abc"[:columns]), "wave")


@pytest.mark.parametrize(("columns", "fields"), [(1, {}), (2, {"cell": "gru", "num_components": 2})])
def test_it_learns_a_wave_and_continues_it(columns: int, fields: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = RNNConfig(input_size=columns, hidden_size=16, num_layers=1, **fields)
    options: dict[str, Any] = {"tensorboard": False, "progress": "quiet", "device": "cpu", "sample_length": 20}
    result = fit(config, wave(columns=columns), out=out, epochs=80, evaluate_every=40, seq_len=20, **options)
    assert {path.name for path in result.files} == {"continuation.png", "loss.png", "metrics.csv", "model"}
    assert result.metrics["rmse"] < 1.5  # of a deviation of 7
    losses = [float(row["loss"]) for row in read_metrics(out / "metrics.csv") if row["split"] == "test"]
    assert losses[-1] < losses[0]
    for picture in (out / "continuation.png", out / "samples" / f"step-{result.step:08d}.png"):
        with Image.open(picture) as image:
            assert image.size == (1000, 260 * columns)
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 20
    saved = from_pretrained(out / "model")
    assert isinstance(saved, RNN)
    train, test = wave(columns=columns).split()
    assert torch.equal(saved.mean, train.scale()[0])
    ahead = saved.generate(train.values, max_new_tokens=5, temperature=0)[len(train) :]
    assert (ahead - test.values[:5]).square().mean().sqrt() < 3
    record = read_run(out)
    assert record["data"]["columns"] == list("ab")[:columns]


def test_errors_are_in_units_of_the_data() -> None:
    from accelerate import Accelerator

    series = SeriesSet(torch.tensor([[1.0], [5.0], [3.0], [11.0]]))
    recipe = RNNSeriesRecipe(RNNConfig(input_size=1, hidden_size=4, num_layers=1), series, series, seq_len=2)
    with torch.no_grad():
        for parameter in recipe.model.head.parameters():
            parameter.zero_()
    figures = recipe.evaluate(Accelerator(cpu=True), Generator(0))
    # The prediction is the mean, 5, of deviation 14 ** 0.5 * (ln 2 + 0.001): softplus(0) of the standardised one.
    errors = torch.tensor([0.0, -2.0, 6.0], dtype=torch.float64)
    scale = 14**0.5 * (math.log(2) + recipe.model.config.min_scale)
    nats = 0.5 * (errors / scale).square() + math.log(scale) + 0.5 * math.log(2 * math.pi)
    assert figures["rmse"] == pytest.approx(math.sqrt(40 / 3), rel=1e-6)
    assert figures["loss"] == pytest.approx(float(nats.mean()), rel=1e-6)


def test_a_stopped_run_on_a_series_goes_on(tmp_path: Path) -> None:
    config = RNNConfig(input_size=1, hidden_size=8, num_layers=1)
    options: dict[str, Any] = {"tensorboard": False, "progress": "quiet", "device": "cpu", "schedule": "constant"}
    fit(config, wave(), out=tmp_path / "whole", epochs=2, **options)
    fit(config, wave(), out=tmp_path / "run", epochs=1, **options)
    fit(config, wave(), out=tmp_path / "run", epochs=2, resume=True, **options)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_series_and_models_that_do_not_fit(tmp_path: Path) -> None:
    config = RNNConfig(input_size=2, hidden_size=4, num_layers=1)
    with pytest.raises(ValueError, match="input_size: expected 1 as the series has, got 2"):
        fit(config, wave(), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"test: expected the columns \('a', 'b'\), got \('x0', 'x1'\)"):
        RNNSeriesRecipe(config, wave(columns=2), SeriesSet(torch.ones(9, 2)))
    with pytest.raises(ValueError, match="seq_len: expected less than the 40 steps to train on, got 50"):
        RNNSeriesRecipe(config, wave(40, 2), wave(40, 2))
    with pytest.raises(TypeError, match="data: expected TokenSet or SeriesSet for RNN, got Tensor"):
        fit(config, torch.ones(9, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="test: expected a SeriesSet, got TokenSet"):
        fit(config, wave(columns=2), tokens(LINE))
    with pytest.raises(ValueError, match="test: expected held-out tokens"):
        fit(RNNConfig(vocab_size=11), tokens(LINE))
    assert not (tmp_path / "run").exists()
