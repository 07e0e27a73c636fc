"""Several comparisons together: each method's mean over the data sets, and mean differences with two kinds of
interval.

Over the sets: a t interval with the sets as the units, for what to expect on another set like these. Inside
the sets: the paired bootstrap draws of each set, averaged, for what the test rows and seeds of these very
sets leave open. In points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from textlora.core.errors import UsageError
from textlora.metrics.paired import Difference, holm, summarize, t_interval, t_test
from textlora.metrics.scores import METRICS
from textlora.report.comparison.table import NOISE, OWN_UNIT, Comparison, Row, Run, compare

__all__ = ["Across", "Average", "Pair", "across"]


@dataclass(frozen=True)
class Pair:
    """One method minus another over the sets that have both: each set's difference, their mean, half its t
    interval, p."""

    values: dict[str, float]
    mean: float
    half: float | None
    p: float | None
    inside: Difference | None

    def as_dict(self) -> dict[str, Any]:
        interval = None if self.half is None else [self.mean - self.half, self.mean + self.half]
        inside = self.inside and [self.inside.low, self.inside.high]
        return {
            "mean": self.mean,
            "interval": interval,
            "p": self.p,
            "on_these_sets": inside,
            "sets": self.values,
        }


@dataclass(frozen=True)
class Average:
    """One method over the sets. Of costs see `typical`."""

    name: str
    method: str
    rows: dict[str, Row]  # data set to its row, where it has a score
    mean: float
    to_best: Pair | None = None
    p_holm: float | None = None
    to_full: Pair | None = None

    def typical(self, fact: str) -> float | None:
        """Geometric mean of a cost over the sets; 0 where one is 0."""
        known = [value for row in self.rows.values() if (value := getattr(row, fact)) is not None]
        if not known:
            return None
        return 0.0 if min(known) <= 0 else math.exp(sum(map(math.log, known)) / len(known))


@dataclass(frozen=True)
class Across:
    """All sets: their tables, and the methods from best to worst; those that lack a set come after those that
    have all."""

    tables: list[Comparison]
    averages: list[Average]

    @property
    def best(self) -> Average | None:
        return next(iter(self.averages), None)

    def pair(self, name: str, other: str) -> Pair | None:
        """`name` minus `other`; None where no set has both."""
        return _pair(self.tables, name, other)

    def as_dict(self) -> dict[str, Any]:
        methods, pairs = [], {}
        for average in self.averages:
            scores = {data: 100 * row.mean for data, row in average.rows.items()}
            methods.append(
                {"method": average.name, "mean": average.mean, "p_holm": average.p_holm, "scores": scores}
            )
            for other in self.averages:
                if other is not average and (pair := self.pair(average.name, other.name)):
                    pairs.setdefault(average.name, {})[other.name] = pair.as_dict()
        return {"sets": [table.data for table in self.tables], "methods": methods, "differences": pairs}


def across(sets: Sequence[tuple[dict[str, Any], Sequence[Run]]]) -> Across:
    """Read and average the comparisons. Raises UsageError as `textlora.report.comparison.page.summary` does."""
    tables = [compare(settings, runs) for settings, runs in sets]
    for table in tables:
        if table.metric in OWN_UNIT or not METRICS[table.metric].higher_is_better:
            raise UsageError(
                f"{table.data} is scored by {table.metric}, which cannot be averaged with other sets' scores",
                "leave the set out",
            )
    names = dict.fromkeys(row.name for table in tables for row in table.scored)
    averages = []
    for name in names:
        rows = {table.data: row for table in tables for row in table.scored if row.name == name}
        averages.append(
            Average(
                name,
                next(iter(rows.values())).method,
                rows,
                100 * float(np.mean([row.mean for row in rows.values()])),
            )
        )
    averages.sort(key=lambda average: (-len(average.rows), -average.mean))
    pairs = {average.name: _pair(tables, average.name, averages[0].name) for average in averages[1:]}
    tested = [name for name, pair in pairs.items() if pair and pair.p is not None]
    adjusted = dict(zip(tested, holm([pairs[name].p for name in tested]), strict=True))
    done = []
    for average in averages:
        to_full = _pair(tables, average.name, "full") if average.name != "full" else None
        done.append(
            replace(
                average, to_best=pairs.get(average.name), p_holm=adjusted.get(average.name), to_full=to_full
            )
        )
    return Across(tables, done)


def _pair(tables: Sequence[Comparison], name: str, other: str) -> Pair | None:
    values, draws = {}, []
    for table in tables:
        rows = {row.name: row for row in table.scored}
        if name in rows and other in rows:
            values[table.data] = 100 * (rows[name].mean - rows[other].mean)
            difference = table.difference(rows[name], rows[other])
            draws.append(None if difference is None else 100 * difference.draws)
    if not values:
        return None
    mean, half = t_interval(list(values.values()))
    inside = summarize(mean, np.mean(draws, axis=0)) if all(draw is not None for draw in draws) else None
    return Pair(values, mean, half, t_test(list(values.values())), inside)


def told_apart(average: Average) -> bool:
    """Whether the method is behind the best by more than noise, over the sets."""
    return average.p_holm is not None and average.p_holm < NOISE
