"""From logits to probabilities and decisions, and the two things fitted on validation rows: temperature and
thresholds.

Prediction, evaluation and serving all come through `probabilities` and `decide`, so that a score means the
same everywhere. Needs numpy only. N is the number of rows, C the number of labels; regression has C = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from textlora.core.config import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from textlora.core.errors import UsageError

LOG_TEMPERATURE_RANGE: Final = (-3.0, 3.0)
THRESHOLD_RANGE: Final = (0.05, 0.95)
COMMON_POSITIVES, OWN_POSITIVES = (
    10.0,
    50.0,
)  # positives at which the common and a label's own threshold count half
PRIOR_SPREAD: Final = 0.5  # of log T around 0: about twenty rows weigh as much
UNSEEN_ERRORS: Final = 3.0
FLOOR_ROWS: Final = 2.0
# From models of the folds to one of all rows: log T above 0 grows by 4 times the share of wrong rows, at most
# by 0.4 of itself; factor of log T
# below 0; log of the growth of well separated logits. Wrong rows at which log T below 0 counts half.
GROWN_PER_ERROR, GROWN_SURER, GROWN_LESS_SURE, GROWN_LOGITS = 4.0, 0.4, 0.25, 0.1
SHARPENING_ERRORS: Final = 10.0
_GOLDEN = (5**0.5 - 1) / 2


def check_problem_type(problem_type: str) -> None:
    """Raise UsageError unless `problem_type` is a value of `PROBLEM_TYPES`."""
    if problem_type not in PROBLEM_TYPES.values():
        raise UsageError(
            f"unknown problem type {problem_type!r}", f"use one of {', '.join(PROBLEM_TYPES.values())}"
        )


def probabilities(logits: np.ndarray, problem_type: str, temperature: float = 1.0) -> np.ndarray:
    """Scores of each label: softmax (single-label), sigmoid (multi-label) or the values themselves
    (regression).

    Args:
        logits: (N, C) floats of any size; no overflow.
        temperature: divides the logits first (Guo et al. 2017, arXiv:1706.04599); without effect on
            regression.

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
        thresholds: multi-label only: a label is given where its score is at least this; one number or (C,);
            None is 0.5.

    Returns:
        single-label: (N,) int64, the label with the highest score (the first of equals); multi-label: (N, C)
        bool;
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


def row_log_loss(
    logits: np.ndarray, labels: np.ndarray, problem_type: str, temperature: float = 1.0
) -> np.ndarray:
    """Negative log-likelihood of each row in nats, straight from the logits, so that no probability is
    rounded to 0.

    Args:
        logits: (N, C).
        labels: single-label (N,) ints; multi-label (N, C) of 0 and 1.

    Returns:
        (N,) float64; multi-label is the mean over the C labels, as in `torch.nn.BCEWithLogitsLoss`.

    Raises:
        UsageError: the problem type has no likelihood (regression) or is unknown, or the temperature is not
            above 0.
    """
    scaled = _scaled(logits, problem_type, temperature)
    if problem_type == SINGLE_LABEL:
        return -_log_softmax(scaled)[np.arange(len(scaled)), np.asarray(labels, dtype=np.int64)]
    if problem_type == MULTI_LABEL:
        with np.errstate(invalid="ignore"):
            return (np.logaddexp(0.0, scaled) - np.asarray(labels, dtype=np.float64) * scaled).mean(axis=1)
    raise UsageError("regression has no log loss", "use mse or mae")


def class_prior(labels: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """What the training labels (N,) of a single-label task say of a text unread: logits (C,) with mean 0, log
    of each class's rows and one more, times its weight in the loss."""
    rows = (np.bincount(labels, minlength=count) + 1.0) * (
        1.0 if weights is None else np.maximum(weights, 1e-6)
    )
    return np.log(rows) - np.log(rows).mean()


def prior_shift(temperature: float, prior: np.ndarray | None) -> np.ndarray | float:
    """What is added to logits after their division by a temperature: `(1 - 1 / T) prior` for T above 1, else
    nothing.

    Scores that are less certain then move towards the classes' frequencies, and not towards equal shares,
    which rows that say little of a rare class would be wrong about.
    """
    return 0.0 if prior is None or temperature <= 1 else (1 - 1 / temperature) * prior


def fit_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    problem_type: str,
    *,
    out_of_fold: bool = False,
    prior: np.ndarray | None = None,
) -> float:
    """A temperature that makes scores as certain as the given held-back rows support, and no more (Guo et al.
    2017, section 4.2).

    With N rows, log T is the larger of two values:

    - The maximum a posteriori: it minimises `sum of the rows' log loss + (log T)^2 / (2 * 0.5^2)`, so few
      rows leave T near 1.
    - A floor: T where the mean claimed chance of a mistake reaches `u / (N + 2 u)`, times `N / (N + 2)`; u is
      3 less the wrong rows. N rows without a mistake do not exclude an error of up to 3 / N (rule of three,
      Hanley and Lippman-Hand 1983); the log loss alone would sharpen such rows without end. A multi-label row
      is wrong where any of its labels is. Without a wrong row T is at least 1; from three on there is no
      floor.

    Rows of cross-validation (`out_of_fold`) come from models that saw fewer rows and took fewer steps than
    the one to be scaled: its logits are larger, and where it errs it is surer than it should be by more. Then
    log T of the first is multiplied, above 0 by `1 + min(0.4, 4 * share of wrong rows)` and below by `0.25 w
    / (w + 10)` for w wrong rows, and the floor's rises by 0.1; measured on ten sets
    (docs/decisions/few-rows.md).

    Args:
        logits: (N, C) of rows that the model has not been trained on.
        labels: single-label (N,) ints; multi-label (N, C) of 0 and 1.
        prior: `class_prior` of a single-label task: the logits that are scored are `logits / T +
            prior_shift(T, prior)`.

    Returns:
        T above 0; 1.0 for regression, without rows, or with logits that are not finite.

    Raises:
        UsageError: the problem type is unknown.
    """
    check_problem_type(problem_type)
    logits = np.asarray(logits, dtype=np.float64)
    count = len(logits)
    if problem_type == REGRESSION or count == 0 or logits.shape[1] == 0 or not np.isfinite(logits).all():
        return 1.0
    parts = (
        logits.shape[1] if problem_type == MULTI_LABEL else 1
    )  # a row's loss is the mean over its labels: here their sum counts

    def scored(log_t: float) -> np.ndarray:
        temperature = float(np.exp(log_t))
        return logits / temperature + prior_shift(temperature, prior)

    def loss(log_t: float) -> float:
        rows = row_log_loss(scored(log_t), labels, problem_type)
        return float(rows.sum()) * parts + log_t**2 / (2 * PRIOR_SPREAD**2)

    log_t = _lowest(loss, *LOG_TEMPERATURE_RANGE)
    wrong = _wrong_rows(logits, labels, problem_type)
    if loss(log_t) >= loss(0.0) or (log_t < 0 and not wrong):
        log_t = 0.0
    unseen = max(0.0, UNSEEN_ERRORS - wrong)
    error = unseen / (count + 2 * unseen)
    if prior is not None:  # scores that say nothing but the frequencies claim no more than theirs
        error = min(error, (1 - float(np.exp(_log_softmax(prior[None])).max())) / 2)
    floor = _floor(scored, problem_type, error) if unseen else LOG_TEMPERATURE_RANGE[0]
    if out_of_fold:
        surer = (
            GROWN_LESS_SURE * wrong / (wrong + SHARPENING_ERRORS)
        )  # few mistakes say little of how sure is too sure
        log_t *= 1 + min(GROWN_SURER, GROWN_PER_ERROR * wrong / count) if log_t > 0 else surer
        floor += GROWN_LOGITS
    floor *= count / (count + FLOOR_ROWS)
    return float(np.exp(min(max(log_t, floor), LOG_TEMPERATURE_RANGE[1])))


def _wrong_rows(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> int:
    """Rows whose decision at T = 1 is not the truth; of a multi-label row, any of them."""
    decided = decide(probabilities(logits, problem_type), problem_type)
    if problem_type == SINGLE_LABEL:
        return int((decided != np.asarray(labels)).sum())
    return int((decided != (np.asarray(labels) > 0.5)).any(axis=1).sum())


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one valley is lowest, or the lowest valley that 25 points show: golden-section
    search. Deterministic."""
    points = np.linspace(low, high, 25)
    best = int(np.argmin([function(float(x)) for x in points]))
    low, high = float(points[max(0, best - 1)]), float(points[min(24, best + 1)])
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-5:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _floor(scored: Callable[[float], np.ndarray], problem_type: str, error: float) -> float:
    """log T at which the mean claimed chance that a row's decision is wrong is `error`, by bisection."""

    def claimed(log_t: float) -> float:
        scores = probabilities(scored(log_t), problem_type)
        right = (
            scores.max(axis=1)
            if problem_type == SINGLE_LABEL
            else np.maximum(scores, 1 - scores).prod(axis=1)
        )
        return 1 - float(right.mean())

    low, high = LOG_TEMPERATURE_RANGE
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if claimed(middle) < error else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Calibration:
    """What is done to logits before they are scores, and where a score decides: `logits / temperature +
    shift`; thresholds of multi-label scores."""

    temperature: float = 1.0
    shift: np.ndarray | None = None
    thresholds: np.ndarray | None = None

    def of(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, C) as they are scored, float32."""
        return (logits / self.temperature + (0.0 if self.shift is None else self.shift)).astype(np.float32)


def calibrate(
    logits: np.ndarray,
    labels: np.ndarray,
    problem_type: str,
    *,
    out_of_fold: bool = False,
    prior: np.ndarray | None = None,
) -> Calibration:
    """All that held-back rows decide about scores. Arguments and errors as in `fit_temperature`; nothing for
    regression."""
    if problem_type == REGRESSION:
        return Calibration()
    temperature = fit_temperature(logits, labels, problem_type, out_of_fold=out_of_fold, prior=prior)
    shift = prior_shift(temperature, prior)
    found = Calibration(temperature, shift if isinstance(shift, np.ndarray) else None)
    if problem_type != MULTI_LABEL:
        return found
    return replace(found, thresholds=fit_thresholds(probabilities(found.of(logits), problem_type), labels))


def fit_thresholds(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per label, a threshold for a high F1, its own only as far as the label's positives support it.

    First one threshold for all labels: the one with the highest F1 over all decisions together (micro F1),
    its logit times `K / (K + 10)` for K positives in all, which draws it towards 0.5. Then each label's own
    with the highest F1: with k positives its logit counts `k / (k + 50)`, that of the common one the rest. On
    a handful of positives the best threshold of a label is where these happen to lie, and costs more than it
    gains on other rows (docs/decisions/few-rows.md).

    Candidates are 0.5, both ends of [0.05, 0.95] and the midpoints between neighbouring scores inside; of
    equally good ones the nearest to 0.5 wins (then the lower).

    Args:
        probs: (N, C) scores in [0, 1] of rows that the model has not been trained on.
        labels: (N, C) of 0 and 1.

    Returns:
        (C,) float64; 0.5 for a label with scores that are not finite, the common one for a label without a
        positive row.
    """
    probs, truth = np.asarray(probs, dtype=np.float64), np.asarray(labels) > 0.5
    usable = np.isfinite(probs).all(axis=0)
    thresholds = np.full(probs.shape[1], 0.5)
    if not truth[:, usable].any():
        return thresholds
    positives = truth.sum(axis=0)
    known = int(positives[usable].sum())
    common = (
        _logit(_best_threshold(probs[:, usable].ravel(), truth[:, usable].ravel()))
        * known
        / (known + COMMON_POSITIVES)
    )
    for column in np.flatnonzero(usable):
        own = _logit(_best_threshold(probs[:, column], truth[:, column])) if positives[column] else common
        share = positives[column] / (positives[column] + OWN_POSITIVES)
        thresholds[column] = 1 / (1 + np.exp(-(common + share * (own - common))))
    return thresholds


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


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
