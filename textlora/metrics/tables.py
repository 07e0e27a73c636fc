"""Tables about predictions: per label, per confidence bin, the worst mistakes; all of them plain JSON-able
records."""

from typing import Any

import numpy as np

from textlora.metrics.calibration import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.metrics.ranking import ratio
from textlora.metrics.rows import ECE_BINS, Rows, bin_of, confusion, number

_TEXT_LIMIT, _SCATTER_LIMIT = 300, 500


def per_class(labels: np.ndarray, predictions: np.ndarray, label_names: list[str]) -> list[dict[str, Any]]:
    """One record {label, support, precision, recall, f1} per label.

    Args:
        labels: single-label (N,) ints, multi-label (N, C) of 0 and 1.
        predictions: as `decide` gives them, of the same shape.

    Returns:
        Precision is None for a label never predicted, recall for one that never occurs, F1 for one that is
        neither.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim == 1:
        matrix = confusion(labels, predictions, len(label_names))
        hits, support, given = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    else:
        truth, chosen = labels > 0.5, predictions > 0.5
        hits, support, given = (truth & chosen).sum(axis=0), truth.sum(axis=0), chosen.sum(axis=0)
    scores = zip(
        label_names,
        support,
        ratio(hits, given),
        ratio(hits, support),
        ratio(2 * hits, support + given),
        strict=True,
    )
    return [
        {
            "label": name,
            "support": int(n),
            "precision": number(precision),
            "recall": number(recall),
            "f1": number(f1),
        }
        for name, n, precision, recall, f1 in scores
    ]


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS
) -> list[dict[str, Any]]:
    """Reliability diagram: records {low, high, count, confidence, accuracy} of equal-width bins (low, high].

    Args:
        confidence: (M,) in [0, 1], for instance each row's highest score.
        correct: (M,) bool: was the prediction right.

    Returns:
        `bins` records; mean confidence and accuracy are None in an empty bin. The ECE is their count-weighted
        mean gap.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    index = bin_of(confidence, bins)
    counts, sums, hits = (np.bincount(index, w, minlength=bins) for w in (None, confidence, correct))
    means, shares = ratio(sums, counts), ratio(hits, counts)
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int(n),
            "confidence": number(mean),
            "accuracy": number(share),
        }
        for b, (n, mean, share) in enumerate(zip(counts, means, shares, strict=True))
    ]


def details(
    problem_type: str,
    labels: np.ndarray,
    logits: np.ndarray,
    label_names: list[str],
    texts: list[str],
    wheres: list[str],
    *,
    temperature: float = 1.0,
    thresholds: np.ndarray | None = None,
    mistakes: int = 20,
) -> dict[str, Any]:
    """What a report shows besides the metrics; everything in it can be written as JSON.

    Args:
        labels, logits, label_names, temperature, thresholds: as for `evaluate`.
        texts, wheres: (N,) each row's text and origin ("test.csv row 7").
        mistakes: how many wrong rows to keep, the most confident first (regression: the largest residuals
            first).

    Returns:
        confusion: (C, C) lists of counts, row = true label (single-label, else None).
        per_class: see `per_class` (regression: empty).
        calibration: see `calibration_bins`; single-label is about each row's highest score, multi-label about
            every score of every label, accuracy being the share of rows that have it (regression: empty).
        mistakes: {text (at most 300 characters), where, label, predicted, score}. Score is the probability
            that was given to the wrong decision; multi-label takes the worst of the row's labels and has
            lists in label and predicted; regression has numbers in both and the absolute residual as score.
        scatter: [label, predicted] of at most 500 rows (regression, else empty).

    Raises:
        UsageError: as `evaluate`.
    """
    rows = Rows(problem_type, labels, logits, temperature, thresholds)
    found: dict[str, Any] = {
        "confusion": None,
        "per_class": [],
        "calibration": [],
        "mistakes": [],
        "scatter": [],
    }
    if not rows.usable:
        return found
    truth, given, probs, every = rows.labels, rows.decisions, rows.probs, np.arange(rows.count)
    if problem_type == REGRESSION:
        wrongness = np.abs(given - truth)
        kept = np.random.default_rng(0).permutation(rows.count)[:_SCATTER_LIMIT]
        found["scatter"] = [[float(truth[i]), float(given[i])] for i in kept]
    else:
        found["per_class"] = per_class(truth, given, label_names)
        if problem_type == SINGLE_LABEL:
            found["confusion"] = confusion(truth, given, probs.shape[1]).tolist()
            found["calibration"] = calibration_bins(probs.max(axis=1), rows.correct)
            wrongness = np.where(rows.correct, -1.0, probs[every, given])
        else:
            found["calibration"] = calibration_bins(probs.ravel(), truth.ravel())
            wrongness = np.where(truth != given, np.where(given, probs, 1 - probs), -1.0).max(axis=1)

    def shown(row: np.ndarray | np.generic) -> Any:
        if problem_type == MULTI_LABEL:
            return [name for name, has in zip(label_names, row, strict=True) if has]
        return float(row) if problem_type == REGRESSION else label_names[int(row)]

    worst = [i for i in np.argsort(-wrongness, kind="stable")[:mistakes] if wrongness[i] >= 0]
    found["mistakes"] = [
        {
            "text": texts[i] if len(texts[i]) <= _TEXT_LIMIT else texts[i][: _TEXT_LIMIT - 1] + "…",
            "where": str(wheres[i]),
            "label": shown(truth[i]),
            "predicted": shown(given[i]),
            "score": float(wrongness[i]),
        }
        for i in worst
    ]
    return found
