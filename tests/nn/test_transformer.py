"""MultiheadAttention and the Transformer's layers beside those of torch.nn: values, gradients, state dicts, errors."""

from __future__ import annotations

import copy
import io
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import fastgen
import fastgen.nn as nn
from fastgen import functional
from fastgen.nn import transformer

E, H, B, L, S = 8, 2, 3, 5, 7


def pair(name: str, *args, dtype=torch.float64, **options):
    """(fastgen's module, PyTorch's) with the same parameters, whose values are not all zeros and ones."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, dtype=dtype, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.4)
    ours = getattr(nn, name)(*args, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_alike(ours, theirs, inputs, call):
    """Equal outputs, and equal gradients of the inputs and of all parameters."""
    results = []
    for module in (ours, theirs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = call(module, *leaves)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        wanted = [*leaves, *module.parameters()]
        results.append([out.detach(), *torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)])
    assert results[0][0].shape == results[1][0].shape
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def ours_everywhere(monkeypatch):
    """Without kernels the modules would be PyTorch's; the op's reference is to pass the same tests."""
    monkeypatch.setattr(transformer, "DEVICES", frozenset({"cpu"}))


@pytest.fixture
def kernel():
    """A spy on the attention function: the calls that were not PyTorch's."""
    with mock.patch.object(
        functional, "scaled_dot_product_attention", wraps=functional.scaled_dot_product_attention
    ) as spy:
        yield spy


# ---------------------------------------------------------------------------------------------------
# MultiheadAttention


def operands(batch_first: bool, batched: bool = True, width: tuple[int, int] = (E, E)):
    def normal(length, size):
        shape = (B, length, size) if batch_first else (length, B, size)
        return torch.randn(shape if batched else (length, size), dtype=torch.float64)

    return normal(L, E), normal(S, width[0]), normal(S, width[1])


HIDDEN = torch.ones(L, S, dtype=torch.bool).triu(3)
MASKS = {
    "none": (None, None),
    "bool": (HIDDEN, None),
    "float": (HIDDEN * -1.5, None),
    "heads": ((torch.arange(B * H * L * S).reshape(B * H, L, S) % 5 == 0), None),
    "padding": (None, torch.arange(S) > torch.tensor([[6], [3], [4]])),
    "float padding": (None, torch.arange(B * S).reshape(B, S) * -0.1),
    "both": (HIDDEN, torch.arange(S) > torch.tensor([[6], [3], [4]])),
    "both float": (HIDDEN * -1.5, torch.arange(B * S).reshape(B, S) * -0.1),
    "both, heads": (
        (torch.arange(B * H * L * S).reshape(B * H, L, S) % 5 == 0),
        torch.arange(S) > torch.tensor([[6], [3], [4]]),
    ),
}
WIDTHS = {"same": {}, "kdim, vdim": {"kdim": 5, "vdim": 6}, "no bias": {"bias": False}}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["length first", "batch first"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_attention_to_others(kernel, masks, batch_first, widths):
    options = WIDTHS[widths]
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=batch_first, **options)
    mask, padding = (x.double() if x is not None and x.is_floating_point() else x for x in MASKS[masks])
    inputs = operands(batch_first, width=(options.get("kdim", E), options.get("vdim", E)))

    def call(module, q, k, v):
        out, weights = module(q, k, v, attn_mask=mask, key_padding_mask=padding, need_weights=False)
        assert weights is None
        return out

    assert_alike(ours, theirs, inputs, call)
    assert kernel.call_count == 1


@pytest.mark.parametrize("batch_first", [False, True], ids=["length first", "batch first"])
@pytest.mark.parametrize("shared", ["all", "key and value"])
def test_attention_to_itself_and_to_one_memory(kernel, batch_first, shared):
    for bias in (True, False):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=batch_first, bias=bias)
        x, memory, _ = operands(batch_first)
        if shared == "all":
            assert_alike(ours, theirs, (x,), lambda m, x: m(x, x, x, need_weights=False)[0])
        else:
            assert_alike(ours, theirs, (x, memory), lambda m, x, y: m(x, y, y, need_weights=False)[0])
    assert kernel.call_count == 2


@pytest.mark.parametrize("padded", [False, True])
def test_the_causal_hint(kernel, padded):
    """It replaces the mask: nothing of size L x L goes to the kernel."""
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(B, L, E, dtype=torch.float64)
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.arange(L) > torch.tensor([[4], [3], [2]]) if padded else None

    def call(module, x):
        return module(x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=False)[0]

    assert_alike(ours, theirs, (x,), call)
    given = kernel.call_args.args[3]
    assert (given is None) is not padded
    assert not padded or given.shape == (B, 1, 1, L)
    assert kernel.call_args.kwargs["is_causal"]


@pytest.mark.parametrize("mask", ["none", "bool", "heads"])
def test_without_a_batch(kernel, mask):
    ours, theirs = pair("MultiheadAttention", E, H)
    given = MASKS[mask][0]
    given = given[:H] if mask == "heads" else given
    padding = torch.arange(S) > 4
    assert_alike(
        ours,
        theirs,
        operands(False, batched=False),
        lambda m, q, k, v: m(q, k, v, attn_mask=given, key_padding_mask=padding, need_weights=False)[0],
    )
    assert kernel.call_count == 1


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_weights_are_pytorchs(masks, average):
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
    mask, padding = (x.double() if x is not None and x.is_floating_point() else x for x in MASKS[masks])
    q, k, v = operands(True)
    got, want = (
        m(q, k, v, attn_mask=mask, key_padding_mask=padding, average_attn_weights=average) for m in (ours, theirs)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_is_left_to_pytorch(kernel, options):
    ours, theirs = pair("MultiheadAttention", E, H, **options)
    assert_alike(ours, theirs, operands(False), lambda m, q, k, v: m(q, k, v, need_weights=False)[0])
    assert not kernel.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_evaluation_without_gradients(kernel, dtype):
    """Where PyTorch has a fused way of its own."""
    ours, theirs = pair("MultiheadAttention", E, H, dtype=dtype, batch_first=True)
    x = torch.randn(B, L, E, dtype=dtype)
    padding = torch.arange(L) > torch.tensor([[4], [3], [2]])
    with torch.inference_mode():
        for options in ({}, {"key_padding_mask": padding}):
            got, want = (m.eval()(x, x, x, need_weights=False, **options)[0] for m in (ours, theirs))
            torch.testing.assert_close(
                got,
                want,
                rtol=0.02 if dtype == torch.bfloat16 else 1e-5,
                atol=0.02 if dtype == torch.bfloat16 else 1e-5,
            )
    assert kernel.call_count == 2


def test_dropout_is_that_of_fastgens_stream(kernel):
    ours, _ = pair("MultiheadAttention", E, H, batch_first=True, dropout=0.5)
    x = torch.randn(B, L, E, dtype=torch.float64)
    torch.manual_seed(3)
    first = ours(x, x, x, need_weights=False)[0]
    q, k, v = (
        y.unflatten(-1, (H, E // H)).transpose(1, 2)
        for y in F.linear(x, ours.in_proj_weight, ours.in_proj_bias).chunk(3, -1)
    )
    torch.manual_seed(3)
    out = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.testing.assert_close(first, ours.out_proj(out.transpose(1, 2).flatten(-2)))
    assert not torch.equal(first, ours(x, x, x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


def test_under_autocast(kernel):
    ours, theirs = pair("MultiheadAttention", E, H, dtype=torch.float32, batch_first=True)
    x = torch.randn(B, L, E)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
    assert kernel.call_count == 1


WRONG = [
    lambda m, q, k, v: m(q[..., :-1], k, v, need_weights=False),
    lambda m, q, k, v: m(q, k[:, :-1], v, need_weights=False),
    lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(S, L), need_weights=False),
    lambda m, q, k, v: m(q, k, v, attn_mask=torch.zeros(L, S, dtype=torch.int), need_weights=False),
    lambda m, q, k, v: m(q, k, v, key_padding_mask=torch.zeros(B, L, dtype=torch.bool), need_weights=False),
    lambda m, q, k, v: m(q, k, v, is_causal=True, need_weights=False),
    lambda m, q, k, v: m(q.float(), k, v, need_weights=False),
]


@pytest.mark.parametrize("wrong", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_errors_are_pytorchs(wrong):
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
    said = []
    for module in (ours, theirs):
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            wrong(module, *operands(True))
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


# ---------------------------------------------------------------------------------------------------
# Layers


LAYERS = [
    {"norm_first": norm_first, "batch_first": batch_first, "activation": activation}
    for norm_first, batch_first, activation in itertools.product(
        (False, True), (False, True), ("relu", "gelu", torch.tanh)
    )
]


@pytest.mark.parametrize("options", LAYERS, ids=range(len(LAYERS)))
def test_encoder_layer(kernel, options):
    ours, theirs = pair("TransformerEncoderLayer", E, H, 11, dropout=0.0, **options)
    x = operands(options["batch_first"])[0]
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.arange(L) > torch.tensor([[4], [3], [2]])
    for given in ((), (mask,), (None, padding), (mask, padding), (mask, None, True)):
        assert_alike(ours, theirs, (x,), lambda m, x, given=given: m(x, *given))
    assert kernel.call_count == 5
    with torch.no_grad():
        got, want = (m.eval()(x, mask) for m in (ours, theirs))
    torch.testing.assert_close(got, want)
    assert kernel.call_count == 6


@pytest.mark.parametrize("options", LAYERS, ids=range(len(LAYERS)))
def test_decoder_layer(kernel, options):
    ours, theirs = pair("TransformerDecoderLayer", E, H, 11, dropout=0.0, **options)
    x, memory, _ = operands(options["batch_first"])
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = torch.arange(S) > torch.tensor([[4], [3], [2]])
    for given in ({}, {"tgt_mask": mask, "tgt_is_causal": True, "memory_key_padding_mask": padding}):
        assert_alike(ours, theirs, (x, memory), lambda m, x, y, given=given: m(x, y, **given))
    assert kernel.call_count == 4  # each attends to itself and to the memory


def test_a_hook_on_the_first_product_sees_it_as_it_was():
    ours, _ = pair("TransformerEncoderLayer", E, H, 11, dropout=0.0)
    seen = []
    ours.linear1.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    ours(operands(False)[0])
    ((x, out),) = seen
    torch.testing.assert_close(out, F.linear(x, ours.linear1.weight, ours.linear1.bias))


def test_layers_of_a_model_that_pytorch_stacks(kernel):
    """TransformerEncoder, TransformerDecoder and Transformer hold our layers; in evaluation, padding makes PyTorch's
    encoder nest its input, and its own way goes on with it."""
    x, y = (torch.randn(B, n, E, dtype=torch.float64) for n in (L, S))
    padding = torch.arange(L) > torch.tensor([[4], [3], [2]])
    ours, theirs = (
        m.TransformerEncoder(
            m.TransformerEncoderLayer(E, H, 11, 0.0, batch_first=True, dtype=torch.float64),
            2,
            norm=torch.nn.LayerNorm(E, dtype=torch.float64),
        )
        for m in (nn, torch.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    assert_alike(ours, theirs, (x,), lambda m, x: m(x, src_key_padding_mask=padding))
    assert kernel.call_count == 2
    with torch.no_grad():
        got, want = (m.eval()(x, src_key_padding_mask=padding) for m in (ours, theirs))
    torch.testing.assert_close(got, want)

    ours, theirs = pair("Transformer", E, H, 2, 2, 11, 0.0, batch_first=True)
    kernel.reset_mock()
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    assert_alike(ours, theirs, (x, y), lambda m, x, y: m(x, y, tgt_mask=causal, tgt_is_causal=True))
    assert kernel.call_count == 2 + 2 * 2


# ---------------------------------------------------------------------------------------------------
# As modules


NAMES = {
    "MultiheadAttention": (E, H),
    "TransformerEncoderLayer": (E, H, 11),
    "TransformerDecoderLayer": (E, H, 11),
    "Transformer": (E, H, 1, 1, 11),
}


@pytest.mark.parametrize("name", NAMES)
def test_construction_is_pytorchs(name):
    """The same arguments, random initial values, names and text."""
    built = []
    for module in (nn, torch.nn):
        torch.manual_seed(5)
        built.append(getattr(module, name)(*NAMES[name], batch_first=True))
    ours, theirs = (m.state_dict() for m in built)
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key])
    assert isinstance(built[0], getattr(torch.nn, name))
    assert repr(built[0]) == repr(built[1])
    kinds = {type(m) for m in built[0].modules()}
    assert not kinds & {torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer, torch.nn.TransformerDecoderLayer}


def test_copies_and_files():
    ours, _ = pair("TransformerEncoderLayer", E, H, 11, dropout=0.0)
    x = operands(False)[0]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(other.self_attn) is nn.MultiheadAttention
        assert torch.equal(other(x), ours(x))


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_accelerate(kernel, name):
    theirs = getattr(torch.nn, name)(*NAMES[name], dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, L, E, dtype=torch.float64)
    call = {
        "MultiheadAttention": lambda m: m(x, x, x, need_weights=False)[0],
        "TransformerEncoderLayer": lambda m: m(x),
        "TransformerDecoderLayer": lambda m: m(x, x),
    }[name]
    want = call(theirs)
    assert not kernel.called
    swaps = []
    assert fastgen.accelerate(theirs, report=swaps.append) is theirs
    assert all(swap.left is None for swap in swaps)
    assert type(theirs) is getattr(nn, name)
    torch.testing.assert_close(call(theirs), want)
    assert kernel.called


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh")
def test_compiled():
    ours, _ = pair("TransformerEncoderLayer", E, H, 11, dropout=0.0, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = operands(True)[0]
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    got, want = compiled(x, mask, is_causal=True), ours(x, mask, is_causal=True)
    torch.testing.assert_close(got, want)
    parameters = list(ours.parameters())
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(want.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_under_transforms():
    """Gradients for each sample, by torch.func."""
    ours, _ = pair("MultiheadAttention", E, H, batch_first=True)
    parameters = dict(ours.named_parameters())
    x = operands(True)[0]

    def loss(parameters, x):
        x = x.unsqueeze(0)
        return torch.func.functional_call(ours, parameters, (x, x, x), {"need_weights": False})[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(B):
        for name, p in torch.func.grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], p)
