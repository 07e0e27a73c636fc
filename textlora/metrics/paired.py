"""Whether one classifier is better than another on the same test rows: intervals over seeds, paired
bootstrap, Holm.

A score has two kinds of luck: which rows were in the test set, and which seed trained the model. The rows are
drawn again with replacement (paired: the same draw for every method); the seeds, of which there are only a
few, enter as a t variable. N is the number of test rows, R the number of resamples, S the number of seeds of
a method.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from textlora.metrics.calibration import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.metrics.rows import Rows

__all__ = [
    "DECIDED",
    "Difference",
    "PairedScores",
    "holm",
    "paired_scores",
    "summarize",
    "t_975",
    "t_interval",
    "t_test",
]

RESAMPLES: Final = 5000
_CHUNK = 100  # resamples held at once, as in `metrics.intervals`
# Metrics that decisions alone determine; the others need each row's scores.
DECIDED: Final = {
    SINGLE_LABEL: ("accuracy", "macro_f1", "weighted_f1", "mcc"),
    MULTI_LABEL: ("micro_f1", "macro_f1", "exact_match", "hamming_loss"),
    REGRESSION: ("spearman", "pearson", "mse", "mae", "r2"),
}

Predictions = Sequence[Any] | np.ndarray


def t_975(freedom: int) -> float:
    """The 97.5 % point of Student's t with `freedom` degrees of freedom (an int of 1 or more).

    Bisection on the closed form of P(|t| <= x) for whole degrees of freedom (Abramowitz and Stegun 1964,
    26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    while high - low > 1e-15:
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < 0.95 else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for power in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power - 1) / power
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the values and half the width of its 95 % t interval; None for that where there is one value
    only."""
    count = len(values)
    half = t_975(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return float(np.mean(values)), half


def t_test(values: Sequence[float]) -> float | None:
    """Two-sided p of a one-sample t test that the values' mean is 0; None for one value, 1 or 0 where they
    are all the same."""
    error, freedom = _standard_error(values)
    if len(values) < 2 or not error:
        return None if len(values) < 2 else float(not np.mean(values))
    return 1 - _within(math.atan(abs(float(np.mean(values))) / error / math.sqrt(freedom)), int(freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): all below 0.05 together with a chance of at most 5 % of even one
    mistake."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - place)))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """One score minus another: value, 95 % interval, two-sided p, and the R draws they come from, in the
    metric's own unit."""

    value: float
    low: float
    high: float
    p: float
    draws: np.ndarray


@dataclass(frozen=True)
class PairedScores:
    """Scores of several methods on the same rows.

    Attributes:
        values: method to seed to score on the rows as they are.
        draws: method to (R,) scores on the resampled rows, mean over seeds; resample i is the same rows for
            every method.
    """

    values: Mapping[str, Mapping[Any, float]]
    draws: Mapping[str, np.ndarray]
    seed: int

    def difference(self, method: str, other: str) -> Difference | None:
        """`method` minus `other`; None where a score has no value (a correlation with constant predictions).

        A draw is the difference on resampled rows plus the seeds' luck: a t variable times the standard error
        of the mean over seeds, of paired differences where both have the same seeds (S - 1 degrees of
        freedom), else of the two means (Welch). A method with one seed adds no luck: its seeds' spread is not
        known. Some noise of single rows is counted with both, so the interval errs to the wide side. Without
        the seeds' part, equal methods differ "significantly" in far more than 5 % of comparisons as soon as
        seeds matter.
        """
        mine, theirs = self.values[method], self.values[other]
        if set(mine) == set(theirs):
            pairs = [mine[seed] - theirs[seed] for seed in mine]
            error, freedom = _standard_error(pairs)
        else:
            error, freedom = _welch(list(mine.values()), list(theirs.values()))
        draws = self.draws[method] - self.draws[other]
        if error:
            draws = draws + error * np.random.default_rng([self.seed, 1]).standard_t(freedom, size=len(draws))
        value = float(np.mean(list(mine.values())) - np.mean(list(theirs.values())))
        return summarize(value, draws)


def summarize(value: float, draws: np.ndarray) -> Difference | None:
    """A difference with its percentile interval and the p that belongs to it: twice the share of draws beyond
    0."""
    known = draws[np.isfinite(draws)]
    if not (math.isfinite(value) and len(known)):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return Difference(
        value, float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (len(known) + 1))), draws
    )


def paired_scores(
    problem_type: str,
    metric: str,
    labels: Predictions,
    predictions: Mapping[str, Mapping[Any, Predictions]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedScores:
    """Score every method and seed on R resamples of the same test rows (paired bootstrap, Efron and
    Tibshirani 1993).

    Args:
        metric: one of `DECIDED[problem_type]`.
        labels: single-label (N,) ints; multi-label (N, C) of 0 and 1; regression (N,) floats.
        predictions: method to seed to decisions in the form of the labels.
        seed: fixes the draws; different data sets need different seeds.
    """
    scorers = {
        m: {s: _scorer(problem_type, metric, labels, made) for s, made in by_seed.items()}
        for m, by_seed in predictions.items()
    }
    count, random = len(labels), np.random.default_rng([seed, 0])
    plain = np.ones((1, count))
    values = {
        m: {s: float(score(plain)[0]) for s, score in by_seed.items()} for m, by_seed in scorers.items()
    }
    draws = {m: [] for m in predictions}
    for start in range(0, resamples, _CHUNK):
        rows = (random.integers(count, size=count) for _ in range(min(_CHUNK, resamples - start)))
        weights = np.stack([np.bincount(row, minlength=count) for row in rows]).astype(np.float64)
        for m, by_seed in scorers.items():
            draws[m].append(np.mean([score(weights) for score in by_seed.values()], axis=0))
    return PairedScores(values, {m: np.concatenate(parts) for m, parts in draws.items()}, seed)


def _scorer(
    problem_type: str, metric: str, labels: Predictions, made: Predictions
) -> Callable[[np.ndarray], np.ndarray]:
    """A function of row weights (R, N) that gives the metric (R,), by the one definition in `Rows`."""
    labels, made = np.asarray(labels), np.asarray(made)
    if problem_type == SINGLE_LABEL:
        classes = int(max(labels.max(), made.max())) + 1
        rows = Rows(problem_type, labels, np.eye(classes)[made], 1.0, None)
        if metric != "accuracy":
            cell = (rows.cells[0] * classes + rows.cells[1])[None]
            one_hot = ((labels * classes + made)[:, None] == cell).astype(np.float64)
            return lambda weights: rows.count_metrics(weights @ one_hot)[metric]
    elif problem_type == MULTI_LABEL:
        rows = Rows(problem_type, labels, np.where(made > 0.5, 1.0, -1.0), 1.0, None)
    else:
        rows = Rows(problem_type, labels, made[:, None], 1.0, None)
        if metric == "spearman":
            return lambda weights: rows.rank_metrics(weights, {metric})[metric]
    if metric in ("accuracy", "exact_match"):
        return lambda weights: weights @ rows.correct / weights.sum(axis=1)
    return lambda weights: rows.row_metrics(weights)[metric]


def _standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the mean and its degrees of freedom; 0 where one value tells nothing of the spread."""
    if len(values) < 2:
        return 0.0, 1.0
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1.0


def _welch(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Standard error of a difference of two means, and the degrees of freedom of Welch (1947) and
    Satterthwaite."""
    parts = [(error**2, freedom) for error, freedom in (_standard_error(mine), _standard_error(theirs))]
    variance = sum(part for part, _ in parts)
    return math.sqrt(variance), variance**2 / sum(
        part**2 / freedom for part, freedom in parts
    ) if variance else 1.0
