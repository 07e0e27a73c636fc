"""The figures of a comparison, drawn by matplotlib: told apart by marker, name and place first, by colour
only besides.

Scores come in as they are to be read (percent where that is usual). Places are computed in points, 1/72 inch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from textlora.report.comparison.labels import place, spread
from textlora.report.comparison.style import BLUE, CARD, GRID, INK, ORANGE, SOFT, TEXT, Mark

__all__ = ["Forest", "Panel", "Point", "Side", "costs", "curves", "forest", "panels"]

WIDE, HALF = 10.0, 5.2  # inches


@dataclass(frozen=True)
class Point:
    """A method in a figure of costs; `half` is half the width of its interval."""

    name: str
    mark: Mark
    x: float
    y: float
    half: float | None


@dataclass(frozen=True)
class Forest:
    """A line of a forest plot: single values with their shapes, their mean and interval; `sure` fills the
    mark. No mean, no line."""

    name: str
    mark: Mark
    values: Sequence[tuple[float, Any]]
    mean: float | None
    low: float | None
    high: float | None
    sure: bool = True


@dataclass(frozen=True)
class Side:
    """A column of a forest plot: title of its axis, lines, where a rule stands, and which end is good."""

    title: str
    lines: Sequence[Forest]
    rule: float | None = None
    high_is_good: bool = True


@dataclass(frozen=True)
class Panel:
    """Scores over learning rates of one method: (rate, score or None for failed, full length) and the rate
    that was chosen."""

    title: str
    mark: Mark
    lines: Sequence[tuple[str, Sequence[tuple[float, float | None, bool]]]]
    chosen: float | None


def _axes(
    width: float,
    height: float,
    left: float = 0.62,
    right: float = 0.15,
    bottom: float = 0.52,
    top: float = 0.14,
) -> Axes:
    """One plot; margins in inches, so that places are known before anything is drawn. A unit of the drawing
    is 1/72 inch."""
    figure = Figure(figsize=(width, height), dpi=72)
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    _plain(axes)
    return axes


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelcolor=SOFT, length=3, labelsize=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)


def _titles(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x, color=SOFT, fontsize=TEXT)
    axes.set_ylabel(y, color=SOFT, fontsize=TEXT)


def _fence(values: Sequence[float], high_is_good: bool, share: float = 0.07) -> tuple[float, float]:
    """Where an axis ends: at the values, but not at one that is far worse than all others (beyond Tukey's
    fence); never before the best."""
    values = np.asarray(values)
    low, high = np.percentile(values, [25, 75])
    reach = 1.5 * (high - low)
    near = values >= low - reach if high_is_good else values <= high + reach
    inside = values[near] if len(values) > 4 and reach > 0 else values
    room = max(inside.max() - inside.min(), 1e-3 * abs(inside).max(), 1e-9) * share
    return float(inside.min() - room), float(inside.max() + room)


def _short(value: float) -> str:
    """1,200 as 1.2k: for the ticks of a logarithmic axis."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _signed(value: float) -> str:
    return f"{value:,.1f}".replace("-", "−")


def _draw(
    axes: Axes, x: float, y: float, look: Mark, size: float = 8.0, filled: bool = True, **more: Any
) -> None:
    # A rim of the page's colour keeps marks apart that overlap.
    face, edge = (look.colour, CARD) if filled else (CARD, look.colour)
    thin = (
        1.35
        if look.shape == "*" or isinstance(look.shape, tuple)
        else 1.12
        if look.shape in tuple("^v<>pPX")
        else 1.0
    )
    grown = size * (1 if filled else 0.9) * thin
    axes.plot(
        [x],
        [y],
        marker=look.shape,
        linestyle="none",
        markersize=grown,
        markerfacecolor=face,
        markeredgecolor=edge,
        markeredgewidth=0.8 if filled else 1.4,
        **more,
    )


def costs(
    points: Sequence[Point], x_title: str, y_title: str, wide: bool = False, high_is_good: bool = True
) -> Figure:
    """Scores against a cost on a logarithmic axis, every point with its name; a cost of 0 stands left of the
    axis."""
    width, height = (WIDE, 4.5) if wide else (HALF, 3.9)
    axes = _axes(width, height, top=0.2)
    _titles(axes, x_title, y_title)
    positive = [point.x for point in points if point.x > 0] or [1.0]
    zero = any(point.x <= 0 for point in points)
    low, high = min(positive), max(positive)
    stretch = max(math.log10(high / low), 0.5)
    left, right = low / 10 ** (0.09 * stretch), high * 10 ** (0.09 * stretch)
    nought = low / 10 ** (0.15 * stretch)
    if zero:
        left = nought / 10 ** (0.07 * stretch)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    bottom, top = _fence([point.y for point in points], high_is_good, 0.13)
    axes.set_ylim(bottom, top)
    ticks = _log_ticks(low if zero else left, right)
    axes.set_xticks(
        [nought, *ticks] if zero else ticks, ["0", *map(_short, ticks)] if zero else list(map(_short, ticks))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    if zero:
        axes.axvline(nought * 10 ** (0.075 * stretch), color=SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
    rim = (top - bottom) * 0.035  # where a point beyond the axis stands
    shown = [
        (point, point.y if bottom <= point.y <= top else bottom + rim if point.y < bottom else top - rim)
        for point in points
    ]
    places = axes.transData.transform([(point.x if point.x > 0 else nought, y) for point, y in shown])
    places = _side_by_side(places, 9.0 if wide else 8.0)
    back = axes.transData.inverted().transform(places)
    names, bars = [], []
    frame = axes.get_window_extent()
    for (point, y), (x, _), (px, py) in zip(shown, back, places, strict=True):
        beyond = point.y != y
        if point.half and not beyond:
            axes.plot(
                [x, x],
                [point.y - point.half, point.y + point.half],
                color=point.mark.colour,
                linewidth=1.3,
                alpha=0.45,
                solid_capstyle="butt",
            )
            reach = point.half / (top - bottom) * frame.height
            bars.append((px - 1, max(py - reach, frame.y0), px + 1, min(py + reach, frame.y1)))
        _draw(axes, x, y, point.mark, clip_on=False, zorder=4)
        names.append(
            f"{point.name} ({_signed(point.y)} {'↓' if point.y < y else '↑'})" if beyond else point.name
        )
    _name(axes, places, names, bars)
    return axes.figure


def _side_by_side(places: np.ndarray, width: float) -> np.ndarray:
    """Points of (nearly) one x that would cover each other, moved apart sideways in the order of x, then of
    height."""
    moved = places.copy()
    order = np.argsort(places[:, 0], kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if groups and places[i, 0] - places[groups[-1][0], 0] < width * 0.75:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        middle = places[group, 0].mean()
        for k, i in enumerate(sorted(group, key=lambda i: (places[i, 0], places[i, 1]))):
            if len(group) > 1:
                moved[i, 0] = middle + (k - (len(group) - 1) / 2) * width
    return moved


def _name(axes: Axes, places: np.ndarray, names: Sequence[str], bars: Sequence[tuple[float, ...]]) -> None:
    figure = axes.figure
    texts = [
        figure.text(0, 0, name, fontsize=TEXT, color=INK, ha="center", va="center", zorder=6)
        for name in names
    ]
    sizes = [(box.width + 2, box.height) for box in (text.get_window_extent() for text in texts)]
    frame = axes.get_window_extent()
    boxes = place(
        places, sizes, 4.5, bars, (frame.x0 + 2, frame.y0 + 2, figure.bbox.x1 - 2, figure.bbox.y1 - 1)
    )
    for text, box, (x, y) in zip(texts, boxes, places, strict=True):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        text.set_position(figure.transFigure.inverted().transform(middle))
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        away = math.hypot(near[0] - x, near[1] - y)
        if away > 11:
            start = (x + (near[0] - x) * 5.5 / away, y + (near[1] - y) * 5.5 / away)
            ends = figure.transFigure.inverted().transform([start, near])
            figure.add_artist(_line(ends, figure))


def _line(ends: np.ndarray, figure: Figure) -> Any:
    return Line2D(ends[:, 0], ends[:, 1], transform=figure.transFigure, color=SOFT, linewidth=0.7, zorder=3)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 (or 3) between them where there are few; always inside what is shown."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    span = math.log10(high / low)
    factors = (
        (1, 1.5, 2, 3, 5, 7) if span < 1 else (1, 2, 5) if span < 2.2 else (1, 3) if span < 3.5 else (1,)
    )
    decades = [d for d in decades if span < 5 or d % 2 == 0]
    return [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high]


def forest(sides: Sequence[Side], key: Sequence[tuple[Any, str]] = ()) -> Figure:
    """A line per method and a column per side; names stand once, at the left.

    `key` names the shapes of the single values, where there are several.
    """
    count = len(sides[0].lines)
    top = 0.34 if key else 0.12
    height = 0.27 * count + top + 0.5
    figure = Figure(figsize=(WIDE, height), dpi=72)
    longest = max((len(line.name) for line in sides[0].lines), default=0)
    left = 0.35 + 0.078 * longest
    gap = 0.25
    each = (WIDE - left - 0.15 - gap * (len(sides) - 1)) / len(sides)
    for i, side in enumerate(sides):
        lines, rule = side.lines, side.rule
        axes = figure.add_axes(
            ((left + i * (each + gap)) / WIDE, 0.5 / height, each / WIDE, (height - top - 0.5) / height)
        )
        _plain(axes)
        axes.grid(axis="x", color=GRID, linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlabel(side.title, color=SOFT, fontsize=TEXT)
        known = [line for line in lines if line.mean is not None]
        low, high = _fence(
            [*(line.mean for line in known), *([rule] if rule is not None else [])], side.high_is_good
        )
        ends = [
            end
            for line in known
            for end in (line.low, line.high)
            if end is not None and low <= line.mean <= high
        ]
        single = [value for line in known for value, _ in line.values if low <= line.mean <= high]
        width = high - low
        axes.set_xlim(
            max(low - width * 0.6, min([low, *ends, *single])),
            min(high + width * 0.6, max([high, *ends, *single])),
        )
        axes.margins(0)
        low, high = axes.get_xlim()
        pad = (high - low) * 0.03
        axes.set_xlim(low - pad, high + pad)
        axes.set_yticks(range(count), [line.name for line in sides[0].lines] if i == 0 else [""] * count)
        axes.tick_params(axis="y", labelcolor=INK, length=0, pad=8)
        for y in range(1, count):
            axes.axhline(y - 0.5, color=GRID, linewidth=1)
        if rule is not None:
            axes.axvline(rule, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for y, line in enumerate(lines):
            if line.mean is None:
                continue
            if not low <= line.mean <= high:
                edge, arrow = (low, "◂ {}") if line.mean < low else (high, "{} ▸")
                axes.text(
                    edge,
                    y,
                    arrow.format(_signed(line.mean)),
                    color=INK,
                    fontsize=TEXT,
                    va="center",
                    ha="left" if line.mean < low else "right",
                )
                continue
            if line.low is not None and line.high is not None:
                axes.plot(
                    [line.low, line.high],
                    [y, y],
                    color=line.mark.colour,
                    linewidth=1.6,
                    alpha=0.5,
                    solid_capstyle="butt",
                )
            for value, shape in line.values:
                face = {
                    "markerfacecolor": "none",
                    "markeredgecolor": SOFT,
                    "markeredgewidth": 0.9,
                    "markersize": 4.5,
                }
                axes.plot([value], [y + 0.22], marker=shape, linestyle="none", **face)
            _draw(axes, line.mean, y, line.mark, 7.5, line.sure, zorder=4)
    x = left
    for shape, name in key:
        y = 1 - 0.14 / height
        text = figure.text((x + 0.13) / WIDE, y, name, color=SOFT, fontsize=TEXT, va="center")
        figure.add_artist(_dot(x / WIDE + 0.003, y, shape, figure))
        x += text.get_window_extent().width / 72 + 0.36
    return figure


def _dot(x: float, y: float, shape: Any, figure: Figure) -> Any:
    return Line2D(
        [x],
        [y],
        marker=shape,
        transform=figure.transFigure,
        linestyle="none",
        markerfacecolor="none",
        markeredgecolor=SOFT,
        markersize=4.5,
    )


def curves(
    lines: Sequence[tuple[str, Mark, Sequence[tuple[float, float, float | None]]]], x_title: str, y_title: str
) -> Figure:
    """Scores over a number of examples (logarithmic), a line per method with its name at the right end."""
    longest = max(len(name) for name, _, _ in lines)
    axes = _axes(WIDE, 4.6, right=0.45 + 0.085 * longest)
    _titles(axes, x_title, y_title)
    axes.set_xscale("log")
    counts = sorted({x for _, _, points in lines for x, _, _ in points})
    axes.set_xticks(counts, [f"{x:,.0f}" for x in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(counts[0] / 1.12, counts[-1] * 1.06)
    values = [y for _, _, points in lines for _, y, _ in points]
    room = (max(values) - min(values)) * 0.05 or 1.0
    axes.set_ylim(min(values) - room, max(values) + room)
    dashes = {BLUE: "-", ORANGE: (0, (5, 2)), SOFT: (0, (1.5, 1.5))}
    for i, (_, look, points) in enumerate(lines):
        # Intervals of one count stand side by side.
        nudge = (counts[-1] / counts[0]) ** ((i / max(len(lines) - 1, 1) - 0.5) * 0.03)
        x, y = [p[0] * nudge for p in points], [p[1] for p in points]
        axes.plot(x, y, color=look.colour, linewidth=1.4, linestyle=dashes[look.colour], alpha=0.85)
        for px, py, half in zip(x, y, [p[2] for p in points], strict=True):
            if half:
                axes.plot(
                    [px, px],
                    [py - half, py + half],
                    color=look.colour,
                    linewidth=1,
                    alpha=0.3,
                    solid_capstyle="butt",
                )
            _draw(axes, px, py, look, 6.5, zorder=4, clip_on=False)
    ends = axes.transData.transform([(points[-1][0], points[-1][1]) for _, _, points in lines])
    frame = axes.get_window_extent()
    heights = spread(ends[:, 1], 12.5, frame.y0 + 4, frame.y1 + 6)
    figure = axes.figure
    for (name, look, _), (x, y), target in zip(lines, ends, heights, strict=True):
        into = figure.transFigure.inverted().transform
        figure.add_artist(_line(into([(x + 9, y), (frame.x1 + 16, target)]), figure))
        tx, ty = into((frame.x1 + 32, target))
        figure.text(tx, ty, name, fontsize=TEXT, color=INK, va="center")
        px, py = into((frame.x1 + 23, target))
        figure.add_artist(
            Line2D(
                [px],
                [py],
                marker=look.shape,
                transform=figure.transFigure,
                linestyle="none",
                color=look.colour,
                markersize=6,
            )
        )
    return figure


def panels(found: Sequence[Panel], y_title: str) -> Figure:
    """Score over learning rate, a small plot per method on one scale: flat is steady. A cross at the foot is
    a run that failed."""
    columns = 4 if len(found) > 4 else max(2, len(found))
    rows = math.ceil(len(found) / columns)
    left, gap, each = 0.62, 0.22, 1.28
    height = rows * (each + 0.62) + 0.35
    figure = Figure(figsize=(WIDE, height), dpi=72)
    width = (WIDE - left - 0.12 - gap * (columns - 1)) / columns
    scores = [
        score for panel in found for _, points in panel.lines for _, score, _ in points if score is not None
    ] or [0.0]
    room = (max(scores) - min(scores)) * 0.1 or 1.0
    for i, panel in enumerate(found):
        row, column = divmod(i, columns)
        axes = figure.add_axes(
            (
                (left + column * (width + gap)) / WIDE,
                (height - (row + 1) * (each + 0.62) + 0.3) / height,
                width / WIDE,
                each / height,
            )
        )
        _plain(axes)
        axes.set_ylim(min(scores) - room, max(scores) + room)
        axes.set_xscale("log")
        rates = sorted({rate for _, points in panel.lines for rate, _, _ in points})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.xaxis.set_minor_locator(NullLocator())
        stretch = (rates[-1] / rates[0]) ** 0.14 if len(rates) > 1 else 2.0
        axes.set_xlim(rates[0] / stretch, rates[-1] * stretch)
        axes.set_title(panel.title, fontsize=TEXT, color=INK, loc="left", pad=4)
        if column:
            axes.tick_params(axis="y", labelleft=False)
        for j, (name, points) in enumerate(panel.lines):
            good = [(rate, score, full) for rate, score, full in points if score is not None]
            axes.plot(
                [g[0] for g in good],
                [g[1] for g in good],
                color=panel.mark.colour,
                linewidth=1.3 if j == 0 else 0.8,
                alpha=0.8 if j == 0 else 0.5,
            )
            for rate, score, full in good:
                if full:
                    _draw(
                        axes,
                        rate,
                        score,
                        panel.mark,
                        7.5 if j == 0 else 5,
                        j == 0 and rate == panel.chosen,
                        zorder=4,
                    )
                else:
                    axes.plot([rate], [score], ".", color=panel.mark.colour, markersize=5, zorder=4)
            for rate in (rate for rate, score, _ in points if score is None):
                axes.plot(
                    [rate],
                    [min(scores) - room * 0.2],
                    "x",
                    color=INK,
                    markersize=7,
                    markeredgewidth=1.8,
                    zorder=5,
                )
            if len(panel.lines) > 1 and good:
                axes.annotate(
                    name,
                    good[-1][:2],
                    (4, 0),
                    textcoords="offset points",
                    fontsize=TEXT - 1.5,
                    color=SOFT,
                    va="center",
                )
    figure.text(0.14 / WIDE, 0.5, y_title, rotation=90, color=SOFT, fontsize=TEXT, va="center", ha="center")
    figure.text(0.5, 0.12 / height, "learning rate", color=SOFT, fontsize=TEXT, ha="center", va="center")
    return figure
