"""Rank metrics for many bootstrap resamples at once: the rows are sorted once, each resample is a vector of
row weights.

N rows, R resamples; a weight (R, N) says how often the resample drew the row (all ones: the plain metric).
Rows with equal scores form one group, so ties count as scikit-learn and SciPy count them. A resample without
a value gives nan.
"""

import numpy as np


def _groups(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the rows by ascending score (N,), and where each group of equal scores starts in that order
    (G,)."""
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below element by element, nan where below is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def roc_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (R,): chance that a positive row scores above a negative one, ties counting
    half.

    Args:
        positive: (N,) bool.
        scores: (N,) floats.
        weights: (R, N) row weights.
    """
    order, starts = _groups(scores)
    weights, positive = weights[:, order], positive[order]
    hits = np.add.reduceat(weights * positive, starts, axis=1)
    misses = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = misses.cumsum(axis=1) - misses / 2
    return ratio((hits * below).sum(axis=1), hits.sum(axis=1) * misses.sum(axis=1))


def average_precision(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (R,): sum over thresholds of (recall step) x precision, without interpolation.

    Arguments as for `roc_auc`.
    """
    order, starts = _groups(-scores)
    weights, positive = weights[:, order], positive[order]
    hits = np.add.reduceat(weights * positive, starts, axis=1)
    given = np.add.reduceat(weights, starts, axis=1).cumsum(axis=1)
    precision = np.nan_to_num(ratio(hits.cumsum(axis=1), given))
    return ratio((hits * precision).sum(axis=1), hits.sum(axis=1))


def spearman(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation (R,) of two (N,) float arrays: Pearson's of the ranks, equal values sharing
    their mean rank."""
    total = weights.sum(axis=1, keepdims=True)
    x, y = _centred_ranks(first, weights, total), _centred_ranks(second, weights, total)
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    return np.clip(ratio((weights * x * y).sum(axis=1), spread), -1, 1)


def _centred_ranks(values: np.ndarray, weights: np.ndarray, total: np.ndarray) -> np.ndarray:
    order, starts = _groups(values)
    sizes = np.add.reduceat(weights[:, order], starts, axis=1)
    # Copies of a row are ties: a group's mean rank is the middle of the places it takes. Exact halves, so
    # constants give 0.
    ranks = sizes.cumsum(axis=1) - sizes / 2 - total / 2
    result = np.empty_like(weights)
    result[:, order] = np.repeat(ranks, np.diff(np.append(starts, len(values))), axis=1)
    return result
