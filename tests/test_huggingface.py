"""fastgen's attention inside models of transformers: outputs and gradients beside "eager", and when it is taken."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch

import fastgen
from fastgen import functional

transformers = pytest.importorskip("transformers")

from fastgen import huggingface  # noqa: E402

SMALL = {"vocab_size": 40, "max_position_embeddings": 64}
LLAMA = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MODELS = {
    "GPT2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=4,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "Gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**LLAMA, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
    "Mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA, sliding_window=4)),
    "GptOss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**LLAMA, sliding_window=4, num_local_experts=2, num_experts_per_tok=1)
    ),
    "Bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            **SMALL,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
}
DECODERS = [name for name in MODELS if name != "Bert"]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def tokens(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls():
    """The calls of fastgen's attention: their masks."""
    real, found = functional.scaled_dot_product_attention, []

    def spy(query, key, value, mask, *args, **kwargs):
        found.append(mask)
        return real(query, key, value, mask, *args, **kwargs)

    with mock.patch.object(huggingface, "scaled_dot_product_attention", spy):
        yield found


def logits_and_gradients(model, **inputs):
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(calls, name, padded):
    model = build(name)
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0  # on the left, as generation pads
    inputs = {"input_ids": ids, "attention_mask": mask}
    model.set_attn_implementation("eager")
    want = logits_and_gradients(model, **inputs)
    assert fastgen.accelerate(model) is model
    got = logits_and_gradients(model, **inputs)
    assert len(calls) == 2
    for given in calls:  # no mask of L x L
        assert tuple(given.shape) == (2, 1, 1, 11) if padded else given is None
    if padded:  # rows of padding see nothing, which every implementation treats in its own way
        got[0], want[0] = (x[mask.bool()] for x in (got[0], want[0]))
        got, want = got[:1], want[:1]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_eager(calls, name):
    """With the keys and values kept, and with them in a cache of fixed size."""
    model = build(name).eval()
    model.generation_config.pad_token_id = 0
    ids = tokens(rows=2, length=6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    for cache in ("dynamic", "static"):
        for given in (torch.ones_like(ids), mask):
            written = []
            for implementation in ("eager", "fastgen"):
                model.set_attn_implementation(implementation)
                out = model.generate(
                    ids,
                    attention_mask=given,
                    max_new_tokens=9,
                    do_sample=False,
                    cache_implementation=cache,
                    disable_compile=True,
                )
                written.append(out)
            assert torch.equal(*written)
    assert calls


def test_dropout_in_training_is_repeated_by_the_seed(calls):
    config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=4, attn_pdrop=0.5)
    model = fastgen.accelerate(transformers.GPT2LMHeadModel(config)).train()
    written = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        written.append(model(tokens()).logits)
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])
    assert len(calls) == 3


def test_bias_of_positions_with_gradient(calls):
    """An encoder's and a decoder's, with and without a mask."""
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    module = torch.nn.Module()
    for is_causal, given in (
        (True, None),
        (False, None),
        (False, causal),
        (True, torch.where(causal, 0.0, -1e9).double()),
    ):
        shape = None if given is None else given.expand(2, 1, 5, 5)
        out, weights = huggingface.attention(module, q, k, v, shape, is_causal=is_causal, position_bias=bias)
        assert weights is None
        hidden = causal if is_causal or given is not None else torch.ones_like(causal)
        want = functional.scaled_dot_product_attention(q, k, v, torch.where(hidden, bias, -torch.inf)).transpose(1, 2)
        torch.testing.assert_close(out, want)
        for a, b in zip(
            torch.autograd.grad(out.square().sum(), bias), torch.autograd.grad(want.square().sum(), bias), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["from_config", "from_pretrained"])
def test_by_name(calls, tmp_path, how):
    model = build("Llama")
    if how == "from_config":
        other = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation="fastgen")
    else:
        model.save_pretrained(tmp_path)
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastgen")
        torch.testing.assert_close(other(tokens()).logits, model(tokens()).logits)
    other(tokens())
    assert calls


def test_what_is_refused():
    model = fastgen.accelerate(build("Llama"))
    with pytest.raises(ValueError, match=r'^output_attentions: expected False with attn_implementation="fastgen"'):
        model(tokens(), output_attentions=True)
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"^cache: expected none that is paged"):
        huggingface.attention(torch.nn.Module(), q, q, q, None, cache=object())


def test_accelerate_reports_one_line_a_model(capsys):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.LSTM(3, 4)
            self.language = build("Llama")

    pair = fastgen.accelerate(Pair(), report=print)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Linear" not in line]
    assert lines == ["rnn: LSTM swapped", "language: LlamaForCausalLM swapped"]
    assert pair.language.config._attn_implementation == "fastgen"
    fastgen.accelerate(pair.language, report=print)
    lines = [line for line in capsys.readouterr().out.splitlines() if "Linear" not in line]
    assert lines == ["(the model): LlamaForCausalLM left, its attention is fastgen's already"]

    class Other(transformers.LlamaForCausalLM):
        _supports_flash_attn = False

    other = fastgen.accelerate(Other(pair.language.config.__class__(**LLAMA)), report=print)
    assert "left, it does not tell its attention function everything" in capsys.readouterr().out
    assert other.config._attn_implementation != "fastgen"


def test_fastgen_does_not_import_transformers():
    code = (
        "import sys, torch, fastgen; fastgen.accelerate(torch.nn.Linear(2, 2)); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_transformers_one_line_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import fastgen.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: transformers is not installed: pip install 'fastgen-torch[hf]'"
