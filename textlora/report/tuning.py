"""A study of `textlora tune` as one HTML page: history, importance, each setting against the score, and every
trial.

Without a script, like the page of a run. Kinds of trials differ by the shape of their marks, not by colour
alone.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from textlora.metrics.scores import METRICS
from textlora.report import figures
from textlora.report.figures import BOTTOM, HEIGHT, WIDTH, Point
from textlora.report.numbers import clean, metric_name, number, setting, whole
from textlora.report.pages import fill

Record = dict[str, Any]
LOGARITHMIC = ("learning_rate", "r")
_SLICE_WIDTH, _SLICE_HEIGHT, _BAR, _NAMES, _SHARE = 340, 210, 26, 120, 50
_FEW = 20  # complete trials, below which importance is a hint


def render_study(study: Record, title: str) -> str:
    """One self-contained HTML page about a study, light or dark as the reader's system is.

    Args:
        study: what `Search.record` gives: trials, metric, importance, settings, and the result of the run
            with the best ones.
        title: heading of the page; like all text it is escaped.
    """
    trials = study["trials"]
    best = next((trial for trial in trials if trial["number"] == study["best"]), None)
    choice = study["choice"] and next(
        trial for trial in trials if trial["number"] == study["choice"]["number"]
    )
    complete = sum(trial["state"] == "complete" for trial in trials)
    return fill(
        "tuning.html",
        title=title,
        about=f"Search over {len(study['searched'])} settings · {study['model']} · {study['problem_type']}",
        study=study,
        metric=metric_name(study["metric"]),
        meaning=METRICS[study["metric"]].what,
        higher=study["higher_is_better"],
        best=best,
        choice=choice,
        headline=_headline(study, choice),
        held=held_words(study),
        tiles=_tiles(study),
        chosen=[(name.replace("_", "-"), shown(choice, name)) for name in _names(study)] if choice else [],
        history=_history(study) if any(last_value(trial) is not None for trial in trials) else None,
        legend=_legend({trial["state"] for trial in trials}),
        importance=_importance(study["importance"]) if study["importance"] else None,
        complete=complete,
        few=complete < _FEW,
        slices=[svg for name in study["searched"] if (svg := _slice(study, name))],
        names=_names(study),
        rows=[_row(study, trial) for trial in trials],
        settings=sorted(study["settings"].items()),
    )


def _names(study: Record) -> list[str]:
    """Settings of a trial to show: what was searched, and the scale that follows the rank."""
    return [
        shown for name in study["searched"] for shown in ((name, "lora_alpha") if name == "r" else (name,))
    ]


def shown(trial: Record, name: str) -> str:
    """A setting of a trial as it would be typed."""
    value = trial["settings"].get(name)
    return (
        "default"
        if name == "target_modules" and value is None
        else f"{value:.4g}"
        if isinstance(value, float)
        else setting(value)
    )


def last_value(trial: Record) -> float | None:
    """Score of a complete trial, last score of any other, None where it has none."""
    return trial["value"] if trial["value"] is not None else next(reversed(trial["scores"].values()), None)


def held_words(study: Record) -> str:
    """Which rows trials were scored on."""
    folds = f" ({study['folds']}-fold cross-validation)" if study["folds"] else ""
    return f"{whole(study['held'])} held-out rows{folds}"


def _headline(study: Record, choice: Record | None) -> Record | None:
    """The score to read first: of the test rows where there are any, else of the rows that the search looked
    at, and said so."""
    if choice is None:
        return None
    metric = metric_name(study["metric"])
    name = "the defaults" if choice["defaults"] else f"trial {choice['number']}"
    score = lambda result: ((result or {}).get("test") or {}).get(study["metric"])
    test = score(study["result"])
    if test is None:
        many = sum(trial["state"] == "complete" for trial in study["trials"])
        luck = (
            ""
            if many == 1
            else f" that {many} trials were compared on, so it is a little luckier than it is good"
        )
        return {
            "score": choice["value"],
            "what": f"held-out {metric}",
            "of": f"of {name} on the {held_words(study)}{luck}",
            "beside": None,
        }
    beside = score(study["defaults_result"]) if not choice["defaults"] else None
    return {
        "score": test,
        "what": f"test {metric}",
        "of": f"of {name} on {whole(study['rows'].get('test', 0))} test rows, which chose nothing",
        "beside": beside,
    }


def _tiles(study: Record) -> list[tuple[str, str]]:
    trials = study["trials"]
    tiles = [("trials", whole(len(trials)))]
    for state in ("complete", "pruned", "failed", "running"):
        count = sum(trial["state"] == state for trial in trials)
        if count:
            tiles.append((state, whole(count)))
    seconds = sum(trial["seconds"] or 0.0 for trial in trials)
    tiles.append(("time in trials", f"{seconds:,.0f} s" if seconds < 3600 else f"{seconds / 3600:,.1f} h"))
    return [*tiles, *((f"{split} rows", whole(count)) for split, count in study["rows"].items())]


def mark(state: str, x: float, y: float, title: str = "", best: bool = False) -> str:
    """A disc for a complete trial, larger and ringed for the best; a cross for a pruned one, a triangle for a
    failed one, a ring for a running one."""
    if best:
        shape = f'<circle class="m-best" cx="{x:.1f}" cy="{y:.1f}" r="7.5"/><circle class="m-complete" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    elif state == "complete":
        shape = f'<circle class="m-complete" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    elif state == "pruned":
        shape = f'<path class="m-pruned" d="M{x - 4:.1f},{y - 4:.1f}l8,8m0,-8l-8,8"/>'
    elif state == "failed":
        shape = f'<path class="m-failed" d="M{x:.1f},{y - 5:.1f}l5,9h-10z"/>'
    else:
        shape = f'<circle class="m-running" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    return f"<g>{f'<title>{escape(clean(title))}</title>' if title else ''}{shape}</g>"


def _legend(states: set[str]) -> Markup:
    words = {
        "complete": "complete",
        "pruned": "pruned, at its last score",
        "failed": "failed",
        "running": "still running",
    }
    parts = [
        f'<span class="m-key"><svg viewBox="0 0 16 16">{mark(s, 8, 8)}</svg>{words[s]}</span>'
        for s in words
        if s in states
    ]
    best = (
        f'<span class="m-key"><svg viewBox="0 0 16 16">{mark("complete", 8, 8, best=True)}</svg>best</span>'
    )
    return Markup(
        "".join([*parts[:1], best, *parts[1:], '<span class="key b">best so far</span>'])
        if "complete" in states
        else "".join(parts)
    )


def _about(study: Record, trial: Record) -> str:
    value = last_value(trial)
    score = (
        trial["state"]
        if value is None
        else f"{trial['state']}, {metric_name(study['metric'])} {number(value)}"
    )
    defaults = " (the defaults)" if trial["defaults"] else ""
    return f"trial {trial['number']}{defaults}: {score}; " + ", ".join(
        f"{name.replace('_', ' ')} {shown(trial, name)}" for name in _names(study)
    )


def _history(study: Record) -> Markup:
    """Score of every trial in the order of their numbers, and the best up to each."""
    trials = study["trials"]
    values = [value for trial in trials if (value := last_value(trial)) is not None]
    span = max(trial["number"] for trial in trials) or 1
    axes = figures.Axes((-0.03 * span, 1.03 * span), figures.room(values, 0.08))
    ticks = [tick for tick in figures.ticks(0, span, 8) if tick == int(tick)]
    parts = [axes.frame("trial", f"held-out {metric_name(study['metric'])}", ticks)]
    steps: list[Point] = []
    better = max if study["higher_is_better"] else min
    for trial in trials:
        if trial["state"] == "complete":
            value = trial["value"] if not steps else better(trial["value"], steps[-1][1])
            steps += ([(trial["number"], steps[-1][1])] if steps else []) + [(trial["number"], value)]
    if steps:
        parts.append(
            f'<path class="line b" d="{axes.path([*steps, (trials[-1]["number"], steps[-1][1])])}"/>'
        )
    for trial in trials:
        value = last_value(trial)
        y = HEIGHT - BOTTOM - 8 if value is None else axes.py(value)
        parts.append(
            mark(
                trial["state"],
                axes.px(trial["number"]),
                y,
                _about(study, trial),
                trial["number"] == study["best"],
            )
        )
    return figures.svg(parts, "score of every trial")


def _importance(shares: dict[str, float]) -> Markup:
    """Horizontal bars, the largest first, each with its name and share."""
    height = _BAR * len(shares) + 8
    most = max(shares.values()) or 1.0
    parts = []
    for i, (name, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        top, wide = 4 + i * _BAR, max(1.0, (WIDTH - _NAMES - _SHARE) * share / most)
        parts.append(
            f'<text class="m-name" x="{_NAMES - 10}" y="{top + 17}" text-anchor="end">{escape(name.replace("_", " "))}</text>'
        )
        parts.append(f'<rect class="bar" x="{_NAMES}" y="{top + 4}" width="{wide:.1f}" height="{_BAR - 8}"/>')
        parts.append(f'<text x="{_NAMES + wide + 8:.1f}" y="{top + 17}">{100 * share:.0f} %</text>')
    return figures.svg(parts, "importance of each setting", height)


def _slice(study: Record, name: str) -> Markup | None:
    """One setting against the score."""
    points = [
        (trial, trial["parameters"][name], last_value(trial))
        for trial in study["trials"]
        if name in trial["parameters"]
    ]
    points = [point for point in points if point[2] is not None]
    if not points:
        return None
    place, ticks, span = _scale(name, [value for _, value, _ in points])
    axes = figures.Axes(
        span, figures.room([score for _, _, score in points], 0.1), _SLICE_HEIGHT, _SLICE_WIDTH
    )
    parts = [axes.frame(name.replace("_", " "), metric_name(study["metric"]), [])]
    parts += [
        f'<text class="tick" x="{axes.px(x):.1f}" y="{_SLICE_HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(clean(label))}</text>'
        for x, label in ticks
    ]
    for trial, value, score in points:
        parts.append(
            mark(
                trial["state"],
                axes.px(place(value)),
                axes.py(score),
                _about(study, trial),
                trial["number"] == study["best"],
            )
        )
    return figures.svg(
        parts, f"{metric_name(study['metric'])} against {name.replace('_', ' ')}", _SLICE_HEIGHT, _SLICE_WIDTH
    )


def _scale(
    name: str, values: Sequence[Any]
) -> tuple[Callable[[Any], float], list[tuple[float, str]], tuple[float, float]]:
    """Where a value of a setting lies on its axis, the axis' ticks, and its range."""
    if name in ("target_modules", "batch_size"):  # choices
        choices = sorted(set(values), key=lambda choice: (choice != "default", choice))
        return (
            choices.index,
            [(i, str(choice)) for i, choice in enumerate(choices)],
            (-0.5, len(choices) - 0.5),
        )
    if name in LOGARITHMIC:
        low, high = math.log10(min(values)), math.log10(max(values))
        decades = range(math.floor(low), math.ceil(high) + 1)
        marks = [2, 4, 8, 16, 32] if name == "r" else [factor * 10.0**k for k in decades for factor in (1, 3)]
        span = figures.room([low, high], 0.06)
        return (
            math.log10,
            [(math.log10(v), f"{v:g}") for v in marks if span[0] <= math.log10(v) <= span[1]],
            span,
        )
    span = figures.room(values, 0.06)
    ticks = [tick for tick in figures.ticks(*span, 5) if name == "lora_dropout" or tick == int(tick)]
    return float, [(tick, f"{tick:g}") for tick in ticks if tick >= 0], span


def _row(study: Record, trial: Record) -> Record:
    notes = ["the defaults of train"] if trial["defaults"] else []
    notes += [trial["reason"]] if trial["reason"] else []
    if trial["state"] == "pruned":
        notes.append(f"after {'fold' if study['folds'] else 'epoch'} {max(map(int, trial['scores']))}")
    if (trial["starts"] or 1) > 1:
        notes.append(f"started {trial['starts']} times")
    return {
        "number": trial["number"],
        "state": trial["state"],
        "best": trial["number"] == study["best"],
        "chosen": bool(study["choice"]) and trial["number"] == study["choice"]["number"],
        "value": last_value(trial),
        "cells": [
            shown(trial, name) if name != "lora_alpha" or trial["parameters"] or trial["defaults"] else ""
            for name in _names(study)
        ],
        "parameters": trial["adapter_parameters"],
        "seconds": None if trial["seconds"] is None else f"{trial['seconds']:,.1f}",
        "note": "; ".join(notes),
    }
