"""What raw labels mean: the problem type, the class names in their stored order, and the targets to train on."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from textlora.core.config import MULTI_LABEL as MULTI
from textlora.core.config import PROBLEM_TYPES, REGRESSION
from textlora.core.config import SINGLE_LABEL as SINGLE
from textlora.core.errors import DataError, UsageError
from textlora.data.rows import Row, label_text, number, place

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LabelSchema:
    """Problem type and class names; the index of a name is its logit's. Regression has the one label "value"."""

    problem_type: str
    labels: tuple[str, ...]
    label_separator: str | None = None
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {label: index for index, label in enumerate(self.labels)})

    def names(self, row: Row, column: str = "label") -> list[str]:
        """Class names of a row, known or not: one for single-label, any number for multi-label, none for
        regression.

        Raises:
            DataError: no label, or a list where one is needed and the other way round.
        """
        if self.problem_type == REGRESSION:
            return []
        return _names(row, self.problem_type, self.label_separator, column)

    def encode(self, row: Row, column: str = "label") -> int | list[float] | float:
        """Class index (single-label), 0/1 per class (multi-label) or number (regression) of one row.

        Raises:
            DataError: a label that is missing or not in `labels`, or a target that is no finite float32.
        """
        if self.problem_type == REGRESSION:
            value = _target(row, column)
            if value is None:
                said = "no label" if row.label is None else f"{_short(row.label)} is not a finite number"
                raise DataError(
                    f"{place(row.source, row.where, column)}: {said}", "mend it or remove the row"
                )
            return value
        indices = []
        for name in self.names(row, column):
            if name not in self._index:
                known = ", ".join(self.labels[:10]) + (", ..." if len(self.labels) > 10 else "")
                raise DataError(
                    f"{place(row.source, row.where, column)}: label {_short(name)} was not in the training data (known: {known})",
                    "correct the label or train with it",
                )
            indices.append(self._index[name])
        if self.problem_type == SINGLE:
            return indices[0]
        vector = [0.0] * len(self.labels)
        for index in indices:
            vector[index] = 1.0
        return vector

    def encode_all(self, rows: Sequence[Row], column: str = "label") -> np.ndarray:
        """Targets of N rows: int64 (N,) single-label, float32 (N, C) multi-label, float32 (N,) regression.

        Raises:
            DataError: as `encode`.
        """
        if self.problem_type == MULTI:
            encoded = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
            for index, row in enumerate(rows):
                encoded[index] = self.encode(row, column)
            return encoded
        return np.array(
            [self.encode(row, column) for row in rows],
            dtype=np.int64 if self.problem_type == SINGLE else np.float32,
        )


def problem_type_name(name: str) -> str:
    """The long name of "single-label", "multi-label" or "regression"; long names pass. Raises UsageError for
    others."""
    if name in PROBLEM_TYPES.values():
        return name
    if name not in PROBLEM_TYPES:
        raise UsageError(f"unknown problem type {name!r}", f"use {', '.join(PROBLEM_TYPES)}")
    return PROBLEM_TYPES[name]


def infer_schema(
    rows: Sequence[Row],
    problem_type: str | None = None,
    label_separator: str | None = None,
    column: str = "label",
) -> LabelSchema:
    """Problem type and classes of the training rows.

    The rule, where `problem_type` is None:
      1. any label is a list, or a separator is given: multi-label;
      2. else all labels are numbers and at least one is not whole: regression (where a NaN or infinity is an
      error, not a class); 3. else single-label.

    Class names are the labels as text: "01" stays "01", 1 and 1.0 are "1" (a string "1.0" stays), True is
    "true". They stand in numeric order where all are integers (ties by text), else in code point order,
    whatever the order of the rows.

    Raises:
        DataError: no rows, a missing label, fewer than two classes (multi-label: fewer than one), or labels
            that do not fit `problem_type`.
        UsageError: no such problem type, or a separator with another type than multi-label.
    """
    if not rows:
        raise DataError("no rows to learn from", "give training rows")
    label_separator = label_separator or None
    if problem_type is None:
        kind = _infer_type(rows, label_separator)
    else:
        kind = problem_type_name(problem_type)
        if label_separator is not None and kind != MULTI:
            raise UsageError(f"a label separator does not go with {problem_type}", "leave one of the two out")
    if kind == REGRESSION:
        schema = LabelSchema(REGRESSION, ("value",))
        for row in rows:
            schema.encode(row, column)
        return schema
    names = {name for row in rows for name in _names(row, kind, label_separator, column)}
    if len(names) < (2 if kind == SINGLE else 1):
        only = f"every row has the label {_short(next(iter(names)))}" if names else "no row has a label"
        raise DataError(f"{rows[0].source}, column {column!r}: {only}", "give rows of at least two classes")
    if all(INTEGER.fullmatch(name) for name in names):
        ordered = sorted(names, key=lambda name: (int(name), name))
    else:
        ordered = sorted(names)
    return LabelSchema(kind, tuple(ordered), label_separator)


def _infer_type(rows: Sequence[Row], separator: str | None) -> str:
    if separator is not None or any(isinstance(row.label, list) for row in rows):
        return MULTI
    fraction = False
    for row in rows:
        value = number(row.label)
        if value is None and not (
            isinstance(row.label, (str, float)) and NOT_FINITE.fullmatch(str(row.label).strip())
        ):
            return SINGLE
        fraction = fraction or (value is not None and not value.is_integer())
    return REGRESSION if fraction else SINGLE


def _names(row: Row, kind: str, separator: str | None, column: str) -> list[str]:
    label = row.label
    where = place(row.source, row.where, column)
    if label is None or (
        kind == SINGLE and isinstance(label, (str, float)) and label_text_or_none(label) is None
    ):
        raise DataError(f"{where}: no label", "fill it in or remove the row")
    if kind == SINGLE:
        if isinstance(label, list):
            if len(label) != 1:
                raise DataError(
                    f"{where}: {len(label)} labels where one is needed", "use the problem type multi-label"
                )
            label = label[0]
        return [label_text(label)]
    if isinstance(label, str) and separator is not None:
        label = label.split(separator)
    if not isinstance(label, list):
        raise DataError(
            f"{where}: {_short(label)} is no list of labels",
            "give --label-separator, or lists in JSON Lines or Parquet",
        )
    return list(dict.fromkeys(name for name in map(label_text, label) if name))


def label_text_or_none(label: str | float) -> str | None:
    """The class name of a string or float; None for a blank string and for NaN and infinities."""
    if isinstance(label, float) and not np.isfinite(label):
        return None
    return label_text(label) or None


def _target(row: Row, column: str) -> float | None:
    if isinstance(row.label, list):
        raise DataError(
            f"{place(row.source, row.where, column)}: a list in place of a number",
            "use the problem type multi-label",
        )
    value = number(row.label)
    return value if value is not None and abs(value) <= FLOAT32_MAX else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
