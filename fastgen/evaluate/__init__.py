"""How good a trained model is: figures of held-out data, one file a modality."""

from fastgen.evaluate.distance import sliced_wasserstein_distance
from fastgen.evaluate.sequences import SeriesScore, TextScore, evaluate_series, evaluate_text

__all__ = ["SeriesScore", "TextScore", "evaluate_series", "evaluate_text", "sliced_wasserstein_distance"]
