"""The tables of a comparison as text: for the page (with marks and small print) and, from the same cells, for
Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from textlora.metrics.paired import Difference
from textlora.report.comparison.across import Across, Pair, told_apart
from textlora.report.comparison.table import NOISE, Comparison, Row
from textlora.report.comparison.words import Scale, p_text, seconds, stored
from textlora.report.numbers import NONE, setting, size, whole

__all__ = ["averages", "by_set", "methods", "pairs", "record"]

Icons = Mapping[str, Markup]
_POINTS = Scale("accuracy")


def _cell(text: str, under: str = "", strong: bool = False) -> dict[str, Any]:
    return {"text": text, "under": under, "strong": strong}


def methods(table: Comparison, icons: Icons) -> dict[str, Any]:
    """One row per method of one comparison."""
    scale = Scale(table.metric)
    cost = [
        "trainable parameters",
        "head",
        "seconds",
        "peak memory",
        "saved",
        "spread over rates",
        "over seeds",
    ]
    head = ["method", "size", "best rate", f"{table.split} {scale.name}", "to the best", "p (Holm)", *cost]
    rows = [
        {"name": r.name, "icon": icons.get(r.name), "best": r is table.best, **_method(r, table, scale)}
        for r in table.rows
    ]
    return {"head": head, "rows": rows, "notes": _notes(table, scale)}


def _method(row: Row, table: Comparison, scale: Scale) -> dict[str, Any]:
    if row.mean is None:
        return {"cells": [], "error": row.error}
    difference, rates = row.difference, row.rates
    under = (
        f"{rates.alike} rates" + (f", {rates.failed} failed" if rates.failed else "")
        if rates and rates.points
        else ""
    )
    to_best = (
        _cell(scale.signed(difference.value), scale.interval(difference))
        if difference
        else _cell("best" if row is table.best else NONE)
    )
    cells = [
        _cell(", ".join(f"{name} {value}" for name, value in row.size.items()) or NONE),
        _cell(setting(row.learning_rate)),
        _cell(scale.mean(row.mean, row.half), row.error or _seeds(row)),
        to_best,
        _cell(p_text(row.p_holm), strong=row.p_holm is not None and row.p_holm < NOISE),
        _cell(whole(row.trainable_parameters)),
        _cell(whole(row.head_parameters)),
        _cell(seconds(row.train_seconds)),
        _cell(size(row.peak_memory_bytes)),
        _cell(stored(row.saved_bytes)),
        _cell(scale.score(rates.width if rates else None), under),
        _cell(scale.score(row.seed_spread)),
    ]
    return {"cells": cells, "error": None}


def _seeds(row: Row) -> str:
    return (
        "no seed" if row.learning_rate is None else "1 seed" if row.one_seed else f"{len(row.scores)} seeds"
    )


def _notes(table: Comparison, scale: Scale) -> list[str]:
    notes = [
        f"{'Scores are in the metric’s own unit' if scale.own else 'Scores are times 100, differences in points'}. "
        "± is the 95 % t interval over seeds: the luck of training, on these test rows; it does not say how other test rows would score. "
        "A fitted method has no seed.",
        "To the best: difference with its 95 % interval, from a paired bootstrap over the test rows with the luck of the seeds as a t variable. "
        "p is two-sided and corrected for the number of comparisons (Holm): below 0.05 the difference is more than noise. "
        "Not told apart does not mean equal: the interval says how far apart they may be.",
        "Spread over rates: best minus worst held-out score among the learning rates, with one seed; over seeds: best minus worst score "
        "at the best rate. Seconds: one training at the best rate, median over seeds. Peak memory: of the whole process. Saved: what is kept per task.",
    ]
    notes += _pooled(table)
    if table.settings.get("folds"):
        notes.append(
            f"Rates, checkpoints, temperature and thresholds were decided by {table.settings['folds']}-fold cross-validation on the training rows; "
            "every run with a score on the test rows was trained on all of them."
        )
    if table.split == "validation":
        notes[1] = (
            "There was no test set: these rows also chose rates and checkpoints, so new rows will score a little lower, and nothing is tested."
        )
    return notes


def _pooled(table: Comparison) -> list[str]:
    """What the heads see, where that is not the same for all."""
    usual = table.settings.get("pooling")
    words = {
        "first": "the first token, through the head that transformers has for the base",
        "mean": "the mean of all tokens",
    }
    found = []
    for pooling in words:
        others = list(
            dict.fromkeys(
                run["method"] for run in table.runs if run.get("pooling") == pooling and pooling != usual
            )
        )
        if usual in words and others:
            found.append(
                f"{', '.join(others)}: the head sees {words[pooling]}, since peft has no other way; all others: {words[usual]}."
            )
    return found


def averages(found: Across, icons: Icons) -> dict[str, Any]:
    """One row per method, means over the sets."""
    full = any(average.to_full for average in found.averages)
    head = ["method", "mean score", "to the best", "p (Holm)", "to the best, on these sets"]
    head += ["to full fine-tuning", "to full, on these sets"] if full else []
    head += ["trainable parameters", "seconds", "peak memory", "saved"]
    rows = []
    for a in found.averages:
        cells = [
            _cell(
                _POINTS.score(a.mean / 100),
                "" if len(a.rows) == len(found.tables) else f"{len(a.rows)} set{'s' * (len(a.rows) > 1)}",
            ),
            _over(a.to_best, "best" if a is found.best else NONE),
        ]
        cells += [_cell(p_text(a.p_holm), strong=told_apart(a)), _inside(a.to_best)]
        cells += [_over(a.to_full, NONE), _inside(a.to_full)] if full else []
        cells += [_cell(whole(a.typical("trainable_parameters"))), _cell(seconds(a.typical("train_seconds")))]
        cells += [_cell(size(a.typical("peak_memory_bytes"))), _cell(stored(a.typical("saved_bytes")))]
        rows.append({"name": a.name, "icon": icons.get(a.name), "best": a is found.best, "cells": cells})
    notes = [
        "Differences in points, mean over the sets that have both. The first interval is over the sets (t, 95 %): what to expect on another set like "
        "these; p belongs to it. “On these sets” leaves the sets as they are: 95 % interval of what their test rows and seeds leave open.",
        "Costs are geometric means over the sets.",
    ]
    return {"title": "Means over the sets", "head": head, "rows": rows, "notes": notes}


def _over(pair: Pair | None, without: str) -> dict[str, Any]:
    if pair is None:
        return _cell(without)
    return _cell(
        _signed(pair.mean),
        f"{_signed(pair.mean - pair.half)} to {_signed(pair.mean + pair.half)}"
        if pair.half is not None
        else "",
    )


def _inside(pair: Pair | None) -> dict[str, Any]:
    return _cell(
        f"{_signed(pair.inside.low)} to {_signed(pair.inside.high)}" if pair and pair.inside else NONE
    )


def _signed(points: float) -> str:
    return _POINTS.signed(points / 100)


def by_set(found: Across, icons: Icons, folder: Path) -> dict[str, Any]:
    """Scores of every method on every set; the best of a set and what is not told apart from it are bold."""
    heads = []
    for table in found.tables:
        link = f"{quote(table.data)}/report.html" if (folder / table.data / "report.html").is_file() else None
        heads.append({"text": table.data, "under": Scale(table.metric).name, "link": link})
    rows = []
    for average in found.averages:
        cells = []
        for table in found.tables:
            row = next((row for row in table.rows if row.name == average.name), None)
            good = row is not None and (row is table.best or (row.p_holm is not None and row.p_holm >= NOISE))
            scale = Scale(table.metric)
            text = scale.score(row.mean) if row else NONE
            cells.append(
                _cell(text, f"± {scale.score(row.half)}" if row and row.half is not None else "", strong=good)
            )
        rows.append(
            {
                "name": average.name,
                "icon": icons.get(average.name),
                "best": average is found.best,
                "cells": cells,
            }
        )
    notes = [
        "± is the 95 % t interval over seeds. Bold: the best of the set and what is not told apart from it (paired test, Holm)."
    ]
    notes += [
        f"{row.name} on {table.data}: {row.error}."
        for table in found.tables
        for row in table.rows
        if row.error
    ]
    return {"title": "Every set", "head": ["method", *heads], "rows": rows, "notes": notes}


def pairs(found: Across, icons: Icons) -> dict[str, Any]:
    """Mean difference of every pair: row minus column."""
    rows = []
    for average in found.averages:
        cells = []
        for other in found.averages:
            pair = found.pair(average.name, other.name) if other is not average else None
            clear = pair is not None and pair.half is not None and abs(pair.mean) > pair.half
            cells.append(
                _cell(_signed(pair.mean) if pair else NONE if other is not average else "", strong=clear)
            )
        rows.append({"name": average.name, "icon": icons.get(average.name), "best": False, "cells": cells})
    notes = [
        "Row minus column in points, mean over the sets. Bold: the 95 % interval over the sets leaves out 0 (not corrected for the number of pairs)."
    ]
    return {
        "title": "Every pair",
        "head": ["method", *(average.name for average in found.averages)],
        "rows": rows,
        "notes": notes,
    }


def record(row: Row, table: Comparison) -> list[dict[str, Any]]:
    """Lines of report.csv about a method: at all training rows, then one for each smaller number. Raw
    numbers, no rounding."""
    rates = row.rates
    facts = {
        "data": table.data,
        "method": row.method,
        "size": " ".join(f"{k}={v}" for k, v in row.size.items()),
        "learning_rate": row.learning_rate,
    }
    full = max((count for count, *_ in row.curve), default=table.train_rows)
    line = {
        **facts,
        "train_rows": full,
        "seeds": len(row.scores),
        "metric": table.metric,
        "split": table.split,
        "score": row.mean,
        **_ends("score", row.mean, row.half),
        "difference": row.difference.value if row.difference else None,
        **_bounds(row.difference),
        "p": row.difference.p if row.difference else None,
        "p_holm": row.p_holm,
        "trainable_parameters": row.trainable_parameters,
        "head_parameters": row.head_parameters,
        "train_seconds": row.train_seconds,
        "peak_memory_bytes": row.peak_memory_bytes,
        "saved_bytes": row.saved_bytes,
        "rate_spread": rates.width if rates else None,
        "rates": rates.alike if rates else None,
        "rates_failed": rates.failed if rates else None,
        "seed_spread": row.seed_spread,
        "error": row.error,
    }
    fewer = [
        dict.fromkeys(line)
        | facts
        | {"train_rows": count, "seeds": seeds, "metric": table.metric, "split": table.split, "score": mean}
        | _ends("score", mean, half)
        for count, mean, half, seeds in row.curve
        if count != full
    ]
    return [line, *fewer]


def _ends(name: str, mean: float | None, half: float | None) -> dict[str, float | None]:
    return (
        {f"{name}_low": mean - half, f"{name}_high": mean + half}
        if half is not None
        else {f"{name}_low": None, f"{name}_high": None}
    )


def _bounds(difference: Difference | None) -> dict[str, float | None]:
    return {
        "difference_low": difference.low if difference else None,
        "difference_high": difference.high if difference else None,
    }
