"""Readers of training data, one file a modality, and the sets they give."""

from fastgen.data.images import ImageSet, load_images

__all__ = ["ImageSet", "load_images"]
