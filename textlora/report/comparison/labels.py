"""Places for the names beside the points of a figure, so that they cover neither each other nor the points.

Greedy, then a few rounds of improvement: every name tries the same ring of places around its point and takes
the cheapest. All lengths are in the unit of the drawing; boxes are (left, bottom, right, top).
"""

import math
from collections.abc import Sequence

import numpy as np

_ROUNDS = 4
_LINE_THROUGH = 25.0  # per tenth of a leading line that runs through a name
_CROSSED = 0.35  # covering an interval line is bad, covering a name or a point is worse


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    marker: float,
    thin: Sequence[tuple[float, float, float, float]],
    bounds: tuple[float, float, float, float],
) -> np.ndarray:
    """Boxes (N, 4) for names of the given sizes (N, 2) beside their points (N, 2).

    Args:
        marker: radius of the points.
        thin: boxes of lines that had better not be covered.
        bounds: the box to stay inside.
    """
    points, sizes = np.asarray(points, float).reshape(-1, 2), np.asarray(sizes, float).reshape(-1, 2)
    count = len(points)
    marks = np.concatenate([points - marker, points + marker], axis=1)
    thin = np.asarray(thin, float).reshape(-1, 4)
    offers = [_offers(points[i], sizes[i], marker) for i in range(count)]
    fixed = []
    for i in range(count):
        outside = (offers[i][:, :2] < bounds[:2]).any(axis=1) | (offers[i][:, 2:] > bounds[2:]).any(axis=1)
        distance = np.hypot(*((offers[i][:, :2] + offers[i][:, 2:]) / 2 - points[i]).T)
        cost = 2 * _covered(offers[i], marks).sum(axis=1) + _CROSSED * _covered(offers[i], thin).sum(axis=1)
        fixed.append(cost + 0.9 * distance + 1e6 * outside)
    boxes = np.full((count, 4), np.nan)
    # The most crowded choose first.
    gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + np.diag(np.full(count, np.inf))
    order = np.argsort(gaps.min(axis=1, initial=np.inf), kind="stable")
    for _ in range(_ROUNDS):
        for i in order:
            placed = [j for j in range(count) if j != i and not math.isnan(boxes[j, 0])]
            others = boxes[placed]
            names = 3 * _covered(offers[i], others).sum(axis=1)
            own = np.stack([_inside(lead, others) for lead in _leads(points[i], offers[i])])
            theirs = sum(
                (_inside(_leads(points[j], boxes[j][None])[0], offers[i], per_box=True) for j in placed),
                np.zeros(len(offers[i])),
            )
            boxes[i] = offers[i][np.argmin(fixed[i] + names + _LINE_THROUGH * (own + theirs))]
    return boxes


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places, moved as little as needed to lie at least `gap` apart inside [low, high], in the same
    order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[tuple[float, int]] = []  # mean place and number of neighbours that touch: they move as one

    def start(group: tuple[float, int]) -> float:
        return max(min(group[0] - (group[1] - 1) * gap / 2, high - (group[1] - 1) * gap), low)

    for i in order:
        groups.append((places[i], 1))
        while len(groups) > 1 and start(groups[-2]) + groups[-2][1] * gap > start(groups[-1]):
            (later, more), (mean, count) = groups.pop(), groups.pop()
            groups.append(((mean * count + later * more) / (count + more), count + more))
    moved = [0.0] * len(places)
    found = (start(group) + k * gap for group in groups for k in range(group[1]))
    for i, value in zip(order, found, strict=True):
        moved[i] = value
    return moved


def _offers(point: np.ndarray, size: np.ndarray, marker: float) -> np.ndarray:
    """Boxes around a point: the same directions at growing distances, the near ones first."""
    boxes = []
    for away in (marker + 3, marker + 9, marker + 17, marker + 27, marker + 40, marker + 56):
        for step in range(24):
            angle = 2 * math.pi * step / 24
            # The point of the box that is nearest to the marker lies `away` from its centre.
            centre = (
                point
                + away * np.array([math.cos(angle), math.sin(angle)])
                + size / 2 * np.array([_soft(math.cos(angle)), _soft(math.sin(angle))])
            )
            boxes.append(np.concatenate([centre - size / 2, centre + size / 2]))
    return np.array(boxes)


def _soft(value: float) -> float:
    return max(-1.0, min(1.0, value * 1.6))


def _leads(point: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Ten places (A, 10, 2) on the line from a point to each box."""
    ends = np.clip(point, boxes[:, :2], boxes[:, 2:])
    return point + np.linspace(0.1, 1, 10)[None, :, None] * (ends - point)[:, None]


def _inside(places: np.ndarray, boxes: np.ndarray, per_box: bool = False) -> np.ndarray:
    """How many of the places (P, 2) lie in the boxes (A, 4): in all, or (A,) in each."""
    hits = ((places[None] > boxes[:, None, :2]) & (places[None] < boxes[:, None, 2:])).all(axis=2)
    return hits.sum(axis=1) if per_box else hits.sum()


def _covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area (A, B) that each box shares with each of the others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.prod(np.clip(high - low, 0, None), axis=2)
