"""Predictions written beside what they were made from, in the format they came in, a row at a time."""

import abc
import contextlib
import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from textlora.core.errors import DataError
from textlora.core.files import atomic_path
from textlora.data.formats import extension

KNOWN = ".csv, .tsv, .jsonl (each also with .gz) and .parquet"
FORMATS = {
    "csv": "csv",
    "tsv": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "jsonl",
    "txt": "jsonl",
    "parquet": "parquet",
}
GROUP = 2000  # rows of a Parquet row group, all that is held in memory
# so many groups are held where all rows so far were bad, and so the types of the predictions are not known
PATIENCE = 10


class Sink(abc.ABC):
    """Rows go in by `write`; `format` is what is written and `names` what each extra column is called there."""

    def __init__(self, format: str, fieldnames: Sequence[str], extra_columns: Sequence[str]):
        self.format = format
        self.fieldnames = list(fieldnames)
        self.names = {name: free_name(name, self.fieldnames) for name in extra_columns}

    @abc.abstractmethod
    def write(self, fields: Mapping[str, object], extra: Mapping[str, object]) -> None:
        """Write one row: its original fields, then the extra ones; what is missing stays empty."""

    def flush(self) -> None:  # noqa: B027  (optional)
        """Hand over what is buffered, where the format allows."""

    def close(self) -> None:  # noqa: B027  (optional)
        """Write what is left. Called once, by `open_sink`."""


@contextlib.contextmanager
def open_sink(
    target: Path | None,
    format: str,
    fieldnames: Sequence[str],
    extra_columns: Sequence[str],
    *,
    stdout: TextIO | None = None,
    delimiter: str = ",",
    arrow_schema: object = None,
) -> Iterator[Sink]:
    """Open `target`, or the text stream `stdout` where it is None, for writing predictions.

    Args:
        target: a path; its extension decides the format, else `format` does. The file appears whole at the
            end or not at all.
        format: `Stream.format`. "lines" is written as JSON Lines, and so is "parquet" to `stdout`, which
            takes text only.
        fieldnames: original columns. CSV and Parquet hold these and no others; JSON Lines holds whatever a
            row has.
        extra_columns: names of what is predicted; one that stands in `fieldnames` gets the suffix
            "_predicted".
        delimiter: of CSV, kept from the input; a .tsv has tabs.
        arrow_schema: types of the original columns in Parquet; else found from the first rows.

    Text is UTF-8. Lists and objects in CSV are JSON.

    Raises:
        DataError: the target's extension is unknown, or a value does not fit its Parquet column.
        StorageError: the disk is full or the folder cannot be written.
    """
    if target is None:
        if stdout is None:
            raise ValueError("give target or stdout")
        kind = {"lines": "jsonl", "parquet": "jsonl"}.get(format, format)
        sink = _text_sink(kind, stdout, fieldnames, extra_columns, delimiter)
        yield sink
        sink.close()
        return
    target = Path(target)
    kind = FORMATS.get(extension(target), "") if extension(target) else {"lines": "jsonl"}.get(format, format)
    zipped = target.name.lower().endswith(".gz")
    if not kind or (kind == "parquet" and zipped):
        raise DataError(f"unknown kind of file: {target.name}", f"known are {KNOWN}")
    if kind == "csv" and delimiter == "\t":
        delimiter = ","
    with atomic_path(target) as part, contextlib.ExitStack() as stack:
        if kind == "parquet":
            sink = _ParquetSink(part, fieldnames, extra_columns, arrow_schema)
            stack.callback(sink.release)
        else:
            raw = stack.enter_context(open(part, "wb"))
            # No name and no time in the gzip header: the same rows give the same bytes.
            binary = stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)) if zipped else raw
            text = stack.enter_context(
                io.TextIOWrapper(binary, encoding="utf-8", errors="replace", newline="")
            )
            sink = _text_sink(kind, text, fieldnames, extra_columns, delimiter)
        yield sink
        sink.close()


def free_name(name: str, taken: Sequence[str] | Mapping[str, object]) -> str:
    """`name`, with "_predicted" after it as often as is needed to differ from all names in `taken`."""
    while name in taken:
        name += "_predicted"
    return name


def _text_sink(
    kind: str, stream: TextIO, fieldnames: Sequence[str], extra_columns: Sequence[str], delimiter: str
) -> Sink:
    if kind == "jsonl":
        return _JsonSink(stream, fieldnames, extra_columns)
    return _CsvSink(stream, kind, fieldnames, extra_columns, "\t" if kind == "tsv" else delimiter)


class _JsonSink(Sink):
    def __init__(self, stream: TextIO, fieldnames: Sequence[str], extra_columns: Sequence[str]):
        super().__init__("jsonl", fieldnames, extra_columns)
        self._stream = stream
        self.flush = stream.flush

    def write(self, fields: Mapping[str, object], extra: Mapping[str, object]) -> None:
        row = dict(fields)
        for name, value in extra.items():
            row[free_name(self.names[name], fields)] = value
        self._stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


class _CsvSink(Sink):
    def __init__(
        self,
        stream: TextIO,
        kind: str,
        fieldnames: Sequence[str],
        extra_columns: Sequence[str],
        delimiter: str,
    ):
        super().__init__(kind, fieldnames, extra_columns)
        self.flush = stream.flush
        self._writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        # Python's csv does not quote a CR that is not in the line terminator, and readers take a bare one for
        # a line's end.
        self._quoting = csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self._row([*self.fieldnames, *self.names.values()])

    def write(self, fields: Mapping[str, object], extra: Mapping[str, object]) -> None:
        self._row(
            [
                *(_cell(fields.get(name)) for name in self.fieldnames),
                *(_cell(extra.get(name)) for name in self.names),
            ]
        )

    def _row(self, cells: list[str]) -> None:
        (self._quoting if any("\r" in cell for cell in cells) else self._writer).writerow(cells)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict, bool)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


class _ParquetSink(Sink):
    """Types come from `arrow_schema` and, for the extra columns, from the first row group.

    A column without any value there becomes text, and what comes later in it is written as in CSV.
    """

    def __init__(self, path: Path, fieldnames: Sequence[str], extra_columns: Sequence[str], arrow_schema):
        super().__init__("parquet", fieldnames, extra_columns)
        self._path, self._types = path, {}
        if arrow_schema is not None:
            self._types = {name: arrow_schema.field(name).type for name in self.fieldnames}
        self._rows: list[dict[str, object]] = []
        self._text: set[str] = set()
        self._typed = False
        self._writer = None

    def write(self, fields: Mapping[str, object], extra: Mapping[str, object]) -> None:
        row = {name: fields.get(name) for name in self.fieldnames}
        row.update((named, extra.get(name)) for name, named in self.names.items())
        self._rows.append(row)
        self._typed = self._typed or any(value is not None for value in extra.values())
        if len(self._rows) >= (GROUP if self._typed else GROUP * PATIENCE):
            self._write_group()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._write_group()

    def release(self) -> None:
        """Let the file go, whether or not all went well."""
        if self._writer is not None:
            self._writer.close()

    def _write_group(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = []
        for name in [*self.fieldnames, *self.names.values()]:
            values = [row[name] for row in self._rows]
            if name in self._text:
                values = [None if value is None else _cell(value) for value in values]
            try:
                array = pa.array(values, type=self._types.get(name))
            except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError) as error:
                reason = (str(error) or "mixed types").splitlines()[0]
                raise DataError(
                    f"column {name!r} cannot be held in Parquet: {reason}", "write .jsonl"
                ) from error
            if pa.types.is_null(array.type):
                array = array.cast(pa.string())
                self._text.add(name)
            self._types[name] = array.type
            arrays.append(array)
        table = pa.table(arrays, names=[*self.fieldnames, *self.names.values()])
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._rows.clear()
