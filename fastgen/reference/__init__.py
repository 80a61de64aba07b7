"""Every op of fastgen in plain PyTorch, one file a family.

This is the definition of each op: the fallback where no kernel was built for a device, and, in double
precision, the oracle of the tests.
"""

from fastgen.reference.activation import gelu, gelu_backward, swiglu, swiglu_backward
from fastgen.reference.attention import attention, attention_backward
from fastgen.reference.generate import pick_tokens, rnn_generate
from fastgen.reference.linear import linear_rows, linear_rows_backward, mm
from fastgen.reference.random import (
    below,
    bernoulli,
    claim,
    exponential,
    normal,
    philox4x32,
    random_bits,
    uniform,
)
from fastgen.reference.recurrent import (
    recurrent,
    recurrent_backward,
    recurrent_cell,
    recurrent_cell_backward,
    recurrent_layers,
    recurrent_step,
)
from fastgen.reference.reparameterize import (
    kl_divergence,
    noise_for,
    reparameterize,
    reparameterize_backward,
    reparameterize_kl,
    reparameterize_kl_backward,
)

__all__ = [
    "attention",
    "attention_backward",
    "below",
    "bernoulli",
    "claim",
    "exponential",
    "gelu",
    "gelu_backward",
    "kl_divergence",
    "linear_rows",
    "linear_rows_backward",
    "mm",
    "noise_for",
    "normal",
    "philox4x32",
    "pick_tokens",
    "random_bits",
    "recurrent",
    "recurrent_backward",
    "recurrent_cell",
    "recurrent_cell_backward",
    "recurrent_layers",
    "recurrent_step",
    "reparameterize",
    "reparameterize_backward",
    "reparameterize_kl",
    "reparameterize_kl_backward",
    "rnn_generate",
    "swiglu",
    "swiglu_backward",
    "uniform",
]
