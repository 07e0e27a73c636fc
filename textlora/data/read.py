"""One call from any source to typed rows."""

from collections.abc import Iterator, Sequence
from decimal import Decimal

from textlora.core.errors import DataError
from textlora.data.columns import find_columns
from textlora.data.formats import check_encoding
from textlora.data.rows import Columns, Label, Row, Table, clean_text, is_null, place, rows_sha256
from textlora.data.sources import Part, describe, open_parts

__all__ = ["Columns", "Row", "Table", "read_table", "require_texts"]


def read_table(
    source: object,
    *,
    split: str = "train",
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    encoding: str = "utf-8",
    need_labels: bool = True,
) -> Table:
    """Read rows of text, optional pair and label.

    Args:
        source: a CSV, TSV, JSON Lines or Parquet file (text formats also as .gz); several, parted by commas;
            a folder of them (where file names tell splits apart, those of `split`); a folder of
            `datasets.save_to_disk`; a hub id "owner/name", "owner/name:split" or "owner/name:config:split"; a
            list of (text, label), (text, pair, label) or dictionaries; a pandas.DataFrame; a datasets.Dataset
            or DatasetDict.
        split: which split to take from a source that has several.
        text_column, text_pair_column, label_column: names; found by `textlora.data.columns` where None.
        label_separator: parts a string label into several, blanks around each dropped.
        encoding: of CSV and JSON Lines; a BOM is dropped.
        need_labels: whether a missing label is an error.

    Only an empty CSV field, a JSON or Parquet null and NaN are missing; "NA" and "null" are ordinary text. A
    number in a text column is spelled out; a missing text is "" (`require_texts` refuses it). With a
    separator, an empty string is a row without labels. ClassLabel numbers become their names.

    Raises:
        DataError: no such source, a record that cannot be read, no rows, no such column, or a missing label,
            with its place.
        UsageError: no such encoding.
    """
    check_encoding(encoding)
    if label_separator == "":
        label_separator = None
    rows: list[Row] = []
    columns: Columns | None = None
    for part in open_parts(source, split, encoding):
        found = find_columns(
            part.columns,
            part.name,
            text_column=text_column,
            text_pair_column=text_pair_column,
            label_column=label_column,
            need_labels=need_labels,
        )
        if columns is not None and found != columns:
            raise DataError(
                f"{part.name} has other columns than the file before it",
                "name them with --text-column and --label-column",
            )
        columns = found
        before = len(rows)
        rows.extend(_rows(part, found, label_separator, need_labels))
        if len(rows) == before:
            raise DataError(f"{part.name} has no rows", "give a file with rows")
    if columns is None:
        raise DataError("no file given", "name a data file")
    return Table(rows, columns, describe(source), rows_sha256(rows))


def require_texts(table: Table) -> None:
    """Refuse rows without text.

    Raises:
        DataError: a text is empty or blank; names the first and counts them.
    """
    empty = [row for row in table.rows if not row.text or row.text.isspace()]
    if empty:
        first, count = empty[0], len(empty)
        raise DataError(
            f"{place(first.source, first.where, table.columns.text)}: empty text ({count} such row{'s' * (count > 1)})",
            "remove them; `textlora check` lists them",
        )


def _rows(part: Part, columns: Columns, separator: str | None, need_labels: bool) -> Iterator[Row]:
    names = [name for name in (columns.text, columns.text_pair, columns.label) if name is not None]
    has_pair, has_label = columns.text_pair is not None, columns.label is not None
    for where, values in part.records(names):
        text, pair, label = values[0], None, None
        if type(text) is not str or not text.isascii():
            text = as_text(text, part.name, where, columns.text)
        if has_pair:
            pair = as_text(values[1], part.name, where, columns.text_pair)
        if has_label:
            label = _label(values[-1], separator, part.name, where, columns.label)
            if label is None and need_labels:
                raise DataError(
                    f"{place(part.name, where, columns.label)}: no label", "fill it in or remove the row"
                )
        yield Row(text, pair, label, where, part.name)


def as_text(value: object, source: str, where: int, column: str) -> str:
    """A cell of a text column as a string: null is "", numbers are spelled out.

    Raises:
        DataError: the cell holds a list, an object or bytes.
    """
    if isinstance(value, str):
        return clean_text(value)
    if is_null(value):
        return ""
    if isinstance(value, (list, tuple, dict, bytes, set)) or hasattr(value, "tolist"):
        value = _scalar(value)
        if not isinstance(value, (int, float, str)):
            raise DataError(
                f"{place(source, where, column)}: {type(value).__name__} in place of text", "give strings"
            )
    return str(value)


def _label(value: object, separator: str | None, source: str, where: int, column: str) -> Label:
    value = _scalar(value)
    if is_null(value):
        return None
    if isinstance(value, str):
        value = clean_text(value)
        if separator is not None:
            return [item.strip() for item in value.split(separator) if item.strip()]
        return value if value.strip() else None
    if isinstance(value, (list, tuple, set)):
        items = [_scalar(item) for item in (sorted(value, key=str) if isinstance(value, set) else value)]
        if any(is_null(item) or isinstance(item, (list, dict, bytes)) for item in items):
            raise DataError(
                f"{place(source, where, column)}: a list label holds something that is no name",
                "give lists of strings",
            )
        return [clean_text(item) if isinstance(item, str) else item for item in items]
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (dict, bytes)):
        raise DataError(
            f"{place(source, where, column)}: {type(value).__name__} in place of a label",
            "give strings, numbers or lists",
        )
    return str(value)


def _scalar(value: object) -> object:
    """numpy's scalars and arrays and Decimal as Python's own."""
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, Sequence) else value
