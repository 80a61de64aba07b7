from __future__ import annotations

import itertools
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fastgen.data import TextSet, TokenSet, Windows
from fastgen.evaluate import evaluate_text
from fastgen.models import GPT, GPTConfig, from_pretrained
from fastgen.nn.lora import LoRALinear, merge_lora
from fastgen.random import Generator
from fastgen.tokenizers import ByteTokenizer, CharTokenizer, train_tokenizer
from fastgen.train import GPTRecipe, Trainer, TrainingResult, fit, read_metrics, read_run
from fastgen.train.checkpoint import Checkpoint

LINE = "the cat sat on the mat. "
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
RECIPE = ("seq_len", "separate_documents", "gradient_accumulation_steps", "gradient_checkpointing", "lora_rank", "seed")


def tokens(text: str, tokenizer: Any = None, starts: tuple[int, ...] = (0,)) -> TokenSet:
    return TextSet(text, "cats", starts=starts).encode(tokenizer or CharTokenizer(LINE))


def recipe(train: str = LINE * 40, test: str = LINE * 5, model: GPT | None = None, **fields: Any) -> GPTRecipe:
    options = {name: fields.pop(name) for name in RECIPE if name in fields}
    config = GPTConfig(**{"vocab_size": len(set(LINE)), **SMALL, **fields})
    return GPTRecipe(model or config, tokens(train), tokens(test), sample_length=60, **options)


def run(recipe: GPTRecipe, out: Path, resume: bool = False, **options: Any) -> TrainingResult:
    defaults = {"epochs": 2, "batch_size": 4, "log_every": 1, "tensorboard": False, "device": "cpu"}
    config = recipe.training_config(**{**defaults, **options})
    return Trainer(recipe, config, out=out, resume=resume, progress="quiet").fit()


# ---------------------------------------------------------------------------------------------------
# Windows


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 5))
def test_windows_give_each_token_once(length: int, seq_len: int, batch: int) -> None:
    sequence = torch.arange(length, dtype=torch.uint8)
    windows = Windows(sequence, seq_len)
    found = []
    firsts = torch.arange(len(windows)) * seq_len
    for group in (*firsts[:-1].split(batch), firsts[-1:]) if len(firsts) > 1 else (firsts,):
        inputs, targets, cu_seqlens = windows.batch(group)
        assert cu_seqlens is None
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs + 1, targets)
        found += targets.flatten().tolist()
    assert found == list(range(1, length))


def test_windows_of_documents_are_packed() -> None:
    windows = Windows(torch.arange(12), 4, starts=(0, 3, 8))
    inputs, targets, cu_seqlens = windows.batch(torch.tensor([0, 6]))
    assert inputs.tolist() == [[0, 1, 2, 3, 6, 7, 8, 9]]
    assert targets.tolist() == [[1, 2, -100, 4, 7, -100, 9, 10]]
    assert cu_seqlens is not None
    assert cu_seqlens.tolist() == [0, 3, 4, 6, 8]


def test_epochs_cut_the_text_at_a_random_phase_and_shuffle() -> None:
    text = recipe()  # 960 characters: 79 windows of 12 and a target
    assert text.num_examples == 79
    phases = set()
    for epoch in range(20):
        rows = text.order(4, Generator(0).fork(epoch))
        assert rows.shape == (19, 4)
        assert int(rows.min()) >= 0
        assert int(rows.max()) + 12 < 960  # the last target is there
        assert len(rows.unique()) == rows.numel()
        inside = rows[rows < rows.max()]
        assert len((inside % 12).unique()) == 1
        phases.add(int(inside[0]) % 12)
        assert (rows.flatten().diff() < 0).any()
    assert len(phases) > 6
    again = text.order(4, Generator(0).fork(19))
    assert torch.equal(again, rows)


# ---------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("separate", [False, True])
def test_a_step_is_that_of_plain_autograd(separate: bool, tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=11, **SMALL)
    starts = tuple(range(0, 960, 50))
    train = tokens(LINE * 40, starts=starts)
    text = GPTRecipe(config, train, tokens(LINE), separate_documents=separate, sample_length=5)
    before = GPT(config)
    before.load_state_dict(text.model.state_dict())
    run(text, tmp_path / "run", max_steps=1, learning_rate=1e-12)

    losses = []
    for first in text.order(4, Generator(0).fork(0).fork(0))[0].tolist():
        window = train.tokens[first : first + 13].long()
        cuts = [0, *(s - first for s in starts if first < s < first + 13), 13] if separate else [0, 13]
        for begin, end in itertools.pairwise(cuts):
            if end - begin > 1:
                logits = before(window[begin : end - 1].unsqueeze(0)).logits[0]
                losses.append(F.cross_entropy(logits, window[begin + 1 : end], reduction="none"))
    loss = torch.cat(losses).mean()
    (row,) = [row for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["split"] == "train"]
    assert float(row["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(before.parameters(), 1.0)
    for (name, ours), theirs in zip(text.model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}], ids=str)
def test_what_saves_memory_changes_rounding_alone(options: dict[str, Any], tmp_path: Path) -> None:
    results = [run(recipe(**more), tmp_path / str(len(more)), max_steps=12) for more in ({}, options)]
    plain, saving = (result.metrics["loss"] for result in results)
    assert saving == pytest.approx(plain, rel=1e-3)
    assert read_run(results[1].out)["recipe"].items() >= options.items()


def test_weight_decay_spares_vectors_and_frozen_weights() -> None:
    text = recipe(lora_rank=2)
    (optimizer,) = text.optimizers(text.training_config()).values()
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.95)
    assert {p.shape[0] for p in group["params"] if p.shape[1] != 2} == {2}  # A is (2, in), B is (out, 2)
    assert len(group["params"]) == 8
    text = recipe()
    (optimizer,) = text.optimizers(text.training_config()).values()
    decayed, spared = optimizer.param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in spared["params"]} == {1}
    assert spared["weight_decay"] == 0


# ---------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize("length", [2, 13, 14, 331])
def test_the_held_out_text_is_read_once_in_windows(length: int) -> None:
    from accelerate import Accelerator

    held_out = (LINE * 20)[:length]
    text = recipe(test=held_out)
    figures = text.evaluate(Accelerator(cpu=True), Generator(0))
    sequence = tokens(held_out).tokens.long()
    nats = 0.0
    for first in range(0, length - 1, 12):
        window = sequence[first : first + 13]
        with torch.no_grad():
            logits = text.model.eval()(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    loss = nats / (length - 1)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    # Tokens are characters; one of them is no target, but has its place among the characters.
    assert figures["bits_per_character"] == pytest.approx(loss / math.log(2), rel=1e-5)
    score = evaluate_text(text.model, tokens(held_out), batch_size=3)
    assert score.num_tokens == length - 1
    assert score.loss == pytest.approx(loss, rel=1e-5)


def test_bits_per_character_do_not_depend_on_what_a_token_is() -> None:
    from accelerate import Accelerator

    held_out = "Caf\u00e9 na\u00efve. " * 4  # 12 characters, 14 bytes each
    for tokenizer in (ByteTokenizer(), train_tokenizer("bpe", held_out, 256)):
        data = tokens(held_out, tokenizer)
        model = GPT(vocab_size=256, **SMALL)
        with torch.no_grad():
            model.embed_tokens.weight.zero_()
        figures = GPTRecipe(model, data, data).evaluate(Accelerator(cpu=True), Generator(0))
        assert figures["loss"] == pytest.approx(math.log(256))
        assert figures["bits_per_character"] == pytest.approx(8 * 14 / 12)


def test_documents_are_judged_apart() -> None:
    from accelerate import Accelerator

    data = tokens(LINE * 2, starts=(0, 5, 9))
    text = GPTRecipe(GPTConfig(vocab_size=11, **SMALL), data, data, separate_documents=True)
    figures = text.evaluate(Accelerator(cpu=True), Generator(0))
    nats, count = 0.0, 0
    sequence = data.tokens.long()
    for first in range(0, 47, 12):
        window = sequence[first : first + 13]
        cuts = [0, *(s - first for s in (5, 9) if first < s < first + 13), len(window)]
        for begin, end in itertools.pairwise(cuts):
            if end - begin > 1:
                logits = text.model.eval()(window[None, begin : end - 1]).logits[0].detach()
                nats += F.cross_entropy(logits, window[begin + 1 : end], reduction="sum").item()
                count += end - begin - 1
    assert count == 45
    assert figures["loss"] == pytest.approx(nats / count, rel=1e-5)


# ---------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(("kind", "line"), [("gpt2", "abcdefghijklmnopqrstuvwx"), ("llama", LINE)])
def test_it_learns_a_line_by_heart_and_says_it(kind: str, line: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tokenizer = CharTokenizer(line)
    sizes = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 48}
    make = GPTConfig.llama if kind == "llama" else GPTConfig
    data = [tokens(line * count, tokenizer) for count in (40, 5)]
    text = GPTRecipe(make(tokenizer.vocab_size, **sizes), *data, sample_length=60)
    result = run(text, out, epochs=50, learning_rate=0.01, warmup_steps=10, evaluate_every=25)
    assert result.metrics["loss"] < 0.2
    assert {path.name for path in result.files} == {"samples.txt", "loss.png", "metrics.csv", "model"}
    samples = (out / "samples.txt").read_text()
    assert samples.count(line[6:]) >= 4
    assert samples.count("-" * 80) == 3

    saved = from_pretrained(out / "model")
    assert isinstance(saved, GPT)
    assert saved.tokenizer == tokenizer
    assert saved.generate(line[:12], max_new_tokens=36, temperature=0) == line * 2
    record = read_run(out)
    assert record["model_type"] == "gpt"
    assert record["data"]["seq_len"] == 48
    assert record["training"]["max_grad_norm"] == 1.0
    assert float(read_metrics(out / "metrics.csv")[0]["tokens_per_second"]) > 0


@pytest.mark.parametrize(
    ("when", "fields"),
    [
        (19, {"dropout": 0.2, "attention_dropout": 0.1, "num_hidden_layers": 2}),
        (23, {"lora_rank": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_a_stopped_run_goes_on_with_the_same_bits(when: int, fields: dict[str, Any], tmp_path: Path) -> None:
    run(recipe(**fields), tmp_path / "whole")
    stopped = recipe(**fields)
    with pytest.MonkeyPatch.context() as patch:
        step = GPTRecipe.train_step

        def stop(self: GPTRecipe, now: Any) -> Any:
            if now.index == when - 1:
                signal.raise_signal(signal.SIGINT)
            return step(self, now)

        patch.setattr(GPTRecipe, "train_step", stop)
        with pytest.raises(KeyboardInterrupt, match=f"stopped after step {when} of 38"):
            run(stopped, tmp_path / "run")
    run(recipe(**fields), tmp_path / "run", resume=True)
    for name in ("model/model.safetensors", "model/tokenizer.json", "samples.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    last = "checkpoints/step-00000038.safetensors"
    ours, theirs = (Checkpoint.load(tmp_path / name / last) for name in ("run", "whole"))
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in theirs.tensors)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_fine_tuning_goes_on_from_the_checkpoint(lora_rank: int, tmp_path: Path) -> None:
    run(recipe(), tmp_path / "first", epochs=6, learning_rate=3e-3, warmup_steps=5, evaluate_every=6)
    model = GPT.from_pretrained(tmp_path / "first" / "model")
    other = LINE.replace("cat", "hat") * 40
    start = evaluate_text(model, tokens(other)).loss
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = recipe(other, other, model, lora_rank=lora_rank)
    rate = 0.03 if lora_rank else 3e-3
    result = run(tuned, tmp_path / "second", epochs=6, learning_rate=rate, warmup_steps=5, evaluate_every=6)
    assert result.metrics["loss"] < start - 0.05
    saved = GPT.from_pretrained(tmp_path / "second" / "model")
    assert not any(isinstance(module, LoRALinear) for module in saved.modules())
    assert evaluate_text(saved, tokens(other)).loss == pytest.approx(result.metrics["loss"], rel=1e-4)
    changed = {name for name, value in saved.state_dict().items() if not torch.equal(value, before[name])}
    layers = {name for name in before if name.startswith("layers.") and "proj.weight" in name}
    assert changed == (layers if lora_rank else set(before))
    if lora_rank:
        logits = model(tokens(other).tokens[None, :12].long()).logits
        merge_lora(model)
        torch.testing.assert_close(model(tokens(other).tokens[None, :12].long()).logits, logits, rtol=1e-4, atol=1e-5)
        assert set(model.state_dict()) == set(before)


def test_bf16_autocast(tmp_path: Path) -> None:
    result = run(recipe(), tmp_path / "run", epochs=4, learning_rate=0.01, evaluate_every=4, dtype="bfloat16")
    assert result.metrics["loss"] < 1.5
    assert from_pretrained(tmp_path / "run" / "model").dtype == torch.float32


def test_fit_takes_a_configuration_or_a_model(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tensorboard": False, "progress": "quiet", "device": "cpu", "sample_length": 5}
    config = GPTConfig(11, **SMALL)
    fit(config, tokens(LINE * 9), tokens(LINE), out=tmp_path / "a", epochs=1, seq_len=6, **options)
    model = GPT.from_pretrained(tmp_path / "a" / "model")
    fit(model, tokens(LINE * 9), tokens(LINE), out=tmp_path / "b", epochs=1, **options)
    with pytest.raises(ValueError, match=r"^test: expected held-out tokens"):
        fit(config, tokens(LINE * 9), **options)


def test_another_text_or_window_does_not_go_on(tmp_path: Path) -> None:
    run(recipe(), tmp_path / "run", max_steps=3)
    with pytest.raises(ValueError, match=r"data: expected checksum .* as .* was started with"):
        run(recipe(train=LINE * 39 + LINE.upper().lower()[::-1]), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"data: expected seq_len 12, as .* was started with, got 11"):
        run(recipe(seq_len=11), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"lora_rank: expected 0, as .* was started with, got 2"):
        run(recipe(lora_rank=2), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": GPTConfig(5, **SMALL)}, ValueError, "vocab_size: expected at least 11 as the tokenizer has, got 5"),
        ({"test": tokens("abc", CharTokenizer("abc"))}, ValueError, "test: expected tokens of CharTokenizer"),
        ({"test": tokens("t")}, ValueError, "test: expected at least 2 tokens, got 1"),
        ({"train": LINE}, TypeError, "train: expected a TokenSet, got str"),
        ({"train": tokens(LINE[:10])}, ValueError, "seq_len: expected less than the 10 tokens to train on, got 12"),
        ({"seq_len": 13}, ValueError, "seq_len: expected at most 12, the context of the model, got 13"),
        ({"seq_len": 0}, ValueError, "seq_len: expected an int of at least 1, got 0"),
        ({"lora_rank": -1}, ValueError, "lora_rank: expected an int of at least 0, got -1"),
        ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps: expected an int of at least 1"),
        ({"prompt": "dog"}, ValueError, "prompt: .*'d' in line 1, column 1 is not among the 11 characters"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": GPTConfig(11, **SMALL), "train": tokens(LINE * 3), "test": tokens(LINE)}
    with pytest.raises(error, match=f"^{message}"):
        GPTRecipe(**{**arguments, **change})


def test_a_model_of_another_alphabet_is_not_trained_on() -> None:
    model = GPT(vocab_size=11, **SMALL, tokenizer=CharTokenizer("abcdefghijk"))
    with pytest.raises(ValueError, match=r"^train: expected tokens of the model's CharTokenizer"):
        recipe(model=model)
