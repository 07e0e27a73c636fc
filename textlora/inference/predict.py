"""Predict rows of a file or stream in windows: constant memory, rows in order, bad rows reported and passed
over."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from textlora.core.config import MULTI_LABEL, REGRESSION
from textlora.core.predictions import Prediction
from textlora.data import Record, Stream
from textlora.inference.classifier import TextClassifier

WINDOW = 1024  # rows held at once: enough to batch by length, little enough to stream


def predict_stream(
    classifier: TextClassifier, stream: Stream, on_problem: Callable[[Record], None]
) -> Iterator[tuple[Record, Prediction]]:
    """Yield each good row with its prediction, in order; hand bad ones to `on_problem` (its `problem` says
    why)."""
    rows = iter(stream)
    while window := list(islice(rows, WINDOW)):
        good = []
        for record in window:
            if record.problem is None:
                good.append(record)
            else:
                on_problem(record)
        if good:
            yield from zip(
                good, classifier.predict([r.text for r in good], [r.text_pair for r in good]), strict=True
            )


def output_columns(classifier: TextClassifier) -> list[str]:
    """Columns that `predict` adds to a table."""
    kind = classifier.meta.problem_type
    if kind == REGRESSION:
        return ["value"]
    named = "labels" if kind == MULTI_LABEL else "label"
    return [named, "score", *(f"score_{label}" for label in classifier.meta.labels)]


def output_values(classifier: TextClassifier, prediction: Prediction) -> dict[str, Any]:
    """The added columns of one row; several labels are joined by the adapter's separator."""
    kind, meta = classifier.meta.problem_type, classifier.meta
    if kind == REGRESSION:
        return {"value": prediction.score}
    scores = {f"score_{label}": score for label, score in prediction.scores.items()}
    if kind == MULTI_LABEL:
        return {
            "labels": (meta.label_separator or ",").join(prediction.labels),
            "score": prediction.score,
            **scores,
        }
    return {"label": prediction.label, "score": prediction.score, **scores}
