"""How good predictions are: metrics, their 95 % intervals, and the tables a report shows.

Every metric is written once, as a function of row weights: `evaluate` gives each row the weight 1,
`intervals` gives it the number of times a bootstrap resample drew it. So the estimate and its interval cannot
disagree about a definition. N is the number of rows, C the number of labels, R the number of resamples;
regression has C = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from textlora.core.errors import UsageError
from textlora.metrics.calibration import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.metrics.rows import Rows, confusion, number
from textlora.metrics.spread import (
    correlation_interval,
    losses,
    mean_interval,
    r2_interval,
    share_bounds,
    wilson,
)
from textlora.metrics.tables import calibration_bins, details, per_class

__all__ = [
    "DEFAULT_METRIC",
    "INTERVALS_ARE",
    "METRICS",
    "MetricInfo",
    "calibration_bins",
    "cannot_tell",
    "confusion",
    "details",
    "evaluate",
    "intervals",
    "per_class",
    "standard_error",
]

# Once beside every table of intervals: what they are about.
INTERVALS_ARE: Final = "An interval is over other test rows of the same kind; training again with another seed can move the score further."
RANK_RESAMPLES: Final = 200
_CHUNK = 100  # resamples held at once: 100 x 25,000 weights are 20 MB


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is for: problem types, direction, and one sentence of meaning."""

    problem_types: tuple[str, ...]
    higher_is_better: bool
    what: str


METRICS: Final[dict[str, MetricInfo]] = {
    "accuracy": MetricInfo((SINGLE_LABEL,), True, "Share of rows whose label is right."),
    "micro_f1": MetricInfo((MULTI_LABEL,), True, "F1 over all decisions of all labels together."),
    "macro_f1": MetricInfo(
        (SINGLE_LABEL, MULTI_LABEL), True, "Mean of the labels' F1, each label counting the same."
    ),
    "weighted_f1": MetricInfo(
        (SINGLE_LABEL,), True, "Mean of the labels' F1, each label counting as often as it occurs."
    ),
    "mcc": MetricInfo(
        (SINGLE_LABEL,), True, "Matthews correlation of labels and predictions: 0 is guessing, 1 is perfect."
    ),
    "auc": MetricInfo(
        (SINGLE_LABEL,),
        True,
        "Chance that a row of a label scores above a row of another (binary: label 1; else the labels' mean).",
    ),
    "exact_match": MetricInfo((MULTI_LABEL,), True, "Share of rows whose labels are all right."),
    "hamming_loss": MetricInfo((MULTI_LABEL,), False, "Share of wrong decisions among all rows and labels."),
    "macro_average_precision": MetricInfo(
        (MULTI_LABEL,), True, "Mean over labels of the area under precision against recall."
    ),
    "log_loss": MetricInfo(
        (SINGLE_LABEL, MULTI_LABEL),
        False,
        "Mean negative log of the probability given to the truth, in nats.",
    ),
    "ece": MetricInfo(
        (SINGLE_LABEL,),
        False,
        "Expected calibration error: mean gap between confidence and accuracy over 15 bins of equal width.",
    ),
    "spearman": MetricInfo((REGRESSION,), True, "Correlation of the ranks of labels and predictions."),
    "pearson": MetricInfo((REGRESSION,), True, "Linear correlation of labels and predictions."),
    "mse": MetricInfo((REGRESSION,), False, "Mean squared error."),
    "mae": MetricInfo((REGRESSION,), False, "Mean absolute error."),
    "r2": MetricInfo(
        (REGRESSION,),
        True,
        "Share of the labels' variance that is explained: 0 is answering the mean, 1 is perfect.",
    ),
}
DEFAULT_METRIC: Final = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "micro_f1", REGRESSION: "spearman"}

_SHARES: Final = ("accuracy", "micro_f1", "macro_f1", "weighted_f1", "exact_match")


def standard_error(metric: str, value: float, rows: int) -> float:
    """Standard error of a score on `rows` rows, `sqrt(p (1 - p) / n)`: exact for accuracy, rough for F1, 0
    for what is no share of rows."""
    return math.sqrt(value * (1 - value) / rows) if metric in _SHARES else 0.0


def cannot_tell(metric: str, value: float | None, interval: Sequence[float] | None, rows: int) -> str | None:
    """One sentence where the rows leave a score open: an interval wider than 0.2 (of errors: an upper end
    above twice the lower), or none.

    None where the rows are enough, the score has no value, or the metric never has an interval.
    """
    if value is None or metric not in METRICS or metric == "ece":
        return None
    few = f"{rows:,} row{'s' * (rows != 1)} cannot tell"
    if interval is None:
        return f"{few} how far the true {metric} is from this one."
    low, high = interval
    if high - low <= 0.2 if METRICS[metric].higher_is_better else high <= 2 * low:
        return None
    return f"{few}: the true {metric} may be anything between {low:.2f} and {high:.2f}."


@np.errstate(over="ignore", invalid="ignore")  # a value too large for a float becomes None, without a warning
def evaluate(
    problem_type: str,
    labels: np.ndarray,
    logits: np.ndarray,
    label_names: list[str],
    *,
    temperature: float = 1.0,
    thresholds: np.ndarray | None = None,
) -> dict[str, float | None]:
    """All metrics of the problem type, in the order of `METRICS`.

    The values are scikit-learn's with its defaults and `zero_division=0`, with these choices: single-label
    macro F1 is over the labels that occur or are predicted; AUC averages one label against the rest; average
    precision leaves out labels without a positive row; multi-label log loss is the mean over rows and labels;
    ECE is Guo et al. 2017 (arXiv:1706.04599).

    Args:
        labels: single-label (N,) ints below C; multi-label (N, C) of 0 and 1; regression (N,) floats.
        logits: (N, C) floats.
        label_names: C names; not looked at for regression.
        thresholds: (C,) for multi-label; None is 0.5.

    Returns:
        Name to value. None (JSON null) where a metric has no value: no rows, logits that are not finite, AUC
        with a label that never occurs (or is the only one), average precision without any positive, a
        correlation or R2 with a constant.

    Raises:
        UsageError: the problem type is unknown, or labels, logits and names do not fit together.
    """
    rows = Rows(problem_type, labels, logits, temperature, thresholds)
    if problem_type != REGRESSION and len(label_names) != rows.logits.shape[1]:
        raise UsageError(
            f"{len(label_names)} label names for logits of {rows.logits.shape[1]} labels",
            "pass one name per column",
        )
    names = [name for name, info in METRICS.items() if problem_type in info.problem_types]
    if not rows.usable:
        return dict.fromkeys(names)
    found = rows.count_metrics(rows.cell_counts[None]) | rows.row_metrics(np.ones((1, rows.count)))
    found |= rows.rank_metrics(np.ones((1, rows.count)), set(names))
    return {name: number(found[name][0]) for name in names}


@np.errstate(over="ignore", invalid="ignore")  # a value too large for a float becomes None, without a warning
def intervals(
    problem_type: str,
    labels: np.ndarray,
    logits: np.ndarray,
    *,
    metrics: list[str] | None = None,
    temperature: float = 1.0,
    thresholds: np.ndarray | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals: what the metrics could be on other test rows of the same kind (not other training
    seeds).

    Accuracy and exact match: Wilson's score interval (1927). All else: a bootstrap over rows (Efron 1979)
    gives the standard error, to which few rows add what they leave open (`textlora.metrics.spread`), so that
    four rows without a mistake do not make a score certain; on many rows the bootstrap decides alone. Metrics
    of a single-label confusion matrix resample its cells, which is the same thing, faster; rank metrics take
    at most 200 resamples. A mean over labels of which some have no row may be anything for those. ECE has
    none: resampling adds noise to its absolute gaps, so an interval would sit too high.

    Args:
        metrics: names; None is all of the problem type.
        seed: the same seed gives the same interval, whichever other metrics are asked for.

    Returns:
        Name to (low, high), without the metrics that have no value and those of which the rows say nothing: a
        mean or a correlation from too few rows, an error of exactly 0, MCC where one label only occurs.

    Raises:
        UsageError: as `evaluate`, or a name is not a metric of the problem type.
    """
    rows = Rows(problem_type, labels, logits, temperature, thresholds)
    known = [name for name, info in METRICS.items() if problem_type in info.problem_types]
    if unknown := sorted(set(metrics or ()) - set(known)):
        raise UsageError(
            f"{unknown[0]!r} is not a metric of {problem_type}", f"use one of {', '.join(known)}"
        )
    wanted = [name for name in known if (metrics is None or name in metrics) and name != "ece"]
    if not rows.usable:
        return {}
    samples: dict[str, list[np.ndarray]] = {}
    if problem_type == SINGLE_LABEL:
        counts = np.random.default_rng([seed, 0]).multinomial(
            rows.count, rows.cell_counts / rows.count, size=resamples
        )
        samples = {name: [values] for name, values in rows.count_metrics(counts).items()}
    if not set(wanted) <= {"accuracy", "macro_f1", "weighted_f1", "mcc"}:
        random = np.random.default_rng([seed, 1])
        for start in range(0, resamples, _CHUNK):
            draws = (
                random.integers(rows.count, size=rows.count) for _ in range(min(_CHUNK, resamples - start))
            )
            weights = np.stack([np.bincount(draw, minlength=rows.count) for draw in draws]).astype(np.float64)
            found = rows.row_metrics(weights)
            if start < RANK_RESAMPLES:
                found |= rows.rank_metrics(weights[: RANK_RESAMPLES - start], set(wanted))
            for name, values in found.items():
                samples.setdefault(name, []).append(values)
    result = {}
    for name in wanted:
        draws = np.concatenate(samples[name]) if name in samples else np.empty(0)
        bounds = _bounds(rows, name, draws)
        if bounds is not None and all(map(math.isfinite, bounds)):
            result[name] = bounds
    return result


def _bounds(rows: Rows, name: str, draws: np.ndarray) -> tuple[float, float] | None:
    """Interval of one metric from its resampled values (R,)."""
    if name in ("accuracy", "exact_match"):
        return wilson(float(rows.correct.mean()), rows.count)
    ones, counts = np.ones((1, rows.count)), rows.cell_counts[None]
    found = rows.count_metrics(counts) | rows.row_metrics(ones) | rows.rank_metrics(ones, {name})
    value = float(found[name][0])
    if not math.isfinite(value):
        return None
    if name in ("spearman", "pearson"):
        return correlation_interval(value, draws, rows.count, ranks=name == "spearman")
    if name == "r2":
        errors, unseen = losses(rows, "mse")
        return r2_interval(
            value,
            draws,
            rows.count,
            mean_interval(1.0, errors / errors.mean(), unseen / errors.mean()) if errors.any() else None,
        )
    if name in ("mse", "mae", "log_loss"):
        return mean_interval(value, *losses(rows, name))
    return share_bounds(rows, name, value, draws)
