"""Readers of training data, one file a modality, and the sets they give."""

from fastgen.data.images import ImageSet, load_images
from fastgen.data.series import SeriesSet, load_series
from fastgen.data.streams import Streams
from fastgen.data.text import TextSet, TokenSet, load_text
from fastgen.data.windows import Windows

__all__ = [
    "ImageSet",
    "SeriesSet",
    "Streams",
    "TextSet",
    "TokenSet",
    "Windows",
    "load_images",
    "load_series",
    "load_text",
]
