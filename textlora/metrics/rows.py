"""Rows to be scored: labels, scores and decisions together, and each metric as a function of row weights."""

import math
from typing import Any, Final

import numpy as np

from textlora.core.errors import UsageError
from textlora.metrics.calibration import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    check_problem_type,
    decide,
    probabilities,
    row_log_loss,
)
from textlora.metrics.ranking import average_precision, ratio, roc_auc, spearman

ECE_BINS: Final = 15


class Rows:
    """N rows; the metrics below take R sets of weights and give (R,) values, nan where a metric has none.

    Raises:
        UsageError: the problem type is unknown, or labels and logits do not fit together.
    """

    def __init__(
        self, problem_type: str, labels: Any, logits: Any, temperature: float, thresholds: np.ndarray | None
    ):
        self.problem_type = problem_type
        self.labels, self.logits = _checked(problem_type, labels, logits)
        self.temperature, self.count = temperature, len(self.logits)
        self.probs = probabilities(self.logits, problem_type, temperature)
        self.decisions = decide(self.probs, problem_type, thresholds) if self.count else self.labels
        self.usable = self.count > 0 and bool(
            np.isfinite(self.logits).all() and np.isfinite(self.labels).all()
        )
        self.cells, self.cell_counts = (np.empty((2, 0), np.int64), np.empty(0, np.int64))
        self.correct = np.zeros(self.count, dtype=bool)
        if problem_type == SINGLE_LABEL and self.usable:
            matrix = confusion(self.labels, self.decisions, self.logits.shape[1])
            self.cells = np.stack(matrix.nonzero())
            self.cell_counts = matrix[tuple(self.cells)]
            self.correct = self.labels == self.decisions
        elif problem_type == MULTI_LABEL and self.usable:
            self.correct = (self.labels == self.decisions).all(axis=1)

    def count_metrics(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Single-label metrics of confusion matrices, given as counts (R, K) of the K cells that are not
        empty."""
        if self.problem_type != SINGLE_LABEL:
            return {}
        one_hot = np.eye(self.logits.shape[1])
        truth, given = self.cells
        counts = counts.astype(np.float64)
        total, right = counts.sum(axis=1), counts @ (truth == given)
        support, predicted = counts @ one_hot[truth], counts @ one_hot[given]
        hits = counts @ (one_hot[truth] * (truth == given)[:, None])
        f1 = ratio(2 * hits, support + predicted)
        # Gorodkin 2004: the correlation of two one-hot codes; 0 where either is constant.
        spread = np.sqrt((total**2 - (predicted**2).sum(axis=1)) * (total**2 - (support**2).sum(axis=1)))
        return {
            "accuracy": right / total,
            "macro_f1": np.nanmean(f1, axis=1),
            "weighted_f1": (np.nan_to_num(f1) * support).sum(axis=1) / total,
            "mcc": np.nan_to_num(ratio(right * total - (predicted * support).sum(axis=1), spread)),
        }

    def row_metrics(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics that are sums over rows, so one matrix product gives all resamples."""
        total = weights.sum(axis=1)
        if self.problem_type == REGRESSION:
            return self._regression(weights, total)
        found = {
            "log_loss": weights
            @ row_log_loss(self.logits, self.labels, self.problem_type, self.temperature)
            / total
        }
        if self.problem_type == SINGLE_LABEL:
            confidence = self.probs.max(axis=1)
            gaps = np.zeros((self.count, ECE_BINS))
            gaps[np.arange(self.count), bin_of(confidence, ECE_BINS)] = confidence - self.correct
            return found | {"ece": np.abs(weights @ gaps).sum(axis=1) / total}
        truth, given = self.labels, self.decisions
        hits, support, predicted = weights @ (truth & given), weights @ truth, weights @ given
        f1 = ratio(2 * hits, support + predicted)
        # A label that is nowhere true or predicted counts 0, as in scikit-learn; one that only this resample
        # lacks is left out.
        f1[:, ~(truth | given).any(axis=0)] = 0
        return found | {
            "micro_f1": np.nan_to_num(ratio(2 * hits.sum(axis=1), (support + predicted).sum(axis=1))),
            "macro_f1": _mean_of_known(f1),
            "exact_match": weights @ self.correct / total,
            "hamming_loss": weights @ (truth != given).mean(axis=1) / total,
        }

    def _regression(self, weights: np.ndarray, total: np.ndarray) -> dict[str, np.ndarray]:
        errors = self.decisions - self.labels
        squared, absolute = weights @ errors**2 / total, weights @ np.abs(errors) / total
        # Centred first: a spread taken from raw squares loses its digits where the mean is large.
        x, y = self.labels - self.labels.mean(), self.decisions - self.decisions.mean()
        mean_x, mean_y, xx, yy, xy = (
            weights @ np.stack([x, y, x * x, y * y, x * y], axis=1) / total[:, None]
        ).T
        var_x, var_y = (_variance(*moments) for moments in ((mean_x, xx, x), (mean_y, yy, y)))
        pearson = ratio(xy - mean_x * mean_y, np.sqrt(var_x * var_y))
        return {
            "pearson": np.clip(pearson, -1, 1),
            "mse": squared,
            "mae": absolute,
            "r2": 1 - ratio(squared, var_x),
        }

    def rank_metrics(self, weights: np.ndarray, wanted: set[str]) -> dict[str, np.ndarray]:
        """Metrics that need the rows in the order of their scores."""
        columns = range(self.logits.shape[1])
        if "spearman" in wanted:
            return {"spearman": spearman(self.labels, self.decisions, weights)}
        if "macro_average_precision" in wanted:
            areas = [average_precision(self.labels[:, c], self.probs[:, c], weights) for c in columns]
            return {"macro_average_precision": _mean_of_known(np.stack(areas, axis=1))}
        if "auc" in wanted:
            present = np.bincount(self.labels, minlength=len(columns)) > 0
            if len(columns) < 2 or not present.all():
                return {"auc": np.full(len(weights), np.nan)}
            if len(columns) == 2:  # the margin, not the probability: no two rows tie because both round to 1
                return {"auc": roc_auc(self.labels == 1, self.logits[:, 1] - self.logits[:, 0], weights)}
            areas = [roc_auc(self.labels == c, self.probs[:, c], weights) for c in columns]
            return {"auc": _mean_of_known(np.stack(areas, axis=1))}
        return {}


def _checked(problem_type: str, labels: Any, logits: Any) -> tuple[np.ndarray, np.ndarray]:
    check_problem_type(problem_type)
    labels, logits = np.asarray(labels), np.asarray(logits, dtype=np.float64)
    if problem_type == REGRESSION and logits.ndim == 1:
        logits = logits[:, None]
    wanted = logits.shape if problem_type == MULTI_LABEL else logits.shape[:1]
    if logits.ndim != 2 or labels.shape != wanted or (problem_type == REGRESSION and logits.shape[1] != 1):
        raise UsageError(
            f"{problem_type} labels of shape {labels.shape} do not fit logits of shape {logits.shape}"
        )
    if problem_type == REGRESSION:
        return labels.astype(np.float64), logits
    if problem_type == MULTI_LABEL:
        return labels > 0.5, logits
    labels = labels.astype(np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < logits.shape[1]):
        row = int(np.flatnonzero((labels < 0) | (labels >= logits.shape[1]))[0])
        raise UsageError(
            f"label {labels[row]} of row {row} is not among the {logits.shape[1]} labels of the logits"
        )
    return labels, logits


def _variance(mean: np.ndarray, mean_of_squares: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Weighted variances (R,), exactly 0 where only rounding is left of them."""
    variance = mean_of_squares - mean**2
    return np.where((variance > 1e-12 * centred.var()) & (np.ptp(centred) > 0), variance, 0.0)


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over axis 1 of what is not nan; nan where nothing is left."""
    return ratio(np.nan_to_num(values).sum(axis=1), (~np.isnan(values)).sum(axis=1))


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Bin b holds confidences in (b / bins, (b + 1) / bins]; 0 falls into the first."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def number(value: Any) -> float | None:
    """A Python float, or None where it is not finite (JSON knows no nan)."""
    value = float(value)
    return value if math.isfinite(value) else None


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) counts; row = true label, column = predicted label. Both arguments are (N,) ints below
    `classes`."""
    flat = np.asarray(labels, dtype=np.int64) * classes + np.asarray(predictions, dtype=np.int64)
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)
