from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from fastgen.models import GPT, GPTConfig, RopeScaling, from_pretrained
from fastgen.tokenizers import CharTokenizer

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "gpt2": GPTConfig(61, **TINY),
    "llama": GPTConfig.llama(61, num_key_value_heads=2, **TINY),
}


def model(name: str = "gpt2", dtype: torch.dtype = torch.float32, **fields: Any) -> GPT:
    config = GPTConfig.from_dict({**CONFIGS[name].to_dict(), **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = GPT(config).to(dtype)
        with torch.no_grad():  # biases that are not zero, attention that is not flat
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def tokens(rows: int = 3, length: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# Beside transformers


def theirs(name: str, **fields: Any) -> Any:
    """A small model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": None, "eos_token_id": None}
    if name == "gpt2":
        config = transformers.GPT2Config(
            **{"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, **ends, **fields}
        )
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(
            vocab_size=61, **{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 24, **ends, **fields}
        )
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 40, "tie_word_embeddings": False}),
    ("gpt2", {"activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    ("llama", {}),
    ("llama", {"num_key_value_heads": None, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 6}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **SCALING}}),
]


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_logits_and_gradients_are_those_of_transformers(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    other = theirs(name, **fields).double()
    other.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.dtype == torch.float64
    inputs, targets = tokens(), tokens(seed=1)
    expected = other(inputs).logits
    output = ours(inputs, targets)
    torch.testing.assert_close(output.logits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours(inputs).logits, output.logits)
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-7, atol=1e-7)

    loss.backward()
    output.loss.backward()
    gradient = other.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours.embed_tokens.weight.grad, gradient, rtol=1e-5, atol=1e-7)
    first = other.transformer.h[0].mlp.c_fc if name == "gpt2" else other.model.layers[0].mlp.down_proj
    mlp = ours.layers[0].mlp
    mine = mlp.up_proj.weight.grad.t() if name == "gpt2" else mlp.down_proj.weight.grad
    torch.testing.assert_close(mine, first.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_transformers_loads_what_is_saved_in_its_layout(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs(name, **fields).save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="huggingface")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[name]
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, ours(tokens()).logits, rtol=1e-4, atol=1e-5)
    same = from_pretrained(tmp_path / "ours")
    assert same.config == ours.config
    for key, value in same.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sharded_and_bare_weights(name: str, tmp_path: Path) -> None:
    other = theirs(name)
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    other.save_pretrained(tmp_path / "whole")
    expected = GPT.from_pretrained(tmp_path / "whole")(tokens()).logits
    assert torch.equal(GPT.from_pretrained(tmp_path / "shards")(tokens()).logits, expected)
    if name == "gpt2":  # without the prefix, and with the constants of old versions
        from safetensors.torch import load_file, save_file

        state = load_file(tmp_path / "whole" / "model.safetensors")
        state = {key.removeprefix("transformer."): value for key, value in state.items()}
        state["h.0.attn.bias"] = torch.ones(24, 24).tril()
        save_file(state, tmp_path / "whole" / "model.safetensors")
        assert torch.equal(GPT.from_pretrained(tmp_path / "whole")(tokens()).logits, expected)


def test_old_spellings_of_rotary_scaling(tmp_path: Path) -> None:
    theirs("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **SCALING}).save_pretrained(tmp_path)
    expected = GPT.from_pretrained(tmp_path).config
    assert expected.rope_scaling == RopeScaling(**SCALING)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    fields |= {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **SCALING}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert GPT.from_pretrained(tmp_path).config == expected


def test_damaged_folders(tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    good = json.loads((tmp_path / "config.json").read_text())
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())

    def error(fields: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**good, **fields}))
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            GPT.from_pretrained(tmp_path)
        return str(caught.value)

    config = f"{tmp_path / 'config.json'}: "
    assert error({"hidden_act": "relu"}).startswith(config + "hidden_act: expected 'silu', others are not supported")
    scaling = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10.0}
    assert "rope_scaling: expected the type default or llama3, got 'yarn'" in error({"rope_parameters": scaling})
    assert error({"num_attention_heads": 3}).startswith(config + "num_key_value_heads: expected a divisor of the 3")
    weights = f"{index}: the weights do not fit the configuration: "
    more = error({"num_hidden_layers": 3})
    assert more.startswith(weights + "missing model.layers.2.input_layernorm.weight, ")
    assert more.endswith("and 5 more")
    fewer = error({"num_hidden_layers": 1})
    assert fewer.startswith(weights + "unexpected model.layers.1.")
    wide = error({"vocab_size": 62})
    assert wide == weights + "embed_tokens.weight expected shape (62, 32), got (61, 32)"
    assert "self_attn.q_proj.weight expected shape (64, 32), got (32, 32)" in error({"head_dim": 16})
    assert error({"quantization_config": {"bits": 4}}).startswith(config + "quantization_config: expected none")
    assert error({"rope_parameters": "llama3"}) == config + "rope_parameters: expected an object, got 'llama3'"
    cut = {"rope_type": "llama3", **{name: value for name, value in SCALING.items() if name != "factor"}}
    assert error({"rope_parameters": cut}) == config + "rope_scaling: expected a factor with the type llama3, got none"
    assert (
        error({"model_type": "mistral"}) == config + "model_type: expected gpt or gpt2 or llama for GPT, got 'mistral'"
    )
    assert error({"model_type": "gpt2", "activation_function": ["relu"]}).startswith(config + "activation_function: ")

    index.write_text(json.dumps({"weight_map": {**places["weight_map"], "x": "../x.safetensors"}}))
    assert "expected names of files beside it" in error({})
    index.write_text(json.dumps({"weight_map": {**places["weight_map"], "x": "absent.safetensors"}}))
    assert "absent.safetensors: no such file" in error({})
    index.write_text("[]")
    assert error({}) == f"{index}: expected a JSON object, got list"
    index.write_bytes(b"\xff")
    assert error({}) == f"{index}: not valid JSON (not UTF-8 text)"
    index.write_text(json.dumps(places))
    shard = tmp_path / sorted(places["weight_map"].values())[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    assert error({}).startswith(f"{shard}: damaged or not a safetensors file")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.weight",
            lambda x: x.sum(),
            r"q_proj.weight expected shape \(32, 32\), got \(\)",
        ),
        (
            "model.layers.0.mlp.up_proj.weight",
            lambda x: x[:, :5],
            r"up_proj.weight expected shape \(.*, 32\), got .*, 5\)",
        ),
        ("model.norm.weight", lambda x: x.to(torch.int8), "norm.weight expected float32, .* got int8"),
        ("model.norm.weight", lambda x: x.to(torch.float8_e5m2), "norm.weight expected float32, .* got float8_e5m2"),
        (
            "lm_head.weight",
            lambda x: x + 1,
            "lm_head.weight is not model.embed_tokens.weight, though tie_word_embeddings",
        ),
    ],
)
def test_damaged_tensors(name: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    theirs("llama", tie_word_embeddings=name == "lm_head.weight").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
    save_file({**state, name: change(state[source]).contiguous()}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        GPT.from_pretrained(tmp_path)


def test_a_configuration_without_its_vocabulary(tmp_path: Path) -> None:
    """null is a field that is left out: theirs has a default, ours has none."""
    theirs("gpt2", vocab_size=50257).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "vocab_size": None}))
    gpt = GPT.from_pretrained(tmp_path)
    assert gpt.vocab_size == 50257
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt"}))
    with pytest.raises(ValueError, match=r"config.json: vocab_size: expected a value in GPTConfig, got none"):
        GPT.from_pretrained(tmp_path)


def test_norms_in_float32_beside_half_types(tmp_path: Path) -> None:
    theirs("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({n: x.float() if "norm" in n else x for n, x in load_file(path).items()}, path)
    gpt = GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    want = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(gpt(tokens()).logits, want(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert GPT.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: no such file; pytorch_model.bin is a pickle"):
        GPT.from_pretrained(tmp_path)


def test_a_configuration_that_is_neither_is_saved_as_our_own_alone(tmp_path: Path) -> None:
    mixed = model("gpt2", position_embedding="rotary")
    with pytest.raises(ValueError, match=r"^layout: expected 'fastgen' .*gpt2 has not position_embedding 'rotary'"):
        mixed.save_pretrained(tmp_path, layout="huggingface")
    assert not list(tmp_path.iterdir())
    mixed.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(tokens()).logits, mixed.eval()(tokens()).logits)


# ---------------------------------------------------------------------------------------------------
# By itself


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_cross_entropy_of_the_logits(name: str) -> None:
    gpt = model(name, torch.float64)
    targets = tokens(seed=1)
    targets[0, :7] = -100
    output = gpt(tokens(), targets)
    assert "logits" not in vars(output)
    loss = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.loss, loss)
    parameters = list(gpt.parameters())
    for ours, expected in zip(
        torch.autograd.grad(output.loss, parameters, retain_graph=True),
        torch.autograd.grad(loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        output = gpt(tokens(), targets)
    assert not output.logits.requires_grad


def test_the_tied_embedding_has_a_dense_gradient_of_every_order() -> None:
    gpt = model("gpt2", torch.float64)
    weight = gpt.embed_tokens.weight
    plain = model("gpt2", torch.float64, tie_word_embeddings=False)
    assert plain.lm_head is not None
    plain.load_state_dict({**gpt.state_dict(), "lm_head.weight": weight})
    both = (plain.embed_tokens.weight, plain.lm_head.weight)

    def gradients(order: int) -> tuple[Tensor, Tensor]:
        ours = torch.autograd.grad(gpt(tokens(), tokens(seed=1)).loss, weight, create_graph=order == 2)
        theirs = torch.autograd.grad(plain(tokens(), tokens(seed=1)).loss, both, create_graph=order == 2)
        if order == 2:
            ours = torch.autograd.grad(ours[0].square().sum(), weight)
            theirs = torch.autograd.grad(sum(theirs).square().sum(), both)
        return ours[0], sum(theirs)

    for order in (1, 2):
        torch.testing.assert_close(*gradients(order))
    gpt(tokens()).hidden.sum().backward()  # the sparse one alone
    assert weight.grad is not None
    assert not weight.grad.is_sparse
    first = weight.grad.clone()
    gpt(tokens()).hidden.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * first)


@given(length=st.integers(1, 24), place=st.integers(0, 23), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=20)
def test_no_look_ahead(length: int, place: int, name: str) -> None:
    gpt, place = model(name).eval(), place % length
    before = tokens(2, length)
    after = before.clone()
    after[:, place:] = (after[:, place:] + 1) % 61
    a, b = gpt(before).logits, gpt(after).logits
    torch.testing.assert_close(a[:, :place], b[:, :place], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a[:, place], b[:, place], rtol=1e-3, atol=1e-3)


@given(lengths=st.lists(st.integers(0, 24), min_size=1, max_size=5), name=st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=20)
def test_packed_documents_do_not_see_each_other(lengths: list[int], name: str) -> None:
    if sum(lengths) == 0:
        lengths = [1]
    gpt = model(name, torch.float64)
    packed = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    logits = gpt(packed, cu_seqlens=cu_seqlens).logits
    alone = [gpt(document).logits for document in packed.split(lengths, dim=1) if document.numel()]
    torch.testing.assert_close(logits, torch.cat(alone, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    gpt = model(name, torch.float64, dropout=0.2, attention_dropout=0.1, embedding_dropout=0.1)
    gradients = []
    for gpt.gradient_checkpointing in (False, True):
        gpt.zero_grad()
        torch.manual_seed(3)
        gpt(tokens(), tokens(seed=1)).loss.backward()
        gradients.append([parameter.grad for parameter in gpt.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("which", ["dropout", "attention_dropout", "embedding_dropout"])
def test_each_dropout_acts_in_training_alone_and_keeps_the_mean(which: str) -> None:
    gpt, plain = model(**{which: 0.3}), model()
    assert torch.equal(gpt.eval()(tokens()).logits, plain.eval()(tokens()).logits)
    gpt.train()
    torch.manual_seed(0)
    first = gpt(tokens()).logits
    torch.manual_seed(0)
    assert torch.equal(gpt(tokens()).logits, first)
    assert not torch.equal(gpt(tokens()).logits, first)
    attention = gpt.layers[0].self_attn if which == "attention_dropout" else None
    if attention is None:
        x = torch.ones(200, 100)
        dropped = gpt._dropped(x, 0.3)
        assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
        assert float(dropped.mean()) == pytest.approx(1.0, abs=0.02)


def test_initial_weights_are_as_in_gpt2() -> None:
    torch.manual_seed(0)
    gpt = GPT(vocab_size=500, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    for name, parameter in gpt.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all()), name
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.02 / math.sqrt(8) if writes else 0.02
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name
    loss = gpt(tokens(), tokens(seed=1)).loss
    assert loss.item() == pytest.approx(math.log(500), rel=0.02)


def test_sizes_of_the_published_models() -> None:
    with torch.device("meta"):
        gpt2 = GPT(
            vocab_size=50257,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=1024,
        )
        smollm = GPT(
            GPTConfig.llama(
                49152,
                hidden_size=576,
                num_hidden_layers=30,
                num_attention_heads=9,
                num_key_value_heads=3,
                intermediate_size=1536,
                tie_word_embeddings=True,
            )
        )
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert sum(p.numel() for p in smollm.parameters()) == 134_515_008
    assert GPTConfig.llama(10, hidden_size=4096, num_attention_heads=32).intermediate_size == 10944
    assert GPTConfig(10, hidden_size=48).intermediate_size == 192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    exact = model("llama", torch.float64)
    half = model("llama", dtype)
    output = half(tokens(), tokens(seed=1))
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == dtype
    assert float(output.loss) == pytest.approx(float(exact(tokens(), tokens(seed=1)).loss), rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast(name: str) -> None:
    gpt = model(name)
    with torch.autocast("cpu", torch.bfloat16):
        output = gpt(tokens(), tokens(seed=1))
        inside = output.logits
    assert output.loss.dtype == torch.float32
    assert inside.dtype == torch.bfloat16
    assert float(output.loss) == pytest.approx(float(gpt(tokens(), tokens(seed=1)).loss), rel=0.02)
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in gpt.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled(name: str) -> None:
    gpt = model(name)
    compiled = torch.compile(
        gpt, fullgraph=True, backend="aot_eager"
    )  # the graph; generating code for it takes a minute
    output, expected = compiled(tokens(), tokens(seed=1)), gpt(tokens(), tokens(seed=1))
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((tokens().float(),), TypeError, "input_ids: expected int64 or int32 tokens, got float32"),
        ((tokens()[0],), ValueError, r"input_ids: expected shape \(B, T\), neither of them 0, got \(20,\)"),
        ((tokens() + 60,), ValueError, "input_ids: expected tokens 0 to 60, got"),
        ((tokens(1, 25),), ValueError, "input_ids: expected at most 24 tokens a row, the context, got 25"),
        ((tokens(), tokens(2)), ValueError, r"targets: expected the shape of input_ids, \(3, 20\), got \(2, 20\)"),
        ((tokens(), tokens().int()), TypeError, "targets: expected int64 tokens, got int32"),
        ((tokens(), tokens() + 60), ValueError, "target: expected 0 to 60 or -100, got"),
    ],
)
def test_bad_tokens(arguments: tuple[Tensor, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        model()(*arguments)


@pytest.mark.parametrize(
    ("rows", "cu_seqlens", "kind", "message"),
    [
        (1, [0, 20], TypeError, "cu_seqlens: expected an int64 or int32 tensor, got list"),
        (3, torch.tensor([0, 20]), ValueError, "input_ids: expected one row of packed documents"),
        (1, torch.tensor([0]), ValueError, r"cu_seqlens: expected shape \(N \+ 1,\) on the CPU, got int64 \(1,\)"),
        (1, torch.tensor([0, 9]), ValueError, r"cu_seqlens: expected to ascend from 0 to 20, got \[0, 9\]"),
        (1, torch.tensor([0, 9, 5, 20]), ValueError, "cu_seqlens: expected to ascend from 0 to 20"),
    ],
)
def test_bad_documents(rows: int, cu_seqlens: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        model()(tokens(rows), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected documents of at most 24 tokens"):
        model()(tokens(1, 30), cu_seqlens=torch.tensor([0, 5, 30]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected an int of at least 1, got 0"),
        ({"hidden_size": 30, "head_dim": 0}, "hidden_size: expected a multiple of the 4 heads, got 30"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of the 4 query heads, got 3"),
        ({"position_embedding": "alibi"}, "position_embedding: expected one of learned, rotary, got 'alibi'"),
        ({"normalization": "batch"}, "normalization: expected one of layer_norm, rms_norm"),
        ({"hidden_act": "tanh"}, "hidden_act: expected one of gelu_tanh, gelu, relu, silu, swiglu, got 'tanh'"),
        ({"dropout": 1.0}, "dropout: expected a finite number of at least 0 and below 1, got 1.0"),
        ({"attention_bias": 1}, "attention_bias: expected True or False, got 1"),
        ({"position_embedding": "rotary", "head_dim": 5}, "head_dim: expected an even int with rotary"),
        (
            {"position_embedding": "rotary", "hidden_size": 36, "head_dim": 0},
            "hidden_size: expected an even multiple of the 4 heads with rotary positions, got 36",
        ),
        ({"rope_scaling": SCALING}, "rope_scaling: expected None without rotary positions"),
        ({"position_embedding": "rotary", "rope_scaling": {"faktor": 2}}, "rope_scaling: no field 'faktor'"),
        ({"position_embedding": "rotary", "rope_scaling": {"factor": 0.5}}, "rope_scaling.factor: expected"),
        ({"n_layer": 3}, "GPTConfig: no field 'n_layer'"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        GPTConfig.from_dict({**CONFIGS["gpt2"].to_dict(), **fields})


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name: str) -> None:
    config = CONFIGS[name]
    if name == "llama":
        config = GPTConfig.from_dict({**config.to_dict(), "rope_scaling": SCALING})
        assert isinstance(config.rope_scaling, RopeScaling)
    assert GPTConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(GPTConfig.from_json(config.to_json()))


def test_the_tokenizer_may_be_smaller_than_the_vocabulary(tmp_path: Path) -> None:
    gpt = GPT(CONFIGS["gpt2"], tokenizer=CharTokenizer("abc"))
    gpt.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer == CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"^tokenizer: expected at most 2 tokens"):
        GPT(GPTConfig(2, **TINY), tokenizer=CharTokenizer("abc"))
