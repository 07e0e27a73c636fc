"""What is in the data, before training on them: sizes, classes, lengths, and the rows that will mislead."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from textlora.core.errors import DataError
from textlora.data.rows import Row, Table, label_text, number, place
from textlora.data.schema import MULTI, REGRESSION, LabelSchema

SHOWN = 5  # places listed for each finding
IMBALANCED = 10.0  # largest class over smallest from which a warning is given
TRUNCATED = 0.1  # share of truncated rows from which a warning is given


@dataclass(frozen=True)
class Lengths:
    """Token lengths of the training rows, and what cutting them at `max_length` loses (None where nothing is
    cut).

    `edges` has one more entry than `counts`; bin i holds lengths from edges[i] up to, not including, edges[i
    + 1].
    """

    min: int
    mean: float
    median: float
    p95: float
    max: int
    edges: list[int]
    counts: list[int]
    max_length: int | None
    rows_truncated: float
    tokens_lost: float


@dataclass(frozen=True)
class DataReport:
    """Findings about training and evaluation rows; shares are of 1.

    `classes` holds a count per class of the training rows (empty for regression, whose `target` has min,
    mean, median, max). `duplicates` counts training rows equal in text and pair to an earlier one;
    `conflicts` the distinct texts among them that have more than one label. `leaks` counts, per evaluation
    split, its rows whose text and pair stand in training. `wheres` lists the first few places of each
    finding.
    """

    rows: dict[str, int]
    problem_type: str
    classes: dict[str, int]
    shares: dict[str, float]
    imbalance: float | None
    target: dict[str, float] | None
    unlabelled: int
    lengths: Lengths | None
    empty: dict[str, int]
    duplicates: int
    conflicts: int
    leaks: dict[str, int]
    unknown_labels: dict[str, dict[str, int]]
    wheres: dict[str, list[str]]
    warnings: list[str]

    def as_dict(self) -> dict[str, object]:
        """The report as JSON-able values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """At most 12 plain sentences: what there is, then the warnings, the first of them where there are
        many."""
        said = ["Rows: " + ", ".join(f"{count:,} {split}" for split, count in self.rows.items()) + "."]
        if self.target is not None:
            said.append(
                "Regression targets: "
                + ", ".join(f"{name} {value:.4g}" for name, value in self.target.items())
                + "."
            )
        else:
            largest = sorted(self.classes, key=lambda label: -self.classes[label])
            shown = ", ".join(
                f"{label} {self.classes[label]:,} ({self.shares[label]:.1%})" for label in largest[:6]
            )
            more = f", ... {largest[-1]} {self.classes[largest[-1]]:,}" if len(largest) > 6 else ""
            several = (
                f", several a row, {self.unlabelled:,} rows without any" if self.problem_type == MULTI else ""
            )
            said.append(f"{len(largest)} classes{several}: {shown}{more}.")
        if self.lengths is not None:
            of = self.lengths
            said.append(
                f"Tokens a row: {of.min} to {of.max}, mean {of.mean:.1f}, median {of.median:.0f}, 95% within {of.p95:.0f}."
            )
            if of.max_length is not None:
                said.append(
                    f"Cutting at {of.max_length} tokens truncates {of.rows_truncated:.1%} of the rows and loses {of.tokens_lost:.1%} of the tokens."
                )
        room = 12 - len(said)
        warnings = [f"Warning: {warning}." for warning in self.warnings]
        if len(warnings) > room:
            warnings = [*warnings[: room - 1], f"... and {len(warnings) - room + 1} more warnings."]
        return said + (warnings or ["No empty rows, duplicates, shared rows or unknown labels."])


def check_tables(
    train: Table,
    evaluations: Mapping[str, Table],
    schema: LabelSchema,
    lengths: np.ndarray | None,
    max_length: int | None,
) -> DataReport:
    """Look through the data.

    Args:
        train: training rows.
        evaluations: split name to its rows; labels may be missing there.
        schema: of the training labels.
        lengths: (N,) token count of each training row before truncation, special tokens included; None if
            unknown.
        max_length: tokens a row is cut at; None for no cut.

    Raises:
        DataError: a training label that does not fit `schema`.
    """
    column = train.columns.label or "label"
    wheres: dict[str, list[str]] = {}
    classes, target, unlabelled = _labels(train.rows, schema, column)
    named = sum(classes.values())
    # A row of several labels counts once for each, so shares are of rows there and can sum to more than 1.
    whole = len(train.rows) if schema.problem_type == MULTI else named
    imbalance = max(classes.values()) / max(min(classes.values()), 1) if classes else None

    tables = {"train": train, **evaluations}
    empty = {}
    for split, table in tables.items():
        found = [row for row in table.rows if _is_empty(row)]
        empty[split] = len(found)
        _note(
            wheres,
            f"empty:{split}",
            (place(row.source, row.where, table.columns.text) for row in found[:SHOWN]),
        )

    first: dict[tuple[str, str | None], Row] = {}
    answers: dict[tuple[str, str | None], set[str]] = {}
    again: list[Row] = []
    for row in train.rows:
        if _is_empty(row):
            continue
        key = (row.text, row.text_pair)
        if first.setdefault(key, row) is not row:
            again.append(row)
            answers.setdefault(key, {_answer(first[key], schema, column)}).add(_answer(row, schema, column))
    conflicting = [key for key, said in answers.items() if len(said) > 1]
    _note(
        wheres, "duplicates", (f"{_at(row)} = {_at(first[row.text, row.text_pair])}" for row in again[:SHOWN])
    )
    _note(wheres, "conflicts", (_at(first[key]) for key in conflicting[:SHOWN]))

    leaks, unknown = {}, {}
    for split, table in evaluations.items():
        shared = [row for row in table.rows if (row.text, row.text_pair) in first]
        leaks[split] = len(shared)
        _note(
            wheres,
            f"leaks:{split}",
            (f"{_at(row)} = {_at(first[row.text, row.text_pair])}" for row in shared[:SHOWN]),
        )
        strange, at = _unknown_labels(table, schema)
        unknown[split] = dict(strange)
        _note(wheres, f"unknown:{split}", at)

    measured = None if lengths is None or len(lengths) == 0 else _lengths(np.asarray(lengths), max_length)
    report = DataReport(
        rows={split: len(table.rows) for split, table in tables.items()},
        problem_type=schema.problem_type,
        classes=classes,
        shares={label: count / max(whole, 1) for label, count in classes.items()},
        imbalance=imbalance,
        target=target,
        unlabelled=unlabelled,
        lengths=measured,
        empty=empty,
        duplicates=len(again),
        conflicts=len(conflicting),
        leaks=leaks,
        unknown_labels=unknown,
        wheres=wheres,
        warnings=[],
    )
    report.warnings.extend(_warnings(report))
    return report


def _labels(
    rows: Sequence[Row], schema: LabelSchema, column: str
) -> tuple[dict[str, int], dict[str, float] | None, int]:
    if schema.problem_type == REGRESSION:
        values = schema.encode_all(rows, column).astype(np.float64)
        target = {
            "min": values.min(),
            "mean": values.mean(),
            "median": np.median(values),
            "max": values.max(),
        }
        return {}, {name: float(value) for name, value in target.items()}, 0
    sets = [schema.names(row, column) for row in rows]
    counts = Counter(name for names in sets for name in names)
    return {label: counts[label] for label in schema.labels}, None, sum(not names for names in sets)


def _unknown_labels(table: Table, schema: LabelSchema) -> tuple[Counter[str], list[str]]:
    """Counts and first places of labels, or of targets that are no number, that `schema` cannot encode."""
    strange: Counter[str] = Counter()
    at: list[str] = []
    column = table.columns.label or "label"
    for row in table.rows:
        if row.label is None:
            continue
        try:
            names = schema.names(row, column)
            if schema.problem_type == REGRESSION and number(row.label) is None:
                names = [str(row.label)]
        except DataError:  # a list where one label is needed, or no list where one is
            names = [str(row.label)]
        missing = [name for name in names if name not in schema.labels]
        strange.update(missing)
        if missing and len(at) < SHOWN:
            at.append(place(row.source, row.where, column))
    return strange, at


def _answer(row: Row, schema: LabelSchema, column: str) -> str:
    return (
        label_text(row.label)
        if schema.problem_type == REGRESSION
        else repr(sorted(schema.names(row, column)))
    )


def _lengths(lengths: np.ndarray, max_length: int | None) -> Lengths:
    longest = int(lengths.max())
    edges = [0, 8]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    lost = np.maximum(lengths - max_length, 0) if max_length is not None else np.zeros_like(lengths)
    return Lengths(
        min=int(lengths.min()),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        p95=float(np.quantile(lengths, 0.95)),
        max=longest,
        edges=edges,
        counts=[int(count) for count in np.histogram(lengths, bins=edges)[0]],
        max_length=max_length,
        rows_truncated=float((lost > 0).mean()),
        tokens_lost=float(lost.sum() / max(int(lengths.sum()), 1)),
    )


def _warnings(report: DataReport) -> list[str]:
    found = []

    def at(key: str) -> str:
        return report.wheres[key][0]

    for split, count in report.empty.items():
        if count:
            found.append(f"{count:,} {split} rows have no text, the first at {at(f'empty:{split}')}")
    for split, labels in report.unknown_labels.items():
        if labels:
            names = ", ".join(list(labels)[:3]) + (", ..." if len(labels) > 3 else "")
            found.append(
                f"{sum(labels.values()):,} {split} labels do not occur in train ({names}), the first at {at(f'unknown:{split}')}"
            )
    for split, count in report.leaks.items():
        if count:
            share = count / max(report.rows[split], 1)
            found.append(
                f"{count:,} {split} rows ({share:.1%}) also stand in train, the first is {at(f'leaks:{split}')}"
            )
    if report.conflicts:
        found.append(
            f"{report.conflicts:,} texts stand in train with different labels, the first at {at('conflicts')}"
        )
    if report.duplicates:
        found.append(
            f"{report.duplicates:,} train rows repeat an earlier one, the first is {at('duplicates')}"
        )
    if report.imbalance is not None and report.imbalance >= IMBALANCED:
        small = min(report.classes, key=lambda label: report.classes[label])
        found.append(
            f"the largest class has {report.imbalance:.0f} times the rows of the smallest, {small} ({report.classes[small]:,})"
        )
    if len(report.classes) > max(20, report.rows["train"] // 4):
        found.append(
            f"{len(report.classes):,} classes in {report.rows['train']:,} rows; check that the label column is the right one"
        )
    if report.lengths is not None and report.lengths.rows_truncated >= TRUNCATED:
        found.append(
            f"{report.lengths.rows_truncated:.1%} of the train rows are truncated; a larger max_length would keep more"
        )
    return found


def _note(wheres: dict[str, list[str]], key: str, places) -> None:
    listed = list(places)
    if listed:
        wheres[key] = listed


def _at(row: Row) -> str:
    return place(row.source, row.where)


def _is_empty(row: Row) -> bool:
    return not row.text or row.text.isspace()
