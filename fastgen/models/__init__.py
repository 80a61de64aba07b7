"""Generative models: each family is one file, one configuration dataclass and one `torch.nn.Module`."""

from fastgen.models._pretrained import PretrainedConfig, PretrainedModel, from_pretrained
from fastgen.models.vae import VAE, VAEConfig, VAEOutput

__all__ = ["VAE", "PretrainedConfig", "PretrainedModel", "VAEConfig", "VAEOutput", "from_pretrained"]
