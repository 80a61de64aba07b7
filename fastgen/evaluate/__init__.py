"""How good a trained model is: figures of held-out data, one file a modality."""

from fastgen.evaluate.distance import RandomFeatures, frechet_distance
from fastgen.evaluate.sequences import SeriesScore, TextScore, evaluate_series, evaluate_text

__all__ = ["RandomFeatures", "SeriesScore", "TextScore", "evaluate_series", "evaluate_text", "frechet_distance"]
