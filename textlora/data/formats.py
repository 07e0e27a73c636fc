"""CSV and JSON Lines as people have them: physical lines first, records on top, places kept, bad input named."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from textlora.core.errors import DataError, UsageError
from textlora.data.columns import DELIMITERS, sniff_delimiter
from textlora.data.rows import clean_text, place

# A quote that never closes must not swallow a whole file; no text to classify is longer than this many
# characters.
FIELD_LIMIT = 1 << 23
BLOCK = 1 << 16


def extension(path: str | Path) -> str:
    """Lower-case extension without its point and without `.gz`: "csv" for `A.CSV.gz`; "" where there is none."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix.removeprefix(".")


def check_encoding(encoding: str) -> None:
    """Raises UsageError if Python knows no text encoding of that name."""
    try:
        "a".encode(encoding)
    except (LookupError, UnicodeError) as error:
        raise UsageError(
            f"unknown encoding {encoding!r}", "use a name such as utf-8, cp1252, cp949 or utf-16"
        ) from error


def is_line_wise(encoding: str) -> bool:
    """Whether bytes can be parted at LF and each line decoded alone: not in UTF-16 and not where earlier
    lines set a state."""
    stateful = codecs.lookup(encoding).name.startswith(("iso2022", "hz", "utf-7"))
    return not stateful and "\n".encode(encoding) in (b"\n", codecs.BOM_UTF8 + b"\n")


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, through gzip if its name ends so. Raises DataError if it cannot be opened."""
    try:
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its permissions"
        ) from error


class Lines:
    """Physical lines of a binary file as text, endings kept; a line ends at LF, CR or CRLF; a BOM is dropped.

    With `strict`, a byte that is not `encoding` and a NUL raise DataError with the line. Without, the line
    comes with U+FFFD in place of what could not be read, and `bad[line number]` says why. `number` is the
    last line handed out; `back(lines)` returns lines to be handed out again.
    """

    def __init__(self, file: BinaryIO, encoding: str, name: str, strict: bool):
        self.number = 0
        self.bad: dict[int, str] = {}
        self._name, self._strict = name, strict
        self._encoding = codecs.lookup(encoding).name
        self._waiting: deque[str] = deque()
        self._fresh = 0  # lines read from the file, whereas `number` goes back with `back`
        self._lines = self._read(file)

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self.number += 1
        return line

    def back(self, lines: list[str]) -> None:
        self._waiting.extendleft(reversed(lines))
        self.number -= len(lines)

    def _read(self, file: BinaryIO) -> Iterator[str]:
        try:
            yield from self._by_line(file) if is_line_wise(self._encoding) else self._by_block(file)
        except UnicodeError as error:
            raise DataError(
                f"{self._name}: the bytes are not {self._encoding} ({error})",
                "name the right one with --encoding",
            ) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{self._name}: not a whole gzip file ({error})", "compress it again or drop the .gz ending"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot read {self._name}: {error.strerror or error}", "check the file"
            ) from error

    def _by_block(self, file: BinaryIO) -> Iterator[str]:
        decoder, rest, block = codecs.getincrementaldecoder(self._encoding)(), "", b" "
        while block:
            block = file.read(BLOCK)
            *whole, rest = io.StringIO(rest + decoder.decode(block, not block), newline="").readlines() or [
                ""
            ]
            for line in whole:  # the last one may go on in the next block, even after a CR
                yield self._checked(line, None)
        if rest:
            yield self._checked(rest, None)

    def _by_line(self, file: BinaryIO) -> Iterator[str]:
        for raw in file:
            problem = None
            try:
                text = raw.decode(self._encoding)
            except UnicodeDecodeError as error:
                problem = f"byte 0x{raw[error.start]:02x} is not {self._encoding}"
                text = raw.decode(self._encoding, "replace")
                if self._fresh == 0 and raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise DataError(f"{self._name} is UTF-16", "give --encoding utf-16") from error
            if text.count("\r") != text.endswith("\r\n"):  # old Mac endings
                for part in io.StringIO(text, newline="").readlines():
                    yield self._checked(part, problem)
            else:
                yield self._checked(text, problem)

    def _checked(self, line: str, problem: str | None) -> str:
        self._fresh += 1
        if self._fresh == 1:
            line = line.removeprefix("\ufeff")
        if problem is None and "\0" in line:
            problem = "NUL bytes"
        if problem is not None:
            if self._strict:
                fix = (
                    "name the right one with --encoding"
                    if problem != "NUL bytes"
                    else "is it UTF-16? then give --encoding utf-16"
                )
                raise DataError(f"{place(self._name, self._fresh)}: {problem}", fix)
            self.bad[self._fresh] = problem
        return line

    def problem(self, start: int) -> str | None:
        """Why one of the lines from `start` up to the last one handed out could not be read; forgets it."""
        found = (
            [self.bad.pop(line) for line in range(start, self.number + 1) if line in self.bad]
            if self.bad
            else []
        )
        return found[0] if found else None


@contextlib.contextmanager
def _field_limit() -> Iterator[None]:
    before = csv.field_size_limit(FIELD_LIMIT)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def csv_records(lines: Lines, delimiter: str, quoting: int) -> Iterator[tuple[int, list[str], str | None]]:
    """(line it starts on, fields, problem) of each record, blank lines left out.

    After a record whose quotes do not parse, reading goes on with the line after the one it started on.
    """
    taken: list[str] = []

    def feed() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        taken.clear()
        start = lines.number + 1
        try:
            with _field_limit():
                fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.back(taken[1:])
            reader = csv.reader(feed(), delimiter=delimiter, quoting=quoting, strict=True)
            yield start, [], lines.problem(start) or _csv_problem(error)
            continue
        if fields:
            yield start, fields, lines.problem(start)


def _csv_problem(error: csv.Error) -> str:
    words = str(error)
    if "unexpected end" in words:
        return "a quote that opens in this record never closes"
    if "field larger" in words:
        return f"a field has more than {FIELD_LIMIT} characters, so a quote may never close"
    if "expected after" in words:
        return "text after a closing quote, so a quote inside the text is not doubled"
    return words


def csv_header(lines: Lines, name: str, suffix: str) -> tuple[str, list[str]]:
    """Delimiter and column names, without outer blanks; the names' line is consumed.

    `suffix` is the file's extension. Excel's `sep=;` line is understood. Raises DataError if there is no
    header.
    """
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError(f"{name} is empty", "give a file with a line of column names and rows")
    bare = first.rstrip("\r\n").strip('"')
    if bare[:4].lower() == "sep=" and bare[4:] in DELIMITERS:
        delimiter = bare[4:]
    else:
        delimiter = sniff_delimiter(first, tab_first=suffix == "tsv")
        lines.back([first])
    try:
        start, names, problem = next(csv_records(lines, delimiter, csv.QUOTE_MINIMAL))
    except StopIteration:
        raise DataError(f"{name} is empty", "give a file with a line of column names and rows") from None
    if problem:
        raise DataError(f"{place(name, start)}: {problem}", "the first line must hold the column names")
    return delimiter, [column.strip() for column in names]


def ragged(fields: list[str], names: list[str]) -> str | None:
    """The problem of a record with another number of fields than the header."""
    if len(fields) == len(names):
        return None
    return f"{len(fields)} field{'s' * (len(fields) != 1)} where the header has {len(names)}"


def csv_quoting(path: Path, encoding: str, delimiter: str) -> int:
    """How quotes are meant in a tab-separated file: csv.QUOTE_MINIMAL, or csv.QUOTE_NONE where they are
    ordinary characters.

    Many TSV files are written without any quoting. One whose quotes do not parse, but whose every line has
    the header's number of fields when quotes mean nothing, is taken as such. Files parted by other characters
    always have quoting.
    """
    if delimiter != "\t":
        return csv.QUOTE_MINIMAL
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        with open_binary(path) as file:
            lines = Lines(file, encoding, path.name, strict=False)
            _, names = csv_header(lines, path.name, extension(path))
            if all(
                problem is None and len(fields) == len(names)
                for _, fields, problem in csv_records(lines, delimiter, quoting)
            ):
                return quoting
    return csv.QUOTE_MINIMAL


def parse_json(line: str) -> tuple[dict[str, object], str | None]:
    """The object of one line of JSON Lines and None, or an empty one and the problem."""
    try:
        value = json.loads(line)
    except RecursionError:
        return {}, "JSON nested too deeply"
    except ValueError as error:
        return {}, f"not JSON: {error.msg} at character {error.pos + 1}" if isinstance(
            error, json.JSONDecodeError
        ) else str(error)
    if not isinstance(value, dict):
        return {}, f"a JSON object is needed, not {type(value).__name__}"
    return (_clean(value) if "\\u" in line else value), None


def _clean(value: object) -> object:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(key): _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value


def json_records(lines: Lines, name: str) -> Iterator[tuple[int, dict[str, object], str | None]]:
    """(line, object, problem) of each line that is not blank.

    A file that starts with "[" is read whole, as one list; places are then the items' numbers.

    Raises:
        DataError: the list cannot be parsed.
    """
    for line in lines:
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            start = lines.number
            text = line + "".join(lines)
            if unread := lines.problem(start):
                raise DataError(f"{name}: {unread}", "name the right encoding with --encoding")
            yield from _json_list(text, name)
            return
        start = lines.number
        unread = lines.problem(start)
        value, problem = ({}, unread) if unread else parse_json(line)
        yield start, value, problem
        break
    for line in lines:
        start = lines.number
        unread = lines.problem(start)
        if unread:
            yield start, {}, unread
        elif line.strip():
            yield start, *parse_json(line)


def _json_list(text: str, name: str) -> Iterator[tuple[int, dict[str, object], str | None]]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        spot = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(
            f"{name}{spot}: not JSON: {reason}", "give one list of objects, or one object a line"
        ) from error
    for index, item in enumerate(items, 1):
        value, problem = (
            (item, None)
            if isinstance(item, dict)
            else ({}, f"a JSON object is needed, not {type(item).__name__}")
        )
        yield index, _clean(value), problem
