"""Which figures a comparison has, and what each is about: from tables to `plots`."""

from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context

from textlora.report.comparison import plots, style
from textlora.report.comparison.across import Across, told_apart
from textlora.report.comparison.plots import Forest, Panel, Point, Side
from textlora.report.comparison.style import Drawing, Mark
from textlora.report.comparison.table import NOISE, Comparison
from textlora.report.comparison.words import Scale
from textlora.report.numbers import whole

__all__ = ["of_many", "of_one"]

Sections = list[dict[str, Any]]
_COSTS = (
    ("seconds", "train_seconds", "seconds of training"),
    ("memory", "peak_memory_bytes", "peak memory of the process, bytes"),
    ("saved", "saved_bytes", "bytes kept per task"),
)
_KINDS = "Blue: LoRA and its kin; grey: the encoder is left as it is; orange: all else."


@rc_context(style.RC)
def of_one(table: Comparison) -> tuple[dict[str, Markup], Sections]:
    """Marks of the methods for the table, and the figures in sections."""
    marks = _marks([table])
    icons = {row.name: style.icon(marks[row.method]) for row in table.rows}
    if not table.scored:
        return icons, []
    scale = Scale(table.metric)
    y_title = f"{table.split} {scale.name}"
    heads = {row.head_parameters for row in table.scored if row.learning_rate is not None}
    head = f" The head has {whole(heads.pop())} besides." if len(heads) == 1 else ""

    def points(fact: str) -> list[Point]:
        known = [row for row in table.scored if getattr(row, fact) is not None]
        factor = scale.factor
        return [
            Point(
                r.name,
                marks[r.method],
                getattr(r, fact),
                factor * r.mean,
                None if r.half is None else factor * r.half,
            )
            for r in known
        ]

    sections = [{"title": "Scores and differences", "drawings": [_scores(table, marks, scale)]}]
    sections += _cost_sections(
        points, y_title, f"mean with 95 % interval over seeds.{head}", table.higher_is_better
    )
    found = [
        (r.name, marks[r.method], [(n, scale.factor * m, h and scale.factor * h) for n, m, h, _ in r.curve])
        for r in table.scored
        if r.curve
    ]
    if found:
        figure = plots.curves(found, "training rows", y_title)
        caption = f"{_capital(y_title)} against the number of training rows, each method at its best rate; mean with 95 % interval over seeds."
        sections.append({"title": "How many examples", "drawings": [Drawing("examples", caption, figure)]})
    return icons, sections + _steadiness(table, marks, scale)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _marks(tables: Sequence[Comparison]) -> dict[str, Mark]:
    methods = dict.fromkeys(
        method
        for table in tables
        for method in (*table.settings.get("methods", ()), *(row.method for row in table.rows))
    )
    return {method: style.mark(method, place) for place, method in enumerate(methods)}


def _cost_sections(
    points: Callable[[str], list[Point]], y_title: str, caption: str, high_is_good: bool = True
) -> Sections:
    figure = plots.costs(
        points("trainable_parameters"), "trainable parameters without the head", y_title, True, high_is_good
    )
    words = f"{_capital(y_title)} against trainable parameters, {caption} Methods with equally many stand side by side. {_KINDS}"
    sections = [{"title": "What it costs in parameters", "drawings": [Drawing("parameters", words, figure)]}]
    drawings = []
    for name, fact, title in _COSTS:
        if known := points(fact):
            drawings.append(
                Drawing(
                    name,
                    f"{_capital(y_title)} against {title}.",
                    plots.costs(known, title, y_title, False, high_is_good),
                )
            )
    return (
        [*sections, {"title": "What it costs in time, memory and storage", "drawings": drawings}]
        if drawings
        else sections
    )


def _scores(table: Comparison, marks: dict[str, Mark], scale: Scale) -> Drawing:
    factor = scale.factor
    left, right = [], []
    for row in table.scored:
        look, sure = marks[row.method], row.p_holm is None or row.p_holm < NOISE or row is table.best
        low, high = (
            (None, None)
            if row.half is None
            else (factor * (row.mean - row.half), factor * (row.mean + row.half))
        )
        values = [(factor * value, "o") for value in row.scores.values()] if row.seed_spread else []
        left.append(Forest(row.name, look, values, factor * row.mean, low, high))
        if row is table.best:
            right.append(Forest(row.name, look, (), 0.0, None, None))
        elif d := row.difference:
            right.append(Forest(row.name, look, (), factor * d.value, factor * d.low, factor * d.high, sure))
        else:
            right.append(Forest(row.name, look, (), None, None, None))
    sides = [Side(f"{table.split} {scale.name}", left, None, table.higher_is_better)]
    caption = (
        f"{_capital(scale.name)}: mean and 95 % interval over seeds, and below each the seeds themselves."
    )
    if any(line.low is not None for line in right):
        sides.append(
            Side(
                f"difference to {table.best.name}{'' if scale.own else ', points'}",
                right,
                0.0,
                table.higher_is_better,
            )
        )
        caption += (
            " At the right, the difference to the best with its 95 % interval (rows and seeds). An empty mark is not told apart from it, "
            "and an interval may go on beyond the axis."
        )
    return Drawing("scores", caption, plots.forest(sides))


def _steadiness(table: Comparison, marks: dict[str, Mark], scale: Scale) -> Sections:
    found = []
    for row in table.rows:
        if not (row.rates and len(row.rates.points) > 1):
            continue
        lines = [
            (", ".join(f"{k} {v}" for k, v in row.size.items()), row.rates.points),
            *((size, s.points) for size, s in row.other_sizes.items()),
        ]
        scaled = [
            (
                name,
                [
                    (rate, None if score is None else scale.factor * score, full)
                    for rate, score, full in points
                ],
            )
            for name, points in lines
        ]
        width = f": {scale.points(row.rates.width)}" if row.rates.width is not None else ""
        found.append(Panel(f"{row.name}{width}", marks[row.method], scaled, row.learning_rate))
    if not found:
        return []
    caption = (
        f"Validation {scale.name} over the learning rate with one seed, all on one scale: the flatter, the steadier. Beside each name, best minus worst. "
        "The full mark was chosen; a dot was stopped early; a cross at the foot is a run that failed."
    )
    return [
        {
            "title": "Steadiness",
            "drawings": [Drawing("steadiness", caption, plots.panels(found, f"validation {scale.name}"))],
        }
    ]


@rc_context(style.RC)
def of_many(found: Across) -> tuple[dict[str, Markup], Sections]:
    """The same over several sets, where a score is a mean difference to the method that is best on average."""
    marks = _marks(found.tables)
    icons = {average.name: style.icon(marks[average.method]) for average in found.averages}
    if found.best is None:
        return icons, []
    shapes = {table.data: style.MARKERS[i % len(style.MARKERS)] for i, table in enumerate(found.tables)}
    left, right = [], []
    for average in found.averages:
        look, pair = marks[average.method], average.to_best
        if pair is None:
            left.append(Forest(average.name, look, (), 0.0 if average is found.best else None, None, None))
        else:
            low, high = (None, None) if pair.half is None else (pair.mean - pair.half, pair.mean + pair.half)
            left.append(
                Forest(
                    average.name,
                    look,
                    [(v, shapes[data]) for data, v in pair.values.items()],
                    pair.mean,
                    low,
                    high,
                    told_apart(average),
                )
            )
        widths = {
            data: 100 * r.rates.width
            for data, r in average.rows.items()
            if r.rates and r.rates.width is not None
        }
        mean = sum(widths.values()) / len(widths) if widths else None
        right.append(
            Forest(
                average.name,
                look,
                [(width, shapes[data]) for data, width in widths.items()],
                mean,
                None,
                None,
            )
        )
    sides = [Side(f"difference to {found.best.name}, points", left, 0.0)]
    if any(line.mean is not None for line in right):
        sides.append(Side("steadiness: best minus worst rate, points", right, 0.0, False))
    caption = (
        "Mean over the sets with its 95 % interval, and below each the sets themselves. An empty mark is not told apart from the best, "
        "and an interval may go on beyond the axis. "
        "At the right, how far the validation score moves with the learning rate."
    )
    drawing = Drawing("sets", caption, plots.forest(sides, [(shape, data) for data, shape in shapes.items()]))
    y_title = f"difference to {found.best.name} (points)"

    def points(fact: str) -> list[Point]:
        known = [a for a in found.averages if a.typical(fact) is not None and (a.to_best or a is found.best)]
        return [
            Point(
                a.name,
                marks[a.method],
                a.typical(fact),
                a.to_best.mean if a.to_best else 0.0,
                a.to_best.half if a.to_best else None,
            )
            for a in known
        ]

    sections = [{"title": "Differences and steadiness", "drawings": [drawing]}]
    sections += _cost_sections(points, y_title, "mean over the sets with its 95 % interval.")
    lines = [
        (average.name, marks[average.method], curve)
        for average in found.averages
        if (curve := _mean_curve(found, average.name))
    ]
    if lines:
        words = "Mean score over the sets against the number of training rows, each method at its best rate."
        sections.append(
            {
                "title": "How many examples",
                "drawings": [Drawing("examples", words, plots.curves(lines, "training rows", "mean score"))],
            }
        )
    return icons, sections


def _mean_curve(found: Across, name: str) -> list[tuple[float, float, float | None]]:
    """Mean over the sets at the numbers of rows that every set has; empty with fewer than two."""
    by_set = [
        {n: 100 * mean for n, mean, *_ in row.curve}
        for t in found.tables
        for row in t.scored
        if row.name == name
    ]
    if len(by_set) < len(found.tables):
        return []
    shared = sorted(set.intersection(*map(set, by_set)))
    return (
        [(n, sum(curve[n] for curve in by_set) / len(by_set), None) for n in shared]
        if len(shared) > 1
        else []
    )
