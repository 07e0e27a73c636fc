"""What a source is, and its parts: each with column names and the wanted values of every record.

Files are read here; `datasets` folders and hub ids in `textlora.data.hub`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from textlora.core.errors import DataError
from textlora.data import hub
from textlora.data.formats import (
    Lines,
    csv_header,
    csv_quoting,
    csv_records,
    extension,
    json_records,
    open_binary,
    ragged,
)
from textlora.data.rows import place

EXTENSIONS = ("csv", "tsv", "jsonl", "ndjson", "json", "parquet")
KNOWN = ".csv, .tsv, .jsonl, .json (each also with .gz) and .parquet"
FOLDER_KINDS = (
    "csv",
    "tsv",
    "jsonl",
    "ndjson",
    "parquet",
)  # a .json beside data is most often a description of them


@dataclass(frozen=True)
class Part:
    """One file or object. `records(names)` gives (where, values of these columns) in order."""

    name: str
    columns: list[str]
    records: Callable[[Sequence[str]], Iterable[tuple[int, Sequence[object]]]]


def open_parts(source: object, split: str, encoding: str) -> list[Part]:
    """The parts of anything `textlora.data.read_table` takes, in order.

    Raises:
        DataError: the source does not exist or is of no known kind.
    """
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if pandas is not None and isinstance(source, pandas.DataFrame):
        return [_frame_part(source)]
    if datasets is not None and isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return [arrow_part(*hub.arrow_table(source, split, "Dataset"), "Dataset")]
    if isinstance(source, (str, os.PathLike)):
        return _path_parts(os.fspath(source), split, encoding)
    if isinstance(source, (list, tuple)):
        return [_list_part(source)]
    raise DataError(
        f"rows cannot be read from {type(source).__name__}",
        "give a path, a hub id, a list, a DataFrame or a Dataset",
    )


def _path_parts(source: str, split: str, encoding: str) -> list[Part]:
    path = Path(source).expanduser()
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError:  # a name longer than the file system takes
        there = folder = False
    if folder and hub.is_saved_dataset(path):
        return [arrow_part(*hub.arrow_table(hub.load_saved(path), split, path.name), path.name)]
    if folder:
        return [_file_part(file, encoding) for file in _split_files(path, split)]
    if there:
        return [_file_part(path, encoding)]
    if "," in source and not Path(source.split(",")[0]).is_dir():
        return [
            part
            for item in source.split(",")
            if item.strip()
            for part in _path_parts(item.strip(), split, encoding)
        ]
    if (
        hub.is_hub_id(source)
        and extension(source.split(":")[0]) not in EXTENSIONS
        and not Path(source.split("/")[0]).is_dir()
    ):
        return [arrow_part(*hub.arrow_table(hub.load_hub(source, split), split, source), source)]
    raise DataError(f"no such file: {source}", "give a file, a folder or a hub id such as owner/name")


def _split_files(folder: Path, split: str) -> list[Path]:
    """The data files of `folder`, else of its direct subfolders; where their names tell splits apart, those
    of `split`."""
    for pattern in ("*", "*/*"):
        files = sorted(
            p
            for p in folder.glob(pattern)
            if p.is_file() and p.name[0] != "." and extension(p) in FOLDER_KINDS
        )
        if files:
            break
    else:
        raise DataError(f"no data files in {folder}", f"known are {KNOWN}")
    marks = {file: _split_of(file.relative_to(folder)) for file in files}
    if any(marks.values()):
        wanted = next((name for name, words in hub.SPLITS.items() if split in words), split)
        files = [file for file in files if marks[file] == wanted]
        if not files:
            there = ", ".join(sorted({mark for mark in marks.values() if mark}))
            raise DataError(
                f"no file in {folder} is named after the split {split!r}; there are {there}",
                "name the file itself",
            )
    kinds = sorted({extension(file) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{folder} holds {' and '.join(kinds)} files", "name the files themselves, parted by commas"
        )
    return files


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())[::-1]
    return next((name for word in words for name, aliases in hub.SPLITS.items() if word in aliases), None)


def _file_part(path: Path, encoding: str) -> Part:
    kind = extension(path)
    if kind in ("csv", "tsv"):
        return _csv_part(path, encoding)
    if kind in ("jsonl", "ndjson", "json"):
        return _json_part(path, encoding)
    if kind == "parquet" and path.suffix.lower() != ".gz":
        return _parquet_part(path)
    raise DataError(f"unknown kind of file: {path.name}", f"known are {KNOWN}")


def _csv_part(path: Path, encoding: str) -> Part:
    with open_binary(path) as file:
        lines = Lines(file, encoding, path.name, strict=True)
        delimiter, columns = csv_header(lines, path.name, extension(path))
    quoting = csv_quoting(path, encoding, delimiter)

    def records(names: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        picked = [columns.index(name) for name in names]
        with open_binary(path) as file:
            lines = Lines(file, encoding, path.name, strict=True)
            csv_header(lines, path.name, extension(path))
            for where, fields, problem in csv_records(lines, delimiter, quoting):
                problem = problem or ragged(fields, columns)
                if problem:
                    raise DataError(
                        f"{place(path.name, where)}: {problem}",
                        "mend the line: quote fields that hold the delimiter, double inner quotes",
                    )
                yield where, [fields[index] for index in picked]

    return Part(path.name, columns, records)


def _json_part(path: Path, encoding: str) -> Part:
    found: list[tuple[int, dict[str, object]]] = []
    with open_binary(path) as file:
        for where, value, problem in json_records(Lines(file, encoding, path.name, strict=True), path.name):
            if problem:
                raise DataError(f"{place(path.name, where)}: {problem}", "put one JSON object on each line")
            found.append((where, value))
    if not found:
        raise DataError(f"{path.name} is empty", "give a file with rows")
    return Part(
        path.name,
        _keys(value for _, value in found),
        lambda names: ((w, [v.get(n) for n in names]) for w, v in found),
    )


def _keys(items: Iterable[dict[str, object]]) -> list[str]:
    seen: dict[str, None] = {}
    for item in items:
        seen.update(dict.fromkeys(map(str, item)))
    return list(seen)


def _parquet_part(path: Path) -> Part:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}", "is the file whole?"
        ) from error

    def records(names: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        try:
            with pq.ParquetFile(path) as file:
                table = file.read(columns=list(names))
            yield from arrow_part(table, hub.class_names(hub.stored_features(schema)), path.name).records(
                names
            )
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path.name} cannot be read as Parquet: {str(error).splitlines()[0]}", "is the file whole?"
            ) from error

    return Part(path.name, list(schema.names), records)


def arrow_part(table, classes: dict[str, list[str]], name: str) -> Part:
    """A pyarrow table as a part. `classes` names, per column, what its class numbers stand for; -1 stands for
    no label."""

    def records(names: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        values = [
            _named(table.column(column).to_pylist(), classes.get(column), name, column) for column in names
        ]
        return enumerate(zip(*values, strict=True), 1)

    return Part(name, list(table.column_names), records)


def _named(values: list[object], classes: list[str] | None, name: str, column: str) -> list[object]:
    if classes is None:
        return values

    def one(value: object, where: int) -> object:
        if isinstance(value, list):
            return [one(item, where) for item in value]
        if not isinstance(value, int) or value == -1:
            return None if value == -1 else value
        if not 0 <= value < len(classes):
            raise DataError(
                f"{place(name, where, column)}: class number {value} has no name among {len(classes)}",
                "mend the data set",
            )
        return classes[value]

    return [one(value, where) for where, value in enumerate(values, 1)]


def _frame_part(frame) -> Part:
    columns = [str(name) for name in frame.columns]
    return Part(
        "DataFrame",
        columns,
        lambda names: enumerate(
            zip(*(frame.iloc[:, columns.index(n)].tolist() for n in names), strict=True), 1
        ),
    )


def _list_part(items: Sequence[object]) -> Part:
    if not items:
        raise DataError("the list of rows is empty", "give rows")
    first = items[0]
    if isinstance(first, dict):
        columns = _keys(item for item in items if isinstance(item, dict))
    elif isinstance(first, str):
        columns = ["text"]
    elif isinstance(first, (tuple, list)) and len(first) in (2, 3):
        columns = ["text", "label"] if len(first) == 2 else ["text", "text_pair", "label"]
    else:
        raise DataError(
            f"row 1 is {type(first).__name__}",
            "give (text, label), (text, pair, label), dictionaries, or strings",
        )

    def records(names: Sequence[str]) -> Iterator[tuple[int, Sequence[object]]]:
        for where, item in enumerate(items, 1):
            if type(item) is not type(first) or (
                isinstance(item, (tuple, list)) and len(item) != len(columns)
            ):
                raise DataError(f"row {where} is not of the kind of row 1", "give all rows the same form")
            whole = (
                item
                if isinstance(item, dict)
                else dict(zip(columns, [item] if isinstance(item, str) else item, strict=True))
            )
            yield where, [whole.get(name) for name in names]

    return Part("rows", columns, records)


def describe(source: object) -> str:
    """A short name of a source for reports."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return {"list": "rows", "tuple": "rows"}.get(type(source).__name__, type(source).__name__)
