"""From an estimate and its bootstrap spread to a 95 % interval that also holds on few rows.

A percentile bootstrap only draws what it has seen: four rows without a mistake give it an interval of no
width. So each interval here is made of two parts: the bootstrap's standard error, and what the same number of
rows leaves open at any rate. The share of the first grows with what the rows show of both outcomes; on many
rows it decides alone.

- Shares (F1, AUC, average precision, Hamming loss; MCC as `(mcc + 1) / 2`): Wilson's interval (1927) on an
  effective number of rows, `p (1 - p) / variance`, as Korn and Graubard (1998, Survey Methodology 24:193) do
  for samples that are not simple.
- Means of errors (log loss, MSE, MAE) and R2 (as `1 - R2`, a ratio of them): Student's t on the logarithm of
  the mean.
- Correlations: Fisher's z (1921), `1 / sqrt(n - 3)`, with a limit where the rows agree perfectly.
"""

import math
from typing import Final

import numpy as np

from textlora.metrics.calibration import SINGLE_LABEL, row_log_loss
from textlora.metrics.paired import t_975
from textlora.metrics.rows import Rows

NORMAL_975: Final = 1.959963984540054
EVENTS: Final = (
    4.0  # events that count as much as the prior spread of a share; by simulation (benchmarks/coverage.py)
)
MEAN_ROWS: Final = 6.0  # the same for the spread of errors, in rows
CORRELATION_ROWS: Final = 30.0
ROWS_PER_LABEL: Final = 30.0
UNSEEN_ERROR: Final = 1.5  # times the largest one seen
Interval = tuple[float, float] | None


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` rows, which need not be a whole number; always holds the
    share."""
    z2 = NORMAL_975**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = (
        NORMAL_975 / (1 + z2 / count) * math.sqrt(max(0.0, share * (1 - share)) / count + z2 / (4 * count**2))
    )
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def share_interval(value: float, draws: np.ndarray, units: float, events: float) -> Interval:
    """Of a metric in [0, 1].

    Args:
        draws: (R,) bootstrap values, not finite where a resample has none.
        units: how many rows the metric rests on: all of them, or for a mean over labels `C^2 / sum(1 / n_c)`.
        events: rows of the rarer outcome, right or wrong; without any, nothing is known of the spread.
    """
    smoothed = (units * value + 2) / (units + 4)  # Agresti and Coull 1998
    prior = smoothed * (1 - smoothed) / units
    weight = events / (events + EVENTS)
    variance = weight * _variance(draws, units) + (1 - weight) * prior
    # At 0 and 1 the smoothed share is the measure of both, so that Wilson's interval of `units` rows is left.
    return wilson(value, smoothed * (1 - smoothed) / variance)


def mean_interval(value: float, rows: np.ndarray, pseudo: float) -> Interval:
    """Of the mean of N errors of 0 and more, on the scale of logarithms.

    Args:
        rows: (N,) the errors.
        pseudo: an error that is possible and may not have been seen; it counts as one row more for the upper
            end.
    """
    count = len(rows)
    if count < 2 or not value > 0:
        return None
    spread = (count * rows.var() / value**2 + MEAN_ROWS * 2.0) / (count + MEAN_ROWS)
    half = t_975(count - 1) * math.sqrt(spread / count)
    more = np.append(rows, pseudo)
    high = max(
        value * math.exp(half), float(more.mean()) + NORMAL_975 * float(more.std()) / math.sqrt(count + 1)
    )
    return value * math.exp(-half), high


def r2_interval(value: float, draws: np.ndarray, count: int, errors: Interval) -> Interval:
    """Of R2, from the logarithm of `1 - R2`, the ratio of the mean squared error (whose bounds relative to it
    are `errors`) and a variance."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(1 - draws[np.isfinite(draws)])
    logs = logs[np.isfinite(logs)]
    if count < 3 or not len(logs) or not value < 1:
        return None
    variance = (count * logs.var() + MEAN_ROWS * 4 / count) / (count + MEAN_ROWS)
    half = t_975(count - 2) * math.sqrt(variance)
    worst = max(math.exp(half), errors[1] if errors else 1.0)
    return 1 - (1 - value) * worst, 1 - (1 - value) * math.exp(-half)


def correlation_interval(value: float, draws: np.ndarray, count: int, ranks: bool) -> Interval:
    """Of Pearson's correlation or, with `ranks`, Spearman's (Bonett and Wright 2000: a variance larger by `1
    + r^2 / 2`)."""
    if count < 4:
        return None
    limit = 1 - 6 / (count**3 - count)  # half the smallest step away from 1 that ranks can make
    held = min(limit, max(-limit, value))
    fisher = (1 + held**2 / 2 if ranks else 1.0) / (count - 3)
    known = draws[np.isfinite(draws)]
    seen = known.var() / (1 - held**2) ** 2 if len(known) else fisher
    weight = count / (count + CORRELATION_ROWS)
    half = NORMAL_975 * math.sqrt(weight * seen + (1 - weight) * fisher)
    return min(value, math.tanh(math.atanh(held) - half)), max(value, math.tanh(math.atanh(held) + half))


def _variance(draws: np.ndarray, units: float) -> float:
    """Variance of the known draws, larger by what few rows do not tell of it: Student's t in place of the
    normal."""
    known = draws[np.isfinite(draws)]
    return float(known.var()) * (t_975(max(1, round(units) - 1)) / NORMAL_975) ** 2 if len(known) else 0.0


def share_bounds(rows: Rows, name: str, value: float, draws: np.ndarray) -> Interval:
    """Of F1, MCC, AUC, average precision or Hamming loss: what they rest on, and `share_interval`."""
    single = rows.problem_type == SINGLE_LABEL
    labels = rows.logits.shape[1]
    truth = np.bincount(rows.labels, minlength=labels) if single else rows.labels.sum(axis=0)
    given = np.bincount(rows.decisions, minlength=labels) if single else rows.decisions.sum(axis=0)
    wrong = int((~rows.correct).sum())
    events = float(min(wrong, rows.count - wrong) if single or name == "micro_f1" else wrong)
    if name in ("weighted_f1", "hamming_loss"):
        return share_interval(value, draws, rows.count, events)
    if name == "micro_f1":  # a row that has no label and got none says nothing about it
        units = int((rows.labels | rows.decisions).any(axis=1).sum())
        return share_interval(value, draws, units, events) if units else None
    if name == "mcc" and (truth > 0).sum() < 2:
        return None
    units = labels**2 / (1 / (truth + 0.5)).sum()
    if name in ("auc", "macro_average_precision"):
        events = units * min(value, 1 - value)
    if name == "mcc":
        low, high = share_interval((value + 1) / 2, (draws + 1) / 2, units, events)
        return 2 * low - 1, 2 * high - 1
    if name == "auc":
        return share_interval(value, draws, units, events)
    known = int((truth > 0).sum())
    if not known:
        return None
    # A label without a row may be there all the same, and its score anything: the more so the fewer rows
    # there are per label.
    missing = (labels - known) * min(1.0, ROWS_PER_LABEL * labels / rows.count)
    # F1 of a label with few rows jumps between 0 and 1, of which the bootstrap of these very rows knows
    # little.
    if name == "macro_f1":
        events = min(events, float(truth[truth > 0].min()))
        units *= (NORMAL_975 / t_975(max(1, round(units) - 1))) ** 2
    # How many labels the value is the mean of (`Rows`): average precision leaves out what has no row, F1 what
    # was not predicted either.
    meant = (
        known
        if name == "macro_average_precision"
        else int(((truth > 0) | (given > 0)).sum())
        if single
        else labels
    )
    scale = meant / known
    low, high = share_interval(min(1.0, value * scale), np.minimum(1.0, draws * scale), units, events)
    return min(value, low * known / (known + missing)), max(
        value, (high * known + missing) / (known + missing)
    )


def losses(rows: Rows, name: str) -> tuple[np.ndarray, float]:
    """Errors of the rows (N,), and one that is possible and may not have been seen.

    For the log loss it is the mean of what a mistake would have cost; for others, where nothing bounds them,
    more than the largest.
    """
    if name != "log_loss":
        errors = np.abs(rows.decisions - rows.labels)
        largest = UNSEEN_ERROR * float(errors.max())
        return (errors**2, largest**2) if name == "mse" else (errors, largest)
    found = row_log_loss(rows.logits, rows.labels, rows.problem_type, rows.temperature)
    if rows.problem_type == SINGLE_LABEL:
        second = np.argsort(-rows.logits, axis=1, kind="stable")[:, min(1, rows.logits.shape[1] - 1)]
        return found, float(row_log_loss(rows.logits, second, rows.problem_type, rows.temperature).mean())
    return found, float(
        (found + np.abs(rows.logits).mean(axis=1) / rows.temperature / rows.logits.shape[1]).mean()
    )
