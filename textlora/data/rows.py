"""The records every reader makes: rows, tables, and how a place in a file is named."""

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

LINE_FORMATS = ("csv", "tsv", "txt", "jsonl", "ndjson")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Label = str | int | float | list[str] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `label` is raw, as the file has it; `textlora.data.schema` gives it a meaning.

    `where` counts from 1: the physical line a CSV or JSONL record starts on, else the row's index plus one.
    """

    text: str
    text_pair: str | None
    label: Label
    where: int
    source: str


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns in use; None where the data have no such column."""

    text: str
    text_pair: str | None
    label: str | None


@dataclass(frozen=True)
class Table:
    """Rows in file order. `sha256` is of texts, pairs and labels in order, so the same rows as CSV and as
    Parquet agree."""

    rows: list[Row]
    columns: Columns
    source: str
    sha256: str


def place(source: str, where: int, column: str | None = None) -> str:
    """`train.csv line 5, column 'text'`; "row" in place of "line" where the source has no lines."""
    parts = source.lower().removesuffix(".gz").rsplit(".", 1)
    word = "line" if parts[-1] in LINE_FORMATS or source == "standard input" else "row"
    return f"{source} {word} {where}" + (f", column {column!r}" if column is not None else "")


def is_null(value: object) -> bool:
    """None, NaN and pandas' NA and NaT, without importing pandas."""
    return (
        value is None
        or (isinstance(value, float) and value != value)
        or type(value).__name__ in ("NAType", "NaTType")
    )


def clean_text(text: str) -> str:
    """`text` with lone surrogates, which JSON escapes can hold and no tokenizer takes, replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def number(value: object) -> float | None:
    """The finite number that `value` is or spells in ASCII, else None. Booleans, "nan", "inf" and "1_000" are
    no numbers."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        found = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:
            return None
    else:
        return None
    return found if math.isfinite(found) else None


def label_text(value: object) -> str:
    """The class name of one raw label: strings without outer blanks, 1 and 1.0 as "1", booleans as "true" and
    "false"."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def rows_sha256(rows: Iterable[Row]) -> str:
    """SHA-256 over the contents of rows in order; each piece is preceded by its length, so nothing can run
    together."""
    digest = hashlib.sha256()

    def add(piece: str | None) -> None:
        data = b"" if piece is None else piece.encode("utf-8", "surrogatepass")
        digest.update(b"-" if piece is None else len(data).to_bytes(8, "little"))
        digest.update(data)

    for row in rows:
        add(row.text)
        add(row.text_pair)
        if isinstance(row.label, list):
            digest.update(b"[" + len(row.label).to_bytes(8, "little"))
            for item in row.label:
                add(_canonical(item))
        else:
            add(None if row.label is None else _canonical(row.label))
    return digest.hexdigest()


def _canonical(value: object) -> str:
    # A file of text says "3.50" where Parquet says 3.5. "01" has no point and stays what it is.
    if isinstance(value, str) and ("." in value or "e" in value.lower()):
        found = number(value)
        return label_text(value if found is None else found)
    return label_text(value)
