"""Generation by a GPT: against a naive loop over the whole text, and row by row, piece by piece, part by part."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgen.models import GPT, GPTConfig, GPTState
from fastgen.reference.generate import pick_tokens
from fastgen.tokenizers import CharTokenizer

LETTERS = "abcdefgh \n"
CONTEXT = 16
FILTERED = {"temperature": 0.8, "top_k": 8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES["max_position_embeddings"] = CONTEXT


def model(name: str, **fields: Any) -> GPT:
    kind = GPTConfig.llama if name == "llama" else GPTConfig
    more = {"num_key_value_heads": 2} if name == "llama" else {}
    torch.manual_seed(0)
    made = GPT(kind(len(LETTERS), **{**SIZES, **more, **fields}), tokenizer=CharTokenizer(LETTERS))
    with torch.no_grad():
        for parameter in made.parameters():  # so that the distributions are not flat
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made.eval()


MODELS = {name: model(name) for name in ("gpt2", "llama")}
NAMES = st.sampled_from(sorted(MODELS))


def naive(gpt: GPT, prompt: Tensor, steps: int, seed: int, **sampling: float) -> Tensor:
    """prompt (T,) and `steps` tokens; every one from a forward pass over the window before it."""
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    tokens = prompt
    for _ in range(steps):
        first = 0
        while len(tokens) - first > CONTEXT:
            first += CONTEXT // 2
        with torch.no_grad():
            logits = gpt(tokens[first:].unsqueeze(0)).logits[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, tokens] = True
        place = torch.tensor([[seed, len(tokens)]])
        tokens = torch.cat((tokens, pick_tokens(logits, seen, place, *{**off, **sampling}.values())))
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_naive_loop_also_beyond_the_context(name: str) -> None:
    gpt = MODELS[name]
    for prompt in (torch.tensor([1, 5, 2]), torch.arange(CONTEXT) % 10):
        for sampling in ({"temperature": 0.0}, {}, FILTERED):
            got = gpt.generate(prompt, 3 * CONTEXT, seed=7, **sampling)
            assert torch.equal(got, naive(gpt, prompt, 3 * CONTEXT, 7, **sampling)), sampling


@pytest.mark.parametrize("name", MODELS)
def test_greedy_as_transformers_has_it(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    MODELS[name].save_pretrained(tmp_path, layout="huggingface")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = torch.tensor([[1, 5, 2], [4, 4, 9]])
    length = CONTEXT - 3
    expected = other.generate(prompts, max_new_tokens=length, do_sample=False, pad_token_id=0)
    assert torch.equal(MODELS[name].generate(prompts, length, temperature=0), expected)


@settings(max_examples=25)
@given(
    NAMES,
    st.lists(st.text(LETTERS, min_size=1, max_size=CONTEXT), min_size=1, max_size=5),
    st.sampled_from([{"temperature": 0.0}, {}, FILTERED]),
    st.data(),
)
def test_a_row_does_not_depend_on_its_batch(
    name: str, prompts: list[str], sampling: dict[str, float], data: st.DataObject
) -> None:
    gpt = MODELS[name]
    seeds = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(prompts), max_size=len(prompts)))
    together = gpt.generate(prompts, 20, seed=seeds, **sampling)
    alone = [gpt.generate(prompt, 20, seed=seed, **sampling) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone


def test_several_continuations_of_each_prompt() -> None:
    gpt = MODELS["llama"]
    together = gpt.generate(["ab", "cab"], 12, seed=5, n=3)
    alone = [gpt.generate(prompt, 12, seed=5 + row) for row, prompt in enumerate(["ab"] * 3 + ["cab"] * 3)]
    assert together == alone
    assert gpt.generate("ab", 12, seed=5, n=3) == alone[:3]
    assert len(set(alone[:3])) == 3


def test_threads_do_not_show(threads: Callable[[int], None]) -> None:
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(MODELS["llama"].generate(["ab", "c", "def"], 30, seed=3))
    assert results[0] == results[1] == results[2]


@given(NAMES, st.integers(1, 39), st.booleans())
@settings(max_examples=20)
def test_a_cut_between_prompt_and_rest_does_not_show(name: str, cut: int, penalised: bool) -> None:
    gpt, sampling = MODELS[name], FILTERED if penalised else {}
    whole = gpt.generate("ab", 40, seed=3, **sampling)
    if 2 + cut <= CONTEXT:
        assert gpt.generate(whole[: 2 + cut], 40 - cut, seed=3, **sampling) == whole
    first, state = gpt.generate("ab", cut, seed=3, return_state=True, **sampling)
    before = copy.deepcopy(state)
    second, later = gpt.generate("", 40 - cut, state=state, return_state=True, **sampling)
    assert first + second == whole
    assert gpt.generate("", 40 - cut, state=before, **sampling) == second, "the state was changed"
    assert later.position.tolist() == [41]
    assert later.pending.tolist() == gpt.tokenizer.encode(whole[-1])
    assert later.context.shape[1] < CONTEXT


def test_a_state_takes_more_prompt_and_survives_a_file(tmp_path: Path) -> None:
    gpt = MODELS["gpt2"]
    heads, state = gpt.generate(["ab", "cabc"], 3, seed=3, return_state=True)
    state.save(tmp_path / "state.safetensors")
    state = GPTState.load(tmp_path / "state.safetensors")
    assert (state.context == -100).sum() == 2  # the shorter row
    more = gpt.generate(["cd\n", "a"], 10, state=state)
    for head, prompt, text, seed in zip(heads, ["cd\n", "a"], more, [3, 4], strict=True):
        whole = head + prompt
        assert text == gpt.generate(whole, 10, seed=seed)[len(head) :]


@given(NAMES, st.lists(st.text(LETTERS, min_size=1, max_size=9), min_size=1, max_size=3))
@settings(max_examples=10)
def test_a_stream_gives_the_same_piece_by_piece(name: str, prompts: list[str]) -> None:
    gpt = MODELS[name]
    expected = gpt.generate(prompts, 20, seed=3)
    generation = gpt.generate(prompts, 20, seed=3, stream=True)
    texts = list(prompts)
    for pieces in generation:
        assert max(len(piece) for piece in pieces) == 1
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == generation.result == expected
    row = list(gpt.generate(torch.tensor([1, 2]), 5, seed=3, stream=True))
    assert row == gpt.generate(torch.tensor([1, 2]), 5, seed=3)[2:].tolist()


def test_rows_that_stop_leave_the_others_as_they_are() -> None:
    gpt = MODELS["llama"]
    prompts = ["ab", "c", "def", "a"]
    free = gpt.generate(prompts, 30, seed=3)
    stop = "b"
    stopped = gpt.generate(prompts, 30, seed=3, stop=stop)
    for prompt, whole, text in zip(prompts, free, stopped, strict=True):
        end = whole.find(stop, len(prompt))
        assert text == (whole if end < 0 else whole[: end + 1])
    assert len({len(text) for text in stopped}) > 1
    pair = free[0][6:8]
    assert gpt.generate("ab", 30, seed=3, stop=[pair]) == free[0][: 2 + free[0][2:].index(pair) + 2]
    tokens = gpt.generate(torch.tensor([[0, 1], [2, 2]]), 30, seed=3, stop=gpt.tokenizer.token(stop))
    assert tokens.shape[0] == 2
    assert ((tokens == -100).sum(1) > 0).sum() == 1


def test_a_processor_sees_each_row_and_decides() -> None:
    gpt = MODELS["gpt2"]
    calls: list[list[int]] = []

    def only_the_next_letter(tokens: list[Tensor], logits: Tensor) -> Tensor:
        calls.append([len(row) for row in tokens])
        wanted = torch.stack([(row[-1] - 1) % 8 + 2 for row in tokens])  # the alphabet is in order: \n, space, a to h
        return torch.full_like(logits, -torch.inf).scatter(1, wanted.unsqueeze(1), 0.0)

    texts = gpt.generate(["a", "fg"], 5, seed=3, logits_processor=only_the_next_letter)
    assert texts == ["abcdef", "fghabcd"]
    assert calls[:2] == [[1, 2], [2, 3]]
    with pytest.raises(ValueError, match=r"^logits_processor: expected logits \(1, 10\) from it, got \(1, 3\)"):
        gpt.generate("a", 5, logits_processor=lambda tokens, logits: logits[:, :3])


def test_tokens_without_a_text_are_never_drawn() -> None:
    gpt = model("gpt2")
    gpt.tokenizer = CharTokenizer("abc")
    text = gpt.generate("ab", 200, seed=3, temperature=3.0)
    assert set(text) == set("abc")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    gpt = model("llama").to(dtype)
    prompt = torch.tensor([1, 5, 2])
    got = gpt.generate(prompt, 20, seed=7)
    assert got.shape == (23,)
    if dtype == torch.float64:
        assert torch.equal(got, naive(gpt, prompt, 20, 7))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gpt.generate(prompt, 20, seed=7), got)


def test_training_mode_is_put_back_and_has_no_effect() -> None:
    gpt = model("gpt2", dropout=0.5)
    expected = gpt.generate("ab", 9, seed=3)
    assert gpt.train().generate("ab", 9, seed=3) == expected
    assert gpt.training
    assert gpt.layers[0].training


def test_without_a_seed_torch_decides() -> None:
    gpt = MODELS["gpt2"]
    torch.manual_seed(1)
    first = gpt.generate("ab", 20)
    assert gpt.generate("ab", 20) != first
    torch.manual_seed(1)
    assert gpt.generate("ab", 20) == first


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": "a" * 17}, ValueError, "prompt: expected at most 16 tokens, the context of the model, got 17"),
        ({"prompt": ""}, ValueError, "prompt: expected at least one token where no state is continued"),
        ({"prompt": "x"}, ValueError, "prompt: text: 'x' in line 1, column 1 is not among"),
        ({"prompt": torch.tensor([99])}, ValueError, "prompt: expected tokens 0 to 9, got 99 in row 0"),
        ({"prompt": "a", "max_new_tokens": 0}, ValueError, "max_new_tokens: expected an int of at least 1"),
        ({"prompt": "a", "temperature": -1.0}, ValueError, "temperature: expected a finite number"),
        ({"prompt": "a", "top_p": 0.0}, ValueError, "top_p: expected a number above 0 and at most 1"),
        ({"prompt": "a", "stop": 10}, ValueError, "stop: expected tokens 0 to 9, got 10"),
        ({"prompt": "a", "stream": True, "return_state": True}, ValueError, "return_state: expected False"),
    ],
)
def test_errors(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        MODELS["gpt2"].generate(**arguments)


def test_states_of_others_are_refused() -> None:
    _, state = MODELS["gpt2"].generate("ab", 3, seed=3, return_state=True)
    with pytest.raises(ValueError, match=r"^state: expected one of 2 rows, as the prompt has, got 1"):
        MODELS["gpt2"].generate(["", ""], 3, state=state)
    with pytest.raises(ValueError, match=r"^state: expected that of a model with this configuration"):
        GPT(vocab_size=11, **SIZES).generate(torch.tensor([1]), 3, state=state)
    with pytest.raises(ValueError, match=r"^seed: expected None where a state is continued"):
        MODELS["gpt2"].generate("", 3, state=state, seed=3)


def test_scores_that_are_not_finite_end_it() -> None:
    gpt = model("gpt2")
    with torch.no_grad():
        gpt.norm.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^model: its scores of token 2 of row 0 are NaN or infinite"):
        gpt.generate("ab", 3)
