"""Folders of Hugging Face's transformers: the configurations of GPT-2 and Llama, and their weights, there and back.

    >>> config = config_from(fields)  # those of a config.json with model_type "gpt2" or "llama"
    >>> path, state = read_state(folder, config, fields["model_type"], torch.device("cpu"))
    >>> fields, state = to_huggingface(config, state)

A layout is a table of names: each of our tensors is the rows of one or more of theirs. GPT-2's linear layers hold their
weights transposed, as (in, out).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastgen import _validate
from fastgen._dtypes import dtype_name
from fastgen.models._pretrained import WEIGHTS_FILE, existing, read_json, read_tensors

if TYPE_CHECKING:
    from fastgen.models.gpt import GPTConfig

__all__ = ["MODEL_TYPES", "config_from", "read_state", "to_huggingface"]

MODEL_TYPES = ("gpt2", "llama")
_INDEX_FILE = "model.safetensors.index.json"

_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "resid_pdrop": "dropout",
    "attn_pdrop": "attention_dropout",
    "embd_pdrop": "embedding_dropout",
}
_GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
}
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}

_LLAMA_FIELDS = {
    name: name
    for name in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "max_position_embeddings", "attention_bias", "mlp_bias", "tie_word_embeddings"),
        *("attention_dropout", "initializer_range"),
    )
} | {"rms_norm_eps": "norm_eps"}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


# ---------------------------------------------------------------------------------------------------
# Configurations


def config_from(fields: Mapping[str, Any]) -> GPTConfig:
    """The configuration that a config.json of theirs stands for.

    Raises:
        ValueError: for a variant that GPT does not have, or a field out of range.
    """
    fields = {name: value for name, value in fields.items() if value is not None}  # null: their way to leave one out
    if "quantization_config" in fields:
        raise ValueError("quantization_config: expected none, quantised weights are not supported")
    return _from_gpt2(fields) if fields["model_type"] == "gpt2" else _from_llama(fields)


def _from_gpt2(fields: Mapping[str, Any]) -> GPTConfig:
    from fastgen.models.gpt import GPTConfig

    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        _expect(fields, name, usual)
    activation = _validate.choice("activation_function", fields.get("activation_function", "gelu_new"), _ACTIVATIONS)
    return GPTConfig(
        **_translated({**_GPT2_DEFAULTS, **fields}, _GPT2_FIELDS),
        hidden_act=_ACTIVATIONS[activation],
    )


def _from_llama(fields: Mapping[str, Any]) -> GPTConfig:
    from fastgen.models.gpt import GPTConfig, RopeScaling

    _expect(fields, "hidden_act", "silu")
    # Since version 5 rope_parameters holds what rope_theta and rope_scaling did.
    rope: dict[str, Any] = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.get(name, {})
        if not isinstance(value, Mapping):
            raise ValueError(f"{name}: expected an object, got {value!r}")
        rope |= value
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    theta = rope.pop("rope_theta")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_scaling: expected the type default or llama3, got {kind!r}")
    _expect(rope, "partial_rotary_factor", 1.0)
    rope.pop("partial_rotary_factor", None)
    if kind == "llama3":  # of these RopeScaling has defaults, a checkpoint has its own
        for field in dataclasses.fields(RopeScaling):
            if field.name not in rope:
                raise ValueError(f"rope_scaling: expected a {field.name} with the type llama3, got none")
    return GPTConfig.llama(
        **{"tie_word_embeddings": False, **_translated({**_LLAMA_DEFAULTS, **fields}, _LLAMA_FIELDS)},
        rope_theta=theta,
        rope_scaling=rope if kind == "llama3" else None,
    )


def _expect(fields: Mapping[str, Any], name: str, usual: object) -> None:
    if fields.get(name, usual) != usual:
        raise ValueError(f"{name}: expected {usual!r}, others are not supported, got {fields[name]!r}")


def _translated(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Theirs under our names."""
    return {ours: fields[theirs] for theirs, ours in names.items() if theirs in fields}


def to_huggingface(config: GPTConfig, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors that transformers loads as a GPT-2 or a Llama, whichever the configuration is.

    Raises:
        ValueError: for a configuration that is neither, naming what differs.
    """
    model_type = _model_type(config)
    values = {name: getattr(config, name) for name in (*_GPT2_FIELDS.values(), *_LLAMA_FIELDS.values())}
    if model_type == "gpt2":
        theirs = {value: key for key, value in reversed(_ACTIVATIONS.items())}
        fields: dict[str, Any] = {
            "architectures": ["GPT2LMHeadModel"],
            **{their: values[ours] for their, ours in _GPT2_FIELDS.items()},
            "activation_function": theirs[config.hidden_act],
        }
    else:
        rope: dict[str, Any] = {"rope_type": "default"}
        if config.rope_scaling is not None:
            rope = {"rope_type": "llama3", **vars(config.rope_scaling)}
        fields = {
            "architectures": ["LlamaForCausalLM"],
            **{their: values[ours] for their, ours in _LLAMA_FIELDS.items()},
            "hidden_act": "silu",
            # For version 5, and for those before it.
            "rope_parameters": {**rope, "rope_theta": config.rope_theta},
            "rope_theta": config.rope_theta,
            "rope_scaling": rope if config.rope_scaling is not None else None,
        }
    dtype = dtype_name(next(iter(state.values())).dtype)
    # No token of theirs: which ends a text is the tokenizer's to say.
    fields |= {"model_type": model_type, "dtype": dtype, "bos_token_id": None, "eos_token_id": None}
    tensors: dict[str, Tensor] = {}
    for ours, sources in _table(config, model_type).items():
        parts = state[ours].split(sources.sizes) if len(sources.names) > 1 else (state[ours],)
        for name, part in zip(sources.names, parts, strict=True):
            # A copy of its own: a file holds no tensor that is a part of another's memory.
            tensors[name] = (part.t() if sources.transposed else part).clone(memory_format=torch.contiguous_format)
    return fields, tensors


def _model_type(config: GPTConfig) -> str:
    gpt2 = {
        "position_embedding": "learned",
        "normalization": "layer_norm",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
    }
    llama = {
        "position_embedding": "rotary",
        "normalization": "rms_norm",
        "hidden_act": "swiglu",
        # It has a place for the dropout of attention alone.
        "dropout": 0.0,
        "embedding_dropout": 0.0,
    }
    differences = []
    for name, expected in (("gpt2", gpt2), ("llama", llama)):
        found = [
            f"{field} {value!r} instead of {wanted!r}"
            for field, wanted in expected.items()
            if (value := getattr(config, field)) != wanted
        ]
        if name == "gpt2" and config.hidden_act == "swiglu":
            found.append("hidden_act 'swiglu'")
        if not found:
            return name
        differences.append(f"a {name} has not {', '.join(found)}")
    raise ValueError(f"layout: expected 'fastgen' for this configuration ({'; '.join(differences)}), got 'huggingface'")


# ---------------------------------------------------------------------------------------------------
# Weights


class _Sources(NamedTuple):
    """Where the rows of one of our tensors are in theirs."""

    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False


def _table(config: GPTConfig, model_type: str) -> dict[str, _Sources]:
    """Our names -> theirs."""
    table = _gpt2_table(config) if model_type == "gpt2" else _llama_table(config)
    if not config.tie_word_embeddings:
        table["lm_head.weight"] = _Sources(("lm_head.weight",))
    return table


def _gpt2_table(config: GPTConfig) -> dict[str, _Sources]:
    table = {
        "embed_tokens.weight": _Sources(("transformer.wte.weight",)),
        "embed_positions.weight": _Sources(("transformer.wpe.weight",)),
    }
    modules = {
        "input_layernorm": ("ln_1", False),
        "self_attn.qkv_proj": ("attn.c_attn", True),
        "self_attn.o_proj": ("attn.c_proj", True),
        "post_attention_layernorm": ("ln_2", False),
        "mlp.up_proj": ("mlp.c_fc", True),
        "mlp.down_proj": ("mlp.c_proj", True),
    }
    for layer in range(config.num_hidden_layers):
        for ours, (theirs, transposed) in modules.items():
            for part in ("weight", "bias"):
                name = f"transformer.h.{layer}.{theirs}.{part}"
                table[f"layers.{layer}.{ours}.{part}"] = _Sources((name,), (), transposed and part == "weight")
    for part in ("weight", "bias"):
        table[f"norm.{part}"] = _Sources((f"transformer.ln_f.{part}",))
    return table


def _llama_table(config: GPTConfig) -> dict[str, _Sources]:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    widths = tuple(count * config.head_dim for count in heads)
    inner = (config.intermediate_size,) * 2
    modules = {
        "self_attn.qkv_proj": (("q_proj", "k_proj", "v_proj"), widths, config.attention_bias),
        "self_attn.o_proj": (("o_proj",), (), config.attention_bias),
        "mlp.gate_up_proj": (("gate_proj", "up_proj"), inner, config.mlp_bias),
        "mlp.down_proj": (("down_proj",), (), config.mlp_bias),
    }
    table = {"embed_tokens.weight": _Sources(("model.embed_tokens.weight",))}
    for layer in range(config.num_hidden_layers):
        begin = f"layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{begin}{norm}.weight"] = _Sources((f"model.{begin}{norm}.weight",))
        for ours, (theirs, sizes, bias) in modules.items():
            block = ours.partition(".")[0]
            for part in ("weight", "bias") if bias else ("weight",):
                names = tuple(f"model.{begin}{block}.{name}.{part}" for name in theirs)
                table[f"{begin}{ours}.{part}"] = _Sources(names, sizes)
    table["norm.weight"] = _Sources(("model.norm.weight",))
    return table


def read_state(
    folder: Path, config: GPTConfig, model_type: str, device: torch.device
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of the folder, one file or several with an index, under our names; and the file to name in errors.

    Raises:
        FileNotFoundError, ValueError: for a missing or damaged file, or one that does not fit the configuration.
    """
    path, theirs = _read_all(folder, device)
    if model_type == "gpt2":
        # Files that were written from the bare model lack the prefix.
        prefix = "transformer."
        theirs = {n if n.startswith((prefix, "lm_head.")) else prefix + n: tensor for n, tensor in theirs.items()}
    # Constants that older versions wrote: causal masks, rotary frequencies.
    constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith(constants)}
    table = _table(config, model_type)
    if config.tie_word_embeddings and (output := theirs.pop("lm_head.weight", None)) is not None:
        (name,) = table["embed_tokens.weight"].names
        if name in theirs and not torch.equal(output, theirs[name].to(output.dtype)):
            raise ValueError(
                f"{path}: the weights do not fit the configuration: lm_head.weight is not {name}, though "
                "tie_word_embeddings is true"
            )
    expected = {name for sources in table.values() for name in sources.names}
    missing, unexpected = sorted(expected - theirs.keys()), sorted(theirs.keys() - expected)
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        found = "; ".join(f"{what} {_shortened(names)}" for what, names in lists if names)
        raise ValueError(f"{path}: the weights do not fit the configuration: {found}")
    state = {}
    for ours, sources in table.items():
        parts = [theirs.pop(name) for name in sources.names]
        if sources.transposed:
            parts = [part.transpose(0, -1) for part in parts]
        for name, part, size in zip(sources.names, parts, sources.sizes, strict=False):
            shape = (size,) if name.endswith(".bias") else (size, config.hidden_size)
            if part.shape != shape:
                raise ValueError(
                    f"{path}: the weights do not fit the configuration: {name} expected shape {shape}, "
                    f"got {tuple(part.shape)}"
                )
        state[ours] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return path, state


def _read_all(folder: Path, device: torch.device) -> tuple[Path, dict[str, Tensor]]:
    """The file to name in errors, and all tensors."""
    index = folder / _INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        if not (folder / WEIGHTS_FILE).exists() and any(folder.glob("pytorch_model*.bin")):
            raise FileNotFoundError(
                f"{folder / WEIGHTS_FILE}: no such file; pytorch_model.bin is a pickle, which may run code and is not "
                "read: transformers' save_pretrained writes safetensors"
            )
        path = existing(folder, WEIGHTS_FILE)
        return path, read_tensors(path, device)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: expected a weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise ValueError(f"{index}: expected names of files beside it, got {name!r}")
        tensors |= read_tensors(existing(folder, name), device)
    return index, tensors


def _shortened(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
