"""How good a trained model is: figures of held-out data, one file a modality."""

from fastgen.evaluate.sequences import SeriesScore, TextScore, evaluate_series, evaluate_text

__all__ = ["SeriesScore", "TextScore", "evaluate_series", "evaluate_text"]
