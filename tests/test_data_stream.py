"""Streams in and sinks out: bad rows are told, not raised; what is written comes back; nothing is held."""

import csv
import gzip
import io
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textlora.core.errors import DataError
from textlora.data import open_sink, open_stream

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(source, data=None, **options):
    stdin = None if data is None else io.BytesIO(data.encode() if isinstance(data, str) else data)
    with open_stream(source, stdin=stdin, **options) as stream:
        return stream, list(stream)


def summary(records):
    return [(record.where, record.text, record.problem) for record in records]


def test_csv_goes_on_over_bad_rows(tmp_path):
    data = b'id;text\r\n1;a\r\n2\r\n3; \r\n4;"b\r\nb"\r\n5;\xff\r\n6;"c\r\n7;"d"d\r\n8;e\r\n9;f\0\r\n'
    stream, records = read(put(tmp_path, "a.csv", data))
    assert (stream.format, stream.fieldnames, stream.delimiter) == ("csv", ["id", "text"], ";")
    assert summary(records) == [
        (2, "a", None),
        (3, None, "1 field where the header has 2"),
        (4, None, "column 'text': empty text"),
        (5, "b\r\nb", None),
        (7, None, "byte 0xff is not utf-8"),
        (8, None, "text after a closing quote, so a quote inside the text is not doubled"),
        (9, None, "text after a closing quote, so a quote inside the text is not doubled"),
        (10, "e", None),
        (11, None, "NUL bytes"),
    ]
    assert records[1].fields == {"id": "2"}
    assert records[3].fields == {"id": "4", "text": "b\r\nb"}


def test_a_quote_that_never_closes_costs_one_row(tmp_path):
    _, records = read(put(tmp_path, "a.csv", 'text\na\n"open\nb\nc\n'))
    assert [record.text for record in records] == ["a", None, "b", "c"]
    assert records[1].problem == "a quote that opens in this record never closes"


def test_json_lines_go_on_over_bad_rows(tmp_path):
    data = b'{"text": \n\n{"text": "a", "n": 1}\n[1]\n{"n": 2}\n{"text": "\xff"}\n{"text": 5}\n{"text": {}}\n'
    stream, records = read(put(tmp_path, "a.jsonl.gz", gzip.compress(data)))
    assert (stream.format, stream.fieldnames) == ("jsonl", ["text", "n"])
    assert [(where, text) for where, text, _ in summary(records)] == [
        *[(1, None), (3, "a"), (4, None), (5, None), (6, None), (7, "5"), (8, None)]
    ]
    assert records[0].problem.startswith("not JSON: Expecting value")
    assert [record.problem for record in records[2:5]] == [
        "a JSON object is needed, not list",
        "column 'text': empty text",
        "byte 0xff is not utf-8",
    ]
    assert records[6].problem == "dict in place of text"


def test_standard_input_kinds():
    stream, records = read("-", "text,more\na,b\n")
    assert (stream.format, records[0].fields) == ("csv", {"text": "a", "more": "b"})
    stream, records = read("-", "\ufeffsentence1\tsentence2\na\tb\n")
    assert (stream.format, records[0].text, records[0].text_pair) == ("tsv", "a", "b")
    stream, records = read("-", '\n {"text": "a"}\n{}\n')
    assert (stream.format, summary(records)) == (
        "jsonl",
        [(2, "a", None), (3, None, "column 'text': empty text")],
    )
    stream, records = read("-", "One text, with a comma\nNA\n\nlast")
    assert stream.format == "lines"
    assert summary(records) == [
        (1, "One text, with a comma", None),
        (2, "NA", None),
        (3, None, "column 'text': empty text"),
        (4, "last", None),
    ]
    stream, records = read("-", "words,more\na,b\n", text_column="words")
    assert (stream.format, records[0].text) == ("csv", "a")
    stream, records = read("-", "text,more\n영화,b\n".encode("cp949"), encoding="cp949")
    assert records[0].text == "영화"
    for data, match in [
        ("", "standard input is empty"),
        ("\n\n", "standard input is empty"),
        ("PAR1", "standard input is Parquet; give the file's path"),
        (gzip.compress(b"text\na\n"), "standard input is gzip"),
        ("a".encode("utf-16"), "cannot be read line by line"),
    ]:
        with pytest.raises(DataError, match=match):
            read("-", data)
    with pytest.raises(DataError, match="no column 'words'; it has 'text', 'more'"):
        read("-", "text,more\na,b\n", text_column="words")


def test_standard_input_is_read_as_it_comes():
    asked = []

    class Slow(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            asked.append(len(asked))
            line = b"text\n" if len(asked) == 1 else b"row %d\n" % len(asked)
            buffer[: len(line)] = line
            return len(line)

    stream = open_stream("-", stdin=io.BufferedReader(Slow()))
    assert next(iter(stream)).text == "row 2"
    assert len(asked) <= 3


def test_file_errors(tmp_path):
    for name, data, match in [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "foo,bar\na,b\n", "no text column found"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", "x\n" * 3, "a.jsonl: no JSON object in the first 3 records"),
        ("a.parquet", "x", "a.parquet cannot be read as Parquet"),
        ("a.doc", "x", "unknown kind of file: a.doc; known are .csv"),
        ("a.json", b'[{"text": "\xff"}]', "a.json: byte 0xff is not utf-8"),
    ]:
        with pytest.raises(DataError, match=match):
            read(put(tmp_path, name, data))
    with pytest.raises(DataError, match=r"no such file: nowhere\.csv"):
        read("nowhere.csv")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def predict(source, target, stdout=None, extra=("label", "score")):
    with open_stream(source) as stream:
        sink = open_sink(
            target,
            stream.format,
            stream.fieldnames,
            extra,
            stdout=stdout,
            delimiter=stream.delimiter,
            arrow_schema=stream.arrow_schema,
        )
        with sink as out:
            for record in stream:
                out.write(record.fields, {"label": "x", "score": 0.5} if record.problem is None else {})


def test_csv_keeps_delimiter_and_columns(tmp_path):
    source = put(tmp_path, "a.csv", 'id;text;label\n1;"a;""b""";y\n2;"c\r\nd";z\n3\n')
    predict(source, tmp_path / "out" / "b.csv")
    assert (tmp_path / "out" / "b.csv").read_bytes() == (
        b'id;text;label;label_predicted;score\n1;"a;""b""";y;x;0.5\n"2";"c\r\nd";"z";"x";"0.5"\n3;;;;\n'
    )
    predict(source, tmp_path / "b.tsv")
    assert (tmp_path / "b.tsv").read_text().splitlines()[0] == "id\ttext\tlabel\tlabel_predicted\tscore"
    stdout = io.StringIO()
    predict(source, None, stdout)
    assert stdout.getvalue().startswith("id;text;label;label_predicted;score\n1;")
    predict(source, tmp_path / "b.csv.gz")
    first = (tmp_path / "b.csv.gz").read_bytes()
    assert gzip.decompress(first) == (tmp_path / "out" / "b.csv").read_bytes()
    predict(source, tmp_path / "b.csv.gz")
    assert (tmp_path / "b.csv.gz").read_bytes() == first


def test_json_lines_merge(tmp_path):
    source = put(
        tmp_path, "a.jsonl", '{"text": "é\\ud800", "more": [1]}\n{"text": "b", "label": "own"}\nbad\n'
    )
    predict(source, tmp_path / "b.jsonl")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == [
        {"text": "é\ufffd", "more": [1], "label": "x", "score": 0.5},
        {"text": "b", "label": "own", "label_predicted": "x", "score": 0.5},
        {},
    ]
    predict(source, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == "text,more,label,score\né\ufffd,[1],x,0.5\nb,,x,0.5\n,,,\n"
    stdout = io.StringIO()
    predict(put(tmp_path, "a.txt", "a\n"), None, stdout)
    assert stdout.getvalue() == '{"text": "a", "label": "x", "score": 0.5}\n'


def test_parquet_keeps_types_in_row_groups(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("textlora.data.sink.GROUP", 2)
    table = pa.table(
        {
            "id": pa.array([1, 2, 3, 4, 5], pa.int8()),
            "text": ["a", "", None, "d", "e"],
            "label": pa.array([None] * 5, pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    predict(tmp_path / "a.parquet", tmp_path / "b.parquet")
    with pq.ParquetFile(tmp_path / "b.parquet") as file:
        assert file.num_row_groups == 3
        found = file.read()
    assert found.schema.field("id").type == pa.int8()
    assert found.schema.field("label").type == pa.int32()
    assert found.column("label_predicted").to_pylist() == ["x", None, None, "x", "x"]
    assert found.column("score").to_pylist() == [0.5, None, None, 0.5, 0.5]
    stdout = io.StringIO()
    predict(tmp_path / "a.parquet", None, stdout)
    assert json.loads(stdout.getvalue().splitlines()[0]) == {
        "id": 1,
        "text": "a",
        "label": None,
        "label_predicted": "x",
        "score": 0.5,
    }


@pytest.mark.parametrize(
    ("patience", "scores"), [(10, [None, {"x": 0.5}, {"x": 0.25}]), (1, [None, '{"x": 0.5}', '{"x": 0.25}'])]
)
def test_parquet_where_the_first_rows_are_bad(tmp_path, monkeypatch, patience, scores):
    import pyarrow.parquet as pq

    monkeypatch.setattr("textlora.data.sink.GROUP", 1)
    monkeypatch.setattr("textlora.data.sink.PATIENCE", patience)
    with open_sink(tmp_path / "a.parquet", "jsonl", ["text"], ["label", "scores"]) as sink:
        sink.write({"text": ""}, {})
        sink.write({"text": "a"}, {"label": "x", "scores": {"x": 0.5}})
        sink.write({"text": "b"}, {"label": "x", "scores": {"x": 0.25}})
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [row["label"] for row in found] == [None, "x", "x"]
    assert [row["scores"] for row in found] == scores


def test_failed_sinks_leave_nothing(tmp_path):
    def write(name, *values):
        with open_sink(tmp_path / name, "csv", ["n"], ["label"]) as sink:
            for value in values:
                sink.write({"n": 1 / value if value == 0 else value}, {"label": "x"})

    with pytest.raises(DataError, match="column 'n' cannot be held in Parquet"):
        write("a.parquet", 1, "x")
    for name in ("b.csv", "b.jsonl.gz", "b.parquet"):
        with pytest.raises(ZeroDivisionError):
            write(name, 1, 0)
    assert list(tmp_path.iterdir()) == []
    for name in ("a.doc", "a.parquet.gz"):
        with (
            pytest.raises(DataError, match="unknown kind of file"),
            open_sink(tmp_path / name, "csv", [], []),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_extra_names_stay_free(tmp_path):
    with open_sink(tmp_path / "a.csv", "csv", ["label", "label_predicted"], ["label", "score"]) as sink:
        assert sink.names == {"label": "label_predicted_predicted", "score": "score"}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "a.json"])
@quick
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.sampled_from([*b'",;\t|\n\r\0 ax{}[]:1\xff\xef']), max_size=40).map(
            lambda b: b"text,n\n" + bytes(b)
        ),
    )
)
def test_any_bytes_give_records_or_data_error(tmp_path, name, data):
    for source, stdin in ((put(tmp_path, name, data), None), ("-", data)):
        try:
            _, records = read(source, stdin)
        except DataError:
            continue
        for record in records:
            assert (record.problem is None) == (record.text is not None)
            assert record.problem is not None or record.text.strip()


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.jsonl"])
@quick
@given(st.lists(st.tuples(cells.filter(str.strip), cells), min_size=1, max_size=4), st.sampled_from(",;|"))
def test_what_a_sink_writes_a_stream_reads(tmp_path, name, rows, delimiter):
    with open_sink(tmp_path / name, "csv", ["text"], ["note"], delimiter=delimiter) as sink:
        for text, note in rows:
            sink.write({"text": text}, {"note": note})
    stream, records = read(tmp_path / name)
    assert stream.fieldnames == ["text", "note"]
    assert [(record.text, record.fields["note"]) for record in records] == rows


def test_memory_does_not_grow_with_rows(tmp_path):
    def peak(count):
        source = tmp_path / f"{count}.csv"
        with open(source, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text"])
            writer.writerows([f"row {n} " + "word " * 20] for n in range(count))
        tracemalloc.start()
        predict(source, tmp_path / "out.csv")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(1000)
    assert peak(10_000) < small + 200_000
