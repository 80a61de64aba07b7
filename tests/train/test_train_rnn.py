from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastgen.data import TextSet, TokenSet
from fastgen.models import RNN, RNNConfig, from_pretrained
from fastgen.random import Generator
from fastgen.tokenizers import ByteTokenizer, CharTokenizer, train_tokenizer
from fastgen.train import RNNTextRecipe, Trainer, TrainingResult, read_metrics, read_run

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


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
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


@pytest.mark.parametrize("length", [21, 60, 331, 400])
def test_the_held_out_text_is_read_in_streams_that_leave_nothing_out(length: int) -> None:
    from accelerate import Accelerator

    held_out = (LINE * 20)[:length]
    text = recipe(test=held_out)
    figures = text.evaluate(Accelerator(cpu=True), Generator(0))
    sequence = tokens(held_out).tokens.long()
    count = min(32, (length - 1) // 10)
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
    assert sorted(path.name for path in (out / "samples").iterdir())[0] == "step-00000023.txt"
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


@pytest.mark.parametrize(("when", "fields"), [(5, {}), (23, {"cell": "gru"}), (31, {"dropout": 0.2, "num_layers": 2})])
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
