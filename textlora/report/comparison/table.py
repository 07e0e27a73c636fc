"""Run records of one comparison to the rows of its table: means over seeds, paired differences to the best,
spreads.

Every number of the report is made here, from the records alone. Scores are in the metric's own unit.
"""

import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from textlora.core.errors import DataError
from textlora.metrics.paired import DECIDED, Difference, PairedScores, holm, paired_scores, t_interval
from textlora.metrics.scores import METRICS
from textlora.report.numbers import metric_name

__all__ = ["Comparison", "Row", "Spread", "compare"]

NOISE = 0.05
OWN_UNIT = ("log_loss", "mse", "mae")  # no share or correlation: 100 times it would mean nothing
Run = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """How much a method's validation score moves with its learning rate, size and seed fixed.

    Attributes:
        points: (learning rate, score, whether it was trained to the full length), by rate; None is a run that
            failed.
        width: highest minus lowest score of the runs that are alike in length; None with fewer than two of
            them.
        failed: how many rates failed.
        alike: how many rates `width` is about.
    """

    points: list[tuple[float, float | None, bool]]
    width: float | None
    failed: int
    alike: int


@dataclass(frozen=True)
class Row:
    """One method at one size, at its best learning rate; a method that failed has no score and says why in
    `error`."""

    method: str
    size: dict[str, Any]
    name: str
    error: str | None = None
    learning_rate: float | None = None
    scores: dict[int, float] = field(default_factory=dict)  # seed to score
    mean: float | None = None
    half: float | None = None
    trainable_parameters: int | None = None
    head_parameters: int | None = None
    saved_bytes: int | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    rates: Spread | None = None
    other_sizes: dict[str, Spread] = field(default_factory=dict)  # sizes that were searched and not chosen
    curve: list[tuple[int, float, float | None, int]] = field(default_factory=list)  # rows, mean, half, seeds
    difference: Difference | None = None  # to the best
    p_holm: float | None = None

    @property
    def one_seed(self) -> bool:
        """Whether the luck of the seed is not known; a method without a learning rate is fitted and has none."""
        return len(self.scores) == 1 and self.learning_rate is not None

    @property
    def seed_spread(self) -> float | None:
        return max(self.scores.values()) - min(self.scores.values()) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """The table of one data set: rows with scores from best to worst, then those without."""

    data: str
    metric: str
    split: str  # where the scores come from: test, or validation where there is no test set
    train_rows: int | None
    test_rows: int
    rows: list[Row]
    paired: PairedScores | None
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better if self.metric in METRICS else True

    @property
    def scored(self) -> list[Row]:
        return [row for row in self.rows if row.mean is not None]

    @property
    def best(self) -> Row | None:
        return next(iter(self.scored), None)

    def difference(self, row: Row, other: Row) -> Difference | None:
        return (
            self.paired.difference(row.name, other.name)
            if self.paired and {row.name, other.name} <= set(self.paired.values)
            else None
        )


def compare(settings: dict[str, Any], runs: Iterable[Run]) -> Comparison:
    """The table of one comparison.

    Args:
        settings: `comparison.json`: data, metric, problem_type, methods, test_labels.
        runs: the run files.

    Raises:
        DataError: a run's predictions are not as many as the test rows.
    """
    runs = sorted(
        runs,
        key=lambda run: (
            run["method"],
            str(run["size"]),
            run["learning_rate"] or 0,
            run["train_rows"],
            run["seed"],
            run["epochs"],
        ),
    )
    metric = settings["metric"]
    split = "test" if any(run.get("test") for run in runs) else "validation"
    groups: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        groups[run["method"]][_size_text(run["size"])].append(run)
    rows = []
    for method in dict.fromkeys([*settings.get("methods", ()), *groups]):
        rows += _rows_of(method, groups.get(method, {}), metric, split)
    sign = 1 if metric not in METRICS or METRICS[metric].higher_is_better else -1
    rows.sort(key=lambda row: math.inf if row.mean is None else -sign * row.mean)
    paired = _paired(settings, runs, rows, metric) if split == "test" else None
    count = len(settings.get("test_labels") or ())
    full = max((run["train_rows"] for run in runs if run["stage"] != "rows"), default=None)
    table = Comparison(settings["data"], metric, split, full, count, rows, paired, settings, runs)
    return replace(table, rows=_with_differences(table))


def _rows_of(method: str, by_size: dict[str, list[Run]], metric: str, split: str) -> list[Row]:
    """The method's rows: a row per size that was repeated over seeds, else one row that says why there is
    none."""
    repeated = {size: runs for size, runs in by_size.items() if any(run["stage"] == "seeds" for run in runs)}
    if not repeated:
        tried = [run for runs in by_size.values() for run in runs]
        known = next((run for run in tried if "error" not in run), tried[0] if tried else None)
        row = Row(method, {}, method, error=_why(tried))
        rates = max(
            (_spread(runs, metric) for runs in by_size.values()),
            key=lambda spread: len(spread.points),
            default=None,
        )
        return [
            replace(
                row,
                rates=rates,
                **({"trainable_parameters": known.get("trainable_parameters")} if known else {}),
            )
        ]
    rows, others = [], {size: _spread(runs, metric) for size, runs in by_size.items() if size not in repeated}
    for size, runs in repeated.items():
        name = method if len(repeated) == 1 else f"{method} {size}"
        seeds = [run for run in runs if run["stage"] == "seeds"]
        scores = {run["seed"]: run[split][metric] for run in seeds if _score(run, split, metric) is not None}
        failed = [run for run in seeds if "error" in run]
        error = f"{len(failed)} of {len(seeds)} seeds failed: {failed[0]['error']}" if failed else None
        if not scores:
            rows.append(
                Row(
                    method,
                    runs[0]["size"],
                    name,
                    error=error or f"no {metric_name(metric)} on the {split} rows",
                    rates=_spread(runs, metric),
                )
            )
            continue
        good = [run for run in seeds if run["seed"] in scores]
        mean, half = t_interval(list(scores.values()))
        rows.append(
            Row(
                method,
                good[0]["size"],
                name,
                error=error,
                learning_rate=good[0]["learning_rate"],
                scores=scores,
                mean=mean,
                half=half,
                trainable_parameters=good[0]["trainable_parameters"],
                head_parameters=good[0]["head_parameters"],
                saved_bytes=good[0]["saved_bytes"],
                train_seconds=median(
                    run["train_seconds"] for run in good
                ),  # a run that was held up must not count
                peak_memory_bytes=max(
                    (run["peak_memory_bytes"] for run in good if run.get("peak_memory_bytes")), default=None
                ),
                rates=_spread(runs, metric),
                other_sizes=others,
                curve=_curve(runs, split, metric),
            )
        )
    return rows


def _score(run: Run, split: str, metric: str) -> float | None:
    value = (run.get(split) or {}).get(metric) if "error" not in run else None
    return value if value is not None and math.isfinite(value) else None


def _why(tried: Sequence[Run]) -> str:
    errors = [run["error"] for run in tried if "error" in run]
    if not tried:
        return "not run"
    if len(errors) == len(tried):
        return errors[0] if len(errors) == 1 else f"all {len(errors)} runs failed: {errors[0]}"
    return f"not finished: {len(tried)} runs of the search, none on the test rows"


def _spread(runs: Sequence[Run], metric: str) -> Spread:
    search = [run for run in runs if run["stage"] == "rates" and run["learning_rate"] is not None]
    longest: dict[float, Run] = {}
    for run in search:  # a run that failed counts only where no run of that rate ended well
        held = longest.get(run["learning_rate"])
        if held is None or ("error" not in run, run["epochs"]) > ("error" not in held, held["epochs"]):
            longest[run["learning_rate"]] = run
    full = max((run["epochs"] for run in search), default=0.0)
    points = [
        (rate, _score(run, "validation", metric), run["epochs"] == full)
        for rate, run in sorted(longest.items())
    ]
    # Rates that were stopped early are compared at the length that the most of them had.
    lengths = Counter(run["epochs"] for run in search if _score(run, "validation", metric) is not None)
    length = max(lengths, key=lambda epochs: (lengths[epochs], epochs), default=None)
    alike = [_score(run, "validation", metric) for run in search if run["epochs"] == length]
    alike = [score for score in alike if score is not None]
    return Spread(
        points,
        max(alike) - min(alike) if len(alike) > 1 else None,
        sum(score is None for _, score, _ in points),
        len(alike),
    )


def _curve(runs: Sequence[Run], split: str, metric: str) -> list[tuple[int, float, float | None, int]]:
    scores: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        value = _score(run, split, metric)
        if run["stage"] in ("seeds", "rows") and value is not None:
            scores[run["train_rows"]].append(value)
    return (
        [(count, *t_interval(values), len(values)) for count, values in sorted(scores.items())]
        if len(scores) > 1
        else []
    )


def _paired(
    settings: dict[str, Any], runs: Sequence[Run], rows: Sequence[Row], metric: str
) -> PairedScores | None:
    labels, problem_type = settings.get("test_labels"), settings["problem_type"]
    if not labels or metric not in DECIDED[problem_type]:
        return None
    names = {(row.method, _size_text(row.size)): row for row in rows}
    made: dict[str, dict[int, Any]] = defaultdict(dict)
    for run in runs:
        row = names.get((run["method"], _size_text(run["size"])))
        if (
            run["stage"] != "seeds"
            or row is None
            or run["seed"] not in row.scores
            or run.get("test_predictions") is None
        ):
            continue
        if len(run["test_predictions"]) != len(labels):
            raise DataError(
                f"the run {run['method']} of seed {run['seed']} has {len(run['test_predictions'])} predictions for {len(labels)} test rows",
                "remove its file under runs/ and start again",
            )
        made[row.name][run["seed"]] = run["test_predictions"]
    return (
        paired_scores(problem_type, metric, labels, made, seed=zlib.crc32(settings["data"].encode()))
        if made
        else None
    )


def _with_differences(table: Comparison) -> list[Row]:
    best, others = table.best, table.scored[1:]
    if best is None:
        return table.rows
    found = {row.name: table.difference(row, best) for row in others}
    known = [name for name, difference in found.items() if difference]
    adjusted = dict(zip(known, holm([found[name].p for name in known]), strict=True))
    return [replace(row, difference=found.get(row.name), p_holm=adjusted.get(row.name)) for row in table.rows]


def _size_text(size: dict[str, Any]) -> str:
    """A size as it is read: r 8."""
    return ", ".join(f"{name} {value}" for name, value in sorted(size.items()))
