"""Rows to learn from and texts to predict: readers, the label schema, data checks, streams.

`read_table` turns any source into rows, `infer_schema` says what their labels mean, `check_tables` reports
what is in them; `open_stream` and `open_sink` carry texts in and predictions out without holding them all.
Nothing here imports pandas, pyarrow, datasets or torch before a source needs them.
"""

from textlora.data.check import DataReport, Lengths, check_tables
from textlora.data.read import read_table, require_texts
from textlora.data.rows import Columns, Row, Table, place
from textlora.data.schema import MULTI, REGRESSION, SINGLE, LabelSchema, infer_schema, problem_type_name
from textlora.data.sink import Sink, open_sink
from textlora.data.stream import Record, Stream, open_stream

__all__ = [
    "MULTI",
    "REGRESSION",
    "SINGLE",
    "Columns",
    "DataReport",
    "LabelSchema",
    "Lengths",
    "Record",
    "Row",
    "Sink",
    "Stream",
    "Table",
    "check_tables",
    "infer_schema",
    "open_sink",
    "open_stream",
    "place",
    "problem_type_name",
    "read_table",
    "require_texts",
]
