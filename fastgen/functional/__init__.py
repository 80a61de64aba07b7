"""Functions of fastgen; the same kernels stand behind `fastgen.nn` and `fastgen.models`."""

from fastgen.functional.activation import gelu, swiglu
from fastgen.functional.adversarial import (
    ADVERSARIAL_LOSSES,
    augmentation_size,
    diff_augment,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    zero_centered_gradient_penalty,
)
from fastgen.functional.attention import scaled_dot_product_attention
from fastgen.functional.cross_entropy import linear_cross_entropy
from fastgen.functional.linear import linear
from fastgen.functional.recurrent import (
    gru,
    gru_cell,
    lstm,
    lstm_cell,
    rnn_relu,
    rnn_relu_cell,
    rnn_tanh,
    rnn_tanh_cell,
)
from fastgen.functional.reparameterize import reparameterize, reparameterize_kl

__all__ = [
    "ADVERSARIAL_LOSSES",
    "augmentation_size",
    "diff_augment",
    "discriminator_loss",
    "gelu",
    "generator_loss",
    "gradient_penalty",
    "gru",
    "gru_cell",
    "linear",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "reparameterize",
    "reparameterize_kl",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "swiglu",
    "zero_centered_gradient_penalty",
]
