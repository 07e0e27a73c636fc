"""Charts as SVG text without a script or a fixed colour: the page's style sheet gives classes their light and
dark colours."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from textlora.report.numbers import clean, number, whole

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 44
_MAX_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart: (x, y) points, `style` a class of the style sheet, dots where a point deserves a
    mark."""

    name: str
    style: str
    points: Sequence[Point]
    dots: Sequence[Point] = field(default=())


@dataclass(frozen=True)
class Axes:
    """Maps values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: float = HEIGHT
    width: float = WIDTH

    def px(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - LEFT - RIGHT)

    def py(self, value: float) -> float:
        return (
            self.height
            - BOTTOM
            - (value - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - TOP - BOTTOM)
        )

    def path(self, points: Iterable[Point]) -> str:
        return "M" + "L".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)

    def box(self, x0: float, x1: float, y: float, style: str, title: str) -> str:
        left, right, top = self.px(x0), self.px(x1), self.py(y)
        shape = f'x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" height="{self.height - BOTTOM - top:.1f}"'
        return f'<rect class="{style}" {shape}><title>{escape(clean(title))}</title></rect>'

    def frame(self, x_title: str, y_title: str, x_ticks: Sequence[float] | None = None) -> str:
        """Grid, tick numbers and axis titles."""
        bottom, right, parts = self.height - BOTTOM, self.width - RIGHT, []
        for value in ticks(*self.y, 5):
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>'
            )
        for value in ticks(*self.x, 6) if x_ticks is None else x_ticks:
            parts.append(
                f'<text class="tick" x="{self.px(value):.1f}" y="{bottom + 17}" text-anchor="middle">{_tick(value)}</text>'
            )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(
            f'<text class="title" x="{(LEFT + right) / 2}" y="{self.height - 8}" text-anchor="middle">{escape(x_title)}</text>'
        )
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text class="title" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
        )
        return "".join(parts)


def lines(series: Sequence[Line], x_title: str, y_title: str) -> Markup:
    """A line chart; the names of the series are told by `legend`."""
    points = [point for line in series for point in (*line.points, *line.dots)]
    axes = Axes(room([x for x, _ in points], 0.0), room([y for _, y in points], 0.06))
    parts = [axes.frame(x_title, y_title)]
    for line in series:
        if len(line.points) > 1:
            parts.append(f'<path class="line {line.style}" d="{axes.path(thin(line.points))}"/>')
        for x, y in line.dots:
            title = f"{line.name}: {number(y)} at {x_title} {_tick(x)}"
            dot = f'<circle class="dot {line.style}" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3.5">'
            parts.append(f"{dot}<title>{escape(title)}</title></circle>")
    return svg(parts, f"{y_title} over {x_title}")


def legend(series: Sequence[Line]) -> Markup:
    """Names of the lines with their colours, as HTML."""
    keys = (Markup('<span class="key {}">{}</span>').format(line.style, line.name) for line in series)
    return Markup('<span class="legend">{}</span>').format(Markup("").join(keys))


def histogram(
    edges: Sequence[float],
    counts: Sequence[float],
    x_title: str,
    y_title: str,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Bars between edges (K + 1) of heights counts (K); `mark` is a place on the x axis with its name, left
    out if off the chart."""
    axes = Axes((edges[0], edges[-1]), (0.0, max(counts) * 1.06 or 1.0))
    parts = [axes.frame(x_title, y_title)]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            parts.append(axes.box(low, high, count, "bar", f"{_tick(low)} to {_tick(high)}: {whole(count)}"))
    if mark and edges[0] < mark[0] <= edges[-1]:
        x = axes.px(mark[0])
        anchor, shift = ("end", -5) if x > WIDTH / 2 else ("start", 5)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="title" x="{x + shift:.1f}" y="{TOP + 11}" text-anchor="{anchor}">{escape(mark[1])}</text>'
        )
    return svg(parts, f"{y_title} by {x_title}")


def reliability(bins: Sequence[dict[str, Any]], x_title: str, y_title: str) -> Markup:
    """Reliability diagram: accuracy per confidence bin against the diagonal, and below it how many
    predictions a bin has."""
    axes = Axes((0.0, 1.0), (0.0, 1.0), height=HEIGHT + 40)
    fifths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [axes.frame(x_title, y_title, fifths)]
    most, base = max((b["count"] for b in bins), default=0) or 1, axes.height - BOTTOM
    known = [b for b in bins if b["count"] and b["accuracy"] is not None]
    for b in known:
        shape = f"{whole(b['count'])} predictions, confidence {number(b['confidence'])}, right {number(b['accuracy'])}"
        parts.append(axes.box(b["low"], b["high"], b["accuracy"], "bar soft", shape))
    for b in bins:
        tall = 34 * b["count"] / most
        x, wide = axes.px(b["low"]) + 3, axes.px(b["high"]) - axes.px(b["low"]) - 6
        parts.append(
            f'<rect class="count" x="{x:.1f}" y="{base - tall:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>'
        )
    parts.append(f'<path class="diagonal" d="{axes.path([(0, 0), (1, 1)])}"/>')
    points = [(b["confidence"], b["accuracy"]) for b in known]
    if points:
        parts.append(f'<path class="line a" d="{axes.path(points)}"/>')
    parts += [
        f'<circle class="dot a" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3.5"/>' for x, y in points
    ]
    return svg(parts, f"{y_title} by {x_title}", axes.height)


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> Markup:
    """Points of predicted (y) against true (x) values with the line where both are equal."""
    values = [value for point in points for value in point]
    span = room(values, 0.04)
    axes = Axes(span, span, height=HEIGHT + 100)
    parts = [
        axes.frame(x_title, y_title),
        f'<path class="diagonal" d="{axes.path([(span[0], span[0]), (span[1], span[1])])}"/>',
    ]
    parts += [f'<circle class="point" cx="{axes.px(x):.1f}" cy="{axes.py(y):.1f}" r="3"/>' for x, y in points]
    return svg(parts, f"{y_title} against {x_title}", axes.height)


def heat_map(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Markup:
    """Confusion matrix of many labels: rows are true labels, a cell's strength is its share of the row,
    mistakes in the second colour."""
    n, named = len(matrix), len(matrix) <= 40
    shorts = [clean(name if len(name) <= 20 else name[:19] + "…") for name in names]
    margin = 14 + 7 * max(map(len, shorts)) if named else 34
    beyond = margin // 2 if named else 0  # the last slanted name leans over the edge
    cell = (900 - margin - beyond) / n
    side = margin + n * cell
    parts = [
        f'<rect class="plate" x="{margin}" y="{margin}" width="{n * cell:.1f}" height="{n * cell:.1f}"/>'
    ]
    told = sum(1 for row in matrix for count in row if count) <= 4000
    for i, row in enumerate(matrix):
        total = sum(row) or 1
        for j, count in enumerate(row):
            if count:
                strength = 0.08 + 0.92 * (count / total) ** (1 if i == j else 0.7)
                title = f"{names[i]} predicted as {names[j]}: {whole(count)} of {whole(total)}"
                place = f'x="{margin + j * cell:.2f}" y="{margin + i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}"'
                tip = f"<title>{escape(clean(title))}</title>" if told else ""
                parts.append(
                    f'<rect class="{"hit" if i == j else "miss"}" {place} fill-opacity="{strength:.2f}">{tip}</rect>'
                )
    if named:
        for i, short in enumerate(shorts):
            middle = margin + (i + 0.5) * cell
            parts.append(
                f'<text class="tick" x="{margin - 6}" y="{middle + 4:.1f}" text-anchor="end">{escape(short)}</text>'
            )
            parts.append(
                f'<text class="tick" transform="translate({middle + 4:.1f} {margin - 6}) rotate(-60)">{escape(short)}</text>'
            )
    else:
        middle = margin + n * cell / 2
        parts.append(f'<text class="title" x="{middle}" y="22" text-anchor="middle">predicted label</text>')
        parts.append(
            f'<text class="title" transform="translate(22 {middle}) rotate(-90)" text-anchor="middle">true label</text>'
        )
    return svg(parts, "confusion matrix", side, side + beyond)


def thin(points: Sequence[Point], limit: int = _MAX_POINTS) -> list[Point]:
    """At most about `limit` of the points in their order; each stretch keeps its lowest and highest, so no
    spike is lost."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit / 2))
    kept: list[Point] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def running_mean(points: Sequence[Point], span: int) -> list[Point]:
    """Mean of each point and the `span` - 1 before it."""
    result, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - span][1] if i >= span else 0.0)
        result.append((x, total / min(i + 1, span)))
    return result


def svg(parts: Iterable[str], label: str, height: float = HEIGHT, width: float = WIDTH) -> Markup:
    # Every text that came from outside went through `escape` above.
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
    return Markup(opening + "".join(parts) + "</svg>")


def room(values: Sequence[float], share: float) -> tuple[float, float]:
    """Lowest and highest with a margin of `share` of their distance; never an empty range."""
    low, high = min(values), max(values)
    margin = (high - low) * share if high > low else abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high]."""
    raw = (high - low) / about
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


_tick: Callable[[float], str] = "{:,.10g}".format
