"""Whether a search has found anything better than the defaults: the held-out answers of both, row by row.

The best of many trials owes a part of its lead to luck, so the lead must be larger than the luck of the best
of so many.
"""

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from textlora.core.config import MULTI_LABEL, SINGLE_LABEL
from textlora.metrics.calibration import decide, probabilities
from textlora.metrics.paired import DECIDED, paired_scores
from textlora.metrics.scores import METRICS, evaluate

CHANCE = 0.05  # of leaving defaults that are as good as every other trial
MOST_BYTES = 48_000  # of a trial's answers before they are written as text: some databases take 64 kB
RESAMPLES, FEW_RESAMPLES = 2000, 300
# by which a training's score moves with its seed (standard deviation, metrics from 0 to 1), which rows cannot
# tell
LUCK = 0.015


@dataclass(frozen=True)
class Verdict:
    """Which trial is taken, and why in one sentence; `difference` is the best trial's lead over the defaults
    on `rows` rows."""

    number: int
    why: str
    difference: float | None = None
    standard_error: float | None = None
    needed: float | None = None
    rows: int = 0


@dataclass(frozen=True)
class Answers:
    """Packs what a trial answered on N held-out rows: decisions where they determine the metric, else logits
    in half precision.

    Of more rows than `MOST_BYTES` have room for, some are kept, evenly spaced, the same of every trial.

    Attributes:
        trainings: how many answered; each answered its part of the rows.
    """

    problem_type: str
    metric: str
    labels: np.ndarray
    names: tuple[str, ...]
    trainings: int = 1

    @property
    def decided(self) -> bool:
        return self.metric in DECIDED[self.problem_type]

    @property
    def _width(self) -> int:
        return 1 if self.decided and self.problem_type != MULTI_LABEL else max(1, len(self.names))

    @property
    def _dtype(self) -> np.dtype:
        if not self.decided:
            return np.dtype("<f2")
        if self.problem_type == SINGLE_LABEL:
            return np.dtype("u1" if len(self.names) <= 256 else "<u2")
        return np.dtype("u1" if self.problem_type == MULTI_LABEL else "<f4")

    @property
    def picked(self) -> np.ndarray:
        count, most = len(self.labels), max(1, MOST_BYTES // (self._width * self._dtype.itemsize))
        return np.arange(count) if count <= most else np.linspace(0, count - 1, most).astype(int)

    def pack(self, logits: np.ndarray) -> str:
        """Logits (N, C) of the held-out rows as text."""
        logits = logits[self.picked]
        if self.decided:
            values = decide(probabilities(logits, self.problem_type), self.problem_type)
        else:
            values = np.clip(logits, -6e4, 6e4)
        return base64.b64encode(
            zlib.compress(np.ascontiguousarray(values.astype(self._dtype)).tobytes(), 9)
        ).decode()

    def unpack(self, text: str) -> np.ndarray:
        values = np.frombuffer(zlib.decompress(base64.b64decode(text)), self._dtype)
        return (
            values.reshape(-1, self._width)
            if not self.decided or self.problem_type == MULTI_LABEL
            else values
        )

    def lead(self, mine: str, theirs: str) -> tuple[float, float] | None:
        """How much better `mine` is than `theirs` (above 0 whichever way the metric goes), and the standard
        error: by a paired bootstrap over the rows (Efron and Tibshirani 1993), with the luck of the trainings
        added. None where the metric has no value."""
        labels, sign = self.labels[self.picked], 1 if METRICS[self.metric].higher_is_better else -1
        a, b = self.unpack(mine), self.unpack(theirs)
        if self.decided:
            scores = paired_scores(
                self.problem_type,
                self.metric,
                labels,
                {"mine": {0: a}, "theirs": {0: b}},
                resamples=RESAMPLES,
            )
            value = scores.values["mine"][0] - scores.values["theirs"][0]
            draws = scores.draws["mine"] - scores.draws["theirs"]
        else:
            random = np.random.default_rng(0)
            score = lambda logits, rows: evaluate(
                self.problem_type, labels[rows], logits[rows].astype(np.float64), list(self.names)
            )[self.metric]
            both = [[score(logits, rows) for logits in (a, b)] for rows in self._draws(random)]
            pairs = np.array([[math.nan if x is None else x for x in pair] for pair in both])
            value, draws = pairs[0, 0] - pairs[0, 1], pairs[1:, 0] - pairs[1:, 1]
        draws = draws[np.isfinite(draws)]
        luck = 0.0 if self.metric in ("log_loss", "mse", "mae") else LUCK * math.sqrt(2 / self.trainings)
        return (
            (sign * float(value), math.hypot(float(draws.std()), luck))
            if math.isfinite(value) and len(draws) > 1
            else None
        )

    def _draws(self, random: np.random.Generator) -> list[np.ndarray]:
        count = len(self.picked)
        return [np.arange(count), *(random.integers(count, size=count) for _ in range(FEW_RESAMPLES))]


def factor(others: int) -> float:
    """Standard errors that the best of so many trials must lead by, so that equally good ones are preferred
    with a chance of `CHANCE` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - CHANCE / max(1, others))


def choose(trials: Sequence[Mapping[str, Any]], best: int, answers: Answers) -> Verdict:
    """The best trial, or the defaults where it does not lead them clearly.

    Args:
        trials: as `Search.record` has them, each with `answers`, `defaults` and `state`.
        best: number of the one with the best score.
    """
    defaults = next((trial for trial in trials if trial["defaults"]), None)
    chosen = next(trial for trial in trials if trial["number"] == best)
    rows = len(answers.picked)
    if defaults is None or defaults["state"] != "complete":
        reason = "" if defaults is None or not defaults["reason"] else f" ({defaults['reason']})"
        return Verdict(
            best, f"The defaults have no score to compare with{reason}, so the best trial is taken."
        )
    if chosen is defaults:
        number = sum(trial["state"] == "complete" for trial in trials)
        why = (
            "No other trial is complete"
            if number == 1
            else f"No trial scored above the defaults on the {len(answers.labels):,} held-out rows"
        )
        return Verdict(best, f"{why}: the defaults are kept.", rows=rows)
    known = chosen["answers"] and defaults["answers"]
    found = answers.lead(chosen["answers"], defaults["answers"]) if known else None
    if found is None:
        return Verdict(
            defaults["number"],
            f"Trial {best} cannot be compared with the defaults row by row, so the defaults are kept.",
            None,
            None,
            None,
            rows,
        )
    lead, error = found
    others = sum(trial["state"] in ("complete", "pruned") for trial in trials) - 1
    needed = factor(others) * error
    clear = lead > needed
    what = f"Trial {best} is {lead:.4f} better than the defaults on the same {rows:,} held-out rows (standard error {error:.4f})"
    many = f"the best of {others} such trials" if others > 1 else "such a trial"
    end = (
        f"more than the {needed:.4f} that luck gives {many}: it is chosen."
        if clear
        else f"and luck alone gives {many} up to {needed:.4f}: the defaults are kept."
    )
    return Verdict(best if clear else defaults["number"], f"{what}, {end}", lead, error, needed, rows)
