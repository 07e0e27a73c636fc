"""The report of `textlora compare`: run records to a page, Markdown, CSV and figures; the same over several
data sets.

Every number is counted from the records. The page has no script and fetches nothing.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape

from textlora.core.errors import UsageError
from textlora.core.files import write_text
from textlora.report.comparison import cells
from textlora.report.comparison.across import across
from textlora.report.comparison.table import Comparison, Run, compare
from textlora.report.comparison.words import sentences, sentences_of_many, verdict
from textlora.report.numbers import clean, whole
from textlora.report.pages import fill

__all__ = ["render", "render_many", "require_matplotlib", "summary"]

_NOT_LISTED = ("data", "descriptions", "labels", "left_out", "split_lines", "test_labels")


def require_matplotlib() -> None:
    """Raise UsageError where matplotlib is not installed; to be asked before hours of training, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the report of textlora compare needs matplotlib",
            'install it with pip install "textlora[compare]"',
        ) from error


def render(settings: dict[str, Any], runs: Sequence[Run], folder: Path) -> dict[str, Any]:
    """Write report.html, report.md, report.csv and figures/*.png and *.svg into `folder`.

    Args:
        settings: `comparison.json`: data, metric, problem_type, methods, test_labels; optional: model,
            descriptions (method to one line), left_out (lines on what the budget did not allow). The rest is
            listed as it is.
        runs: the run files, in any order.

    Returns:
        A summary that JSON can hold: data, metric, split, rows, best, verdict, sentences (the verdict and
            more), left_out, and methods (the lines of
        report.csv).

    Raises:
        UsageError: matplotlib is not installed.
        DataError: a run does not belong to these test rows.
        StorageError: the folder cannot be written.
    """
    require_matplotlib()
    from textlora.report.comparison.drawings import of_one

    table = compare(settings, runs)
    icons, sections = of_one(table)
    records = [line for row in table.rows for line in cells.record(row, table)]
    words = sentences(table)
    page = {
        "title": f"Methods compared on {table.data}",
        "about": _about(table),
        "sentences": words,
        "left_out": settings.get("left_out") or [],
        "tables": [cells.methods(table, icons)],
        "figures": sections,
        "described": [
            (name, what)
            for name, what in (settings.get("descriptions") or {}).items()
            if name in settings["methods"]
        ],
        "settings": _flat({name: value for name, value in settings.items() if name not in _NOT_LISTED}),
    }
    _write(page, records, Path(folder))
    best = table.best.name if table.best else None
    found = {
        "data": table.data,
        "metric": table.metric,
        "split": table.split,
        "rows": table.test_rows,
        "best": best,
    }
    return found | {
        "verdict": verdict(table),
        "sentences": words,
        "left_out": page["left_out"],
        "methods": records,
    }


def render_many(sets: Sequence[tuple[dict[str, Any], Sequence[Run]]], folder: Path) -> dict[str, Any]:
    """One page over several comparisons, as the same files as `render`; a set links to `<data>/report.html`
    where that is there.

    Returns:
        `summary(sets)`.

    Raises:
        UsageError: matplotlib is not installed, or a set's metric cannot be averaged with others (see
            `summary`).
        DataError, StorageError: as `render`.
    """
    require_matplotlib()
    from textlora.report.comparison.drawings import of_many

    found, folder = across(sets), Path(folder)
    icons, sections = of_many(found)
    described = {
        name: what
        for table in found.tables
        for name, what in (table.settings.get("descriptions") or {}).items()
        if name in table.settings["methods"]
    }
    runs = sum(len(table.runs) for table in found.tables)
    page = {
        "title": f"Methods compared on {len(found.tables)} data sets",
        "about": f"{', '.join(table.data for table in found.tables)} · {whole(runs)} runs",
        "sentences": sentences_of_many(found),
        "left_out": [
            f"{table.data}: {line}" for table in found.tables for line in table.settings.get("left_out") or []
        ],
        "tables": [
            cells.averages(found, icons),
            cells.by_set(found, icons, folder),
            cells.pairs(found, icons),
        ],
        "figures": sections,
        "described": list(described.items()),
        "settings": [],
    }
    _write(
        page,
        [line for table in found.tables for row in table.rows for line in cells.record(row, table)],
        folder,
    )
    return found.as_dict()


def summary(sets: Sequence[tuple[dict[str, Any], Sequence[Run]]]) -> dict[str, Any]:
    """Means over data sets: per method the score and the scores of the sets, and for every pair the mean
    difference, in points.

    A difference's `interval` is a t interval over the sets (what to expect on another set like these), `p`
    belongs to it; `on_these_sets` is from the paired bootstrap inside each set (what its test rows and seeds
    leave open).

    Raises:
        UsageError: a set's metric is an error or a loss, which cannot be averaged with scores of other sets.
    """
    return across(sets).as_dict()


def _flat(settings: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Settings and those inside them, each with its way there; without those that are not set."""
    found = []
    for name, value in settings.items():
        found += (
            _flat(value, f"{above}{name} ")
            if isinstance(value, dict)
            else [(above + name, value)]
            if value not in (None, [])
            else []
        )
    return found


def _about(table: Comparison) -> str:
    facts = [str(table.settings["model"])] if table.settings.get("model") else []
    facts += [f"{whole(table.train_rows)} training rows"] if table.train_rows else []
    facts += [f"{whole(table.test_rows)} test rows"] if table.test_rows else []
    return " · ".join([*facts, f"{len(table.runs)} runs"])


def _write(page: dict[str, Any], records: list[dict[str, Any]], folder: Path) -> None:
    for section in page["figures"]:
        for drawing in section["drawings"]:
            drawing.save(folder / "figures")
    text = io.StringIO()
    if records:
        lines = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        lines.writeheader()
        lines.writerows(records)
    write_text(folder / "report.csv", text.getvalue())
    write_text(folder / "report.md", _markdown(page))
    write_text(folder / "report.html", fill("comparison/page.html", **page))


def _markdown(page: dict[str, Any]) -> str:
    text = [f"# {_plain(page['title'])}", "", _plain(page["about"]), ""]
    text += [f"- {_plain(line)}" for line in (*page["sentences"], *page["left_out"])]
    for table in page["tables"]:
        text += ["", f"## {_plain(table['title'])}"] if table.get("title") else []
        heads = [head["text"] if isinstance(head, dict) else head for head in table["head"]]
        text += ["", "| " + " | ".join(map(_plain, heads)) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in table["rows"]:
            shown = [
                _plain(c["text"] + (f" ({c['under']})" if c["under"] else "")) for c in row["cells"]
            ] or [_plain(row["error"] or "")]
            shown = (
                [
                    f"**{part}**" if cell["strong"] else part
                    for part, cell in zip(shown, row["cells"], strict=True)
                ]
                if row["cells"]
                else shown
            )
            text.append(
                "| " + " | ".join([_plain(row["name"]), *shown, *[""] * (len(heads) - 1 - len(shown))]) + " |"
            )
        text += [part for line in table["notes"] for part in ("", _plain(line))]
    for section in page["figures"]:
        text += ["", f"## {section['title']}"]
        for drawing in section["drawings"]:
            text += [
                "",
                f"![{_plain(drawing.caption)}](figures/{drawing.name}.png)",
                "",
                _plain(drawing.caption),
            ]
    text += (
        ["", "## Methods", "", *(f"- {_plain(name)}: {_plain(what)}" for name, what in page["described"])]
        if page["described"]
        else []
    )
    return "\n".join(text) + "\n"


def _plain(text: str) -> str:
    # Markdown may hold HTML, and a name must not end its table cell or begin a list, emphasis or link.
    safe = (
        str(escape(clean(text)))
        .replace("|", "&#124;")
        .replace("*", "\\*")
        .replace("_", "\\_")
        .replace("[", "\\[")
        .replace("]", "\\]")
    )
    return " ".join(safe.split())
