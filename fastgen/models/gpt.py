"""Decoder-only Transformers: the next token of a text.

One model covers GPT-2 (Radford et al., "Language models are unsupervised multitask learners", 2019: learned
positions, layer norm before each half of a layer, GELU) and Llama (Touvron et al., "LLaMA: open and efficient
foundation language models", 2023: rotary positions, RMS norm, SwiGLU, grouped-query heads).

Example:
    >>> model = GPT(vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)
    >>> output = model(input_ids, targets)  # int64 (B, T) each
    >>> output.loss.backward()
    >>> model.generate("To be", max_new_tokens=100, seed=1)
    >>> GPT.from_pretrained("gpt2/")  # a folder in the layout of Hugging Face, or of save_pretrained
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

import fastgen.nn as nn
from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen._ops.library import plain_only
from fastgen.functional import gelu, linear, linear_cross_entropy, scaled_dot_product_attention, swiglu
from fastgen.models._cached import CachedRows, GPTState, LayerPass
from fastgen.models._huggingface import MODEL_TYPES, config_from, read_state, to_huggingface
from fastgen.models._pretrained import CONFIG_FILE, Folder, PretrainedConfig, read_config
from fastgen.models._text import TextModel
from fastgen.nn.lora import add_lora, lora_state_dict
from fastgen.random import Device, dropout_mask
from fastgen.tokenizers import Tokenizer

__all__ = ["GPT", "GPTConfig", "GPTOutput", "GPTState", "RopeScaling"]

_GELUS = {"gelu_tanh": "tanh", "gelu": "none"}  # and how the distribution function is approximated
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3 stretches rotary positions to a longer context (Dubey et al., "The Llama 3 herd of models", 2024).

    Frequencies whose wavelength exceeds original_max_position_embeddings / low_freq_factor are divided by `factor`,
    those under original_max_position_embeddings / high_freq_factor stay, and between the two the divisor changes
    over smoothly.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "factor": _validate.number("rope_scaling.factor", self.factor, minimum=1),
            "low_freq_factor": _validate.number("rope_scaling.low_freq_factor", self.low_freq_factor, above=0),
            "high_freq_factor": _validate.number("rope_scaling.high_freq_factor", self.high_freq_factor, above=0),
            "original_max_position_embeddings": _validate.integer(
                "rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, 1
            ),
        }
        if checked["high_freq_factor"] <= checked["low_freq_factor"]:
            raise ValueError(
                f"rope_scaling.high_freq_factor: expected above low_freq_factor, {self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class GPTConfig(PretrainedConfig):
    """Everything that defines a GPT but its weights. The defaults are those of GPT-2, small; see also `llama`.

    Args:
        vocab_size: tokens are 0 .. vocab_size - 1.
        hidden_size: width of the embeddings and of what flows from layer to layer.
        num_hidden_layers: how many layers of attention and MLP.
        num_attention_heads: query heads of a layer.
        num_key_value_heads: key and value heads, which groups of query heads share (Ainslie et al., "GQA", 2023);
            0 is `num_attention_heads`.
        head_dim: width of a head; 0 is hidden_size / num_attention_heads.
        intermediate_size: width of the MLP; 0 is 4 hidden_size, or with "swiglu" two thirds of that, up to a
            multiple of 64.
        max_position_embeddings: the context: tokens that attention may look back over.
        position_embedding: "learned" or "rotary" (Su et al., "RoFormer", 2021).
        normalization: "layer_norm" or "rms_norm" (Zhang & Sennrich, 2019).
        hidden_act: "gelu_tanh", "gelu", "relu" or "silu" of the MLP; or "swiglu", whose input is gated by a second
            one (Shazeer, "GLU variants improve Transformer", 2020).
        norm_eps: what the normalisations add to the variance.
        attention_bias, mlp_bias: whether the linear layers of attention and MLP have biases.
        tie_word_embeddings: the output has the embedding's weights (Press & Wolf, 2017).
        rope_theta: base of the rotary wavelengths.
        rope_scaling: see `RopeScaling`; its fields, or None.
        dropout: probability of dropping an element of what attention and MLP add.
        attention_dropout: of dropping an attention weight.
        embedding_dropout: of dropping an element of the embedding.
        initializer_range: standard deviation of the initial weights; of the layers that write into the residual
            stream it is divided by sqrt(2 num_hidden_layers).

    Raises:
        ValueError: for a field out of range, naming it.
    """

    model_type: ClassVar[str] = "gpt"

    vocab_size: int
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    max_position_embeddings: int = 256
    position_embedding: str = "learned"
    normalization: str = "layer_norm"
    hidden_act: str = "gelu_tanh"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    mlp_bias: bool = True
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    initializer_range: float = 0.02

    @classmethod
    def llama(cls, vocab_size: int, **fields: Any) -> Self:
        """A configuration with the parts of Llama where `fields` do not say otherwise."""
        parts: dict[str, Any] = {
            "position_embedding": "rotary",
            "normalization": "rms_norm",
            "hidden_act": "swiglu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        }
        return cls(vocab_size, **{**parts, **fields})

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "position_embedding": _validate.choice(
                "position_embedding", self.position_embedding, ("learned", "rotary")
            ),
            "normalization": _validate.choice("normalization", self.normalization, ("layer_norm", "rms_norm")),
            "hidden_act": _validate.choice("hidden_act", self.hidden_act, (*_GELUS, *_ACTIVATIONS, "swiglu")),
            "norm_eps": _validate.number("norm_eps", self.norm_eps, above=0),
            "rope_theta": _validate.number("rope_theta", self.rope_theta, above=0),
            "initializer_range": _validate.number("initializer_range", self.initializer_range, above=0),
        }
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            checked[name] = _validate.integer(name, getattr(self, name), 1)
        checked["max_position_embeddings"] = _validate.integer(
            "max_position_embeddings", self.max_position_embeddings, 1
        )
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            checked[name] = _validate.integer(name, getattr(self, name), 0)
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            checked[name] = _validate.boolean(name, getattr(self, name))
        for name in ("dropout", "attention_dropout", "embedding_dropout"):
            checked[name] = _validate.number(name, getattr(self, name), minimum=0, below=1)

        hidden, heads = checked["hidden_size"], checked["num_attention_heads"]
        groups = checked["num_key_value_heads"] = checked["num_key_value_heads"] or heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads: expected a divisor of the {heads} query heads, got {groups}")
        if not checked["head_dim"]:
            if hidden % heads:
                raise ValueError(f"hidden_size: expected a multiple of the {heads} heads, got {hidden}")
            checked["head_dim"] = hidden // heads
        if not checked["intermediate_size"]:
            width = 4 * hidden
            checked["intermediate_size"] = -(-width * 2 // 3 // 64) * 64 if self.hidden_act == "swiglu" else width
        rotary = self.position_embedding == "rotary"
        if rotary and self.head_dim == 0 and checked["head_dim"] % 2:
            raise ValueError(
                f"hidden_size: expected an even multiple of the {heads} heads with rotary positions, got {hidden}"
            )
        if rotary and checked["head_dim"] % 2:
            raise ValueError(f"head_dim: expected an even int with rotary positions, got {checked['head_dim']}")
        scaling: Any = self.rope_scaling
        if scaling is not None and not rotary:
            raise ValueError(f"rope_scaling: expected None without rotary positions, got {scaling!r}")
        if isinstance(scaling, Mapping):  # as JSON has it
            known = [field.name for field in dataclasses.fields(RopeScaling)]
            for key in scaling:
                if key not in known:
                    raise ValueError(f"rope_scaling: no field {key!r}; the fields are {', '.join(known)}")
            checked["rope_scaling"] = RopeScaling(**scaling)
        elif scaling is not None and not isinstance(scaling, RopeScaling):
            raise ValueError(f"rope_scaling: expected a RopeScaling, its fields, or None, got {scaling!r}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def rope_frequencies(self) -> Tensor:
        """(head_dim / 2,) float32: radians a position of each rotated pair, theta^(-2 i / head_dim)."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / self.rope_theta**exponents
        if (scaling := self.rope_scaling) is None:
            return frequencies
        # How many wavelengths the original context held, from 0 (low) to 1 (high) between the two factors.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        share = share.clamp(0, 1)
        return (1 - share) * frequencies / scaling.factor + share * frequencies


@dataclasses.dataclass
class GPTOutput:
    """What `GPT.forward` gives; B rows, T tokens.

    Attributes:
        loss: scalar, the mean negative log-likelihood of a target in nats; None without targets.
        hidden: (B, T, hidden_size), the last layer's output, normalised.
        weight: (vocab_size, hidden_size), of the output.
    """

    loss: Tensor | None
    hidden: Tensor
    weight: Tensor

    @functools.cached_property
    def logits(self) -> Tensor:
        """(B, T, vocab_size) of the next token.

        With targets they are made when they are asked for, as the loss does without them: in training they would
        be the largest tensor. They are differentiable then as ever.
        """
        weight = self.weight
        if not torch.is_autocast_enabled(weight.device.type):  # else hidden may be of the type of autocast
            return linear(self.hidden.to(weight.dtype), weight)
        return linear(self.hidden, weight)


class GPT(TextModel):
    """Decoder-only Transformer; `GPT(config)` or `GPT(**fields)` with the fields of `GPTConfig`.

    A layer adds attention(norm(x)) to x, then mlp(norm(x)); the output is norm(x) times the output weights, all of
    it without a look ahead. The loss is at least float32, also in a half-precision model and under autocast.
    Weights and dropout draw from torch's default generator.

    `generate` keeps keys and values of the tokens so far; a prompt has at most as many as the context. When a text
    outgrows the context, it goes on with the latter half of it, and again after another half: the token at place t is
    drawn from the last C - h + 1 to C tokens, C the context and h = C // 2, which of them a function of t alone.
    Attention may round otherwise where it reads one token than where it reads many.

    Args:
        config, fields: see `GPTConfig`.
        tokenizer: what `generate` reads and writes strings with; saved and loaded with the model.

    Attributes:
        gradient_checkpointing: whether training keeps only what enters each layer and runs it again in the
            backward pass (Chen et al., "Training deep nets with sublinear memory cost", 2016). Default False.
    """

    config_class = GPTConfig
    other_model_types = MODEL_TYPES
    rows_class = CachedRows
    config: GPTConfig

    def __init__(self, config: GPTConfig | None = None, *, tokenizer: Tokenizer | None = None, **fields: Any) -> None:
        super().__init__(config, tokenizer=tokenizer, **fields)
        config = self.config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions: nn.Embedding | None = None
        if config.position_embedding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                # A sum of 2 N terms, two a layer, then has about the variance of one.
                writes = name.endswith((".o_proj", ".down_proj"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * len(self.layers)) if writes else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def save_pretrained(self, directory: Folder, *, layout: str = "fastgen") -> None:
        """Write `config.json`, `model.safetensors` and, if there is a tokenizer, `tokenizer.json` into `directory`.

        Args:
            directory: the folder, made if missing; see `PretrainedModel.save_pretrained`.
            layout: "fastgen", or "huggingface": a folder that transformers loads as `GPT2LMHeadModel` or
                `LlamaForCausalLM`, and `GPT.from_pretrained` as well.

        Raises:
            ValueError: for the layout "huggingface" of a configuration that is neither GPT-2 nor Llama, naming what
                differs.
        """
        if _validate.choice("layout", layout, ("fastgen", "huggingface")) == "fastgen":
            super().save_pretrained(directory)
            return
        fields, tensors = to_huggingface(self.config, self._saved_state())
        self._save_tokenizer(Path(directory))
        self._save(Path(directory), fields, tensors)

    @classmethod
    def from_pretrained(cls, directory: Folder, device: Device = None, dtype: torch.dtype | None = None) -> Self:
        """The model of a folder, in evaluation mode; see `PretrainedModel.from_pretrained`.

        Besides folders of `save_pretrained` it reads those of Hugging Face's transformers whose config.json has the
        model_type gpt2 or llama, with weights in one safetensors file or in several with an index.
        """
        folder = Path(directory)
        fields = read_config(folder)
        model_type = fields.get("model_type")
        if model_type not in MODEL_TYPES:
            return super().from_pretrained(directory, device, dtype)
        try:
            config = config_from(fields)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
        path, state = read_state(folder, config, model_type, torch.device("cpu" if device is None else device))
        model = cls._loaded(config, path, state, dtype)
        if dtype is None:  # some keep norms in float32 beside half types; a GPT computes in one dtype
            model.to(functools.reduce(torch.promote_types, (p.dtype for p in model.parameters())))
        model._load_tokenizer(folder)
        return model

    def _check_tokenizer(self, name: object) -> None:
        # Models of others have a vocabulary that is rounded up; what is left over is never drawn.
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.vocab_size:
            raise ValueError(
                f"{name}: expected at most {self.vocab_size} tokens as the model has, got {self.tokenizer!r}"
            )

    def add_lora(self, rank: int, alpha: float | None = None) -> None:
        """Adapt the linear layers of attention and MLP by matrices of low rank, and freeze all else.

        See `fastgen.nn.lora`: fine-tuning then has few parameters with a gradient, and starts from what the model
        says now. `save_pretrained` writes the merged weights, so that what it saves is a plain model.
        """
        self.requires_grad_(False)
        add_lora(self.layers, rank, alpha)

    def _saved_state(self) -> dict[str, Tensor]:
        return lora_state_dict(self)

    @property
    def output_weight(self) -> Tensor:
        """(vocab_size, hidden_size): of the output, the embedding's where they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, *, cu_seqlens: Tensor | None = None
    ) -> GPTOutput:
        """Predictions of the next token at every place, and their loss.

        Args:
            input_ids: ints (B, T), T at most max_position_embeddings.
            targets: what comes next, already shifted: int64 (B, T), where -100 does not count.
            cu_seqlens: documents packed one behind the other, which do not see each other: int64 or int32 (N + 1,) on
                the CPU, ascending from 0 to T, where B is 1 and document n is tokens cu_seqlens[n] to
                cu_seqlens[n + 1]. Positions count from the beginning of each, and it is the longest document that
                the context limits.

        Raises:
            TypeError, ValueError: for an argument that does not fit, naming it. The range of the tokens is
                looked at on the CPU only, elsewhere it would stall the device.
        """
        self._check_tokens("input_ids", input_ids)
        positions = self._positions(input_ids, cu_seqlens)
        layers, weight = _FullPass(self, cu_seqlens), self.output_weight
        if self.lm_head is None and weight.requires_grad and torch.is_grad_enabled() and not plain_only():
            weight = layers.embedding = _Summed.apply(weight)
        hidden = self.run_layers(input_ids, positions, layers)
        if not torch.is_grad_enabled():
            weight = weight.detach()  # logits that are asked for later shall not have a gradient either
        output = GPTOutput(None, hidden, weight)
        if targets is None:
            output.logits  # noqa: B018  in this call, under the user's settings of autocast and gradients
        else:
            self._check_targets(input_ids, targets)
            output.loss = linear_cross_entropy(hidden.to(weight.dtype), weight, targets)
        return output

    def run_layers(self, input_ids: Tensor, positions: Tensor, layers: LayerPass) -> Tensor:
        """(B, T, hidden_size): what the output layer takes, for tokens (B, T) at positions (T,) or (B, T)."""
        if layers.embedding is None:
            x = self.embed_tokens(input_ids)
        else:
            x = _TiedEmbedding.apply(input_ids, layers.embedding)
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        else:
            layers.rotation = self._rotation(positions, x.dtype)
        x = self._dropped(x, self.config.embedding_dropout)
        for index, layer in enumerate(self.layers):
            layers.index = index
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, layers, use_reentrant=False)
            else:
                x = layer(x, layers)
        return self.norm(x)

    def _positions(self, input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """(T,): the place of each token in its row, or in its document."""
        rows, length = input_ids.shape
        context = self.config.max_position_embeddings
        positions = torch.arange(length, device=input_ids.device)
        if cu_seqlens is None:
            if length > context:
                raise ValueError(f"input_ids: expected at most {context} tokens a row, the context, got {length}")
            return positions
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"cu_seqlens: expected an int64 or int32 tensor, got {_kind(cu_seqlens)}")
        if rows != 1:
            raise ValueError(f"input_ids: expected one row of packed documents with cu_seqlens, got {rows}")
        lengths = cu_seqlens.diff()
        if cu_seqlens.dim() != 1 or cu_seqlens.device.type != "cpu" or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens: expected shape (N + 1,) on the CPU, got {_kind(cu_seqlens)}")
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length or int(lengths.min()) < 0:
            raise ValueError(f"cu_seqlens: expected to ascend from 0 to {length}, got {cu_seqlens.tolist()}")
        if int(lengths.max()) > context:
            raise ValueError(
                f"cu_seqlens: expected documents of at most {context} tokens, the context, got {int(lengths.max())}"
            )
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=length)
        return positions - starts.to(input_ids.device)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, (..., T, 1, head_dim / 2): equal for all heads."""
        angles = positions.unsqueeze(-1).float() * self.config.rope_frequencies.to(positions.device)
        angles = angles.unsqueeze(-2)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _dropped(self, x: Tensor, p: float) -> Tensor:
        return _dropout(x, p) if self.training and p > 0 else x

    def _check_targets(self, input_ids: Tensor, targets: Tensor) -> None:
        if _validate.tensor("targets", targets).shape != input_ids.shape:
            raise ValueError(
                f"targets: expected the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(targets.shape)}"
            )
        if targets.dtype != torch.int64:
            raise TypeError(f"targets: expected int64 tokens, got {_kind(targets)}")


class _TiedEmbedding(torch.autograd.Function):
    """The rows `input_ids` of a weight, whose gradient is a sparse tensor.

    Where output and embedding have one weight, the output's gradient fills all of it and only the rows of a few
    tokens are added; a dense one would be another (V, D) of zeros, 154 MB in GPT-2, and as much to add.
    """

    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.shape = weight.shape
        return F.embedding(input_ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (input_ids,) = ctx.saved_tensors
        rows, values = input_ids.flatten(), grad.flatten(0, -2)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None, values.new_zeros(ctx.shape).index_add(0, rows, values)
        return None, torch.sparse_coo_tensor(rows.unsqueeze(0), values, ctx.shape, check_invariants=False)


class _Summed(torch.autograd.Function):
    """A weight that is used twice; the sum of its gradients is dense also where only the sparse one came."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to_dense() if grad.is_sparse else grad


class _FullPass(LayerPass):
    """All tokens of all rows at once."""

    def __init__(self, model: GPT, cu_seqlens: Tensor | None) -> None:
        config = model.config
        self._dropout = config.attention_dropout if model.training else 0.0
        self._grouped = config.num_key_value_heads != config.num_attention_heads
        self._cu_seqlens = cu_seqlens

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self._dropout,
            is_causal=True,
            enable_gqa=self._grouped,
            cu_seqlens_q=self._cu_seqlens,
        )

    def gelu(self, layer: nn.Linear, x: Tensor, approximate: str) -> Tensor:
        if type(layer) is not nn.Linear or layer.bias is None:
            return super().gelu(layer, x, approximate)
        # The bias goes with what follows, and its gradient with what precedes: a sum over all tokens less.
        return gelu(linear(x, layer.weight), layer.bias, approximate=approximate)


class _Layer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.p = config.dropout
        self.input_layernorm = _norm(config)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, layers: LayerPass) -> Tensor:
        x = x + self._dropped(self.self_attn(self.input_layernorm(x), layers))
        return x + self._dropped(self.mlp(self.post_attention_layernorm(x), layers))

    def _dropped(self, x: Tensor) -> Tensor:
        return _dropout(x, self.p) if self.training and self.p > 0 else x


class _Attention(nn.Module):
    """Query, key and value of all heads are one product: rows H head_dim, Hkv head_dim, Hkv head_dim of its weight."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        bias = config.attention_bias
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads[0] * config.head_dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, layers: LayerPass) -> Tensor:
        # (B, T, heads, head_dim), heads moved forward without a copy
        projected = layers.linear(self.qkv_proj, x).unflatten(-1, (-1, self.head_dim))
        query, key, value = projected.split(self.heads, dim=-2)
        if layers.rotation is not None:
            query, key = _rotated(query, *layers.rotation), _rotated(key, *layers.rotation)
        attended = layers.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return layers.linear(self.o_proj, attended.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    up_proj: nn.Linear
    gate_up_proj: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size, config.mlp_bias
        self.activation = config.hidden_act
        if self.activation == "swiglu":
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=bias)
        else:
            self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, layers: LayerPass) -> Tensor:
        if self.activation == "swiglu":
            inner = swiglu(layers.linear(self.gate_up_proj, x))
        elif self.activation in _GELUS:
            inner = layers.gelu(self.up_proj, x, _GELUS[self.activation])
        else:
            inner = _ACTIVATIONS[self.activation](layers.linear(self.up_proj, x))
        return layers.linear(self.down_proj, inner)


def _norm(config: GPTConfig) -> nn.Module:
    if config.normalization == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), of which elements i and i + D / 2 are the coordinates that turn by angle i."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _dropout(x: Tensor, p: float) -> Tensor:
    return x * (dropout_mask(x.shape, p=p, dtype=x.dtype, device=x.device) * (1 / (1 - p)))


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}"
