"""Texts to predict, one record at a time, from files larger than memory and from standard input."""

import codecs
import csv
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from textlora.core.errors import DataError
from textlora.data.columns import find_columns, has_text_name, header_fields, sniff_delimiter
from textlora.data.formats import (
    Lines,
    check_encoding,
    csv_header,
    csv_quoting,
    csv_records,
    extension,
    is_line_wise,
    json_records,
    open_binary,
    ragged,
)
from textlora.data.read import as_text
from textlora.data.rows import Columns

STDIN = "standard input"
KNOWN = ".csv, .tsv, .jsonl, .json, .txt (each also with .gz) and .parquet"
BATCH = 1024  # Parquet rows decoded at a time
# Bad JSON lines passed over, and kept to be reported, before the first good one tells the columns.
LOOK_AHEAD = 1000


@dataclass(slots=True)
class Record:
    """One input record. A bad one has `problem` set, `text` None and as many `fields` as could be read."""

    fields: dict[str, object]
    text: str | None
    text_pair: str | None
    where: int
    problem: str | None


@dataclass
class Stream:
    """Records of one source, to be iterated once; `close` (or leaving a `with` block) lets the file go.

    `format` is "csv", "tsv", "jsonl", "parquet" or "lines". `fieldnames` are the columns (of the first object
    in JSON Lines). `arrow_schema` is a Parquet file's, else None.
    """

    name: str
    format: str
    fieldnames: list[str]
    columns: Columns
    delimiter: str
    arrow_schema: object
    records: Iterator[Record] = field(repr=False)
    file: BinaryIO | None = field(repr=False)

    def __iter__(self) -> Iterator[Record]:
        return self.records

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def open_stream(
    source: str | Path,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    encoding: str = "utf-8",
    stdin: BinaryIO | None = None,
) -> Stream:
    """Open a CSV, TSV, JSON Lines, Parquet or text file, or standard input for "-".

    Standard input that starts with "{" is JSON Lines; else, if its first line is a header with a known text
    column or `text_column` is given, CSV; else each line is a text. In a `.txt` file each line is a text.
    Columns are found as by `read_table`. Memory does not grow with the number of records, except for a
    `.json` file that is one list.

    A record that cannot be used (another number of fields than the header, quotes or JSON that do not parse,
    wrong bytes, no text) comes with its `problem`, and reading goes on with the next line.

    Raises:
        DataError: no such file, unknown kind, no text column, or the file as a whole cannot be read; also
            while iterating.
        UsageError: no such encoding.
    """
    check_encoding(encoding)
    named = {"text_column": text_column, "text_pair_column": text_pair_column}
    if str(source) == "-":
        return _from_stdin(sys.stdin.buffer if stdin is None else stdin, encoding, named)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"no such file: {source}", "give a file, or - for standard input")
    if path.is_dir():
        raise DataError(f"{source} is a folder", "name one file")
    kind = extension(path)
    if kind == "parquet" and path.suffix.lower() == ".parquet":
        return _parquet(path, named)
    if kind not in ("csv", "tsv", "jsonl", "ndjson", "json", "txt"):
        raise DataError(f"unknown kind of file: {path.name}", f"known are {KNOWN}")
    file = open_binary(path)
    try:
        lines = Lines(file, encoding, path.name, strict=False)
        if kind in ("csv", "tsv"):
            return _csv(lines, path.name, kind, named, file, (path, encoding))
        return _plain(lines, path.name, file) if kind == "txt" else _json(lines, path.name, named, file)
    except BaseException:
        file.close()
        raise


def _from_stdin(file: BinaryIO, encoding: str, named: dict[str, str | None]) -> Stream:
    raw = file.readline()
    if raw.startswith((b"PAR1", b"\x1f\x8b")):
        kind, fix = (
            ("Parquet", "give the file's path")
            if raw.startswith(b"PAR1")
            else ("gzip", "unpack it first, as zcat does")
        )
        raise DataError(f"{STDIN} is {kind}", fix)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or not is_line_wise(encoding):
        raise DataError(
            f"{STDIN} is in an encoding that cannot be read line by line",
            "give the file's path, or convert it to utf-8 first",
        )
    lines = Lines(itertools.chain([raw] if raw else [], file), encoding, STDIN, strict=False)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{STDIN} is empty", "pipe some texts in")
    lines.back([first])
    if first.lstrip().startswith("{"):
        return _json(lines, STDIN, named, None)
    if any(named.values()) or has_text_name(header_fields(first, sniff_delimiter(first, tab_first=False))):
        return _csv(lines, STDIN, "csv", named, None, None)
    return _plain(lines, STDIN, None)


def _record(
    fields: dict[str, object], columns: Columns, name: str, where: int, problem: str | None
) -> Record:
    if problem is not None:
        return Record(fields, None, None, where, problem)
    pair = None
    try:
        text = as_text(fields.get(columns.text), name, where, columns.text)
        if columns.text_pair is not None:
            pair = as_text(fields.get(columns.text_pair), name, where, columns.text_pair)
    except DataError as error:
        return Record(fields, None, None, where, error.message.split(": ", 1)[-1])
    if not text or text.isspace():
        return Record(fields, None, None, where, f"column {columns.text!r}: empty text")
    return Record(fields, text, pair, where, None)


def _csv(
    lines: Lines,
    name: str,
    suffix: str,
    named: dict[str, str | None],
    file: BinaryIO | None,
    again: tuple[Path, str] | None,
) -> Stream:
    delimiter, names = csv_header(lines, name, suffix)
    columns = find_columns(names, name, **named, need_labels=False)
    quoting = csv.QUOTE_MINIMAL if again is None else csv_quoting(*again, delimiter)

    def records() -> Iterator[Record]:
        for where, values, problem in csv_records(lines, delimiter, quoting):
            fields = dict(zip(names, values, strict=False))
            yield _record(fields, columns, name, where, problem or ragged(values, names))

    return Stream(
        name, "tsv" if delimiter == "\t" else "csv", names, columns, delimiter, None, records(), file
    )


def _json(lines: Lines, name: str, named: dict[str, str | None], file: BinaryIO | None) -> Stream:
    source = json_records(lines, name)
    begun = []
    for item in itertools.islice(source, LOOK_AHEAD):
        begun.append(item)
        if item[2] is None and item[1]:
            break
    else:
        if not begun:
            raise DataError(f"{name} is empty", "give one JSON object a line")
        raise DataError(
            f"{name}: no JSON object in the first {len(begun)} records", "give one JSON object a line"
        )
    names = [str(key) for key in begun[-1][1]]
    columns = find_columns(names, name, **named, need_labels=False)

    def records() -> Iterator[Record]:
        for where, fields, problem in itertools.chain(begun, source):
            yield _record(fields, columns, name, where, problem)

    return Stream(name, "jsonl", names, columns, ",", None, records(), file)


def _plain(lines: Lines, name: str, file: BinaryIO | None) -> Stream:
    columns = Columns("text", None, None)

    def records() -> Iterator[Record]:
        for line in lines:
            yield _record(
                {"text": line.rstrip("\r\n")}, columns, name, lines.number, lines.problem(lines.number)
            )

    return Stream(name, "lines", ["text"], columns, ",", None, records(), file)


def _parquet(path: Path, named: dict[str, str | None]) -> Stream:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def broken(error: Exception) -> DataError:
        return DataError(
            f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}", "is the file whole?"
        )

    try:
        # Buffered reading keeps one page of each column in memory, where the default would hold a whole row
        # group.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise broken(error) from error
    names = list(file.schema_arrow.names)
    try:
        columns = find_columns(names, path.name, **named, need_labels=False)
    except DataError:
        file.close()
        raise

    def batches() -> Iterable[list[dict[str, object]]]:
        try:
            for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
                yield batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise broken(error) from error

    def records() -> Iterator[Record]:
        for where, fields in enumerate(itertools.chain.from_iterable(batches()), 1):
            yield _record(fields, columns, path.name, where, None)

    return Stream(path.name, "parquet", names, columns, ",", file.schema_arrow, records(), file)
