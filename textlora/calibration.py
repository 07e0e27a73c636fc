"""From logits to probabilities and decisions, and the two things fitted on validation rows: temperature and thresholds.

Prediction, evaluation and serving all come through `probabilities` and `decide`, so that a score means the same everywhere.
Needs numpy only. N is the number of rows, C the number of labels; regression has C = 1.
"""

from typing import Final

import numpy as np

from textlora.config import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from textlora.errors import UsageError

LOG_TEMPERATURE_RANGE: Final = (-3.0, 3.0)
THRESHOLD_RANGE: Final = (0.05, 0.95)
_GOLDEN = (5**0.5 - 1) / 2


def check_problem_type(problem_type: str) -> None:
    """Raise UsageError unless `problem_type` is a value of `PROBLEM_TYPES`."""
    if problem_type not in PROBLEM_TYPES.values():
        raise UsageError(f"unknown problem type {problem_type!r}", f"use one of {', '.join(PROBLEM_TYPES.values())}")


def probabilities(logits: np.ndarray, problem_type: str, temperature: float = 1.0) -> np.ndarray:
    """Scores of each label: softmax (single-label), sigmoid (multi-label) or the values themselves (regression).

    Args:
        logits: (N, C) floats of any size; no overflow.
        temperature: divides the logits first (Guo et al. 2017, arXiv:1706.04599); without effect on regression.

    Returns:
        (N, C) float64.

    Raises:
        UsageError: the problem type is unknown or the temperature is not above 0.
    """
    scaled = _scaled(logits, problem_type, temperature)
    if problem_type == SINGLE_LABEL:
        return np.exp(_log_softmax(scaled))
    if problem_type == MULTI_LABEL:
        return np.exp(-np.logaddexp(0.0, -scaled))
    return scaled


def decide(probs: np.ndarray, problem_type: str, thresholds: np.ndarray | float | None = None) -> np.ndarray:
    """Turn scores (N, C) into decisions.

    Args:
        thresholds: multi-label only: a label is given where its score is at least this; one number or (C,); None is 0.5.

    Returns:
        single-label: (N,) int64, the label with the highest score (the first of equals); multi-label: (N, C) bool;
        regression: (N,) float64.

    Raises:
        UsageError: the problem type is unknown.
    """
    check_problem_type(problem_type)
    probs = np.asarray(probs)
    if problem_type == SINGLE_LABEL:
        return probs.argmax(axis=1)
    if problem_type == MULTI_LABEL:
        return probs >= (0.5 if thresholds is None else np.asarray(thresholds, dtype=np.float64))
    return probs[:, 0].astype(np.float64)


def row_log_loss(logits: np.ndarray, labels: np.ndarray, problem_type: str, temperature: float = 1.0) -> np.ndarray:
    """Negative log-likelihood of each row in nats, straight from the logits, so that no probability is rounded to 0.

    Args:
        logits: (N, C).
        labels: single-label (N,) ints; multi-label (N, C) of 0 and 1.

    Returns:
        (N,) float64; multi-label is the mean over the C labels, as in `torch.nn.BCEWithLogitsLoss`.

    Raises:
        UsageError: the problem type has no likelihood (regression) or is unknown, or the temperature is not above 0.
    """
    scaled = _scaled(logits, problem_type, temperature)
    if problem_type == SINGLE_LABEL:
        return -_log_softmax(scaled)[np.arange(len(scaled)), np.asarray(labels, dtype=np.int64)]
    if problem_type == MULTI_LABEL:
        with np.errstate(invalid="ignore"):
            return (np.logaddexp(0.0, scaled) - np.asarray(labels, dtype=np.float64) * scaled).mean(axis=1)
    raise UsageError("regression has no log loss", "use mse or mae")


def fit_temperature(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> float:
    """The temperature that gives the given (validation) rows the lowest mean log loss (Guo et al. 2017, section 4.2).

    Golden-section search on log T in [-3, 3]: the loss is convex in 1/T, so it has one valley in log T. Deterministic.

    Returns:
        1.0 for regression, without rows, with logits that are not finite, or where no temperature beats 1.0.
    """
    check_problem_type(problem_type)
    if problem_type == REGRESSION or len(logits) == 0:
        return 1.0

    def loss(log_temperature: float) -> float:
        return float(row_log_loss(logits, labels, problem_type, float(np.exp(log_temperature))).mean())

    low, high = LOG_TEMPERATURE_RANGE
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 1e-5:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = loss(right)
    middle = (low + high) / 2
    return float(np.exp(middle)) if loss(middle) < loss(0.0) else 1.0


def fit_thresholds(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per label, the threshold with the highest F1 on the given (validation) rows.

    Candidates are 0.5, both ends of [0.05, 0.95] and the midpoints between neighbouring scores inside; of equally good
    ones the nearest to 0.5 wins (then the lower). So no label's F1 on these rows is below its F1 at 0.5.

    Args:
        probs: (N, C) scores in [0, 1].
        labels: (N, C) of 0 and 1.

    Returns:
        (C,) float64; 0.5 for a label without a positive row or with scores that are not finite.
    """
    probs, truth = np.asarray(probs, dtype=np.float64), np.asarray(labels) > 0.5
    thresholds = np.full(probs.shape[1], 0.5)
    for column, (scores, positive) in enumerate(zip(probs.T, truth.T, strict=True)):
        if positive.any() and np.isfinite(scores).all():
            thresholds[column] = _best_threshold(scores, positive)
    return thresholds


def _best_threshold(scores: np.ndarray, positive: np.ndarray) -> float:
    distinct = np.unique(scores)
    middles = np.clip((distinct[1:] + distinct[:-1]) / 2, *THRESHOLD_RANGE)
    candidates = np.unique(np.concatenate([middles, THRESHOLD_RANGE, [0.5]]))
    # Given to a label: every row whose score is at least the candidate, counted with two sorted searches.
    given = len(scores) - np.searchsorted(np.sort(scores), candidates, side="left")
    hits = positive.sum() - np.searchsorted(np.sort(scores[positive]), candidates, side="left")
    f1 = 2 * hits / (given + positive.sum())
    best = candidates[f1 == f1.max()]
    return float(best[np.abs(best - 0.5).argmin()])


def _scaled(logits: np.ndarray, problem_type: str, temperature: float) -> np.ndarray:
    check_problem_type(problem_type)
    logits = np.asarray(logits, dtype=np.float64)
    if problem_type == REGRESSION:
        return logits
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} is not above 0", "use 1.0 for uncalibrated scores")
    return logits / temperature


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # inf - inf: the row's scores are nan, and the metrics say so
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
