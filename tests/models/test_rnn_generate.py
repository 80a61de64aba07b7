"""Generation: against a naive loop over the whole text, and row by row, piece by piece, part by part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen._load import kernel_devices
from fastgen.models import RNN, Generation, GenerationState
from fastgen.random import Generator, uniform
from fastgen.reference.generate import pick_tokens
from fastgen.tokenizers import ByteTokenizer, CharTokenizer, train_tokenizer

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
LETTERS = "abcdefgh \n"
FILTERED = {"temperature": 0.8, "top_k": 8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2}


def model(cell: str = "lstm", **fields: object) -> RNN:
    torch.manual_seed(0)
    made = RNN(
        **{"vocab_size": len(LETTERS), "hidden_size": 16, "cell": cell, **fields}, tokenizer=CharTokenizer(LETTERS)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "head" in name:
                parameter.mul_(4)  # so that the distributions are not flat
    return made.eval()


def series_model(cell: str = "lstm", **fields: object) -> RNN:
    torch.manual_seed(0)
    made = RNN(**{"input_size": 2, "hidden_size": 16, "num_components": 2, "cell": cell, **fields})
    made.set_scale(torch.tensor([5.0, -100.0]), torch.tensor([2.0, 30.0]))
    return made.eval()


def assert_same(a: Tensor, b: Tensor) -> None:
    """To the bit by the kernels; PyTorch's products round by the batch."""
    tolerance = 0.0 if "cpu" in kernel_devices("linear_rows") else 1e-4
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


LSTM = model()
SERIES = series_model()


def naive(rnn: RNN, prompt: Tensor, steps: int, seed: int, **sampling: float) -> Tensor:
    """prompt (L,) and `steps` tokens; every one from a forward pass over all before it."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    tokens = prompt
    for _ in range(steps):
        with torch.no_grad():
            logits = rnn(tokens.unsqueeze(0)).logits[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, tokens] = True
        place = torch.tensor([[seed, len(tokens)]])
        tokens = torch.cat((tokens, pick_tokens(logits, seen, place, *{**off, **sampling}.values())))
    return tokens


# ---------------------------------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("fields", [{}, {"tie_weights": True, "embedding_dim": 6}, {"num_layers": 1}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_naive_loop(cell: str, fields: dict[str, object]) -> None:
    rnn = model(cell, **fields)
    prompt = torch.tensor([1, 5, 2])
    for sampling in ({"temperature": 0.0}, {}, FILTERED):
        got = rnn.generate(prompt, 30, seed=7, **sampling)
        assert torch.equal(got, naive(rnn, prompt, 30, 7, **sampling)), sampling


WHOLE_ROWS = [
    {"layer_norm": True},
    {"layer_norm": True, "zoneout": (0.3, 0.1)},
    *({"cell": cell, "zoneout": 0.2} for cell in CELLS),
]


@pytest.mark.parametrize("fields", WHOLE_ROWS, ids=str)
def test_layer_norm_and_zoneout(fields: dict[str, object]) -> None:
    """Against the whole text in the sequence form, and, to the bit, against the loop in Python."""
    rnn = model(**fields)
    prompt = torch.tensor([1, 5, 2])
    for sampling in ({"temperature": 0.0}, {}, FILTERED):
        got = rnn.generate(prompt, 30, seed=7, **sampling)
        assert torch.equal(got, naive(rnn, prompt, 30, 7, **sampling)), sampling
    rnn.to(torch.bfloat16)
    prompts = ["ab", "c", "d e"]
    looped, state = rnn.generate(prompts, 30, seed=3, logits_processor=lambda _, x: x, return_state=True)
    native, same = rnn.generate(prompts, 30, seed=3, return_state=True)
    assert looped == native
    assert torch.equal(state.h, same.h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rnn = model().to(dtype)
    prompt = torch.tensor([1, 5, 2])
    got = rnn.generate(prompt, 20, seed=7)
    assert got.shape == (23,)
    if dtype == torch.float64:
        assert torch.equal(got, naive(rnn, prompt, 20, 7))


@settings(max_examples=30)
@given(
    st.lists(st.text(LETTERS, min_size=1, max_size=6), min_size=1, max_size=5),
    st.sampled_from([{"temperature": 0.0}, {}, FILTERED]),
    st.data(),
)
def test_a_row_does_not_depend_on_its_batch(
    prompts: list[str], sampling: dict[str, float], data: st.DataObject
) -> None:
    seeds = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(prompts), max_size=len(prompts)))
    together = LSTM.generate(prompts, 12, seed=seeds, **sampling)
    alone = [LSTM.generate(prompt, 12, seed=seed, **sampling) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone


def test_threads_do_not_show(threads: Callable[[int], None]) -> None:
    """With layers wide enough to be worth sharing."""
    rnn = model(hidden_size=320, num_layers=1)
    prompts, results = ["ab", "c", "def"], []
    for count in (1, 2, 3):
        threads(count)
        results.append(rnn.generate(prompts, 40, seed=3, return_state=True))
    (texts, state), *others = results
    for other_texts, other_state in others:
        assert other_texts == texts
        assert_same(other_state.h, state.h)


@given(st.integers(1, 19), st.booleans())
@settings(max_examples=10)
def test_a_cut_between_prompt_and_rest_does_not_show(cut: int, penalised: bool) -> None:
    sampling = FILTERED if penalised else {}
    whole = LSTM.generate("ab", 20, seed=3, **sampling)
    assert LSTM.generate(whole[: 2 + cut], 20 - cut, seed=3, **sampling) == whole
    first, state = LSTM.generate("ab", cut, seed=3, return_state=True, **sampling)
    second, later = LSTM.generate("", 20 - cut, state=state, return_state=True, **sampling)
    assert first + second == whole
    assert LSTM.generate("", 20 - cut, state=state, **sampling) == second, "the state was changed"
    assert later.position.tolist() == [21]
    assert later.pending.tolist() == LSTM.tokenizer.encode(whole[-1])


def test_a_state_takes_more_prompt() -> None:
    whole = LSTM.generate("ab cd", 10, seed=3)
    _, state = LSTM.generate("ab", 3, seed=3, return_state=True)
    head = LSTM.generate("ab", 3, seed=3)
    assert LSTM.generate("cd\n", 10, state=state) == "cd\n" + LSTM.generate(head + "cd\n", 10, seed=3)[8:]
    assert whole.startswith("ab cd")


def test_a_state_survives_a_file(tmp_path: Path) -> None:
    for rnn, prompt, empty in (
        (LSTM, ["ab", "c"], ["", ""]),
        (model("gru"), ["ab", "c"], ["", ""]),
        (SERIES, torch.ones(2, 3, 2), torch.ones(2, 0, 2)),
    ):
        _, state = rnn.generate(prompt, 5, seed=2, return_state=True)
        state.save(tmp_path / "state.safetensors")
        loaded = GenerationState.load(tmp_path / "state.safetensors")
        got, want = (rnn.generate(empty, 9, state=s) for s in (loaded, state))
        assert torch.equal(got, want) if isinstance(got, Tensor) else got == want


def test_seeds() -> None:
    rows = LSTM.generate("ab", 30, seed=5, n=3)
    assert rows == [LSTM.generate("ab", 30, seed=5 + row) for row in range(3)]
    assert len(set(rows)) == 3
    assert LSTM.generate("ab", 30, seed=np.array([5, 6, 7]), n=3) == rows
    assert LSTM.generate("ab", 30, seed=np.int64(5)) == rows[0]
    last = 2**64 - 1
    assert LSTM.generate("ab", 30, seed=last, n=2)[1] == LSTM.generate("ab", 30, seed=0)
    torch.manual_seed(11)
    drawn = LSTM.generate("ab", 30)
    assert LSTM.generate("ab", 30) != drawn
    torch.manual_seed(11)
    assert LSTM.generate("ab", 30) == drawn


def test_the_numbers_are_those_of_the_stream() -> None:
    """With flat scores the token is the uniform number of its place, times the size of the vocabulary."""
    rnn = model()
    with torch.no_grad():
        rnn.head.weight.zero_()
        rnn.head.bias.zero_()
    got = rnn.generate(torch.tensor([1, 2, 3]), 20, seed=9)[3:]
    u = uniform(20, generator=Generator(9, 3), dtype=torch.float64)
    assert torch.equal(got, (u * len(LETTERS)).long())


# ---------------------------------------------------------------------------------------------------
# Forms of prompt and result


def test_forms() -> None:
    encode = LSTM.tokenizer.encode
    one = LSTM.generate("ab", 6, seed=1)
    assert LSTM.generate(torch.tensor(encode("ab")), 6, seed=1).tolist() == encode(one)
    assert LSTM.generate(torch.tensor([encode("ab")]), 6, seed=1).tolist() == [encode(one)]
    assert LSTM.generate(["ab"], 6, seed=1) == [one]
    assert LSTM.generate("ab", 6, seed=1, n=1) == one
    listed = LSTM.generate([torch.tensor(encode("ab")), torch.tensor(encode("a"), dtype=torch.int32)], 6, seed=[1, 4])
    assert [row.tolist() for row in listed] == [encode(one), encode(LSTM.generate("a", 6, seed=4))]
    several = LSTM.generate(["ab", "cd"], 6, seed=1, n=2)
    assert several == [LSTM.generate(p, 6, seed=1 + i) for i, p in enumerate(["ab", "ab", "cd", "cd"])]
    assert LSTM.generate(torch.tensor(encode("ab")), 6, seed=1, n=2).shape == (2, 8)


def test_stop_tokens() -> None:
    whole = LSTM.generate("ab", 200, seed=3)
    end = whole.index("\n", 2)
    assert LSTM.generate("ab", 200, seed=3, stop="\n") == whole[: end + 1]
    assert LSTM.generate("ab", 200, seed=3, stop=[LSTM.tokenizer.token("\n")]) == whole[: end + 1]
    first = min(whole.index("\n", 2), whole.index("c", 2))
    assert LSTM.generate("ab", 200, seed=3, stop=["c", "\n"]) == whole[: first + 1]
    rows = LSTM.generate(torch.tensor([[0, 1], [2, 3]]), 40, seed=3, stop=0)
    ends = [row.tolist().index(0, 2) for row in rows]
    assert rows.shape[1] == max(ends) + 1
    for row, end in zip(rows.tolist(), ends, strict=True):
        assert row[end + 1 :] == [-100] * (len(row) - end - 1)
    assert LSTM.generate("a\n", 3, seed=3, stop="\n").startswith("a\n"), "one in the prompt does not count"


def test_stop_strings() -> None:
    whole = LSTM.generate("ab", 300, seed=3)
    stop = whole[40:43]
    end = whole.index(stop, 2) + 3
    text, state = LSTM.generate("ab", 300, seed=3, stop=stop, return_state=True)
    assert text == whole[:end]
    assert LSTM.generate("", 50, state=state) == whole[end : end + 50], "nothing was drawn behind the stop"
    both = LSTM.generate(["ab", "hh"], 300, seed=3, stop=[stop, "zz"[:0] + whole[60:62]])
    assert both[0] == whole[: min(end, whole.index(whole[60:62], 2) + 2)]
    tokens = LSTM.generate(torch.tensor(LSTM.tokenizer.encode("ab")), 300, seed=3, stop=stop)
    assert LSTM.tokenizer.decode(tokens) == whole[:end]


def test_a_stop_inside_a_subword_cuts_the_text() -> None:
    tokenizer = train_tokenizer("bpe", "the cat and the hat and the bat\n" * 20, vocab_size=290)
    torch.manual_seed(0)
    rnn = RNN(vocab_size=tokenizer.vocab_size, hidden_size=8, tokenizer=tokenizer)
    with torch.no_grad():  # " the" for ever
        rnn.head.bias[tokenizer.token(" the")] = 50.0
    assert rnn.generate("the", 5, stop="t") == "the t"
    assert rnn.generate("the", 3) == "the the the the"


def test_text_with_bytes_that_are_no_characters() -> None:
    torch.manual_seed(0)
    rnn = RNN(vocab_size=256, hidden_size=8, tokenizer=ByteTokenizer())
    text = rnn.generate("a", 50, seed=1)
    tokens = rnn.generate(torch.tensor([97]), 50, seed=1)
    assert text == bytes(tokens.tolist()).decode(errors="replace")
    assert "a" + "".join(rnn.generate("a", 50, seed=1, stream=True)) == text


# ---------------------------------------------------------------------------------------------------
# Streams


@pytest.mark.parametrize("stop", [None, "\n", "b c", "ab"])
def test_a_stream_makes_up_the_whole(stop: str | None) -> None:
    options = {"max_new_tokens": 60, "seed": 3, "stop": stop, **FILTERED}
    stream = LSTM.generate("ab", stream=True, **options)
    assert isinstance(stream, Generation)
    pieces = list(stream)
    assert "ab" + "".join(pieces) == LSTM.generate("ab", **options) == stream.result
    prompts = ["a", "bcd e", "fg"]
    rows = list(LSTM.generate(prompts, stream=True, **options))
    joined = [prompt + "".join(row[i] for row in rows) for i, prompt in enumerate(prompts)]
    assert joined == LSTM.generate(prompts, **options)


def test_a_stream_of_tokens() -> None:
    prompt = torch.tensor([1, 2])
    assert list(LSTM.generate(prompt, 30, seed=1, stream=True)) == LSTM.generate(prompt, 30, seed=1)[2:].tolist()
    prompts = [torch.tensor([1, 2, 3, 4]), torch.tensor([5])]
    steps = torch.stack(list(LSTM.generate(prompts, 10, seed=1, stream=True)), 1)
    for row, prompt, whole in zip(steps, prompts, LSTM.generate(prompts, 10, seed=1), strict=True):
        assert torch.equal(row[row != -100], whole[len(prompt) :])


def test_a_stream_can_be_left_and_continued() -> None:
    whole = LSTM.generate("ab", 30, seed=3)
    stream = LSTM.generate("ab", 30, seed=3, stream=True)
    with pytest.raises(RuntimeError, match="state: expected every row to have a token of its own"):
        _ = stream.state
    first = "".join(next(stream) for _ in range(9))
    assert stream.result == whole[:11]
    assert "ab" + first + LSTM.generate("", 21, state=stream.state) == whole
    assert "ab" + first + "".join(stream) == whole


def test_a_stream_does_not_touch_modes() -> None:
    rnn = model(dropout=0.5).train()
    stream = rnn.generate("ab", 30, seed=3, stream=True)
    next(stream)
    assert rnn.training
    assert torch.is_grad_enabled()
    assert rnn(torch.tensor([[1, 2]])).logits.requires_grad
    assert rnn.generate("ab", 30, seed=3) == rnn.eval().generate("ab", 30, seed=3), "dropout in generation"


# ---------------------------------------------------------------------------------------------------
# Logits by a function of the caller


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, FILTERED])
def test_a_processor_that_changes_nothing_changes_nothing(sampling: dict[str, float]) -> None:
    prompts = ["ab", "c", "d e"]
    seen = []

    def note(tokens: list[Tensor], logits: Tensor) -> Tensor:
        seen.append([row.tolist() for row in tokens])
        assert logits.shape == (len(tokens), len(LETTERS))
        return logits

    got = LSTM.generate(prompts, 9, seed=3, logits_processor=note, **sampling)
    assert got == LSTM.generate(prompts, 9, seed=3, **sampling)
    encoded = [LSTM.tokenizer.encode(text) for text in got]
    assert seen[0] == [encoded[1][:1]]
    assert seen[2] == [encoded[0][:3], encoded[1][:3], encoded[2][:3]]
    assert seen[-1] == [encoded[2][:-1]]


def test_a_processor_can_forbid_and_force() -> None:
    def no_a(tokens: list[Tensor], logits: Tensor) -> Tensor:
        logits[:, LSTM.tokenizer.token("a")] = -math.inf
        return logits

    assert "a" in LSTM.generate("b", 60, seed=3)
    assert "a" not in LSTM.generate("b", 60, seed=3, logits_processor=no_a)
    assert "a" not in "".join(LSTM.generate("b", 60, seed=3, logits_processor=no_a, stream=True))

    def count_up(tokens: list[Tensor], logits: Tensor) -> Tensor:
        following = torch.stack([row[-1] + 1 for row in tokens]) % len(LETTERS)
        return torch.nn.functional.one_hot(following, len(LETTERS)) * 1000.0

    assert LSTM.generate("bc", 8, logits_processor=count_up) == "bcdefgh\n a"
    with pytest.raises(ValueError, match=r"logits_processor: expected logits \(1, 10\) from it, got \(1, 9\)"):
        LSTM.generate("b", logits_processor=lambda tokens, logits: logits[:, 1:])
    with pytest.raises(ValueError, match="logits_processor: expected floating-point logits, got int64"):
        LSTM.generate("b", logits_processor=lambda tokens, logits: logits.long())


# ---------------------------------------------------------------------------------------------------
# Series


def naive_series(rnn: RNN, prompt: Tensor, steps: int, seed: int, temperature: float) -> Tensor:
    values = prompt
    for _ in range(steps):
        with torch.no_grad():
            density = rnn(values.unsqueeze(0)).distribution
        last = type(density)(*(part[:, -1] for part in vars(density).values()))
        values = torch.cat((values, last.draw(torch.tensor([[seed, len(values)]]), temperature)))
    return values


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("cell", CELLS)
def test_a_series_equals_the_naive_loop(cell: str, temperature: float) -> None:
    rnn = series_model(cell)
    prompt = torch.tensor([[5.0, -90.0], [6.0, -130.0], [4.0, -100.0]])
    got = rnn.generate(prompt, 12, seed=4, temperature=temperature)
    torch.testing.assert_close(got, naive_series(rnn, prompt, 12, 4, temperature), rtol=1e-3, atol=1e-3)


def test_a_series_with_layer_norm_and_zoneout() -> None:
    rnn = series_model(layer_norm=True, zoneout=0.2)
    prompt = torch.tensor([[4.0, -90.0], [6.0, -120.0]])
    torch.testing.assert_close(rnn.generate(prompt, 6, seed=2), naive_series(rnn, prompt, 6, 2, 1.0))


def test_rows_of_series() -> None:
    prompts = [torch.randn(length, 2) for length in (4, 1, 6)]
    together = SERIES.generate(prompts, 9, seed=2)
    for row, prompt in enumerate(prompts):
        alone = SERIES.generate(prompt, 9, seed=2 + row)
        assert_same(together[row], alone)
    stacked = SERIES.generate(torch.stack([prompts[0]] * 2), 9, seed=2)
    assert stacked.shape == (2, 13, 2)
    assert SERIES.generate(prompts[0], 9, seed=2, n=2).shape == (2, 13, 2)
    assert_same(stacked[0], together[0])


def test_a_series_in_parts_and_in_a_stream() -> None:
    prompt = torch.randn(3, 2)
    whole = SERIES.generate(prompt, 10, seed=2)
    first, state = SERIES.generate(prompt, 4, seed=2, return_state=True)
    assert torch.equal(torch.cat((first, SERIES.generate(prompt[:0], 6, state=state))), whole)
    assert torch.equal(torch.stack(list(SERIES.generate(prompt, 10, seed=2, stream=True))), whole[3:])
    steps = torch.stack(list(SERIES.generate([prompt, prompt[:1]], 10, seed=2, stream=True)), 1)
    assert steps.shape == (2, 12, 2)
    assert bool(steps[0, :2].isnan().all())
    assert torch.isfinite(steps[0, 2:]).all()


# ---------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("abz", {}, "prompt: text: 'z' in line 1, column 3 is not among the 10 characters"),
        ("", {}, "prompt: expected at least one token where no state is continued"),
        (torch.tensor([1, 10]), {}, "prompt: expected tokens 0 to 9, got 10 in row 0"),
        (torch.tensor([[1], [-1]]), {}, "prompt: expected tokens 0 to 9, got -1 in row 1"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens: expected an int of at least 1, got 0"),
        ("a", {"temperature": -1.0}, "temperature: expected a finite number of at least 0"),
        ("a", {"top_k": 0}, "top_k: expected an int of at least 1, got 0"),
        ("a", {"top_p": 0.0}, "top_p: expected a number above 0 and at most 1, got 0.0"),
        ("a", {"top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ("a", {"min_p": -0.1}, "min_p: expected a number from 0 to 1, got -0.1"),
        ("a", {"repetition_penalty": 0.0}, "repetition_penalty: expected a finite number above 0"),
        ("a", {"stop": ""}, "stop: expected strings that are not empty"),
        ("a", {"stop": 10}, "stop: expected tokens 0 to 9, got 10"),
        ("a", {"stop": "z"}, "stop: text: 'z' in line 1"),
        ("a", {"seed": [1, 2]}, "seed: expected one, or one for each of the 1 rows, got 2"),
        ("a", {"seed": -1}, "seed: expected an int of at least 0, got -1"),
        ("a", {"seed": [2**64]}, "seed: expected an int under 2[*][*]64, got 18446744073709551616"),
        ("a", {"seed": 1.5}, "seed: expected an int of at least 0, got 1.5"),
        ("a", {"seed": torch.tensor(3)}, r"seed: expected an int of at least 0, got tensor\(3\)"),
        ("a", {"stop": 1.5}, "stop: expected an int of at least 0, got 1.5"),
        ("a", {"n": 0}, "n: expected an int of at least 1, got 0"),
        ("a", {"stream": True, "return_state": True}, "return_state: expected False where stream is True"),
    ],
)
def test_bad_arguments(prompt: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LSTM.generate(prompt, **options)


@pytest.mark.parametrize(
    "prompt", [None, 3, [], [1, 2], ["a", torch.tensor([1])], torch.tensor(1), torch.ones(1, 1, 1).long()]
)
def test_bad_forms_of_prompt(prompt: object) -> None:
    with pytest.raises(TypeError, match="prompt: expected"):
        LSTM.generate(prompt)


def test_any_top_k_above_the_vocabulary_leaves_all() -> None:
    whole = LSTM.generate("ab", 20, seed=1)
    for top_k in (10, 11, 2**31, 2**63, 2**70):
        assert LSTM.generate("ab", 20, seed=1, top_k=top_k) == whole


def test_bad_prompts_of_a_series() -> None:
    with pytest.raises(TypeError, match=r"prompt: expected values \(T, 2\) or \(B, T, 2\)"):
        SERIES.generate("abc")
    with pytest.raises(TypeError, match=r"prompt: expected values \(T, 2\) or \(B, T, 2\)"):
        SERIES.generate(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"prompt: expected values \(T, 2\) or .*, got \(5,\)$"):
        SERIES.generate(torch.zeros(5))
    with pytest.raises(ValueError, match=r"NaN or infinite; the weights are damaged, or the temperature is too large"):
        SERIES.generate(torch.ones(3, 2), 5, temperature=1e300, seed=0)
    with pytest.raises(ValueError, match=r"prompt: expected floats \(T, 2\) a row, got float32 \(3, 1\)"):
        SERIES.generate(torch.ones(3, 1))
    with pytest.raises(ValueError, match="prompt: expected finite values"):
        SERIES.generate(torch.tensor([[1.0, math.nan]]))
    for name, value in {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "stop": 1, "repetition_penalty": 2.0}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .* for a model of numbers"):
            SERIES.generate(torch.ones(3, 2), **{name: value})


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    _, state = LSTM.generate("ab", 2, seed=1, return_state=True)
    with pytest.raises(ValueError, match="state: expected one of 2 rows, as the prompt has, got 1"):
        LSTM.generate(["", ""], state=state)
    with pytest.raises(ValueError, match="state: expected that of a model with this configuration"):
        model("gru").generate("", state=state)
    with pytest.raises(ValueError, match="state: expected that of a model with this configuration"):
        model(hidden_size=8).generate("", state=state)
    for token in (-1, 10):
        with pytest.raises(ValueError, match=f"state: expected pending tokens 0 to 9, got {token} in row 0"):
            LSTM.generate("", state=dataclasses.replace(state, pending=torch.tensor([token])))
    for other in (3, (state.h, state.c), vars(state)):
        with pytest.raises(TypeError, match="state: expected a GenerationState, got "):
            LSTM.generate("", state=other)
    with pytest.raises(ValueError, match="seed: expected None where a state is continued"):
        LSTM.generate("", state=state, seed=1)
    with pytest.raises(FileNotFoundError, match="no such file"):
        GenerationState.load(tmp_path / "absent")
    LSTM.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: not the state of a generation"):
        GenerationState.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad: float, temperature: float) -> None:
    rnn = model()
    with torch.no_grad():
        rnn.head.bias[3] = bad
    with pytest.raises(ValueError, match="model: its scores of token 2 of row 0 are NaN or infinite"):
        rnn.generate("ab", 5, temperature=temperature)
    numbers = series_model()
    with torch.no_grad():
        numbers.head.weight[3] = bad
    with pytest.raises(ValueError, match="model: its prediction of step 1 is NaN or infinite"):
        numbers.generate(torch.ones(1, 2), 5, temperature=temperature)


def test_a_model_without_a_tokenizer() -> None:
    rnn = RNN(vocab_size=4, hidden_size=4)
    for arguments in ({"prompt": "a"}, {"prompt": torch.tensor([1]), "stop": "a"}):
        with pytest.raises(ValueError, match="as the model has no tokenizer, got a string"):
            rnn.generate(**arguments)
