"""Readers: files as people have them, places in errors, and no other exception than DataError for any bytes."""

import csv
import gzip
import io
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from textlora.core.errors import DataError, UsageError
from textlora.data import Columns, Row, read_table, require_texts
from textlora.data.columns import find_columns

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def contents(table):
    return [(row.text, row.text_pair, row.label) for row in table.rows]


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def fails(match, source, **options):
    with pytest.raises(DataError, match=match) as caught:
        read_table(source, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        "text,label\na,x\nb,y\n",
        "\ufefftext,label\r\na,x\r\nb,y\r\n",
        "text;label\na;x\nb;y",
        "text\tlabel\na\tx\nb\ty\n",
        "text|label\na|x\n\n\nb|y\n",
        "text,label\ra,x\rb,y",
        "text,label\ra,x\rb,y\r",
        '"text","label"\n"a","x"\n"b","y"\n',
        "sep=;\ntext;label\na;x\nb;y\n",
        " text , label \na,x\nb,y\n",
        "Text,LABEL\na,x\nb,y\n",
        "id,label,text\n1,x,a\n2,y,b\n",
        ",text,label\n0,a,x\n1,b,y\n",
        "review,kind\na,x\nb,y\n",
        "words,label\na,x\nb,y\n",
    ],
)
def test_csv_dialects_give_the_same_rows(tmp_path, data):
    table = read_table(put(tmp_path, "a.csv", data))
    assert contents(table) == [("a", None, "x"), ("b", None, "y")]
    assert table.sha256 == read_table([("a", "x"), ("b", "y")]).sha256


def test_where_is_the_line_a_record_starts_on(tmp_path):
    table = read_table(put(tmp_path, "a.csv", 'text,label\n"one\ntwo ""2""\n",x\n\nb,y\n'))
    assert table.rows == [Row('one\ntwo "2"\n', None, "x", 2, "a.csv"), Row("b", None, "y", 6, "a.csv")]


def test_na_null_and_numbers_stay_text(tmp_path):
    table = read_table(put(tmp_path, "a.csv", "text,label\nNA,null\nnull,NA\nNone,01\nnan,1.0\n"))
    assert contents(table) == [
        ("NA", None, "null"),
        ("null", None, "NA"),
        ("None", None, "01"),
        ("nan", None, "1.0"),
    ]


@pytest.mark.parametrize(
    "encoding", ["cp949", "cp1252", "utf-16", "utf-16-le", "gb18030", "iso2022_kr", "utf-8-sig"]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_encodings_and_gzip(tmp_path, encoding, zipped):
    word = "café" if encoding == "cp1252" else "영화"
    data = f"text,label\r\n{word},x\r\nb,{word}\r\n".encode(encoding)
    path = put(tmp_path, "a.csv.gz" if zipped else "a.csv", gzip.compress(data) if zipped else data)
    assert contents(read_table(path, encoding=encoding)) == [(word, None, "x"), ("b", None, word)]


def test_wrong_encoding_names_line_and_flag(tmp_path):
    error = fails(
        r"a.csv line 3: byte 0xe9 is not utf-8",
        put(tmp_path, "a.csv", "text,label\na,x\ncafé,y\n".encode("cp1252")),
    )
    assert "--encoding" in error.fix
    fails(
        "a.csv is UTF-16; give --encoding utf-16",
        put(tmp_path, "a.csv", "text,label\na,x\n".encode("utf-16")),
    )
    fails("the bytes are not utf-16", put(tmp_path, "b.csv", b"text,label\na,x\n1"), encoding="utf-16")
    fails(
        r"b.jsonl line 2: byte 0xff",
        put(tmp_path, "b.jsonl", b'{"text": "a", "label": "x"}\n{"text": "\xff"}\n'),
    )
    for name in ("klingon", "hex", "undefined"):
        with pytest.raises(UsageError, match="unknown encoding"):
            read_table(tmp_path / "a.csv", encoding=name)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("text,label\na,x\nb,y,z\n", "a.csv line 3: 3 fields where the header has 2"),
        ('text,label\n"a\nb",x\nc\n', "a.csv line 4: 1 field where the header has 2"),
        ('text,label\n"say "hi"",x\n', "a.csv line 2: text after a closing quote"),
        ('text,label\na,x\n"open,y\nb,x\n', "a.csv line 3: a quote that opens in this record never closes"),
        ("text,label\na\0,x\n", "a.csv line 2: NUL bytes"),
        ("text,label\n", "a.csv has no rows"),
        ("", "a.csv is empty"),
        ("\n \n", "a.csv is empty"),
        ("text,label,text\na,x,b\n", "two columns are named 'text'"),
        (
            "foo,bar,baz\na,x,b\n",
            "no text column found among 'foo', 'bar', 'baz'; name it with --text-column",
        ),
        ("text,foo,bar\na,x,b\n", "no label column found among .*--label-column"),
        ("text\na\n", "no label column found"),
        ("text,label\na,x\nb,\n", "a.csv line 3, column 'label': no label"),
        ("text,label\na,x\nb,  \n", "a.csv line 3, column 'label': no label"),
    ],
)
def test_bad_csv_is_named(tmp_path, data, match):
    fails(match, put(tmp_path, "a.csv", data))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ('{"text": "a", "label": 1}\n{"text": \n', "a.jsonl line 2: not JSON"),
        ('{"text": "a", "label": 1}\n\n3\n', "a.jsonl line 3: a JSON object is needed, not int"),
        ('[{"text": "a"},\n 3', "a.jsonl line 2: not JSON"),
        ('{"text": "a", "label": null}\n', "a.jsonl line 1, column 'label': no label"),
        ('{"text": "a", "label": NaN}\n', "a.jsonl line 1, column 'label': no label"),
        ('{"text": "a", "label": {"b": 1}}\n', "dict in place of a label"),
        ('{"text": "a", "label": ["b", null]}\n', "a list label holds something that is no name"),
        ('{"text": ["a"], "label": 1}\n', "a.jsonl line 1, column 'text': list in place of text"),
        ("[" * 100_000, "nested|recursion"),
        ("[]", "a.jsonl is empty"),
    ],
)
def test_bad_json_is_named(tmp_path, data, match):
    fails(match, put(tmp_path, "a.jsonl", data))


def test_json_lines_and_lists(tmp_path):
    rows = [
        {"text": 3, "label": 1},
        {"label": "NA", "text": None},
        {"text": "\ud800é", "label": [True, "b"], "more": {}},
    ]
    wanted = [("3", None, 1), ("", None, "NA"), ("\ufffdé", None, [True, "b"])]
    lines = "\n".join(map(json.dumps, rows))
    assert contents(read_table(put(tmp_path, "a.jsonl", "\ufeff" + lines))) == wanted
    assert contents(read_table(put(tmp_path, "a.json", lines))) == wanted
    assert contents(read_table(put(tmp_path, "b.json", json.dumps(rows, indent=1)))) == wanted
    assert contents(read_table(rows)) == wanted


def test_tsv_without_quoting_is_read_as_such(tmp_path):
    plain = 'sentence\tlabel\n"The Wire" is good\tx\n"open\ty\nsay "hi"\tx\n'
    assert [row.text for row in read_table(put(tmp_path, "a.tsv", plain)).rows] == [
        '"The Wire" is good',
        '"open',
        'say "hi"',
    ]
    quoted = 'sentence\tlabel\n"The ""Wire""\tis"\tx\n'
    assert [row.text for row in read_table(put(tmp_path, "b.tsv", quoted)).rows] == ['The "Wire"\tis']
    fails("a.tsv line 2: text after a closing quote", put(tmp_path, "a.tsv", 'text\tlabel\n"a"b\tx\nc\n'))
    assert (
        read_table(put(tmp_path, "c.tsv", "text, or so\tlabel\na, b\tx\n"), text_column="text, or so")
        .rows[0]
        .text
        == "a, b"
    )


def test_long_fields_do_not_touch_the_global_limit(tmp_path):
    before = csv.field_size_limit()
    table = read_table(put(tmp_path, "a.csv", f"text,label\n{'a' * 200_000},x\n"))
    assert len(table.rows[0].text) == 200_000
    assert csv.field_size_limit() == before


def test_column_rules():
    def found(*names, **options):
        return find_columns(names, "a.csv", **options)

    assert found("premise", "hypothesis", "label") == Columns("premise", "hypothesis", "label")
    assert found("label", "sentence2", "Sentence1", "idx") == Columns("Sentence1", "sentence2", "label")
    assert found("text", "text_pair", "label", text_column="text") == Columns("text", None, "label")
    assert found("a", "b", "c", text_column="a", text_pair_column="b", label_column="c") == Columns(
        "a", "b", "c"
    )
    assert found("title", "text", "stars", "label") == Columns("text", None, "label")
    assert found("id", "blurb", "label") == Columns("blurb", None, "label")
    assert found("text", need_labels=False) == Columns("text", None, None)
    assert found("blurb", need_labels=False) == Columns("blurb", None, None)
    assert found("text", "other", need_labels=False) == Columns("text", None, None)
    with pytest.raises(DataError, match="no column 'Foo'; it has 'text', 'label'"):
        found("text", "label", text_column="Foo")
    with pytest.raises(DataError, match="one column is named for two purposes"):
        found("text", "label", text_column="text", label_column="text")


def test_pairs_and_separator(tmp_path):
    path = put(tmp_path, "a.csv", "question1,question2,tags\na,b,x | y\nc,,\n")
    table = read_table(path, label_separator="|")
    assert table.columns == Columns("question1", "question2", "tags")
    assert contents(table) == [("a", "b", ["x", "y"]), ("c", "", [])]


def test_require_texts(tmp_path):
    table = read_table(put(tmp_path, "train.csv", "text,label\na,x\n ,y\n,x\n"))
    with pytest.raises(
        DataError, match=r"train.csv line 3, column 'text': empty text \(2 such rows\); remove them"
    ):
        require_texts(table)
    require_texts(read_table([("a", 1)]))


def test_unknown_sources(tmp_path, monkeypatch):
    fails("no such file: nowhere.csv", "nowhere.csv")
    fails("no such file: data/nowhere.csv", "data/nowhere.csv")
    fails("no such file", "a" * 5000)
    fails("unknown kind of file: a.xlsx; known are .csv", put(tmp_path, "a.xlsx", "x"))
    (tmp_path / "empty").mkdir()
    fails("no data files in", tmp_path / "empty")
    fails("rows cannot be read from int", 3)
    fails("the list of rows is empty", [])
    fails("row 2 is not of the kind of row 1", [("a", 1), ("a", "b", 1)])
    fails("row 1 is int", [1])
    fails(
        "a.csv.gz: not a whole gzip file",
        put(tmp_path, "a.csv.gz", gzip.compress(b"text,label\na,x\n" * 99)[:-9]),
    )
    fails("a.csv.gz: not a whole gzip file", put(tmp_path, "a.csv.gz", "text,label\n"))
    fails("a.parquet cannot be read as Parquet", put(tmp_path, "a.parquet", "text,label\n"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    fails("no such file: sub/set", "sub/set")


def test_folders_and_several_files(tmp_path):
    put(tmp_path, "train-1.csv", "text,label\na,x\n")
    put(tmp_path, "train-2.csv", "text,label\nb,y\n")
    put(tmp_path, "my_dev.csv", "text,label\nc,x\n")
    put(tmp_path, "README.md", "train")
    assert [(row.text, row.source) for row in read_table(tmp_path).rows] == [
        ("a", "train-1.csv"),
        ("b", "train-2.csv"),
    ]
    assert [row.text for row in read_table(tmp_path, split="validation").rows] == ["c"]
    fails("named after the split 'test'; there are train, validation", tmp_path, split="test")
    both = f"{tmp_path}/my_dev.csv,{tmp_path}/train-1.csv"
    assert [row.text for row in read_table(both).rows] == ["c", "a"]
    put(tmp_path, "other.csv", "title,label\nc,x\n")
    fails("other.csv has other columns", f"{tmp_path}/my_dev.csv,{tmp_path}/other.csv")
    put(tmp_path, "train-3.jsonl", '{"text": "a", "label": "x"}')
    fails("holds csv and jsonl files", tmp_path)
    deep = tmp_path / "deep"
    (deep / "data").mkdir(parents=True)
    put(deep / "data", "part.csv", "text,label\nd,x\n")
    assert [row.text for row in read_table(deep, split="test").rows] == ["d"]


def test_parquet_dataframe_and_dataset_agree(tmp_path, monkeypatch):
    import datasets
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    wanted = [("a", None, "pos"), ("b", None, "neg")]
    sha256 = read_table([("a", "pos"), ("b", "neg")]).sha256
    dataset.to_parquet(tmp_path / "train.parquet")
    both = datasets.DatasetDict({"train": dataset.select([1]), "dev": dataset})
    dataset.save_to_disk(tmp_path / "one")
    both.save_to_disk(tmp_path / "two")
    for source in (dataset, tmp_path / "train.parquet", f"{tmp_path}/train.parquet", tmp_path / "one"):
        table = read_table(source)
        assert contents(table) == wanted
        assert table.sha256 == sha256
    assert contents(read_table(tmp_path / "two", split="validation")) == wanted
    assert contents(read_table(both)) == wanted[1:]
    fails("has no split 'test'; it has train, dev", both, split="test")
    assert [row.where for row in read_table(tmp_path / "train.parquet").rows] == [1, 2]

    frame = pd.DataFrame({"text": ["a", None, 3], "label": [1, 0, 1], "n": [1.0, 2.0, None]})
    assert contents(read_table(frame)) == [("a", None, 1), ("", None, 0), ("3", None, 1)]
    fails("DataFrame row 3, column 'n': no label", frame, label_column="n")
    assert read_table(frame, label_column="n", need_labels=False).rows[2].label is None
    assert (
        read_table(pd.DataFrame({"text": ["a", pd.NA], "label": ["x", "y"]}, dtype="string")).rows[1].text
        == ""
    )

    lists = pa.table({"text": ["a", "b"], "labels": [["x", "y"], []]})
    pq.write_table(lists, tmp_path / "lists.parquet")
    assert contents(read_table(tmp_path / "lists.parquet")) == [("a", None, ["x", "y"]), ("b", None, [])]
    several = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.Sequence(features["label"])}
    )
    named = datasets.Dataset.from_dict({"text": ["a"], "labels": [[1, 0]]}, features=several)
    assert contents(read_table(named)) == [("a", None, ["pos", "neg"])]
    hidden = datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}, features=features)
    fails("row 1, column 'label': no label", hidden)

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "no/where":
            raise ConnectionError("Couldn't reach\nthe hub")
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("textlora.data.hub._require_hub", lambda repo: None)
    for source in ("some/set", "some/set:test", "some/set:fine:test"):
        assert contents(read_table(source)) == wanted
    assert asked == [("some/set", None, "train"), ("some/set", None, "test"), ("some/set", "fine", "test")]
    fails("could not be had from the hub: Couldn't reach; check .* give the local path", "no/where")


def test_hash_does_not_depend_on_the_format(tmp_path):
    rows = [("a", 0.5), ("b", 3.0), ("c", 2)]
    text = read_table(put(tmp_path, "a.csv", "text,score\na,0.50\nb,3.0\nc,2\n"))
    lines = read_table(
        put(tmp_path, "a.jsonl", "\n".join(json.dumps({"text": t, "score": s}) for t, s in rows))
    )
    assert text.sha256 == lines.sha256 == read_table(rows).sha256
    assert read_table([("a", "01")]).sha256 != read_table([("a", "1")]).sha256
    assert read_table([("ab", "x")]).sha256 != read_table([("a", "bx")]).sha256
    assert read_table([("a", ["x", "y"])]).sha256 != read_table([("a", ["xy"])]).sha256


def test_importing_is_light():
    code = "import sys, textlora.data; print([m for m in ('pandas', 'pyarrow', 'datasets', 'torch') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
tricky = st.lists(
    st.sampled_from(
        [*'",;\t|\n\r\0 ax', "\ufeff", "é", "text", "label", '"', "\r\n", "{", "}", "[", ":", "1"]
    ),
    max_size=40,
).map("".join)


@quick
@given(
    st.one_of(
        st.binary(max_size=200), tricky.map(str.encode), tricky.map(lambda t: b"text,label\n" + t.encode())
    )
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.csv.gz", "a.parquet"])
def test_any_bytes_give_rows_or_data_error(tmp_path, name, data):
    path = put(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data)
    for encoding in ("utf-8", "utf-16", "cp949"):
        try:
            table = read_table(path, encoding=encoding, need_labels=False)
        except DataError:
            continue
        assert all(isinstance(row.text, str) and row.where >= 1 for row in table.rows)


@quick
@given(
    st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=5),
    st.sampled_from(",;\t|"),
    st.booleans(),
)
def test_written_csv_comes_back(tmp_path, rows, delimiter, quote_all):
    written = io.StringIO(newline="")
    plain = not quote_all and not any("\r" in cell for row in rows for cell in row)
    out = csv.writer(
        written,
        delimiter=delimiter,
        lineterminator="\n",
        quoting=csv.QUOTE_MINIMAL if plain else csv.QUOTE_ALL,
    )
    out.writerows([("text", "label"), *rows])
    path = put(tmp_path, "a.csv", written.getvalue())
    assert contents(read_table(path)) == [(text, None, label) for text, label in rows]
