"""A training run's records (the lines of `run/metrics.jsonl`) as one HTML page, and as a few lines of
Markdown.

The page has no script and fetches nothing; every number on it is in the records or counted from them. A run
that was resumed may have written a step twice, and one that was stopped has no end: the last record counts,
what is absent is left out.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import escape

from textlora.metrics.calibration import MULTI_LABEL, REGRESSION
from textlora.metrics.scores import DEFAULT_METRIC, INTERVALS_ARE, METRICS, cannot_tell
from textlora.report import figures
from textlora.report.numbers import NONE, clean, metric_name, number, percent, setting, size, whole
from textlora.report.pages import css_share, fill, finite

__all__ = ["markdown_summary", "render"]

TABLE_LIMIT = (
    12  # up to here a confusion matrix is a table of numbers, beyond it a heat map and a list of pairs
)
PAIRS, LONG_TABLE = 20, 24
_SPLITS = ("test", "validation")


def render(records: list[dict[str, Any]], title: str) -> str:
    """One self-contained HTML page about a run, light or dark as the reader's system is.

    Args:
        records: dicts with a `kind`: start, data, step, evaluation, final, end; other kinds and keys are
            passed over.
        title: heading of the page; like all text it is escaped.
    """
    run = _Run.of(records)
    return fill(
        "run.html",
        title=title,
        about=_about(run),
        data=run.data,
        regression=run.problem_type == REGRESSION,
        multi_label=run.problem_type == MULTI_LABEL,
        head=_headline(run),
        tiles=_tiles(run),
        splits=[_shown(run.finals[split]) for split in _SPLITS if split in run.finals],
        intervals_are=INTERVALS_ARE,
        metric_rows=_metric_rows(run),
        curves=_curves(run),
        shown=run.shown | {"split": _shown(run.shown)},
        confusion=_confusion(run),
        calibration=_calibration(run),
        scatter=_scatter(run),
        lengths=_lengths(run),
        per_class=_per_class(run),
        mistakes=run.details.get("mistakes"),
        settings=_settings(run),
        **_classes(run),
    )


def markdown_summary(records: list[dict[str, Any]]) -> str:
    """Score, metrics table and cost of a run in Markdown, for a model card; "" while there is no final
    evaluation."""
    run = _Run.of(records)
    head = _headline(run)
    if not head:
        return ""
    between = (
        f" (95 % interval {number(head['interval'][0])} to {number(head['interval'][1])})"
        if head["interval"]
        else ""
    )
    open_still = f" {_in_markdown(head['open'])}" if head["open"] else ""
    text = [
        f"**{_in_markdown(head['name'])} {number(head['value'])}**{between} on {whole(head['rows'])} {head['split']} rows.{open_still}",
        "",
    ]
    splits = [split for split in _SPLITS if split in run.finals]
    text.append(
        "| metric | " + " | ".join(f"{_shown(run.finals[split])} | 95 % interval" for split in splits) + " |"
    )
    text.append("|---|" + "---:|---:|" * len(splits))
    for row in _metric_rows(run):
        cells = []
        for cell in row["cells"]:
            cells += [
                number(cell["value"]),
                " to ".join(map(number, cell["interval"])) if cell["interval"] else "",
            ]
        text.append(f"| {_in_markdown(row['name'])} | " + " | ".join(cells) + " |")
    if head["interval"]:
        text += ["", INTERVALS_ARE]
    facts = [f"{_in_markdown(name)}: {value}" for name, value in _tiles(run)]
    return "\n".join([*text, "", "; ".join(facts) + "." if facts else ""]).rstrip() + "\n"


def _shown(final: dict[str, Any]) -> str:
    """What the rows of a final evaluation are called: rows that cross-validation held out in turn are no
    split."""
    return final.get("shown") or final.get("split") or ""


def _in_markdown(text: str) -> str:
    # Model cards are shown as Markdown with HTML in it; a name must not end its table cell either.
    return " ".join(str(escape(clean(text))).replace("|", "&#124;").split())


@dataclass(frozen=True)
class _Run:
    """The records by kind; of what was written twice, the last."""

    start: dict[str, Any]
    data: dict[str, Any]
    end: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    finals: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> "_Run":
        kinds: dict[str, dict[Any, dict[str, Any]]] = defaultdict(dict)
        for record in records:
            kind = record.get("kind")
            if "fold" in record:  # what the folds found stands in the evaluations of the last training
                continue
            if kind == "final" and record.get("folds"):
                record = record | {"shown": "held-out"}
            key = {
                "step": record.get("step"),
                "evaluation": record.get("step"),
                "final": record.get("split"),
            }.get(kind)
            kinds[kind][key] = record
        start, data, end = (kinds[kind].get(None, {}) for kind in ("start", "data", "end"))
        steps, evaluations = (
            [r for s, r in sorted(kinds[k].items()) if s is not None] for k in ("step", "evaluation")
        )
        return cls(start, data, end, steps, evaluations, kinds["final"])

    @property
    def problem_type(self) -> str:
        return self.start.get("problem_type", "")

    @property
    def held_name(self) -> str:
        """Of the rows that evaluations are on."""
        return "held-out" if any(record.get("folds") for record in self.evaluations) else "validation"

    @property
    def shown(self) -> dict[str, Any]:
        """The final evaluation that the tables are about: of the test rows, else of the validation rows."""
        return self.finals.get("test") or self.finals.get("validation") or {}

    @property
    def details(self) -> dict[str, Any]:
        return self.shown.get("details") or {}

    def main_metric(self, metrics: dict[str, Any]) -> str | None:
        """The metric that chose the checkpoint, else the problem type's, else the first there is."""
        wanted = [
            (self.end.get("best_metric") or {}).get("name"),
            DEFAULT_METRIC.get(self.problem_type),
            *metrics,
        ]
        return next((name for name in wanted if name in metrics), None)


def _about(run: _Run) -> str:
    labels = run.start.get("labels")
    facts = [f"LoRA adapter on {run.start['model']}"] if run.start.get("model") else []
    facts += [run.problem_type] if run.problem_type else []
    facts += [f"{whole(len(labels))} labels"] if labels and run.problem_type != REGRESSION else []
    return " · ".join(facts)


def _headline(run: _Run) -> dict[str, Any] | None:
    metrics = run.shown.get("metrics") or {}
    name = run.main_metric(metrics)
    if name is None:
        return None
    value, interval = metrics[name], (run.shown.get("intervals") or {}).get(name)
    right = baseline = bar = None
    matrix = run.details.get("confusion")
    if name == "accuracy" and matrix:
        right = sum(row[i] for i, row in enumerate(matrix))
        support = [sum(row) for row in matrix]
        most = support.index(max(support))
        baseline = {
            "label": run.start.get("labels", [str(i) for i in range(len(matrix))])[most],
            "share": percent(support[most] / sum(support)),
        }
    if interval and finite(value) and all(0 <= part <= 1 for part in (value, *interval)):
        bar = {"low": css_share(interval[0]), "rest": css_share(1 - interval[1]), "value": css_share(value)}
    known = {
        "name": metric_name(name),
        "value": value,
        "interval": interval,
        "meaning": METRICS[name].what if name in METRICS else "",
    }
    rows = run.shown.get("rows")
    known |= {"open": cannot_tell(name, value, interval, rows) if rows else None}
    return known | {
        "split": _shown(run.shown),
        "rows": rows,
        "right": right,
        "baseline": baseline,
        "bar": bar,
    }


def _tiles(run: _Run) -> list[tuple[str, str]]:
    end, best = run.end, run.end.get("best_metric") or {}
    facts = [
        ("training rows", whole((run.data.get("rows") or {}).get("train"))),
        ("adapter parameters", whole(run.start.get("adapter_parameters"))),
        ("head parameters", whole(run.start.get("head_parameters"))),
        ("epochs", setting(end.get("epochs"))),
        (
            "training time",
            number(end["train_seconds"], 1) + " s" if finite(end.get("train_seconds")) else NONE,
        ),
        ("tokens per second", whole(end.get("tokens_per_second"))),
        ("peak memory", size(end.get("peak_memory_bytes"))),
        ("best step", whole(end.get("best_step"))),
        (
            f"its {_shown(run.finals.get('validation') or {}) or 'validation'} {metric_name(best.get('name') or '')}",
            number(best.get("value")),
        ),
    ]
    return [(name, value) for name, value in facts if value != NONE]


def _metric_rows(run: _Run) -> list[dict[str, Any]]:
    finals = [run.finals[split] for split in _SPLITS if split in run.finals]
    names = list(dict.fromkeys(name for final in finals for name in final.get("metrics") or {}))
    rows = []
    for name in names:
        cells = [
            {"value": (f.get("metrics") or {}).get(name), "interval": (f.get("intervals") or {}).get(name)}
            for f in finals
        ]
        rows.append(
            {"name": metric_name(name), "cells": cells, "what": METRICS[name].what if name in METRICS else ""}
        )
    return rows


def _curves(run: _Run) -> list[dict[str, Any]]:
    def points(records: Iterable[dict[str, Any]], name: str) -> list[figures.Point]:
        return [(r["step"], r[name]) for r in records if finite(r.get(name))]

    charts = []
    training, validation = points(run.steps, "loss"), points(run.evaluations, "loss")
    span = max(1, len(training) // 25)
    loss = [figures.Line("training, each step", "faint", training)] if training else []
    if span > 1:
        loss.append(figures.Line(f"mean of {span} steps", "a", figures.running_mean(training, span)))
    if validation:
        loss.append(figures.Line(run.held_name, "b", validation, validation))
    if loss:
        charts.append((loss, "loss"))
    flat = [{"step": r.get("step"), **(r.get("metrics") or {})} for r in run.evaluations]
    name = run.main_metric({key: None for r in flat for key in r if key != "step"})
    scores = points(flat, name) if name else []
    if scores:
        best = [point for point in scores if point[0] == run.end.get("best_step")]
        lines = [figures.Line(f"{run.held_name} {metric_name(name)}", "a", scores, scores)]
        charts.append(
            (
                lines + ([figures.Line("checkpoint that was kept", "best", [], best)] if best else []),
                metric_name(name),
            )
        )
    return [
        {"legend": figures.legend(lines), "svg": figures.lines(lines, "step", title)}
        for lines, title in charts
    ]


def _confusion(run: _Run) -> dict[str, Any] | None:
    matrix = run.details.get("confusion")
    if not matrix:
        return None
    names = run.start.get("labels") or [str(i) for i in range(len(matrix))]
    totals = [sum(row) for row in matrix]
    wrong = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if count and i != j]
    wrong.sort(key=lambda cell: (-cell[0], -cell[0] / totals[cell[1]], cell[1], cell[2]))
    pairs = [
        {"label": names[i], "predicted": names[j], "count": n, "share": n / totals[i]}
        for n, i, j in wrong[:PAIRS]
    ]
    table = heat = None
    if len(matrix) <= TABLE_LIMIT:
        table = [
            {
                "label": names[i],
                "total": totals[i],
                "cells": [
                    {"count": n, "share": n / (totals[i] or 1), "style": "hit" if i == j else "miss"}
                    for j, n in enumerate(row)
                ],
            }
            for i, row in enumerate(matrix)
        ]
    else:
        heat = figures.heat_map(matrix, names)
    return {"names": names, "table": table, "pairs": pairs, "map": heat}


def _calibration(run: _Run) -> Any:
    bins = run.details.get("calibration")
    if not bins or not any(b["count"] for b in bins):
        return None
    return figures.reliability(
        bins,
        "score",
        "share that is right" if run.problem_type != MULTI_LABEL else "share that has the label",
    )


def _scatter(run: _Run) -> Any:
    points = [(x, y) for x, y in run.details.get("scatter") or [] if finite(x) and finite(y)]
    return figures.scatter(points, "true value", "predicted value") if points else None


def _lengths(run: _Run) -> dict[str, Any] | None:
    lengths = run.data.get("lengths")
    if not lengths:
        return None
    edges, counts, limit = lengths.get("edges") or [], lengths.get("counts") or [], lengths.get("max_length")
    svg = None
    if counts and len(edges) == len(counts) + 1 and edges[-1] > edges[0]:
        mark = (limit, f"max_length {limit}") if finite(limit) else None
        svg = figures.histogram(edges, counts, "tokens", "texts", mark)
    return {**lengths, "svg": svg}


def _classes(run: _Run) -> dict[str, Any]:
    shares = run.data.get("shares") or {}
    counts = sorted((run.data.get("classes") or {}).items(), key=lambda item: -item[1])
    most = max([count for _, count in counts], default=0) or 1
    rows = [
        {"label": name, "count": count, "share": shares.get(name), "width": count / most}
        for name, count in counts
    ]
    cut = len(rows) > LONG_TABLE
    return {
        "classes": [*rows[: LONG_TABLE // 2], *rows[-LONG_TABLE // 2 :]] if cut else rows,
        "classes_cut": cut,
    }


def _per_class(run: _Run) -> dict[str, Any] | None:
    rows = run.details.get("per_class")
    if not rows:
        return None
    if len(rows) <= LONG_TABLE:
        return {"first": rows, "rest": [], "sorted": False}
    rows = sorted(rows, key=lambda row: math.inf if row.get("f1") is None else row["f1"])
    return {"first": rows[:LONG_TABLE], "rest": rows[LONG_TABLE:], "sorted": True}


def _settings(run: _Run) -> list[tuple[str, Any]]:
    known = [(name, value) for name, value in (run.start.get("settings") or {}).items() if value is not None]
    return known + [
        (f"version of {name}", value) for name, value in (run.start.get("versions") or {}).items()
    ]
