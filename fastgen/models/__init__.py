"""Generative models: each family is one file, one configuration dataclass and one `torch.nn.Module`."""

from fastgen.models._pretrained import PretrainedConfig, PretrainedModel, from_pretrained
from fastgen.models.gan import GAN, GANConfig, GANOutput
from fastgen.models.gpt import GPT, GPTConfig, GPTOutput, GPTState, RopeScaling
from fastgen.models.rnn import (
    RNN,
    GaussianMixture,
    Generation,
    GenerationState,
    RNNConfig,
    RNNOutput,
    detach_state,
)
from fastgen.models.vae import VAE, VAEConfig, VAEOutput

__all__ = [
    "GAN",
    "GPT",
    "RNN",
    "VAE",
    "GANConfig",
    "GANOutput",
    "GPTConfig",
    "GPTOutput",
    "GPTState",
    "GaussianMixture",
    "Generation",
    "GenerationState",
    "PretrainedConfig",
    "PretrainedModel",
    "RNNConfig",
    "RNNOutput",
    "RopeScaling",
    "VAEConfig",
    "VAEOutput",
    "detach_state",
    "from_pretrained",
]
